//! A tensor as a file, or the memory of a program, stores it; and where networks get theirs from.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read, Seek, SeekFrom, Take};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use crate::kernels::{Weight, is_finite};
use crate::model::WeightForm;
use crate::{Error, Result};

/// Where weights come from, by name and shape.
///
/// ```
/// use scylla_core::model::{StoredTensor, WeightForm, Weights};
///
/// /// Every tensor there can be, all ones.
/// struct Ones;
///
/// impl Weights for Ones {
///     fn find(&self, name: &str, shape: &[usize]) -> scylla_core::Result<StoredTensor<'_>> {
///         let bytes = 1.0f32.to_le_bytes().repeat(shape.iter().product());
///         StoredTensor::in_memory(name.to_string(), safetensors::Dtype::F32, shape, bytes)
///     }
///     fn form(&self) -> WeightForm {
///         WeightForm::F32
///     }
/// }
///
/// assert_eq!(Ones.vector("norm.weight", 3)?, [1.0; 3]);
/// # Ok::<(), scylla_core::Error>(())
/// ```
pub trait Weights {
    /// Finds a tensor of floating-point values or blocks of them, its shape checked.
    fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>>;
    /// The form that matrices shall be held in.
    fn form(&self) -> WeightForm;

    /// A vector `[n]` in f32.
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        self.find(name, &[n])?.vector()
    }

    /// A matrix `[n, k]` as the CPU kernels multiply with it, in the form asked for.
    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<Weight> {
        self.form().apply(self.find(name, &[n, k])?.weight()?)
    }
}

/// A tensor's elements or blocks, row by row.
pub struct Raw<'a> {
    /// The element or block type.
    pub dtype: GgmlDType,
    /// Whole elements or blocks.
    pub bytes: Cow<'a, [u8]>,
}

/// Where the bytes are.
pub(super) enum Bytes<'a> {
    /// In a file, from an offset on, checked to lie within it.
    File { start: u64, length: usize },
    /// In memory.
    Memory(Cow<'a, [u8]>),
}

/// A tensor that may be read.
pub struct StoredTensor<'a> {
    pub(super) name: Cow<'a, str>,
    /// The file; for messages, where the bytes are in memory.
    pub(super) path: &'a Path,
    pub(super) dtype: GgmlDType,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Bytes<'a>,
    /// Heads whose rows stand in interleaved rotary pairs, and are put back into split ones.
    pub(super) interleaved: Option<usize>,
}

impl<'a> StoredTensor<'a> {
    /// A tensor in memory: elements of a type, row by row.
    ///
    /// # Errors
    /// If the elements are no floating-point values that are read, or not as many as the shape says.
    pub fn in_memory(
        name: impl Into<Cow<'a, str>>,
        dtype: Dtype,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self> {
        let (name, path, bytes) = (name.into(), Path::new("memory"), bytes.into());
        let count: usize = shape.iter().product();
        let found = format!("{} bytes of {dtype:?}", bytes.len());
        match element(dtype) {
            Some(element) if bytes.len() == count * element.type_size() => Ok(Self {
                name,
                path,
                dtype: element,
                shape: shape.to_vec(),
                bytes: Bytes::Memory(bytes),
                interleaved: None,
            }),
            _ => Err(Error::Tensor {
                path: path.to_path_buf(),
                tensor: name.to_string(),
                expected: format!("shape {shape:?} of F32, F16 or BF16"),
                found,
            }),
        }
    }

    /// The type of its elements or blocks.
    pub fn dtype(&self) -> GgmlDType {
        self.dtype
    }

    /// Rows and columns of a matrix; a vector is a row.
    fn sizes(&self) -> (usize, usize) {
        match *self.shape {
            [n, k] => (n, k),
            _ => (1, self.shape.iter().product()),
        }
    }

    pub(super) fn reader(&self) -> Result<Box<dyn BufRead + '_>> {
        Ok(match &self.bytes {
            Bytes::File { start, length } => {
                let file = self.section(*start, *length)?;
                Box::new(BufReader::with_capacity(1 << 16, file))
            }
            Bytes::Memory(bytes) => Box::new(Cursor::new(bytes)),
        })
    }

