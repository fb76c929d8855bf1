//! `upg chat`.
#![forbid(unsafe_code)]

mod commands;
mod input;
mod transcript;

use super::generation::{
    compute_prompt, note_cut, sampling_options, session_options, template, warn_if_hot,
};
use super::model_file;
use crate::cli::ChatArgs;
use crate::wrap::Wrap;
use crate::{signals, terminal};
use commands::{HELP, Line, Options};
use input::Lines;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use upg_kernel::inference::chat_template::{ChatTemplate, Message};
use upg_kernel::inference::tokenizer::EncodeOptions;
use upg_kernel::inference::{FinishReason, Sampler, Scheduler};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

/// Share of the context that is kept free for an answer: one in this many positions.
const ANSWER_SHARE: usize = 4;

pub fn run(args: &ChatArgs, open: OpenOptions) -> Result<()> {
    let model = model_file::load(&args.file, open)?;
    let interrupt = signals::interrupt_flag()?;
    let session = session_options(&args.sampling, Arc::clone(&interrupt));
    let longest = model.model().config().context;
    let mut chat = Chat {
        template: template(&args.sampling, &model)?,
        scheduler: model.scheduler(1, &session)?,
        context: args.sampling.context.map_or(longest, |n| n.min(longest)),
        options: Options {
            sampling: sampling_options(&args.sampling, &model)?,
            max_tokens: args.sampling.max_tokens,
        },
        system: args.system.clone(),
        turns: Vec::new(),
        left_out: 0,
        file: None,
        model: &model,
        interrupt,
        args,
    };
    let mut lines = Lines::new(!args.no_history)?;
    if std::io::stdin().is_terminal() {
        terminal::note(chat.banner());
    }
    while let Some(line) = signals::while_waiting(|| lines.next())?? {
        match Line::parse(&line) {
            Ok(Line::End) => return Ok(()),
            Ok(line) => {
                if let Line::Question(question) = &line {
                    lines.keep(question);
                }
                chat.act(line)?;
            }
            Err(e) => terminal::note(format_args!("upg: {e}")),
        }
    }
    Ok(())
}

/// Conversation so far.
struct Chat<'a> {
    model: &'a UPGModel,
    args: &'a ChatArgs,
    template: ChatTemplate,
    scheduler: Scheduler,
    /// Positions of the context.
    context: usize,
    options: Options,
    system: Option<String>,
    /// Questions and answers in turn.
    turns: Vec<Message>,
    /// Number of the oldest turns that the model no longer sees.
    left_out: usize,
    /// File that this conversation was saved to or loaded from.
    file: Option<PathBuf>,
    interrupt: Arc<AtomicBool>,
}

