//! GGUF files: metadata and tensor table, read with every count and offset checked, in one file or in several.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;

use super::stored::{Bytes, StoredTensor, missing};
use crate::files::refuse_pointer;
use crate::{Error, Result};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An integer of any width.
    Integer(i128),
    /// A floating-point number.
    Float(f64),
    /// A switch.
    Flag(bool),
    /// A text; bytes that are no UTF-8 become U+FFFD.
    Text(String),
    /// A list of numbers or switches.
    Numbers(Vec<f64>),
    /// A list of texts.
    Texts(Vec<String>),
}

impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Integer(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Flag(v) => write!(f, "{v}"),
            Self::Text(v) => write!(f, "{v:?}"),
            Self::Numbers(list) => write!(f, "a list of {} numbers", list.len()),
            Self::Texts(list) => write!(f, "a list of {} texts", list.len()),
        }
    }
}

/// The types of tensors by their number in the file, with the name that llama.cpp prints.
const TYPES: [(u32, &str, Option<GgmlDType>); 38] = [
    (0, "F32", Some(GgmlDType::F32)),
    (1, "F16", Some(GgmlDType::F16)),
    (2, "Q4_0", Some(GgmlDType::Q4_0)),
    (3, "Q4_1", Some(GgmlDType::Q4_1)),
    (4, "Q4_2", None),
    (5, "Q4_3", None),
    (6, "Q5_0", Some(GgmlDType::Q5_0)),
    (7, "Q5_1", Some(GgmlDType::Q5_1)),
    (8, "Q8_0", Some(GgmlDType::Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(GgmlDType::Q2K)),
    (11, "Q3_K", Some(GgmlDType::Q3K)),
    (12, "Q4_K", Some(GgmlDType::Q4K)),
    (13, "Q5_K", Some(GgmlDType::Q5K)),
    (14, "Q6_K", Some(GgmlDType::Q6K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(GgmlDType::BF16)),
    (31, "Q4_0_4_4", None),
    (32, "Q4_0_4_8", None),
    (33, "Q4_0_8_8", None),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
];

/// Names of the types that are read.
pub(crate) fn supported() -> String {
    let names = TYPES.iter().filter(|t| t.2.is_some()).map(|t| t.1);
    names.collect::<Vec<_>>().join(", ")
}

/// Where a tensor lies.
struct Info {
    file: usize,
    dtype: GgmlDType,
    /// Rows first, as elsewhere; the file says the columns first.
    shape: Vec<usize>,
    start: u64,
    length: usize,
}

/// A GGUF model: metadata, and tensors read when asked for.
pub struct Gguf {
    /// The file; the first, of several.
    pub path: PathBuf,
    files: Vec<PathBuf>,
    metadata: HashMap<String, Value>,
    tensors: HashMap<String, Info>,
}

/// A reader that knows where it is and how much is left, so that no count in the file is believed.
struct Reader<'a> {
    path: &'a Path,
    from: BufReader<File>,
    at: u64,
    size: u64,
    /// The first version has lengths of 32 bits.
    short: bool,
}

impl Reader<'_> {
    fn bad(&self, message: String) -> Error {
        Error::file(self.path, message)
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reserve(N as u64, what)?;
        self.from
            .read_exact(&mut bytes)
            .map_err(Error::io(self.path))?;
        Ok(bytes)
    }

    /// Counts bytes that are about to be read.
    fn reserve(&mut self, bytes: u64, what: &str) -> Result<()> {
        let left = self.size - self.at;
        if bytes > left {
            return Err(self.bad(format!(
                "not a whole GGUF file: {what} takes {bytes} bytes at offset {}, of {left} left (truncated?)",
                self.at
            )));
        }
        self.at += bytes;
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take(what)?))
    }

    fn length(&mut self, what: &str) -> Result<u64> {
        match self.short {
            true => self.u32(what).map(u64::from),
            false => self.u64(what),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.length(what)?;
        self.reserve(length, what)?;
        let mut bytes = Vec::new();
        let read = self.from.by_ref().take(length).read_to_end(&mut bytes);
        read.map_err(Error::io(self.path))?;
        if bytes.len() as u64 != length {
            return Err(self.bad(format!("{what} ends early; the file is being changed")));
        }
        Ok(match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => String::from_utf8_lossy(e.as_bytes()).into_owned(),
        })
    }

    /// A number or switch of type `kind`; `None` if that is none of theirs.
    fn number(&mut self, kind: u32, what: &str) -> Result<Option<Value>> {
        Ok(Some(match kind {
            0 => Value::Integer(u8::from_le_bytes(self.take(what)?).into()),
            1 => Value::Integer(i8::from_le_bytes(self.take(what)?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.take(what)?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.take(what)?).into()),
            4 => Value::Integer(self.u32(what)?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.take(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.take(what)?).into()),
            7 => Value::Flag(self.take::<1>(what)?[0] != 0),
            10 => Value::Integer(self.u64(what)?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.take(what)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.take(what)?)),
            _ => return Ok(None),
        }))
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let what = format!("metadata `{key}`");
        let kind = self.u32(&what)?;
        if let Some(value) = self.number(kind, &what)? {
            return Ok(value);
        }
        match kind {
            8 => Ok(Value::Text(self.text(&what)?)),
            9 => self.list(&what),
            _ => Err(self.bad(format!("{what} has the unknown type {kind}"))),
        }
    }

    fn list(&mut self, what: &str) -> Result<Value> {
        let kind = self.u32(what)?;
        let count = self.length(what)?;
        if kind == 8 {
            let mut texts = Vec::new();
            for _ in 0..count {
                texts.push(self.text(what)?);
            }
            return Ok(Value::Texts(texts));
        }
        let mut numbers = Vec::new();
        for _ in 0..count {
            numbers.push(match self.number(kind, what)? {
                Some(Value::Integer(v)) => v as f64,
                Some(Value::Float(v)) => v,
                Some(Value::Flag(v)) => f64::from(u8::from(v)),
                _ => return Err(self.bad(format!("{what} is a list of the unknown type {kind}"))),
            });
        }
        Ok(Value::Numbers(numbers))
    }

    /// Magic and version; returns the version.
    fn begin(&mut self) -> Result<u32> {
        let magic: [u8; 4] = self.take("the magic")?;
        match &magic {
            b"GGUF" => {}
            b"ggml" | b"ggjt" | b"ggla" | b"ggmf" | b"lmgg" | b"tjgg" | b"algg" | b"fmgg" => {
                return Err(self.bad(
                    "a GGML file of before GGUF; convert the model anew with llama.cpp".into(),
                ));
            }
            _ => {
                return Err(self.bad(format!(
                    "not a GGUF file: it begins with {magic:?}, not with \"GGUF\""
                )));
            }
        }
        match self.u32("the version")? {
            version @ 1..=3 => Ok(version),
            version if (1..=3).contains(&version.swap_bytes()) => Err(self.bad(
                "a big-endian GGUF file; convert it with llama.cpp's gguf_convert_endian.py, or take the usual little-endian one".into(),
            )),
            version => Err(self.bad(format!("GGUF version {version}; supported: 1 to 3"))),
        }
    }
}

