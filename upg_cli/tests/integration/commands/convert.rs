//! `upg convert`, and other commands on version 1 files.

#[cfg(unix)]
use crate::common::waiting_for_its_prompt;
use crate::common::{data, names, output, succeed, succeed_json, upg};
use std::fs;
use std::path::PathBuf;
use upg_kernel::format::UpgFile;

fn v1(name: &str) -> PathBuf {
    data("v1").join(name)
}

/// Runs a command; returns the exit code, standard output and standard error.
fn run<const N: usize>(args: [&str; N]) -> (Option<i32>, String, String) {
    output(&mut upg(args))
}

#[test]
fn an_old_file_becomes_what_the_python_script_makes_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("new.safetensors");
    let out = out.to_str().unwrap();
    let old = v1("numpy2-p5-csr.upg");
    let (code, said, _) = run(["convert", old.to_str().unwrap(), out]);
    assert_eq!(code, Some(0));
    assert!(
        said.contains("3 matrices as mdcsr and 1 vectors, 1.1 %"),
        "{said}"
    );
    assert!(said.contains("cannot be run; --model DIR"), "{said}");
    let expected = fs::read(v1("rows.safetensors")).unwrap();
    assert!(fs::read(out).unwrap() == expected);
    // Again with the option, over the existing file.
    succeed(["convert", old.to_str().unwrap(), "-o", out]);
    succeed(["verify", out]);
    assert_eq!(names(folder.path()), ["new.safetensors"]);
}

#[test]
fn an_old_file_gets_its_config_and_another_encoding_in_one_go() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (model, old) = (v1("model"), v1("model/tiny.upg"));
    let (model, old) = (model.to_str().unwrap(), old.to_str().unwrap());
    let said = succeed(["convert", old, &at("plain"), "--model", model]);
    assert!(!said.contains("cannot be run"), "{said}");
    let logits = |file: &str, out: &str| {
        succeed(["run", file, "--tokens", "1,5,9", "--logits", out]);
        fs::read(out).unwrap()
    };
    let of_plain = logits(&at("plain"), &at("logits"));
    // The version 1 file gives the same output, with a warning.
    let args = [
        "run",
        old,
        "--tokens",
        "1,5,9",
        "--logits",
        &at("logits of old"),
    ];
    let (code, _, warned) = run(args);
    assert_eq!(code, Some(0));
    assert!(
        warned.contains("deprecated") && warned.contains("upg convert"),
        "{warned}"
    );
    assert_eq!(fs::read(at("logits of old")).unwrap(), of_plain);

    // 30 % of the weights are zero: s8 is smaller than q8, s4 is not smaller than q4.
    for (to, embedding) in [("q4", "s8"), ("t3", "q4"), ("keep", "keep")] {
        let out = at(to);
        let said = succeed(["convert", old, &out, "--model", model, "--to", to]);
        assert!(said.contains("bits per weight"), "{said}");
        succeed(["verify", &out]);
        let file = UpgFile::open(&out).unwrap();
        let encoding = |name: &str| match file.layer_id(name) {
            Some(id) => file.layers()[id].encoding_name().to_owned(),
            None => "keep".to_owned(),
        };
        assert_eq!(encoding("model.layers.0.mlp.down_proj.weight"), to);
        assert_eq!(encoding("model.embed_tokens.weight"), embedding);
        logits(&out, &at("logits"));
    }
    // Uncompressed weights equal those of the old file.
    assert_eq!(fs::read(at("logits")).unwrap(), of_plain);
    // Works without a config, and as a source of `compress` with the config beside it.
    succeed(["convert", old, &at("no-config"), "--to", "q4"]);
    let (code, _, said) = run(["run", &at("no-config"), "-p", "x"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("no config.json"), "{said}");
    succeed([
        "compress",
        old,
        "-o",
        &at("compressed"),
        "-e",
        "q4",
        "--no-calibrate",
    ]);
    let [compressed, converted] = [at("compressed"), at("q4")].map(|f| fs::read(f).unwrap());
    assert!(compressed == converted);
}