impl Chat<'_> {
    fn banner(&self) -> String {
        let file = self.model.file();
        let metadata = |key| file.metadata(key).unwrap_or_default();
        format!(
            "{}: {}, {:.2} bits a weight, {}, context {}; /help",
            file_name(file.path()),
            metadata("model"),
            file.bits_per_weight(),
            terminal::bytes(file.file_len()),
            self.context,
        )
    }

    /// Does what a line asks for. A failure of a command is told, and the conversation goes on.
    fn act(&mut self, line: Line) -> Result<()> {
        let done = match line {
            Line::Nothing | Line::End => Ok(()),
            Line::Question(question) => return self.ask(question).map(drop),
            Line::Again => return self.ask_again(),
            Line::Help => terminal::print(HELP),
            Line::Show => terminal::print(&self.show()),
            Line::Set(name, value) => self.options.set(&name, &value).map(|()| {
                if name.starts_with("temp") {
                    warn_if_hot(self.options.sampling.temperature);
                }
                terminal::note(format_args!("upg: {name} is {value}"));
            }),
            Line::System(text) => {
                let what = if text.is_some() { "set" } else { "removed" };
                self.system = text;
                terminal::note(format_args!("upg: system message {what}"));
                Ok(())
            }
            Line::Save(path) => self.save(&path),
            Line::Load(path) => self.load(&path),
            Line::Undo => {
                match self.last_question() {
                    Some(index) => {
                        self.keep(index);
                        let left = questions(&self.turns);
                        terminal::note(format_args!("upg: forgotten; {left} left"));
                    }
                    None => terminal::note("upg: no question yet"),
                }
                Ok(())
            }
            Line::Clear => {
                self.keep(0);
                self.file = None;
                terminal::note("upg: the conversation starts again");
                Ok(())
            }
        };
        match done {
            Err(e) if terminal::is_broken_pipe(&e) => Err(e),
            Err(e) => {
                terminal::note(format_args!("upg: {e}"));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Keeps the first `turns` turns. There may be room again for those that were left out.
    fn keep(&mut self, turns: usize) {
        self.turns.truncate(turns);
        self.left_out = 0;
    }

    fn save(&mut self, path: &Path) -> Result<()> {
        if self.last_question().is_none() {
            return Err(Error::new(ErrorKind::Argument, "no question yet"));
        }
        if path.exists() && self.file.as_deref() != Some(path) {
            let e = Error::new(ErrorKind::Argument, "the file exists").at(path);
            return Err(e.hint("this conversation was neither saved there nor loaded from it"));
        }
        transcript::save(path, self.system.as_deref(), &self.turns)?;
        let questions = questions(&self.turns);
        terminal::note(format_args!("upg: {questions} in {}", path.display()));
        self.file = Some(path.to_path_buf());
        Ok(())
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let (system, turns) = transcript::load(path)?;
        let (before, now) = (questions(&self.turns), questions(&turns));
        terminal::note(format_args!(
            "upg: {now} from {}, in place of {before}",
            path.display()
        ));
        (self.system, self.turns, self.left_out) = (system, turns, 0);
        self.file = Some(path.to_path_buf());
        Ok(())
    }

    fn show(&self) -> String {
        // A conversation that the template refuses takes nothing.
        let used = self.encode().map_or(0, |tokens| tokens.len());
        let system = match &self.system {
            Some(text) => format!("system message: {text}\n"),
            None => String::new(),
        };
        format!(
            "{}\n{system}{}; {} of {} tokens of the context used\noptions (/set NAME VALUE):\n{}",
            self.banner(),
            questions(&self.turns),
            if self.turns.is_empty() {
                0
            } else {
                used.min(self.context)
            },
            self.context,
            self.options.show(),
        )
    }

    /// Returns the index of the last question.
    fn last_question(&self) -> Option<usize> {
        self.turns.iter().rposition(|turn| turn.role == "user")
    }

    /// Answers the last question again, with another seed. Without a new answer the old one stays.
    fn ask_again(&mut self) -> Result<()> {
        let Some(index) = self.last_question() else {
            terminal::note("upg: no question yet");
            return Ok(());
        };
        let question = self.turns[index].content.clone();
        let before = (self.turns.clone(), self.left_out);
        self.keep(index);
        if !self.ask(question)? {
            (self.turns, self.left_out) = before;
            terminal::note("upg: the answer before stays");
        }
        Ok(())
    }

    /// Processes one question; returns whether there is an answer. Without one the question is
    /// taken back.
    fn ask(&mut self, question: String) -> Result<bool> {
        self.turns.push(Message::new("user", question));
        let mut answer = String::new();
        let result = {
            let _quiet = signals::without_echo();
            self.answer(&mut answer)
        };
        let is_interrupted = match result {
            Ok(()) => false,
            // Ctrl-C ends the answer, not the conversation.
            Err(e) if e.kind() == ErrorKind::Interrupted => {
                signals::start_again(&self.interrupt);
                true
            }
            Err(e) if matches!(e.kind(), ErrorKind::Argument | ErrorKind::TooLarge) => {
                terminal::note(format_args!("upg: {e}"));
                self.turns.pop();
                return Ok(false);
            }
            Err(e) => return Err(e),
        };
        signals::check_end()?;
        if is_interrupted && answer.trim().is_empty() {
            self.turns.pop();
            terminal::note("upg: stopped before the first word; the question is taken back");
            return Ok(false);
        }
        self.turns.push(Message::new("assistant", answer));
        Ok(true)
    }

    /// Prints the answer as it is generated and appends it to `answer`,
    /// even if it ends with an error.
    fn answer(&mut self, answer: &mut String) -> Result<()> {
        let prompt = self.prompt()?;
        let length = prompt.len();
        let most = self.options.max_tokens.unwrap_or(usize::MAX);
        let mut request = self.model.request(prompt, most);
        request.sampler = Sampler::new(self.options.sampling.clone())?;
        self.model.stop_at(&mut request, &self.args.sampling.stop);
        // Each answer has a seed of its own.
        let seed = &mut self.options.sampling.seed;
        *seed = seed.wrapping_add(1);
        let mut stream = self.scheduler.stream(request)?;
        compute_prompt(&mut stream);
        let mut wrap = Wrap::new(terminal::columns().filter(|_| !self.args.no_wrap));
        let finished = stream.by_ref().try_for_each(|piece| {
            let piece = piece?;
            answer.push_str(&piece);
            terminal::print(&wrap.push(&piece))
        });
        if !answer.is_empty() || finished.is_ok() {
            terminal::print(&(wrap.finish() + "\n"))?;
        }
        let (timings, reason) = (stream.timings(), stream.finish_reason());
        if self.args.stats {
            terminal::note(format_args!(
                "[first token after {:.2} s, then {:.1} tokens/s; {} tokens; context {} of {}]",
                timings.prompt_time.as_secs_f64(),
                timings.step_rate(),
                timings.generated_tokens,
                length + timings.generated_tokens,
                self.context
            ));
        }
        match reason {
            // The next question makes room.
            Some(FinishReason::ContextFull) => terminal::note("upg: cut: the context is full"),
            reason => note_cut(reason, self.options.max_tokens),
        }
        finished
    }

    /// Returns the tokens of the conversation. Where they leave no room for an answer, the model no
    /// longer sees the oldest turns.
    ///
    /// Errors: those of the template and the tokenizer; `TooLarge` if the last question alone does
    /// not fit.
    fn prompt(&mut self) -> Result<Vec<u32>> {
        let room = (self.context / ANSWER_SHARE).min(self.options.max_tokens.unwrap_or(usize::MAX));
        let mut tokens = self.encode()?;
        if tokens.len() + room <= self.context {
            return Ok(tokens);
        }
        let before = self.left_out;
        // More than necessary, because a prompt with another beginning is computed anew.
        while self.left_out + 1 < self.turns.len() && tokens.len() > self.context / 2 {
            self.left_out = (self.left_out + 2).min(self.turns.len() - 1);
            tokens = self.encode()?;
        }
        if tokens.len() < self.context {
            if self.left_out > before {
                let oldest = questions(&self.turns[..self.left_out]);
                terminal::note(format_args!(
                    "upg: the context is full; the model no longer sees the oldest {oldest}"
                ));
            }
            return Ok(tokens);
        }
        // The question is taken back, so the model still sees the others.
        self.left_out = before;
        let message = format!(
            "the question has {} tokens with the template; the context has {}",
            tokens.len(),
            self.context
        );
        Err(Error::new(ErrorKind::TooLarge, message).hint("shorten it; --context sets the size"))
    }

    fn encode(&self) -> Result<Vec<u32>> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<_> = system
            .chain(self.turns[self.left_out..].iter().cloned())
            .collect();
        let text = self.template.render(&messages, true)?;
        let options = EncodeOptions {
            add_special: false,
            interrupt: Some(&self.interrupt),
            ..EncodeOptions::default()
        };
        self.model.tokenizer()?.encode_with(&text, options)
    }
}

/// Returns the number of questions in words.
fn questions(turns: &[Message]) -> String {
    match turns.iter().filter(|turn| turn.role == "user").count() {
        1 => "1 question".to_owned(),
        n => format!("{n} questions"),
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}