/// One file's part of a model.
struct Part {
    metadata: HashMap<String, Value>,
    tensors: Vec<(String, Info)>,
}

impl Part {
    fn read(path: &Path, file: usize) -> Result<Self> {
        let opened = File::open(path).map_err(Error::io(path))?;
        let size = opened.metadata().map_err(Error::io(path))?.len();
        if size < 1024 {
            refuse_pointer(path, &crate::files::head(path, 64)?)?;
        }
        let mut r = Reader {
            path,
            from: BufReader::new(opened),
            at: 0,
            size,
            short: false,
        };
        r.short = r.begin()? == 1;
        let tensors = r.length("the number of tensors")?;
        let pairs = r.length("the number of metadata keys")?;
        let mut metadata = HashMap::new();
        for _ in 0..pairs {
            let key = r.text("a metadata key")?;
            let value = r.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(r.bad(format!("metadata `{key}` is there twice")));
            }
            metadata.insert(key, value);
        }
        let mut infos = Vec::new();
        for _ in 0..tensors {
            infos.push(Self::info(&mut r, file)?);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(Value::Integer(v))
                if (1..=1 << 20).contains(v) && (*v as u64).is_power_of_two() =>
            {
                *v as u64
            }
            Some(other) => {
                return Err(r.bad(format!(
                    "metadata `general.alignment` is {other}; expected a power of two"
                )));
            }
        };
        let data = r.at.next_multiple_of(alignment);
        for (name, info) in &mut infos {
            let end = data
                .checked_add(info.start)
                .and_then(|start| start.checked_add(info.length as u64));
            if end.is_none_or(|end| end > size) {
                return Err(Error::Tensor {
                    path: path.to_path_buf(),
                    tensor: name.clone(),
                    expected: format!("{} bytes at offset {} of the data", info.length, info.start),
                    found: format!(
                        "a file of {size} bytes whose data begin at {data} (truncated?)"
                    ),
                });
            }
            info.start += data;
        }
        Ok(Self {
            metadata,
            tensors: infos,
        })
    }

    /// One row of the tensor table; its offset is still that within the data.
    fn info(r: &mut Reader<'_>, file: usize) -> Result<(String, Info)> {
        let name = r.text("a tensor's name")?;
        let what = format!("tensor `{name}`");
        let bad = |path: &Path, expected: &str, found: String| Error::Tensor {
            path: path.to_path_buf(),
            tensor: name.clone(),
            expected: expected.into(),
            found,
        };
        let dimensions = r.u32(&what)?;
        if dimensions > 8 {
            return Err(bad(r.path, "at most 8 dimensions", dimensions.to_string()));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = r.length(&what)?;
            let fits = usize::try_from(size).ok().filter(|&s| s <= 1 << 40);
            shape.push(fits.ok_or_else(|| bad(r.path, "a size", size.to_string()))?);
        }
        shape.reverse();
        let number = r.u32(&what)?;
        let start = r.u64(&what)?;
        let known = TYPES.iter().find(|t| t.0 == number);
        let Some(dtype) = known.and_then(|t| t.2) else {
            let named = known.map_or("unknown".into(), |t| t.1.to_string());
            return Err(Error::Unsupported(format!(
                "{}: tensor `{name}` has type {number} ({named}); supported: {}. Take a file in one of these, such as Q4_K_M or Q8_0",
                r.path.display(),
                supported()
            )));
        };
        let columns = shape.last().copied().unwrap_or(1);
        if !columns.is_multiple_of(dtype.block_size()) {
            let found = format!("rows of {columns}");
            let expected = format!("rows of whole blocks of {}", dtype.block_size());
            return Err(bad(r.path, &expected, found));
        }
        let count = shape.iter().try_fold(1usize, |a, &d| a.checked_mul(d));
        let length = count.and_then(|c| (c / dtype.block_size()).checked_mul(dtype.type_size()));
        let Some(length) = length else {
            return Err(bad(r.path, "a size", format!("shape {shape:?}")));
        };
        let info = Info {
            file,
            dtype,
            shape,
            start,
            length,
        };
        Ok((name, info))
    }

    /// A metadata number that counts something.
    fn count(&self, key: &str) -> Option<usize> {
        match self.metadata.get(key) {
            Some(Value::Integer(v)) => usize::try_from(*v).ok(),
            _ => None,
        }
    }
}

