//! Originals in place of UPG files: downloaded by name, and compressed once into the cache.
#![forbid(unsafe_code)]

use super::compress::unasked_calibration;
use super::pull;
use crate::cli::ModelArgs;
use crate::progress::WeightsBar;
use crate::signals;
use crate::terminal::{self, bytes, duration};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use upg_compress::{
    Choice, CompressOptions, Preflight, compress_checked, partial_files, source::open_with,
};
use upg_hub::{Cache, CompressedCache, Hub, Listing, ModelName, Origin};
use upg_kernel::support::open_regular;
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

/// Maximum bytes of an answer to a question.
const MAX_ANSWER: usize = 1024;

/// Ends of names of files, which no model of the Hub is taken for.
const FILE_ENDS: [&str; 4] = [".safetensors", ".gguf", ".upg", ".json"];

/// Argument for a model.
enum Model {
    /// UPG file, or something that is refused when it is opened.
    Upg,
    /// GGUF file or directory.
    Original,
    Hub(ModelName),
}

impl Model {
    /// Recognizes the argument. Whatever exists is a file.
    fn of(path: &Path) -> Self {
        let hub_name = || {
            path.to_str()
                .and_then(hub_name)
                .map_or(Self::Upg, Self::Hub)
        };
        match path.metadata() {
            Ok(metadata) if metadata.is_dir() => Self::Original,
            Ok(_) if is_gguf(path) => Self::Original,
            Ok(_) => Self::Upg,
            Err(_) => hub_name(),
        }
    }
}

/// Returns the name of a model of the Hub, unless the text rather names a file.
fn hub_name(text: &str) -> Option<ModelName> {
    let is_file = FILE_ENDS.iter().any(|end| text.ends_with(end));
    text.parse()
        .ok()
        .filter(|name: &ModelName| !is_file || name.quantization().is_some())
}

fn is_gguf(path: &Path) -> bool {
    let magic = || {
        let (mut file, _) = open_regular(path).ok()?;
        let mut magic = [0; 4];
        file.read_exact(&mut magic).ok()?;
        Some(magic)
    };
    magic().is_some_and(|magic| magic == *b"GGUF")
}

/// Returns whether a word that is no command looks like a model.
pub fn is_like_a_model(word: &str) -> bool {
    hub_name(word).is_some()
        || Path::new(word).exists()
        || FILE_ENDS.iter().any(|end| word.ends_with(end))
}

/// Returns a file or directory that `upg compress` reads: `path`, or the download of that name.
///
/// Errors: those of [`Hub`].
pub fn source(path: &Path, offline: bool) -> Result<PathBuf> {
    let Model::Hub(name) = Model::of(path) else {
        return Ok(path.to_path_buf());
    };
    let hub = pull::hub(pull::settings(offline)?)?;
    match hub.cached(&name)? {
        Some(model) => Ok(model.path),
        None => Ok(pull::pull(&hub, &hub.look_up(&name)?)?.path),
    }
}

/// Returns a UPG file: `path`, or the compressed file of an original.
///
/// An original is downloaded and compressed if it is not in the caches. On a terminal that needs a
/// yes; elsewhere a line on standard error says so. Errors: those of the Hub and of the compression;
/// `Interrupted` without a yes.
pub fn upg_file(path: &Path, args: &ModelArgs, open: OpenOptions) -> Result<PathBuf> {
    let model = Model::of(path);
    if matches!(model, Model::Upg) {
        return Ok(path.to_path_buf());
    }
    let work = Work {
        cache: CompressedCache::from_env()?,
        options: args.encoding.to_string(),
        args,
        open,
    };
    match model {
        Model::Hub(name) => work.of_hub(&name),
        Model::Original | Model::Upg => work.of_original(&Origin::local(path)?, path, true),
    }
}

/// Compression of an original into the cache.
struct Work<'a> {
    cache: CompressedCache,
    /// Options that the result depends on.
    options: String,
    args: &'a ModelArgs,
    open: OpenOptions,
}

