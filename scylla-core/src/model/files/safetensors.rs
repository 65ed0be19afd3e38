//! Safetensors, in one file or in shards: headers checked, tensors read when asked for.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};

use super::stored::{Bytes, StoredTensor, element, missing};
use crate::files::{head, parse_json, read_text, refuse_pointer};
use crate::{Error, Result};

/// A tensor of a safetensors file.
struct Found<'a> {
    name: &'a str,
    path: &'a Path,
    dtype: Dtype,
    range: std::ops::Range<usize>,
}

/// Reads the header of a safetensors file: where the data begins, what it holds, and the size of the file.
#[allow(unsafe_code)]
fn header(path: &Path) -> Result<(usize, Metadata, usize)> {
    let begin = head(path, 64)?;
    refuse_pointer(path, &begin)?;
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read-only and private, and lives for this function alone. A file that another process
    // shortens meanwhile ends this one with a signal; it cannot make it read other memory.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|e| Error::file(path, format!("not a whole safetensors file: {e}")))?;
    Ok((header + 8, metadata, map.len()))
}

/// Safetensors files and which of them holds which tensor.
pub struct Shards {
    files: Vec<PathBuf>,
    /// Tensor name to file, type, shape and byte range.
    index: HashMap<String, (usize, Dtype, Vec<usize>, std::ops::Range<usize>)>,
}

impl Shards {
    /// Opens every shard of a model directory.
    ///
    /// # Errors
    /// If the directory holds no weights that are read, or its listing and its shards do not agree.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        if single.is_file() {
            return Self::open_files(&[single]);
        }
        let listing = dir.join("model.safetensors.index.json");
        if !listing.is_file() {
            return Err(no_weights(dir));
        }
        let map = listed(&listing)?;
        let names = shard_names(&map, &listing)?;
        let files: Vec<PathBuf> = names.iter().map(|n| dir.join(n)).collect();
        let shards = Self::open_files(&files)?;
        for (tensor, file) in &map {
            let found = shards.index.get(tensor).map(|at| &names[at.0]);
            if found != Some(file) {
                return Err(Error::file(
                    &listing,
                    match found {
                        Some(found) => format!("says that {file} holds `{tensor}`; {found} does"),
                        None => format!("says that {file} holds `{tensor}`; it does not"),
                    },
                ));
            }
        }
        Ok(shards)
    }

    /// Opens the given files.
    ///
    /// # Errors
    /// If there are none, one is not whole, or two hold a tensor of the same name.
    pub fn open_files(paths: &[PathBuf]) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::Invalid("no weight files were given".into()));
        }
        let mut shards = Self {
            files: paths.to_vec(),
            index: HashMap::new(),
        };
        for (i, path) in paths.iter().enumerate() {
            let (data, metadata, size) = header(path)?;
            for (name, info) in metadata.tensors() {
                let range = data + info.data_offsets.0..data + info.data_offsets.1;
                if range.end > size {
                    return Err(Error::Tensor {
                        path: path.clone(),
                        tensor: name,
                        expected: format!("a file of at least {} bytes", range.end),
                        found: format!("{size} bytes (truncated?)"),
                    });
                }
                if let Some((other, ..)) = shards.index.get(&name) {
                    let message = format!("tensor `{name}` is also in {}", paths[*other].display());
                    return Err(Error::file(path, message));
                }
                let entry = (i, info.dtype, info.shape.clone(), range);
                shards.index.insert(name, entry);
            }
        }
        Ok(shards)
    }

    /// The files.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The same under other names.
    ///
    /// # Errors
    /// If two tensors get one name.
    pub fn renamed(self, name: impl Fn(&str) -> String) -> Result<Self> {
        let mut index = HashMap::with_capacity(self.index.len());
        for (old, entry) in self.index {
            let new = name(&old);
            if index.contains_key(&new) {
                return Err(Error::file(
                    &self.files[0],
                    format!("holds tensor `{new}` under two names, of which one is `{old}`"),
                ));
            }
            index.insert(new, entry);
        }
        let files = self.files;
        Ok(Self { files, index })
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// The tensors' names, in order.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.index.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Shape of a tensor, where it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.index.get(name).map(|(_, _, shape, _)| &shape[..])
    }

    /// The first file.
    pub fn path(&self) -> &Path {
        &self.files[0]
    }

    /// Type of a tensor, its shape checked.
    pub fn dtype(&self, name: &str, shape: &[usize]) -> Result<Dtype> {
        Ok(self.entry(name, shape)?.dtype)
    }

    /// Type and bytes of a tensor of any type, as stored.
    pub fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, Vec<u8>)> {
        let Found {
            path, dtype, range, ..
        } = self.entry(name, shape)?;
        let mut file = File::open(path).map_err(Error::io(path))?;
        let mut bytes = vec![0; range.len()];
        file.seek(SeekFrom::Start(range.start as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(path))?;
        Ok((dtype, bytes))
    }

    /// File, type and place of a tensor, its shape checked.
    fn entry(&self, name: &str, shape: &[usize]) -> Result<Found<'_>> {
        let Some((name, (file, dtype, found, range))) = self.index.get_key_value(name) else {
            return Err(missing(self.files[0].clone(), name, shape));
        };
        let path = &self.files[*file];
        if found != shape {
            return Err(Error::Tensor {
                path: path.clone(),
                tensor: name.into(),
                expected: format!("shape {shape:?}"),
                found: format!("shape {found:?}"),
            });
        }
        Ok(Found {
            name,
            path,
            dtype: *dtype,
            range: range.clone(),
        })
    }

    /// Finds a tensor of floating-point values, its shape checked.
    ///
    /// # Errors
    /// If it is not there, or has another shape or type.
    pub fn find(&self, name: &str, shape: &[usize]) -> Result<StoredTensor<'_>> {
        let Found {
            name,
            path,
            dtype,
            range,
        } = self.entry(name, shape)?;
        let Some(ggml) = element(dtype) else {
            return Err(Error::Tensor {
                path: path.to_path_buf(),
                tensor: name.into(),
                expected: "F32, F16 or BF16".into(),
                found: format!("{dtype:?}"),
            });
        };
        Ok(StoredTensor {
            name: name.into(),
            path,
            dtype: ggml,
            shape: shape.to_vec(),
            bytes: Bytes::File {
                start: range.start as u64,
                length: range.len(),
            },
            interleaved: None,
        })
    }
}

