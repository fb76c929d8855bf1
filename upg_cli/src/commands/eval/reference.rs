//! What `upg eval` compares with: another UPG file, or an original.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use upg_compress::{Source, source};
use upg_kernel::inference::evaluate::{Computed, EvaluationOptions, Reference, Window, Windows};
use upg_kernel::inference::{CacheType, Model};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

/// A model that is loaded when its logits are asked for first.
pub struct Against {
    opened: Opened,
    options: EvaluationOptions,
    computed: Option<Computed>,
}

enum Opened {
    Upg(Box<UPGModel>),
    Source(Box<dyn Source>),
}

impl Against {
    /// A UPG file, to be run with `options`, or a source, to be run in f32. Errors: those of opening it.
    pub fn open(path: &Path, options: EvaluationOptions, open: OpenOptions) -> Result<Self> {
        let (opened, cache_type) = match source::is_upg(path) {
            true => (
                Opened::Upg(Box::new(UPGModel::from_file_with(path, open)?)),
                options.cache_type,
            ),
            false => (
                Opened::Source(source::open_with(path, open)?),
                CacheType::F32,
            ),
        };
        Ok(Self {
            opened,
            options: EvaluationOptions {
                cache_type,
                ..options
            },
            computed: None,
        })
    }

    /// Errors (`Argument`): its tokenizer cuts `text` into other windows.
    pub fn check(&self, text: &str, windows: &Windows) -> Result<()> {
        let cut = |tokenizer| Windows::of_text(tokenizer, text, windows.window(), windows.count());
        let same = match &self.opened {
            Opened::Upg(model) => cut(model.tokenizer()?)? == *windows,
            Opened::Source(source) => cut(&source.files().tokenizer()?)? == *windows,
        };
        match same {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Argument,
                "the two models have different vocabularies",
            )),
        }
    }

    /// The files that it is read from.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.opened {
            Opened::Upg(model) => vec![model.file().path().to_path_buf()],
            Opened::Source(source) => source.own_files(),
        }
    }

    /// What the logits are known by: path, size and time of change of each file, and how they are computed.
    ///
    /// Errors: `Io`.
    pub fn identity(&self) -> Result<String> {
        let mut files = self.files();
        files.sort();
        let mut identity = format!("{:?}", self.options);
        for path in files {
            let io = |e| Error::io("cannot read", &path, e);
            // Files that could belong to a source need not be there.
            let Ok(metadata) = path.metadata() else {
                continue;
            };
            let changed = metadata.modified().map_err(io)?;
            let since = changed.duration_since(UNIX_EPOCH).unwrap_or_default();
            let path = path.canonicalize().map_err(io)?;
            identity += &format!("\n{path:?} {} {}", metadata.len(), since.as_nanos());
        }
        Ok(identity)
    }

    fn model(&self) -> Result<Arc<Model>> {
        match &self.opened {
            Opened::Upg(model) => Ok(Arc::clone(model.model())),
            Opened::Source(source) => Ok(Arc::new(source.load_model()?)),
        }
    }
}

impl Reference for Against {
    fn logits(&mut self, window: &Window<'_>) -> Result<Vec<f32>> {
        let computed = match self.computed.take() {
            Some(computed) => computed,
            None => Computed {
                model: self.model()?,
                options: self.options,
            },
        };
        self.computed.insert(computed).logits(window)
    }
}