    fn section(&self, start: u64, length: usize) -> Result<Take<File>> {
        let mut file = File::open(self.path).map_err(Error::io(self.path))?;
        file.seek(SeekFrom::Start(start))
            .map_err(Error::io(self.path))?;
        Ok(file.take(length as u64))
    }

    /// Its elements or blocks, q and k rows in split rotary order.
    ///
    /// # Errors
    /// If a value is NaN or infinite, or the file cannot be read.
    pub fn raw(self) -> Result<Raw<'a>> {
        let bytes = match &self.bytes {
            Bytes::File { start, length } => {
                let mut bytes = vec![0; *length];
                self.section(*start, *length)?
                    .read_exact(&mut bytes)
                    .map_err(Error::io(self.path))?;
                Cow::Owned(bytes)
            }
            Bytes::Memory(bytes) => bytes.clone(),
        };
        if !is_finite(self.dtype, &bytes) {
            return Err(self.wrong("finite values".into(), "NaN or infinity".into()));
        }
        let bytes = match self.interleaved {
            Some(heads) => Cow::Owned(split_pairs(&bytes, self.shape[0], heads)),
            None => bytes,
        };
        Ok(Raw {
            dtype: self.dtype,
            bytes,
        })
    }

    /// A vector in f32.
    ///
    /// # Errors
    /// As [`StoredTensor::raw`].
    pub fn vector(self) -> Result<Vec<f32>> {
        Ok(self.weight()?.to_f32())
    }

    /// Reads into the form the CPU kernels multiply with, piece by piece: no second copy is ever held.
    ///
    /// # Errors
    /// As [`StoredTensor::raw`].
    pub fn weight(self) -> Result<Weight> {
        let (n, k) = self.sizes();
        if self.interleaved.is_some() {
            let raw = self.raw()?;
            return Weight::from_gguf(raw.dtype, &raw.bytes, n, k);
        }
        match Weight::read(self.dtype, n, k, &mut self.reader()?) {
            Ok(read) => read.map_err(Error::io(self.path)),
            Err(Error::Invalid(found)) => Err(self.wrong("finite values".into(), found)),
            Err(e) => Err(e),
        }
    }

    fn wrong(&self, expected: String, found: String) -> Error {
        Error::Tensor {
            path: self.path.to_path_buf(),
            tensor: self.name.to_string(),
            expected,
            found,
        }
    }
}

/// The floating-point types that are read.
pub(super) fn element(dtype: Dtype) -> Option<GgmlDType> {
    match dtype {
        Dtype::F32 => Some(GgmlDType::F32),
        Dtype::F16 => Some(GgmlDType::F16),
        Dtype::BF16 => Some(GgmlDType::BF16),
        _ => None,
    }
}

/// Puts the `n` rows of a q or k weight or bias of a Llama model back from interleaved to split rotary pairs.
fn split_pairs(bytes: &[u8], n: usize, heads: usize) -> Vec<u8> {
    let row = bytes.len() / n;
    let e = n / heads;
    let mut straight = vec![0; bytes.len()];
    for (i, to) in straight.chunks_exact_mut(row).enumerate() {
        let (head, at) = (i / e, i % e);
        let from = head * e
            + if at < e / 2 {
                2 * at
            } else {
                2 * (at - e / 2) + 1
            };
        to.copy_from_slice(&bytes[from * row..(from + 1) * row]);
    }
    straight
}

/// The error about a tensor that is not there.
pub(in crate::model) fn missing(path: std::path::PathBuf, name: &str, shape: &[usize]) -> Error {
    Error::Tensor {
        path,
        tensor: name.into(),
        expected: format!("shape {shape:?}"),
        found: "no such tensor".into(),
    }
}
