//! llama.cpp on the same machine: one run of its `llama-bench` per figure.
#![forbid(unsafe_code)]

use crate::cli::MeasureArgs;
use serde_json::Value;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use upg_kernel::{Error, ErrorKind, Result};

const PROGRAM: &str = "llama-bench";

/// GGUF file, and the program to measure it with.
pub struct Llama {
    pub gguf: PathBuf,
    program: PathBuf,
    about: RefCell<About>,
}

/// Model and build as reported by `llama-bench`.
#[derive(Clone, Default)]
pub struct About {
    pub model: Option<String>,
    pub model_bytes: Option<u64>,
    pub build: Option<String>,
}

impl Llama {
    /// Returns one value per file to compare with.
    ///
    /// Errors: `Io` if a file does not exist, `Missing` if the program does not.
    pub fn find(args: &MeasureArgs) -> Result<Vec<Self>> {
        let Some(first) = args.compare_llama.first() else {
            return Ok(Vec::new());
        };
        for gguf in &args.compare_llama {
            std::fs::File::open(gguf).map_err(|e| Error::io("cannot open", gguf, e))?;
        }
        let program = match &args.llama_bench {
            Some(path) => path.is_file().then(|| path.clone()),
            None => on_the_path(),
        };
        let program = program.ok_or_else(|| {
            let wanted = args.llama_bench.as_deref().unwrap_or(Path::new(PROGRAM));
            let message = format!("no program '{}' to measure it with", wanted.display());
            Error::new(ErrorKind::Missing, message)
                .at(first)
                .hint("install llama.cpp and name its llama-bench with --llama-bench")
        })?;
        let with_program = |gguf: &PathBuf| Self {
            gguf: gguf.clone(),
            program: program.clone(),
            about: RefCell::default(),
        };
        Ok(args.compare_llama.iter().map(with_program).collect())
    }

    /// Returns what `llama-bench` reported in its last run.
    pub fn about(&self) -> About {
        self.about.borrow().clone()
    }

    /// Measures the tokens per second of a prompt.
    pub fn prefill(&self, tokens: usize) -> Result<f64> {
        self.run(tokens, 0, 0)
    }

    /// Measures the tokens per second of decoding, after `depth` positions of context.
    pub fn decode(&self, tokens: usize, depth: usize) -> Result<f64> {
        self.run(0, tokens, depth)
    }

    fn run(&self, prompt: usize, generate: usize, depth: usize) -> Result<f64> {
        let threads = rayon::current_num_threads();
        let numbers = [
            ("-p", prompt),
            ("-n", generate),
            ("-d", depth),
            ("-t", threads),
            ("-r", 1),
        ];
        let mut command = Command::new(&self.program);
        command.arg("-m").arg(&self.gguf).args(["-o", "json"]);
        for (option, number) in numbers {
            command.arg(option).arg(number.to_string());
        }
        let done = command
            .stdin(Stdio::null())
            .output()
            .map_err(|e| Error::io("cannot run", &self.program, e))?;
        let failed = |message: String| {
            Err(Error::new(ErrorKind::Invalid, format!("{PROGRAM}: {message}")).at(&self.gguf))
        };
        if !done.status.success() {
            let errors = String::from_utf8_lossy(&done.stderr);
            let last = errors.lines().rfind(|line| !line.trim().is_empty());
            return failed(format!("{}: {}", done.status, last.unwrap_or("no message")));
        }
        let json: Value = match serde_json::from_slice(&done.stdout) {
            Ok(json) => json,
            Err(e) => return failed(format!("its output is not JSON: {e}")),
        };
        *self.about.borrow_mut() = about(&json[0]);
        match json[0]["avg_ts"].as_f64() {
            Some(rate) if rate > 0.0 => Ok(rate),
            found => failed(format!("'avg_ts' is {found:?}, expected tokens per second")),
        }
    }
}

fn on_the_path() -> Option<PathBuf> {
    let name = format!("{PROGRAM}{}", std::env::consts::EXE_SUFFIX);
    let path = std::env::var_os("PATH")?;
    let places = std::env::split_paths(&path).map(|folder| folder.join(&name));
    places.into_iter().find(|place| place.is_file())
}

fn about(run: &Value) -> About {
    let text = |key: &str| run[key].as_str().map(str::to_owned);
    About {
        model: text("model_type"),
        model_bytes: run["model_size"].as_u64(),
        build: text("build_commit"),
    }
}
