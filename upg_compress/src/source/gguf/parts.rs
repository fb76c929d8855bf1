//! Parts of a split GGUF file, as `llama-gguf-split` and the writer of llama.cpp name them.
//!
//! The first part holds the metadata of the model. Every part holds tensors, and says with
//! `split.no` and `split.count` which one it is. The other parts are found by their names.
#![forbid(unsafe_code)]

use super::header::{Entry, Header, MAX_COUNT, malformed};
use super::metadata::Metadata;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use upg_kernel::support::{MAX_PARTS, PartName, folder_of};
use upg_kernel::{Error, ErrorKind, MappedFile, OpenOptions, Result};

/// Files of a model in order: a whole GGUF file, or all parts of a split one.
#[derive(Debug)]
pub(super) struct Parts(Vec<MappedFile>);

/// Tensor of a model and the part that it is in.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) part: usize,
    pub(super) entry: Entry,
}

/// Everything that is read from the headers of the parts.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) parts: Parts,
    /// Header of the first part, without its tensors.
    pub(super) header: Header,
    /// Tensors of all parts.
    pub(super) tensors: Vec<Stored>,
}

impl Opened {
    /// Opens the GGUF file at `path`, and all others if it is any part of a split one.
    ///
    /// Cost: one walk over the headers. Errors: those of [`MappedFile::open_with`] and
    /// [`Header::read`]; `Missing` for a part that is not in the folder; `Malformed` for parts that
    /// do not belong together; `TooLarge` for too many parts or tensors.
    pub(super) fn open(path: &Path, options: OpenOptions) -> Result<Self> {
        let mut given = Part::open(path, options)?;
        let Some(split) = given.split(path)? else {
            let entries = std::mem::take(&mut given.header.tensors).into_iter();
            return Ok(Self {
                parts: Parts(vec![given.file]),
                header: given.header,
                tensors: entries.map(|entry| Stored { part: 0, entry }).collect(),
            });
        };
        let mut first = None;
        let mut files = Vec::new();
        let mut tensors: Vec<Stored> = Vec::new();
        let mut names = BTreeSet::new();
        let mut given = Some(given);
        for number in 1..=split.count {
            let path = split.path(number);
            let mut part = match given.take_if(|_| number == split.number) {
                Some(part) => part,
                None => split.open(&path, number, options)?,
            };
            let at_part = |e: Error| e.at(&path);
            for entry in std::mem::take(&mut part.header.tensors) {
                if !names.insert(entry.name.clone()) {
                    let twice = malformed("listed in two parts").tensor(&entry.name);
                    return Err(at_part(twice));
                }
                tensors.push(Stored {
                    part: files.len(),
                    entry,
                });
            }
            if tensors.len() as u64 > MAX_COUNT {
                let message = format!("more than {MAX_COUNT} tensors in all parts");
                return Err(at_part(Error::new(ErrorKind::TooLarge, message)));
            }
            files.push(part.file);
            first.get_or_insert(part.header);
        }
        let opened = Self {
            parts: Parts(files),
            header: first.ok_or_else(|| malformed("no parts"))?,
            tensors,
        };
        opened.check_count().map_err(|e| e.at(split.path(1)))?;
        Ok(opened)
    }

    /// Checks the number of tensors that the first part says the model has.
    fn check_count(&self) -> Result<()> {
        let metadata = Metadata {
            header: &self.header,
            file: self.parts.bytes(0),
        };
        let found = self.tensors.len();
        match metadata.number("split.tensors.count")? {
            Some(expected) if expected != found => Err(malformed(format!(
                "the parts have {found} tensors, split.tensors.count says {expected}"
            ))
            .hint("the parts are not of one model: get them again")),
            _ => Ok(()),
        }
    }
}

impl Parts {
    /// Returns the bytes of a part; none for a part that does not exist.
    pub(super) fn bytes(&self, part: usize) -> &[u8] {
        self.0.get(part).map_or(&[], |file| file)
    }

    /// Returns the paths of all parts in order.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(MappedFile::path)
    }
}

/// GGUF file with its header.
struct Part {
    file: MappedFile,
    header: Header,
}

/// Place of a part among the others.
struct Split {
    folder: PathBuf,
    name: String,
    extension: String,
    number: usize,
    count: usize,
}

impl Part {
    fn open(path: &Path, options: OpenOptions) -> Result<Self> {
        let file = MappedFile::open_with(path, options)?;
        let header = Header::read(&file).map_err(|e| e.at(path))?;
        Ok(Self { file, header })
    }

    /// Returns which part the file is; none for a whole file.
    ///
    /// Errors: `Malformed`; `TooLarge`; `Unsupported` if its name is not that of the part.
    fn split(&self, path: &Path) -> Result<Option<Split>> {
        self.read_split(path).map_err(|e| e.at(path))
    }

    fn read_split(&self, path: &Path) -> Result<Option<Split>> {
        let metadata = Metadata {
            header: &self.header,
            file: &self.file,
        };
        let Some(count) = metadata.number("split.count")?.filter(|n| *n > 1) else {
            return Ok(None);
        };
        if count > MAX_PARTS {
            let message = format!("one of {count} parts, at most {MAX_PARTS}");
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        let index = metadata.number("split.no")?.unwrap_or(0);
        if index >= count {
            return Err(malformed(format!("split.no is {index} of {count}")));
        }
        let number = index + 1;
        let stem = path.file_stem().unwrap_or_default().to_str();
        let extension = path.extension().unwrap_or_default().to_str();
        let named = stem.and_then(PartName::of);
        let is_itself = |part: &PartName<'_>| (part.number, part.count) == (number, count);
        let (Some(part), Some(extension)) = (named.filter(is_itself), extension) else {
            let message = format!("this is part {number} of {count}, and its name does not say so");
            let hint = format!(
                "the parts are found by their names: NAME-{number:05}-of-{count:05}.gguf and so on"
            );
            return Err(Error::new(ErrorKind::Unsupported, message).hint(hint));
        };
        Ok(Some(Split {
            folder: folder_of(path).to_path_buf(),
            name: part.name.to_owned(),
            extension: extension.to_owned(),
            number,
            count,
        }))
    }
}

impl Split {
    /// Returns the path of a part, for `number` from 1 on.
    fn path(&self, number: usize) -> PathBuf {
        let part = PartName {
            name: &self.name,
            number: self.number,
            count: self.count,
        };
        self.folder.join(part.file_name(number, &self.extension))
    }

    /// Opens the part `number` at `path`, and checks that it is this part.
    fn open(&self, path: &Path, number: usize, options: OpenOptions) -> Result<Part> {
        if path.symlink_metadata().is_err() {
            let message = format!("part {number} of {} is not there", self.count);
            let hint = format!("all {} parts have to be in one folder", self.count);
            return Err(Error::new(ErrorKind::Missing, message).at(path).hint(hint));
        }
        let part = Part::open(path, options)?;
        match part.split(path)? {
            Some(_) => Ok(part),
            None => {
                let message = format!("a whole GGUF file in place of part {number}");
                Err(malformed(message).at(path))
            }
        }
    }
}