/// The paths of all files of a model in `count` files, of which `path` is one.
fn siblings(path: &Path, count: usize) -> Result<Vec<PathBuf>> {
    let split = |message: String| Error::file(path, message);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let of = format!("-of-{count:05}.gguf");
    let stem = name
        .strip_suffix(&of)
        .and_then(|n| n.get(..n.len().checked_sub(6)?));
    let Some(stem) = stem.filter(|_| count <= 99_999) else {
        return Err(split(format!(
            "one of {count} files of a split model (split.count); its name should end with `-00001{of}`. Rename the files as they were, \
             or join them with llama.cpp's llama-gguf-split --merge"
        )));
    };
    let named = |i: usize| path.with_file_name(format!("{stem}-{i:05}{of}"));
    let all: Vec<PathBuf> = (1..=count).map(named).collect();
    match all.iter().find(|p| !p.is_file()) {
        Some(absent) => Err(split(format!(
            "one of {count} files of a split model (split.count), and {} is not there",
            absent.display()
        ))),
        None => Ok(all),
    }
}

impl Gguf {
    /// Reads the metadata of a file, and of its siblings where the model is split, and checks that every tensor lies
    /// within its file.
    ///
    /// # Errors
    /// If a file is truncated, big-endian, or holds a type that is not read; names file, key or tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let given = Part::read(path, 0)?;
        let count = given.count("split.count").unwrap_or(1);
        let (files, mut parts) = match count {
            0 | 1 => (vec![path.to_path_buf()], vec![given]),
            count => {
                let files = siblings(path, count)?;
                let parts = files.iter().enumerate().map(|(i, f)| Part::read(f, i));
                (files.clone(), parts.collect::<Result<Vec<_>>>()?)
            }
        };
        let mut tensors = HashMap::new();
        for (i, part) in parts.iter_mut().enumerate() {
            if count > 1 && part.count("split.no") != Some(i) {
                return Err(Error::file(
                    &files[i],
                    format!(
                        "metadata `split.no` is {:?}; expected {i}",
                        part.metadata.get("split.no")
                    ),
                ));
            }
            for (name, info) in part.tensors.drain(..) {
                if tensors.contains_key(&name) {
                    return Err(Error::file(
                        &files[i],
                        format!("tensor `{name}` is there twice"),
                    ));
                }
                tensors.insert(name, info);
            }
        }
        let first = parts.swap_remove(0);
        if let Some(expected) = first.count("split.tensors.count")
            && count > 1
            && expected != tensors.len()
        {
            return Err(Error::file(
                path,
                format!(
                    "the files of this split model hold {} tensors; expected {expected}",
                    tensors.len()
                ),
            ));
        }
        Ok(Self {
            path: files[0].clone(),
            files,
            metadata: first.metadata,
            tensors,
        })
    }

    /// The files it is made of.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// A metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// The metadata keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The names of the tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    /// The shape of a tensor, rows first.
    pub fn shape(&self, tensor: &str) -> Option<&[usize]> {
        self.tensors.get(tensor).map(|info| &info.shape[..])
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::file(
            &self.path,
            format!("metadata `{key}` is {value}; expected {expected}"),
        )
    }

    /// A number; `None` where the key is not there.
    ///
    /// # Errors
    /// If something else is there.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(v)) => Ok(Some(*v as f64)),
            Some(Value::Float(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong(key, other, "a number")),
        }
    }

    /// A text; `None` where the key is not there.
    ///
    /// # Errors
    /// If something else is there.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong(key, other, "a text")),
        }
    }

    /// A switch; `None` where the key is not there.
    ///
    /// # Errors
    /// If something else is there.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Flag(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong(key, other, "true or false")),
        }
    }

    /// A size; `None` where the key is not there.
    ///
    /// # Errors
    /// If something else is there.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(v)) if (0..1_000_000_000).contains(v) => Ok(Some(*v as usize)),
            Some(other) => Err(self.wrong(key, other, "a size")),
        }
    }

    /// A token's id; `None` where the key is not there.
    ///
    /// # Errors
    /// If something else is there.
    pub fn id(&self, key: &str) -> Result<Option<u32>> {
        match self.value(key) {
            None => Ok(None),
            // llama.cpp's word for no token.
            Some(Value::Integer(-1 | 0xFFFF_FFFF)) => Ok(None),
            Some(Value::Integer(v)) if u32::try_from(*v).is_ok() => Ok(Some(*v as u32)),
            Some(other) => Err(self.wrong(key, other, "a token's id")),
        }
    }

    /// A list of texts.
    ///
    /// # Errors
    /// If it is not there, or something else is.
    pub fn texts(&self, key: &str) -> Result<&[String]> {
        match self.value(key) {
            Some(Value::Texts(list)) => Ok(list),
            Some(other) => Err(self.wrong(key, other, "a list of texts")),
            None => Err(self.absent(key)),
        }
    }

    /// A list of numbers.
    ///
    /// # Errors
    /// If it is not there, or something else is.
    pub fn numbers(&self, key: &str) -> Result<&[f64]> {
        match self.value(key) {
            Some(Value::Numbers(list)) => Ok(list),
            Some(other) => Err(self.wrong(key, other, "a list of numbers")),
            None => Err(self.absent(key)),
        }
    }

    pub(in crate::model) fn absent(&self, key: &str) -> Error {
        Error::file(&self.path, format!("metadata key `{key}` is missing"))
    }

    /// Finds a tensor by the file's name for it, its shape checked.
    ///
    /// # Errors
    /// If it is not there, or has another shape.
    pub fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let Some((name, info)) = self.tensors.get_key_value(name) else {
            return Err(missing(self.path.clone(), name, shape));
        };
        if info.shape != shape {
            return Err(Error::Tensor {
                path: self.files[info.file].clone(),
                tensor: name.clone(),
                expected: format!("shape {shape:?}"),
                found: format!("{:?}", info.shape),
            });
        }
        Ok(StoredTensor {
            name: name.into(),
            path: &self.files[info.file],
            dtype: info.dtype,
            shape: shape.to_vec(),
            bytes: Bytes::File {
                start: info.start,
                length: info.length,
            },
            interleaved: None,
        })
    }
}