/// What a directory holds instead of weights that are read, and what to do about it.
fn no_weights(dir: &Path) -> Error {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    let ending = |ends: &[&str]| names.iter().find(|n| ends.iter().any(|e| n.ends_with(e)));
    let pickled = ending(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]);
    let message = if let Some(name) = ending(&["adapter_model.safetensors"]) {
        format!(
            "holds an adapter ({name}), not a model; merge it into its base model first (peft: merge_and_unload)"
        )
    } else if let Some(name) = ending(&[".gguf"]) {
        format!("holds {name} and no model.safetensors; give the path of the GGUF file itself")
    } else if let Some(name) = pickled {
        format!(
            "holds pickled weights ({name}), which run code when loaded and are not read. Convert them once with Python: \
             from transformers import AutoModelForCausalLM as M; M.from_pretrained('{dir}').save_pretrained('{dir}', safe_serialization=True)",
            dir = dir.display()
        )
    } else if let Some(name) = ending(&[".safetensors"]) {
        format!(
            "holds {name}, but no model.safetensors and no model.safetensors.index.json that lists shards"
        )
    } else {
        "holds no model.safetensors, in one file or in shards".into()
    };
    Error::file(dir, message)
}

/// The shard of each tensor, as a listing says.
fn listed(listing: &Path) -> Result<HashMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Listing {
        weight_map: HashMap<String, String>,
    }
    let json = parse_json(&read_text(listing)?, listing, "a shard listing")?;
    let parsed: Listing = serde::Deserialize::deserialize(json)
        .map_err(|e| Error::file(listing, format!("not a shard listing: {e}")))?;
    Ok(parsed.weight_map)
}

fn shard_names(map: &HashMap<String, String>, listing: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = map.values().cloned().collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return Err(Error::file(listing, "names no shard"));
    }
    // A name from a file must not lead out of its directory.
    match names
        .iter()
        .find(|n| Path::new(n).components().count() != 1 || n.contains(".."))
    {
        Some(name) => Err(Error::file(
            listing,
            format!("shard name `{name}` is a path"),
        )),
        None => Ok(names),
    }
}

/// The shards that a listing names.
pub(crate) fn shards_of(listing: &Path) -> Result<Vec<String>> {
    shard_names(&listed(listing)?, listing)
}