/// A command that is killed while it runs an old file leaves no temporary file.
#[cfg(unix)]
#[test]
fn nothing_is_left_of_an_old_file_that_was_opened() {
    let folder = tempfile::tempdir().unwrap();
    let old = v1("model/tiny.upg");
    let mut command = upg(["run", old.to_str().unwrap(), "-p", "-"]);
    let (mut running, _input) = waiting_for_its_prompt(command.env("TMPDIR", folder.path()));
    assert_eq!(names(folder.path()), [""; 0]);
    running.kill().unwrap();
    let ended = running.wait_with_output().unwrap();
    let warning = String::from_utf8(ended.stderr).unwrap();
    assert!(warning.contains("deprecated"), "{warning}");
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn catalogues_are_shown() {
    let catalogue = v1("catalogue.upg");
    let table = succeed(["inspect", catalogue.to_str().unwrap()]);
    for part in [
        "UPG 1 (a Python pickle)",
        "model phi-4-upg, made of microsoft/phi-4, by prime_sparse_v1, target 10.0",
        "model.layers.0.mlp.down_proj.weight          5 x 700  bfloat16",
        "a list of 4 tensors only: the file has no weights",
    ] {
        assert!(table.contains(part), "{table}");
    }
    let json = succeed_json(["inspect", "--json", catalogue.to_str().unwrap()]);
    assert_eq!(json["tensors"][0]["shape"], serde_json::json!([5, 700]));
    assert_eq!(json["tensors"][0]["weights"], false);
    assert_eq!(json["tensors"][0]["notes"]["sparsity_level"], 0.5);
    let whole = v1("numpy1-p4-one.upg");
    let table = succeed(["inspect", whole.to_str().unwrap()]);
    assert!(table.contains("4 tensors; `upg convert` makes"), "{table}");
}

#[test]
fn what_is_no_old_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(at("text"), "no model").unwrap();
    fs::write(
        at("hostile"),
        b"\x80\x04cos\nsystem\n(X\x06\x00\x00\x00touch xtR.",
    )
    .unwrap();
    let old = v1("model/tiny.upg");
    let catalogue = v1("catalogue.upg");
    let new = v1("rows.safetensors");
    let [old, catalogue, new] = [&old, &catalogue, &new].map(|path| path.to_str().unwrap());
    let before = names(folder.path());
    for (file, more, code, says) in [
        (&at("none")[..], &[][..], 1, "No such file"),
        (&at("text"), &[], 1, "not a version 1 UPG file"),
        (new, &[], 1, "needs no conversion"),
        (&at("hostile"), &[], 1, "the global 'os.system'"),
        (
            catalogue,
            &[],
            1,
            "upg compress microsoft/phi-4 -o phi-4.safetensors",
        ),
        (catalogue, &["--to", "q4"], 1, "has the weights of none"),
        (old, &["--model", &at("none")], 1, "no config.json"),
        (old, &["--to", "q5"], 2, "q5"),
        (old, &["--buffers", &at("none")], 1, "none"),
    ] {
        let args = ["convert", file, "-o", &at("out")];
        let (found, _, stderr) = output(&mut upg(args.iter().chain(more)));
        assert_eq!(found, Some(code), "{file} {more:?}: {stderr}");
        assert!(stderr.contains(says), "{file} {more:?}: {stderr}");
        assert_eq!(names(folder.path()), before);
    }
    let (code, _, _) = run(["convert", old]);
    assert_eq!(code, Some(2));
    for command in [["verify", old], ["bench", old]] {
        let (code, _, stderr) = run(command);
        assert_eq!(code, Some(1), "{stderr}");
        assert!(
            stderr.contains("upg convert OLD NEW.safetensors"),
            "{stderr}"
        );
    }
}
