//! Reading a trace, line by line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::{FORMAT, Header, Line, Place, PlaceLine, Text, VERSION};
use crate::{Error, Result};

/// Bytes of a line at most: a place of 4096 nodes has under 200 KB, an answer of a million tokens 8 MB.
const LONGEST: u64 = 64 << 20;

/// Reads the texts of a trace one after the other, and their places as they are asked for.
pub struct Reader {
    from: BufReader<File>,
    path: PathBuf,
    /// Lines read.
    line: usize,
    buffer: Vec<u8>,
    /// A text that was met while a place was looked for.
    next: Option<Text>,
    /// The text whose places come next.
    text: Option<Text>,
    header: Header,
}

/// The trace that a path means: a file, or the one in a bench's folder.
///
/// # Errors
/// If a folder holds none, or several.
pub fn find(path: &Path) -> Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_path_buf());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let name = entry.map_err(Error::io(path))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("dense-") && name.ends_with(".jsonl") {
            found.push(name);
        }
    }
    found.sort();
    match &found[..] {
        [one] => Ok(path.join(one)),
        [] => Err(Error::file(
            path,
            "no dense trace in it; `scylla bench --trace dense` writes one",
        )),
        _ => Err(Error::file(
            path,
            format!("several dense traces: name one of {}", found.join(", ")),
        )),
    }
}

impl Reader {
    /// Opens a trace.
    ///
    /// # Errors
    /// If it is none, or of a later version.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let mut reader = Self {
            from: BufReader::with_capacity(1 << 20, file),
            path: path.to_path_buf(),
            line: 0,
            buffer: Vec::new(),
            next: None,
            text: None,
            header: Header {
                format: String::new(),
                version: 0,
                target: String::new(),
                draft: String::new(),
                dir: None,
                budget: scylla_core::tree::Budget::OFF.into(),
                repetition_penalty: 1.0,
                environment: Default::default(),
            },
        };
        // Of another format or version the rest of the line may be anything.
        #[derive(serde::Deserialize)]
        struct Kind {
            format: String,
            version: u32,
        }
        #[derive(serde::Deserialize)]
        struct First {
            trace: Kind,
        }
        reader.line()?;
        let first: Option<First> = serde_json::from_slice(&reader.buffer).ok();
        match first.map(|f| f.trace) {
            Some(Kind { format, version }) if format == FORMAT && version <= VERSION => {}
            Some(Kind { format, version }) => {
                return Err(reader.bad(format!(
                    "format {format} version {version}; this program reads {FORMAT} up to version {VERSION}"
                )));
            }
            None => {
                return Err(reader.bad(
                    "not the beginning of a dense trace (`scylla bench --trace dense` writes one)"
                        .into(),
                ));
            }
        }
        match reader.parsed::<PlaceLine>()? {
            Line::Trace(header) => reader.header = header,
            _ => return Err(reader.bad("not the first line of a dense trace".into())),
        }
        let budget = scylla_core::tree::Budget::from(reader.header.budget);
        budget.check().map_err(|e| reader.bad(e.to_string()))?;
        Ok(reader)
    }

    /// What it is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// An error of the line that was read last.
    fn bad(&self, what: String) -> Error {
        Error::file(&self.path, format!("line {}: {what}", self.line))
    }

    /// Reads a line; false at the end.
    fn line(&mut self) -> Result<bool> {
        self.buffer.clear();
        let mut limited = (&mut self.from).take(LONGEST);
        let read = limited.read_until(b'\n', &mut self.buffer);
        read.map_err(Error::io(&self.path))?;
        if self.buffer.is_empty() {
            return Ok(false);
        }
        self.line += 1;
        match self.buffer.pop() {
            Some(b'\n') => Ok(true),
            _ if self.buffer.len() as u64 + 1 == LONGEST => {
                Err(self.bad(format!("longer than {LONGEST} bytes")))
            }
            _ => Err(self.bad("the file ends in the middle of a line".into())),
        }
    }

    fn parsed<P: serde::de::DeserializeOwned>(&self) -> Result<Line<P>> {
        serde_json::from_slice(&self.buffer).map_err(|e| self.bad(e.to_string()))
    }

    /// The next text; places of the one before that were not asked for are passed over.
    ///
    /// # Errors
    /// If a line is not understood.
    pub fn text(&mut self) -> Result<Option<Text>> {
        let mut next = self.next.take();
        while next.is_none() && self.line()? {
            match self.parsed::<serde::de::IgnoredAny>()? {
                Line::Text(text) => next = Some(text),
                Line::Place(_) if self.text.is_some() => {}
                Line::Place(_) => return Err(self.bad("a place before any text".into())),
                Line::Trace(_) => return Err(self.bad("another trace begins here".into())),
            }
        }
        if let Some(text) = &next {
            let n = text.answer.len();
            let all = text.prompt_tokens.saturating_add(n);
            if n == 0
                || n > text.max_new_tokens
                || all > text.context.saturating_add(1)
                || text.most == 0
            {
                return Err(self.bad(format!(
                    "text `{}` of {} and {n} tokens does not fit its limits of {} new ones and {} positions",
                    text.prompt, text.prompt_tokens, text.max_new_tokens, text.context
                )));
            }
        }
        self.text.clone_from(&next);
        Ok(next)
    }

    /// The candidates at a place of the text, which lies behind all that were asked for before.
    ///
    /// # Errors
    /// If it is not there, or a line is not understood.
    pub fn place(&mut self, at: usize) -> Result<Place> {
        let Some(text) = &self.text else {
            return Err(self.bad("a place of no text".into()));
        };
        let missing = format!("place {at} of text `{}` is missing", text.prompt);
        if self.next.is_some() || !self.line()? {
            return Err(self.bad(missing + ": the trace was cut short"));
        }
        loop {
            // Most places are passed over: their numbers are not needed.
            #[derive(serde::Deserialize)]
            struct At {
                at: usize,
            }
            match self.parsed::<At>()? {
                Line::Place(place) if place.at < at => {}
                Line::Place(place) if place.at == at => break,
                Line::Text(text) => {
                    self.next = Some(text);
                    return Err(self.bad(missing));
                }
                _ => return Err(self.bad(missing)),
            }
            if !self.line()? {
                return Err(self.bad(missing + ": the trace was cut short"));
            }
        }
        let Line::Place(place) = self.parsed::<PlaceLine>()? else {
            return Err(self.bad(missing));
        };
        let text = self.text.as_ref().ok_or_else(|| self.bad(missing))?;
        place
            .place(text, self.header.budget)
            .map_err(|what| self.bad(what))
    }
}
