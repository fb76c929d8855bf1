//! Reference of `upg eval`: another UPG file, or an original.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use upg_compress::{Source, source};
use upg_kernel::inference::evaluate::{Computed, EvaluationOptions, Reference, Window, Windows};
use upg_kernel::inference::{CacheType, Model};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

/// Reference model, loaded when its logits are first needed.
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
    /// Opens a UPG file, to be run with `options`, or a source, to be run in f32.
    ///
    /// Errors: those of opening it.
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

    /// Checks that its tokenizer splits `text` into the same windows. Errors (`Argument`): it
    /// does not.
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

    /// Returns the files that the reference is read from.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.opened {
            Opened::Upg(model) => vec![model.file().path().to_path_buf()],
            Opened::Source(source) => source.own_files(),
        }
    }

    /// Returns the identity of the logits.
    ///
    /// It consists of the path, size and modification time of each file,
    /// and the options of the computation.
    ///
    /// Errors: `Io`.
    pub fn identity(&self) -> Result<String> {
        let mut files = self.files();
        files.sort();
        let mut identity = format!("{:?}", self.options);
        for path in files {
            let io = |e| Error::io("cannot read", &path, e);
            // Optional files of a source may be missing.
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
