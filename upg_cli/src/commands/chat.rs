//! `upg chat`.
#![forbid(unsafe_code)]

use super::model_file;
use super::run::{note_end, sampling_options, session_options};
use crate::cli::ChatArgs;
use crate::{signals, terminal};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use upg_kernel::inference::chat_template::{ChatTemplate, Message};
use upg_kernel::inference::tokenizer::{EncodeOptions, MAX_TEXT_BYTES};
use upg_kernel::inference::{Sampler, SamplingOptions, Scheduler};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

pub fn run(args: &ChatArgs, open: OpenOptions) -> Result<()> {
    let model = model_file::load(&args.file, open)?;
    let interrupt = signals::interrupt_flag()?;
    let mut chat = Chat {
        template: model.chat_template()?,
        scheduler: model.scheduler(1, &session_options(&args.sampling, Arc::clone(&interrupt)))?,
        sampling: sampling_options(&args.sampling),
        messages: Vec::new(),
        model: &model,
        interrupt,
        args,
    };
    chat.clear();
    let mut lines = Lines::new()?;
    while let Some(line) = signals::while_waiting(|| lines.next())?? {
        match line.trim() {
            "" => continue,
            "/clear" => chat.clear(),
            "/exit" | "/quit" => return Ok(()),
            command if command.starts_with('/') => {
                terminal::note("upg: unknown command; the commands are /clear and /exit");
            }
            line => {
                lines.keep(line);
                chat.turn(line)?;
            }
        }
    }
    Ok(())
}

/// Source of the questions.
enum Lines {
    Terminal(Box<DefaultEditor>),
    /// File or pipe, whose lines may be unbounded.
    Piped,
}

impl Lines {
    fn new() -> Result<Self> {
        match std::io::stdin().is_terminal() {
            true => {
                let editor = DefaultEditor::new().map_err(|e| input_error(&e))?;
                Ok(Self::Terminal(Box::new(editor)))
            }
            false => Ok(Self::Piped),
        }
    }

    /// Returns the next line; `None` at the end of input, and after Ctrl-C at the prompt.
    fn next(&mut self) -> Result<Option<String>> {
        match self {
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => Ok(Some(line)),
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => Ok(None),
                Err(e) => Err(input_error(&e)),
            },
            Self::Piped => terminal::read_line(&mut std::io::stdin().lock(), MAX_TEXT_BYTES),
        }
    }

    /// Adds a line to the history of the arrow keys.
    fn keep(&mut self, line: &str) {
        if let Self::Terminal(editor) = self {
            // A line that the history refuses is no reason to stop.
            let _ = editor.add_history_entry(line);
        }
    }
}

/// Conversation so far.
struct Chat<'a> {
    model: &'a UPGModel,
    args: &'a ChatArgs,
    template: ChatTemplate,
    scheduler: Scheduler,
    /// Options of the next answer: each has a seed of its own.
    sampling: SamplingOptions,
    messages: Vec<Message>,
    interrupt: Arc<AtomicBool>,
}

impl Chat<'_> {
    fn clear(&mut self) {
        let system = self.args.system.iter();
        self.messages = system.map(|text| Message::new("system", text)).collect();
    }

    /// Processes one question. An error in its text is printed, and the question is removed.
    fn turn(&mut self, line: &str) -> Result<()> {
        self.messages.push(Message::new("user", line));
        let mut answer = String::new();
        match self.answer(&mut answer) {
            Ok(()) => {}
            // Ctrl-C ends the answer, not the conversation.
            Err(e) if e.kind() == ErrorKind::Interrupted => signals::start_again(&self.interrupt),
            Err(e) if matches!(e.kind(), ErrorKind::Argument | ErrorKind::TooLarge) => {
                terminal::note(format_args!("upg: {e}"));
                terminal::note("upg: use /clear to start again");
                self.messages.pop();
                return Ok(());
            }
            Err(e) => return Err(e),
        }
        terminal::print("\n")?;
        signals::check_end()?;
        self.messages.push(Message::new("assistant", answer));
        Ok(())
    }

    /// Prints the answer as it is generated and appends it to `answer`,
    /// even if it ends with an error.
    fn answer(&mut self, answer: &mut String) -> Result<()> {
        let text = self.template.render(&self.messages, true)?;
        let options = EncodeOptions {
            add_special: false,
            interrupt: Some(&self.interrupt),
            ..EncodeOptions::default()
        };
        let prompt = self.model.tokenizer()?.encode_with(&text, options)?;
        let mut request = self.model.request(prompt, self.args.max_tokens);
        request.sampler = Sampler::new(self.sampling.clone())?;
        request.stop_strings.clone_from(&self.args.sampling.stop);
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        let mut stream = self.scheduler.stream(request)?;
        for piece in stream.by_ref() {
            let piece = piece?;
            answer.push_str(&piece);
            terminal::print(&piece)?;
        }
        note_end(stream.finish_reason());
        Ok(())
    }
}

fn input_error(e: &ReadlineError) -> Error {
    Error::new(ErrorKind::Io, format!("cannot read the terminal: {e}"))
}