impl Work<'_> {
    fn of_hub(&self, name: &ModelName) -> Result<PathBuf> {
        let origin = |model| Origin::Hub {
            name: name.clone(),
            model,
        };
        let settings = pull::settings(self.args.offline)?;
        if let Some(model) = Cache::new(&settings.cache).model(name)? {
            return self.of_original(&origin(model.clone()), &model.path, true);
        }
        // The original may have been removed to save room.
        if let Some(path) = self.cache.find(name, &self.options)? {
            return Ok(path);
        }
        let hub = pull::hub(settings)?;
        let listing = hub.look_up(name)?;
        self.ask(&self.download_question(&hub, &listing))?;
        let model = pull::pull(&hub, &listing)?;
        self.of_original(&origin(model.clone()), &model.path, false)
    }

    /// Returns the compressed file of the original at `path`, which may have to be made.
    fn of_original(&self, origin: &Origin, path: &Path, asks: bool) -> Result<PathBuf> {
        let out = self.cache.path(origin, &self.options);
        if out.is_file() {
            return Ok(out);
        }
        // First, so that nothing is created for what is no model.
        let source = open_with(path, self.open)?;
        std::fs::create_dir_all(self.cache.folder())
            .map_err(|e| Error::io("cannot create", self.cache.folder(), e))?;
        let interrupt = signals::interrupt_flag()?;
        let mut waits = || terminal::note("upg: another process compresses this model; waiting");
        let mut tick = || match interrupt.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
            false => Ok(()),
        };
        let _lock = self.cache.lock(&out, &mut waits, &mut tick)?;
        if out.is_file() {
            return Ok(out);
        }
        let mut options = CompressOptions::new(self.args.encoding);
        options.resume = true;
        options.calibration = unasked_calibration(source.as_ref(), self.args.encoding)?;
        let preflight = Preflight::new(source.as_ref(), &out, &options).map_err(|e| e.at(path))?;
        preflight.check()?;
        let question = format!(
            "compress {} once, as {}: {} in {}, about {}",
            origin.label(),
            self.options,
            bytes(preflight.file_bytes),
            self.cache.folder().display(),
            duration(preflight.seconds),
        );
        match asks {
            true => self.ask(&question)?,
            false => terminal::note(format_args!("upg: {question}")),
        }
        let progress = WeightsBar::new(Some(preflight.seconds))?;
        let made = || compress_checked(source.as_ref(), &out, &options, &progress);
        let is_final = |e: &Error| matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::TooLarge);
        let made = match made() {
            // What an earlier build left cannot be resumed; this process has the lock.
            Err(e) if !is_final(&e) && remove_partial(&out)? => {
                compress_checked(source.as_ref(), &out, &options, &progress)
            }
            made => made,
        };
        made.map_err(|e| match e.kind() {
            ErrorKind::Interrupted => e.hint("the same command resumes"),
            _ => e.at(path),
        })?;
        drop(progress);
        self.cache.record(&out, origin, &self.options)?;
        Ok(out)
    }

    fn download_question(&self, hub: &Hub, listing: &Listing) -> String {
        let size = listing
            .bytes()
            .map_or("a model of unknown size".to_owned(), bytes);
        let result = match listing.parameters {
            Some(weights) => format!(
                " (about {})",
                bytes((weights as f64 * self.bytes_per_weight()) as u64)
            ),
            None => String::new(),
        };
        format!(
            "download {} ({size}) to {}, and compress it once, as {}{result}, in {}",
            listing.name,
            hub.cache().folder().display(),
            self.options,
            self.cache.folder().display(),
        )
    }

    /// Returns the approximate bytes of a weight in the compressed file.
    fn bytes_per_weight(&self) -> f64 {
        use upg_kernel::format::Encoding as E;
        match self.args.encoding {
            Choice::Encode(E::Q8 | E::S8) => 8.13 / 8.0,
            Choice::Encode(E::Q4 | E::S4) => 4.26 / 8.0,
            Choice::Encode(E::T4) => 4.1 / 8.0,
            Choice::Encode(E::T3) => 3.1 / 8.0,
            Choice::Encode(E::T2) => 2.1 / 8.0,
            Choice::Encode(_) => 4.0,
            _ => 2.0,
        }
    }

    /// Asks on a terminal; elsewhere, and with `--yes`, says what will happen.
    ///
    /// Errors (`Interrupted`): the answer is not yes.
    fn ask(&self, what: &str) -> Result<()> {
        let is_terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        match is_terminal && !self.args.yes {
            true => confirm(what, true),
            false => {
                terminal::note(format_args!("upg: {what}"));
                Ok(())
            }
        }
    }
}

/// Asks a question on the terminal; an empty answer is `default`.
///
/// Errors (`Interrupted`): the answer is no, or there is none.
pub fn confirm(what: &str, default: bool) -> Result<()> {
    let answers = if default { "Y/n" } else { "y/N" };
    terminal::note(format_args!("upg: {what}? [{answers}]"));
    let read = || terminal::read_line(&mut std::io::stdin().lock(), MAX_ANSWER);
    let answer = signals::while_waiting(read)??;
    let is_yes = match answer
        .as_deref()
        .map(|a| a.trim().to_lowercase())
        .as_deref()
    {
        Some("") => default,
        Some("y" | "yes") => true,
        _ => false,
    };
    match is_yes {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Interrupted, "nothing was done")),
    }
}

/// Removes what a stopped run left. Returns whether there was anything.
fn remove_partial(out: &Path) -> Result<bool> {
    let mut found = false;
    for path in partial_files(out)? {
        found |= std::fs::remove_file(&path).is_ok();
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_are_not_names_of_files() {
        for name in [
            "user/model",
            "user/model@v1",
            "user/model:Q4_K_M",
            "user/model:a.gguf",
        ] {
            assert!(hub_name(name).is_some(), "{name}");
        }
        for name in [
            "model",
            "folder/model.safetensors",
            "folder/model.gguf",
            "/a/b",
            "./a/b",
            "../b",
        ] {
            assert!(hub_name(name).is_none(), "{name}");
        }
        assert!(is_like_a_model("x.gguf") && is_like_a_model("user/model"));
        assert!(!is_like_a_model("compres"));
    }
}
