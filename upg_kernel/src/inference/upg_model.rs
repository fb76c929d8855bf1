//! A whole model from one UPG file: weights, tokenizer, chat template.
#![forbid(unsafe_code)]

use super::chat_template::{ChatTemplate, Date};
use super::generate::PieceDecoder;
use super::model_dir::check_ids;
use super::scheduler::{Event, Request, Scheduler};
use super::tokenizer::{DecodeStream, SpecialIds, Tokenizer};
use super::{Model, ModelConfig, SamplingOptions, Session, SessionOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::format::UpgFile;
use crate::mapped::OpenOptions;
#[cfg(feature = "candle")]
use candle_core::{Device, Tensor};
use std::borrow::Borrow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Sequences of [`UPGModel::generate_batch`] in a forward pass.
const AT_ONCE: usize = 16;

/// A model that is ready to generate; shared by any number of [`Session`]s. A clone shares
/// everything.
#[derive(Clone)]
pub struct UPGModel {
    file: Arc<UpgFile>,
    model: Arc<Model>,
    tokenizer: Option<Arc<Tokenizer>>,
}

impl UPGModel {
    /// Opens a UPG file with everything that is in it.
    ///
    /// Weights are mapped, not read: the time goes into the header and the tokenizer. Errors: those
    /// of [`UpgFile::open`] and [`UPGModel::new`].
    ///
    /// ```no_run
    /// # fn main() -> upg_kernel::Result<()> {
    /// let model = upg_kernel::UPGModel::from_file("smollm2.safetensors")?;
    /// println!("{}", model.generate("The capital of France is", 20)?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        Self::from_file_with(path, OpenOptions::default())
    }

    /// [`UPGModel::from_file`] with options: for example read into memory and verified, not mapped.
    ///
    /// Cost and errors: also those of [`UpgFile::open_with`].
    ///
    /// ```no_run
    /// # fn main() -> upg_kernel::Result<()> {
    /// use upg_kernel::{OpenOptions, UPGModel};
    ///
    /// let model = UPGModel::from_file_with("/net/smollm2.safetensors", OpenOptions::in_memory())?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_file_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Self::new(Arc::new(UpgFile::open_with(path, options)?))
    }

    /// Loads the model of a file that is already open.
    ///
    /// Errors: `Missing` if there is no `config.json` in the file; those of
    /// [`ModelConfig::from_json`], [`Tokenizer::from_json`] and [`Model::load`].
    pub fn new(file: Arc<UpgFile>) -> Result<Self> {
        Self::load(&file).map_err(|e| e.at(file.path()))
    }

    fn load(file: &Arc<UpgFile>) -> Result<Self> {
        let config_json = file.metadata("config.json").ok_or_else(|| {
            Error::new(ErrorKind::Missing, "no config.json in the file")
                .hint("it holds weights only: compress a whole model directory")
        })?;
        let config = ModelConfig::from_json(config_json, file.metadata("generation_config.json"))?;
        let special = SpecialIds::from(&config);
        let tokenizer = file
            .tokenizer_text()?
            .map(|json| {
                let tokenizer_config = file.metadata("tokenizer_config.json");
                Tokenizer::from_json(json.as_bytes(), tokenizer_config, special).map(Arc::new)
            })
            .transpose()?;
        let model = Arc::new(Model::load(config, &**file)?);
        Ok(Self {
            file: Arc::clone(file),
            model,
            tokenizer,
        })
    }

    /// Checks that the model of a file can be loaded and that its texts can be used.
    ///
    /// A file without config has only weights, of which nothing is checked. A chat template that
    /// cannot be used is a warning in the log, because the model works without.
    ///
    /// Cost and errors: as [`UPGModel::new`]; `Invalid` if the begin or end of a text has no
    /// embedding.
    pub fn check(file: &Arc<UpgFile>) -> Result<()> {
        if file.metadata("config.json").is_none() {
            return Ok(());
        }
        let model = Self::new(Arc::clone(file))?;
        if let Some(tokenizer) = &model.tokenizer {
            let rows = model.model.config().vocab_size;
            check_ids(tokenizer, rows).map_err(|e| e.at(file.path()))?;
        }
        match model.chat_template() {
            Err(e) if e.kind() != ErrorKind::Missing => {
                log::warn!("chat is not available with this model: {e}");
            }
            _ => {}
        }
        Ok(())
    }

    /// The open file.
    pub fn file(&self) -> &Arc<UpgFile> {
        &self.file
    }

    /// The decoder, to make sessions of.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The tokenizer. Errors (`Missing`): the file has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_deref().ok_or_else(|| self.no_tokenizer())
    }

    fn no_tokenizer(&self) -> Error {
        Error::new(ErrorKind::Missing, "no tokenizer in the file")
            .at(self.file.path())
            .hint("pass token ids instead of text, or compress a directory with tokenizer.json")
    }

    /// The chat template of the model; if it asks for the date, it is told today's (UTC). Errors:
    /// `Missing` if it has none, and those of [`ChatTemplate::new`].
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let template = match self.file.metadata("chat_template") {
            Some(source) => {
                let tokenizer = self.tokenizer()?;
                Some(ChatTemplate::new(
                    source,
                    tokenizer.bos_token(),
                    tokenizer.eos_token(),
                )?)
            }
            None => self
                .file
                .metadata("tokenizer_config.json")
                .map(ChatTemplate::from_tokenizer_config)
                .transpose()?
                .flatten(),
        };
        let template = template.ok_or_else(|| {
            Error::new(ErrorKind::Missing, "the model has no chat template")
                .at(self.file.path())
                .hint("give it a plain prompt instead")
        })?;
        Ok(template.with_date(Date::today()))
    }

    /// Returns the sampling options that the model recommends, or common ones.
    ///
    /// Errors: those of [`SamplingOptions::from_generation_config`].
    pub fn sampling_options(&self) -> Result<SamplingOptions> {
        let config = self.file.metadata("generation_config.json");
        SamplingOptions::from_generation_config(config.unwrap_or("{}"))
    }

    /// An empty sequence. Errors: those of [`Session::new`].
    pub fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(Arc::clone(&self.model), options)
    }

    /// Logits of every position of `tokens`: an F32 tensor `[tokens, vocab]`.
    ///
    /// Errors: those of [`Session::forward`].
    #[cfg(feature = "candle")]
    pub fn forward(&self, tokens: &[u32]) -> Result<Tensor> {
        let logits = self.session(&SessionOptions::default())?.forward(tokens)?;
        let shape = (tokens.len(), self.model.config().vocab_size);
        Ok(Tensor::from_vec(logits, shape, &Device::Cpu)?)
    }

    /// Makes a scheduler for up to `at_once` sequences in a forward pass. Errors: those of
    /// [`Scheduler::new`].
    pub fn scheduler(&self, at_once: usize, options: &SessionOptions) -> Result<Scheduler> {
        Scheduler::new(Arc::clone(&self.model), at_once, options)
    }

    /// Makes a request for the `max_tokens` most probable tokens after the token ids `prompt`, up
    /// to a stop token of the model. Its answer is a text if the model has a tokenizer.
    pub fn request(&self, prompt: Vec<u32>, max_tokens: usize) -> Request {
        let mut request = Request::new(prompt, max_tokens);
        request.stop_ids.clone_from(&self.model.config().eos_ids);
        if let Some(tokenizer) = &self.tokenizer {
            request.stop_ids.clone_from(&tokenizer.special_ids().eos);
            request.decoder = Some(Box::new(DecodeStream::new(Arc::clone(tokenizer), true)));
        }
        request
    }

    /// Ends the answer to `request` at each of `texts` too.
    ///
    /// A text that is exactly the spelling of a special token becomes a stop id, because special
    /// tokens are no part of the answer. The others become stop strings.
    pub fn stop_at(&self, request: &mut Request, texts: &[String]) {
        let tokenizer = self.tokenizer.as_deref();
        for text in texts {
            match tokenizer.and_then(|tokenizer| tokenizer.special_id(text)) {
                Some(id) => request.stop_ids.push(id),
                None => request.stop_strings.push(text.clone()),
            }
        }
    }

    /// Continues `prompt` greedily by at most `max_tokens` tokens; ends at the model's stop tokens.
    /// Returns the new text only.
    ///
    /// Errors: `Missing` tokenizer; those of [`Scheduler::submit`] and of the request.
    pub fn generate(&self, prompt: &str, max_tokens: usize) -> Result<String> {
        let prompt = self.tokenizer()?.encode(prompt, true)?;
        let mut scheduler = self.scheduler(1, &SessionOptions::default())?;
        scheduler
            .stream(self.request(prompt, max_tokens))?
            .collect()
    }

    /// [`UPGModel::generate`] for several prompts, 16 of them at once; the texts in the order of
    /// the prompts.
    ///
    /// Errors: the first of those of [`UPGModel::generate`].
    ///
    /// ```no_run
    /// # fn main() -> upg_kernel::Result<()> {
    /// let model = upg_kernel::UPGModel::from_file("smollm2.safetensors")?;
    /// let prompts = ["The capital of France is", "The capital of Italy is"];
    /// for (prompt, text) in prompts.iter().zip(model.generate_batch(&prompts, 20)?) {
    ///     println!("{prompt}{text}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn generate_batch(&self, prompts: &[&str], max_tokens: usize) -> Result<Vec<String>> {
        let tokenizer = self.tokenizer()?;
        let mut scheduler = self.scheduler(AT_ONCE, &SessionOptions::default())?;
        let submit = |prompt: &&str| {
            scheduler.submit(self.request(tokenizer.encode(prompt, true)?, max_tokens))
        };
        let ids = prompts.iter().map(submit).collect::<Result<Vec<_>>>()?;
        let mut texts: HashMap<_, String> = HashMap::new();
        while !scheduler.is_idle() {
            for (id, event) in scheduler.step() {
                match event {
                    Event::Text(text) => texts.entry(id).or_default().push_str(&text),
                    Event::Token(..) | Event::Finished(..) => {}
                    Event::Failed(error, _) => return Err(error),
                }
            }
        }
        let text_of = |id| texts.remove(id).unwrap_or_default();
        Ok(ids.iter().map(text_of).collect())
    }
}

impl std::fmt::Debug for UPGModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UPGModel({})", self.file.path().display())
    }
}

impl<T: Borrow<Tokenizer> + Send> PieceDecoder for DecodeStream<T> {
    fn piece(&mut self, id: u32) -> Result<String> {
        self.push(id)
    }

    fn finish(&mut self) -> Result<String> {
        DecodeStream::finish(self)
    }
}
