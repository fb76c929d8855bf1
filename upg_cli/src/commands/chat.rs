//! `upg chat`.
#![forbid(unsafe_code)]

use super::run::{sampling_options, session_options};
use crate::cli::ChatArgs;
use crate::terminal;
use rustyline::error::ReadlineError;
use std::sync::atomic::Ordering;
use upg_kernel::inference::Sampler;
use upg_kernel::inference::chat_template::Message;
use upg_kernel::{Error, ErrorKind, Result, UPGModel};

pub fn run(args: &ChatArgs) -> Result<()> {
    let model = UPGModel::from_file(&args.file)?;
    let template = model.chat_template()?;
    let tokenizer = model.tokenizer()?;
    let interrupted = terminal::interrupt_flag()?;
    let mut session = model.session(&session_options(&args.sampling))?;
    let mut sampler = Sampler::new(sampling_options(&args.sampling))?;
    let system: Vec<_> = args
        .system
        .iter()
        .map(|text| Message::new("system", text))
        .collect();
    let mut messages = system.clone();
    let mut editor = rustyline::DefaultEditor::new().map_err(|e| input_error(&e))?;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(e) => return Err(input_error(&e)),
        };
        let line = line.trim();
        match line {
            "" => continue,
            "/clear" => {
                messages = system.clone();
                continue;
            }
            "/exit" | "/quit" => return Ok(()),
            _ => {}
        }
        // History is a comfort: a line that it refuses is no reason to stop.
        let _ = editor.add_history_entry(line);
        messages.push(Message::new("user", line));
        let prompt = tokenizer.encode(&template.render(&messages, true)?, false)?;
        interrupted.store(false, Ordering::Relaxed);
        let stop = args.sampling.stop.clone();
        let stream = model.stream(&mut session, &mut sampler, &prompt, args.max_tokens, stop);
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) if e.kind() == ErrorKind::Argument => {
                eprintln!("upg: {e}");
                eprintln!("upg: use /clear to start again");
                messages.pop();
                continue;
            }
            Err(e) => return Err(e),
        };
        let mut answer = String::new();
        for piece in stream {
            let piece = piece?;
            terminal::print(&piece)?;
            answer.push_str(&piece);
            if interrupted.load(Ordering::Relaxed) {
                break;
            }
        }
        terminal::print("\n")?;
        messages.push(Message::new("assistant", answer));
    }
}

fn input_error(e: &ReadlineError) -> Error {
    Error::new(ErrorKind::Io, format!("cannot read the terminal: {e}"))
}
