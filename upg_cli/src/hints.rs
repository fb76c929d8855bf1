//! Commands and options of other programs, and what to say to this one.
#![forbid(unsafe_code)]

use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::ffi::OsString;

/// Options of llama.cpp and ollama that are spelled otherwise here, or are not needed.
const OPTIONS: [(&[&str], &str); 15] = [
    (
        &["-m", "--model"],
        "the model comes first: upg run MODEL TEXT",
    ),
    (
        &["-hf", "-hfr", "--hf-repo"],
        "the name of the model comes first: upg run user/model:Q8_0 TEXT",
    ),
    (
        &["-ngl", "--gpu-layers", "--n-gpu-layers"],
        "there are no layers to move to a GPU; leave it out",
    ),
    (&["-sys", "--system-prompt"], "use --system TEXT"),
    (
        &["-st", "--single-turn"],
        "upg run answers once; leave it out",
    ),
    (
        &["-cnv", "--conversation", "-i", "--interactive"],
        "use upg chat",
    ),
    (&["-no-cnv", "--no-conversation"], "use --raw"),
    (
        &["-ctk", "-ctv", "--cache-type-v"],
        "use --cache-type, for keys and values",
    ),
    (&["-r", "--reverse-prompt"], "use --stop TEXT"),
    (&["-tb", "--threads-batch"], "use --threads, for everything"),
    (
        &["--flash-attn", "--jinja", "--mlock", "-np"],
        "there is nothing to choose; leave it out",
    ),
    (
        &["-b", "--batch-size", "-ub", "--ubatch-size"],
        "prompts are computed in pieces of a fitting size; leave it out",
    ),
    (&["--no-display-prompt"], "only --raw repeats the prompt"),
    (
        &["--verbose", "-v", "--log-verbose"],
        "use --stats for figures; upg --version --verbose lists the kernels",
    ),
    (&["--chat-template-kwargs"], "use --template-arg NAME=VALUE"),
];

/// Commands of llama.cpp, ollama and MLX.
const COMMANDS: [(&[&str], &str); 8] = [
    (
        &["quantize", "quant", "imatrix", "create"],
        "upg compress SOURCE -o FILE",
    ),
    (
        &["serve", "server", "ps"],
        "there is no server; upg chat, or upg run --json",
    ),
    (&["version"], "upg --version"),
    (&["cli", "generate", "complete", "completion"], "upg run"),
    (&["perplexity", "ppl"], "upg eval"),
    (&["download", "get", "fetch"], "upg pull"),
    (&["remove", "delete"], "upg rm"),
    (&["info", "dump"], "upg inspect FILE, or upg show NAME"),
];

/// Returns what to use in place of the command or option that `error` is about, if it is known
/// from another program.
pub fn of(error: &clap::Error, arguments: &[OsString]) -> Option<String> {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    match error.kind() {
        ErrorKind::InvalidSubcommand => {
            let word = context(ContextKind::InvalidSubcommand)?;
            let (_, instead) = COMMANDS.iter().find(|(names, _)| names.contains(&word))?;
            Some(format!("there is no command {word}: {instead}"))
        }
        // clap reads -hf as -h.
        ErrorKind::DisplayHelp => {
            let is_meant = |name: &&str| name.starts_with("-h") && *name != "-h";
            let argument = arguments.iter().filter_map(|a| a.to_str());
            argument.filter(is_meant).find_map(option)
        }
        // clap reads -ngl as -n with the value gl.
        ErrorKind::UnknownArgument | ErrorKind::ValueValidation | ErrorKind::InvalidValue => {
            let is_meant = |argument: &str| {
                let unknown = context(ContextKind::InvalidArg).is_some_and(|found| {
                    found == argument
                        || (!argument.starts_with("--") && argument.starts_with(found))
                });
                let value = context(ContextKind::InvalidValue);
                unknown || value.is_some_and(|v| argument.get(2..).is_some_and(|rest| rest == v))
            };
            let argument = arguments.iter().filter_map(|a| a.to_str());
            let named = argument.map(|a| a.split_once('=').map_or(a, |(name, _)| name));
            named.filter(|name| is_meant(name)).find_map(option)
        }
        _ => None,
    }
}

/// Returns what to use in place of an option of another program.
fn option(name: &str) -> Option<String> {
    let (_, instead) = OPTIONS.iter().find(|(names, _)| names.contains(&name))?;
    Some(format!("{name} is an option of another program: {instead}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;

    fn hint(arguments: &[&str]) -> Option<String> {
        let arguments: Vec<OsString> = ["upg"]
            .iter()
            .chain(arguments)
            .map(OsString::from)
            .collect();
        let error = Cli::try_parse_from(&arguments).err()?;
        of(&error, &arguments)
    }

    #[test]
    fn spellings_of_other_programs_are_known() {
        for (names, instead) in OPTIONS {
            for name in names {
                let alone = hint(&["run", "m.st", name]);
                let with_value = hint(&["run", "m.st", name, "4", "-p", "text"]);
                for found in [alone, with_value] {
                    let found = found.unwrap_or_default();
                    assert!(
                        found.starts_with(name) && found.ends_with(instead),
                        "{name}: {found}"
                    );
                }
            }
        }
        for (names, instead) in COMMANDS {
            for name in names {
                assert!(
                    hint(&[name, "x"]).is_some_and(|h| h.ends_with(instead)),
                    "{name}"
                );
            }
        }
        assert!(hint(&["run", "--model=m.st", "text"]).is_some());
    }

    #[test]
    fn other_errors_have_no_hint() {
        for arguments in [
            &["run", "m.st", "-n", "x"][..],
            &["run", "m.st", "--bogus"],
            &["run", "m.st", "-p", "-m", "--bogus"],
            &["bogus"],
            &["run"],
        ] {
            assert_eq!(hint(arguments), None, "{arguments:?}");
        }
    }
}
