//! Compiler and runner of `.metal` files on the CPU with clang: see `machine.h`.

mod translate;

use crate::metal_kernels::{Element, Operand, Plan};
use crate::prime_lut::PRIME_LUT;
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use tempfile::TempDir;

/// Oldest version that the options below work with.
const OLDEST_CLANG: u32 = 15;

const NAMES: [&str; 9] = [
    "clang++",
    "clang++-22",
    "clang++-21",
    "clang++-20",
    "clang++-19",
    "clang++-18",
    "clang++-17",
    "clang++-16",
    "clang++-15",
];

/// Returns the C++ compiler of clang: `UPG_CLANG`, or one of the system;
/// `None` below version 15.
pub(super) fn clang() -> Option<String> {
    match std::env::var("UPG_CLANG")
        .ok()
        .filter(|name| !name.is_empty())
    {
        Some(name) => {
            let is_new = version(&name).is_some_and(|version| version >= OLDEST_CLANG);
            assert!(
                is_new,
                "UPG_CLANG, {name}, is no clang++ from {OLDEST_CLANG} on"
            );
            Some(name)
        }
        None => NAMES
            .into_iter()
            .find(|name| version(name).is_some_and(|version| version >= OLDEST_CLANG))
            .map(String::from),
    }
}

/// Returns the major version of a compiler that is clang.
fn version(clang: &str) -> Option<u32> {
    let macros = ["-dM", "-E", "-x", "c++", "/dev/null"];
    let defined = Command::new(clang).args(macros).output().ok()?.stdout;
    let defined = String::from_utf8_lossy(&defined).into_owned();
    let major = defined.split("#define __clang_major__ ").nth(1)?;
    major.split_whitespace().next()?.parse().ok()
}

/// Compiled `.metal` file.
pub(super) struct Program {
    executable: PathBuf,
}

/// Outputs of the kernels of a job, for one schedule.
pub(super) struct Left {
    pub(super) y: Vec<u8>,
    pub(super) rotated: Vec<f32>,
}

/// Input of a run.
pub(super) struct Job<'a> {
    pub(super) plan: &'a Plan<'a>,
    /// Input vectors as bytes.
    pub(super) x: &'a [u8],
    pub(super) element: Element,
    /// Number of output elements.
    pub(super) outputs: usize,
    pub(super) schedules: &'a [u32],
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/metal_on_cpu")
}

fn checked(command: &mut Command) -> Result<Vec<u8>, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    match out.status.success() {
        true => Ok(out.stdout),
        false => Err(String::from_utf8_lossy(&out.stderr).into_owned()),
    }
}

/// Translates the file to C++, in `folder`.
fn translated(
    clang: &str,
    source: &str,
    chosen: impl Fn(&str) -> bool,
    is_checked: bool,
    folder: &Path,
) -> Result<PathBuf, String> {
    const NAME: &str = "spmv.metal";
    std::fs::write(folder.join(NAME), source).map_err(|e| e.to_string())?;
    let preprocessed = checked(
        Command::new(clang)
            .args([
                "-E",
                "-x",
                "c++",
                "-std=c++17",
                "-D__METAL_VERSION__=310",
                "-I",
            ])
            .arg(here().join("stub"))
            // Keeps the path out of the text.
            .current_dir(folder)
            .arg(NAME),
    )?;
    let cpp = translate::to_cpp(&String::from_utf8_lossy(&preprocessed), chosen, is_checked)?;
    let path = folder.join(if is_checked {
        "checked.cpp"
    } else {
        "kernels.cpp"
    });
    std::fs::write(&path, cpp).map_err(|e| e.to_string())?;
    Ok(path)
}

/// Options for all compilations.
///
/// Metal's compiler knows attributes that clang does not, and its `char` is always signed.
const OPTIONS: [&str; 4] = [
    "-std=c++17",
    "-fsigned-char",
    "-Wno-unknown-attributes",
    "-Wno-unknown-pragmas",
];

/// Checks the types of a `.metal` file, including address spaces. Errors: those of clang.
pub(super) fn check(clang: &str, source: &str) -> Result<(), String> {
    let folder = TempDir::new().map_err(|e| e.to_string())?;
    let cpp = translated(clang, source, |_| true, true, folder.path())?;
    checked(
        Command::new(clang)
            .args(OPTIONS)
            // Metal is C++14; the C++17 in the headers here does not count.
            .args([
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wpre-c++17-compat",
                "-fsyntax-only",
                "-DMETAL_ADDRESS_SPACES",
            ])
            .arg("-isystem")
            .arg(here().join("include"))
            .arg("-isystem")
            .arg(here())
            .arg(cpp),
    )
    .map(|_| ())
}

/// Returns the names of the kernels of a `.metal` file.
pub(super) fn kernels(clang: &str, source: &str) -> Result<Vec<String>, String> {
    let names = std::cell::RefCell::new(Vec::new());
    let folder = TempDir::new().map_err(|e| e.to_string())?;
    let chosen = |name: &str| {
        names.borrow_mut().push(name.to_string());
        true
    };
    translated(clang, source, chosen, true, folder.path())?;
    Ok(names.into_inner())
}

/// Compiles `from` to `to`.
fn compile(clang: &str, options: &[&str], from: &Path, to: PathBuf) -> Result<PathBuf, String> {
    let mut command = Command::new(clang);
    command.args(OPTIONS).args(options).arg("-c");
    command
        .arg("-I")
        .arg(here().join("include"))
        .arg("-I")
        .arg(here());
    command.arg(from).arg("-o").arg(&to);
    checked(&mut command).map(|_| to)
}

/// Returns a folder for results that depend only on these texts, in cargo's build folder.
///
/// `make` fills it if it does not exist.
fn built(
    texts: &[&[u8]],
    make: impl FnOnce(&Path) -> Result<(), String>,
) -> Result<PathBuf, String> {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update(text.len().to_le_bytes());
        hash.update(text);
    }
    let name: String = hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let all = Path::new(env!("OUT_DIR")).join("metal_on_cpu");
    let folder = all.join(name);
    if !folder.exists() {
        std::fs::create_dir_all(&all).map_err(|e| e.to_string())?;
        let new = TempDir::new_in(&all).map_err(|e| e.to_string())?;
        make(new.path())?;
        // Another test may have been faster, with the same result.
        if std::fs::rename(new.path(), &folder).is_ok() {
            let _moved = new.keep();
        }
    }
    Ok(folder)
}

/// Returns the compiler's version text: another compiler makes other programs.
fn called(clang: &str) -> Result<Vec<u8>, String> {
    checked(Command::new(clang).arg("--version"))
}

/// Compiles the code that is linked to the kernels, once.
fn machine(clang: &str) -> Result<PathBuf, String> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _alone = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let texts =
        ["machine.cpp", "job.cpp", "machine.h"].map(|name| std::fs::read(here().join(name)));
    let mut all = vec![called(clang)?, OPTIONS.concat().into_bytes()];
    for text in texts {
        all.push(text.map_err(|e| e.to_string())?);
    }
    let all: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    built(&all, |folder| {
        for name in ["machine", "job"] {
            let from = here().join(name).with_extension("cpp");
            let to = folder.join(name).with_extension("o");
            compile(clang, &["-O2"], &from, to)?;
        }
        Ok(())
    })
}

impl Program {
    /// Compiles the kernels of a `.metal` file whose names are `chosen`, with `options`.
    ///
    /// Errors: those of clang.
    pub(super) fn new(
        clang: &str,
        source: &str,
        chosen: impl Fn(&str) -> bool,
        options: &[&str],
    ) -> Result<Self, String> {
        let folder = TempDir::new().map_err(|e| e.to_string())?;
        let cpp = translated(clang, source, chosen, false, folder.path())?;
        // Hooks before memory accesses, which machine.cpp defines, and traps on undefined behavior.
        // Uninitialized locals are not 0.
        let kernels = [
            "-O1",
            "-fsanitize=thread",
            "-mllvm",
            "-tsan-instrument-read-before-write=1",
            "-fsanitize=alignment,shift,integer-divide-by-zero,signed-integer-overflow,bounds,float-cast-overflow",
            "-fsanitize-trap=all",
            "-ftrivial-auto-var-init=pattern",
        ];
        let options = [&kernels, options].concat();
        let machine = machine(clang)?;
        let read = |path: &Path| std::fs::read(path).map_err(|e| e.to_string());
        let texts = [
            read(&cpp)?,
            options.concat().into_bytes(),
            // Identifies the compiler and the linked code.
            machine.as_os_str().as_encoded_bytes().to_vec(),
            read(&here().join("include/metal_stdlib"))?,
        ];
        let executable = built(&texts.each_ref().map(Vec::as_slice), |folder| {
            let kernels = compile(clang, &options, &cpp, folder.join("kernels.o"))?;
            let objects = ["machine.o", "job.o"].map(|name| machine.join(name));
            let mut link = Command::new(clang);
            link.arg(kernels)
                .args(objects)
                .arg("-o")
                .arg(folder.join("run"));
            checked(&mut link).map(|_| ())
        })?;
        Ok(Self {
            executable: executable.join("run"),
        })
    }

    /// Returns the outputs with each schedule. Errors: the first failure of any of them.
    pub(super) fn run(&self, job: &Job<'_>) -> Result<Vec<Left>, String> {
        let input = Encoded::job(job);
        let mut child = Command::new(&self.executable)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| e.to_string())?;
        let mut stdin = child.stdin.take().expect("piped");
        // It reads everything before it writes; if it ends early, its status shows that.
        let _ = stdin.write_all(&input);
        drop(stdin);
        let out = child.wait_with_output().map_err(|e| e.to_string())?;
        if !out.status.success() {
            return Err(format!(
                "{}: {}",
                out.status,
                String::from_utf8_lossy(&out.stderr).trim()
            ));
        }
        let mut out = out.stdout.as_slice();
        let mut outputs = Vec::new();
        for schedule in job.schedules {
            let error = taken(&mut out, None);
            if !error.is_empty() {
                return Err(format!(
                    "schedule {schedule}: {}",
                    String::from_utf8_lossy(&error)
                ));
            }
            // In the order of `Encoded::job`.
            let y = taken(&mut out, Some(job.outputs * job.element.size()));
            let rotated = taken(&mut out, Some(job.plan.rotated * 4));
            let rotated = rotated
                .as_chunks()
                .0
                .iter()
                .map(|x| f32::from_le_bytes(*x))
                .collect();
            outputs.push(Left { y, rotated });
        }
        Ok(outputs)
    }
}

/// Takes `size` bytes, or as many as a number before them says.
fn taken(from: &mut &[u8], size: Option<usize>) -> Vec<u8> {
    let size = size.unwrap_or_else(|| {
        let mut size = [0; 4];
        from.read_exact(&mut size).expect("the output of the job");
        u32::from_le_bytes(size) as usize
    });
    let mut bytes = vec![0; size];
    from.read_exact(&mut bytes).expect("the output of the job");
    bytes
}

/// Job in the format of `job.cpp`.
#[derive(Default)]
struct Encoded {
    buffers: Vec<u8>,
    count: u32,
}

impl Encoded {
    fn job(job: &Job<'_>) -> Vec<u8> {
        let size = job.element.size();
        let mut all = Self::default();
        let y = all.buffer(size, Err(job.outputs * size));
        let rotated = all.buffer(4, Err(job.plan.rotated * 4));
        let x = all.buffer(size, Ok(job.x));
        let primes = all.buffer(4, Ok(bytemuck::cast_slice(&PRIME_LUT)));
        let mut dispatches = Vec::new();
        put(&mut dispatches, job.plan.dispatches.len());
        for dispatch in &job.plan.dispatches {
            put(&mut dispatches, dispatch.kernel.len());
            dispatches.extend(dispatch.kernel.as_bytes());
            // Argument 0 is not a buffer.
            put(&mut dispatches, dispatch.operands.len() + 1);
            dispatches.extend(u32::MAX.to_le_bytes());
            for operand in &dispatch.operands {
                let buffer = match operand {
                    Operand::Weights(weights) => {
                        all.buffer(weights.alignment(), Ok(weights.bytes()))
                    }
                    Operand::Levels(k) => {
                        let levels = Plan::levels(*k).expect("2, 3 or 4");
                        all.buffer(2, Ok(bytemuck::cast_slice(&levels)))
                    }
                    Operand::Primes => primes,
                    Operand::X => x,
                    Operand::Y => y,
                    Operand::Rotated => rotated,
                    Operand::Unused => u32::MAX,
                };
                dispatches.extend(buffer.to_le_bytes());
            }
            let written = match dispatch.written() {
                Operand::Y => y,
                Operand::Rotated => rotated,
                other => unreachable!("{other:?} is not written"),
            };
            dispatches.extend(written.to_le_bytes());
            put(&mut dispatches, dispatch.args.len());
            dispatches.extend(&dispatch.args);
            put(&mut dispatches, dispatch.threadgroup_bytes);
            for number in [
                dispatch.threadgroups[0],
                dispatch.threadgroups[1],
                dispatch.threads,
            ] {
                put(&mut dispatches, number);
            }
        }
        put(&mut dispatches, job.schedules.len());
        for schedule in job.schedules {
            dispatches.extend(schedule.to_le_bytes());
        }
        let mut bytes = all.count.to_le_bytes().to_vec();
        bytes.extend(all.buffers);
        bytes.extend(dispatches);
        bytes
    }

    /// Adds a buffer and returns its number.
    ///
    /// `content` is bytes to read, or the number of bytes that kernels write.
    fn buffer(&mut self, alignment: usize, content: Result<&[u8], usize>) -> u32 {
        put(
            &mut self.buffers,
            content.map_or_else(|size| size, <[u8]>::len),
        );
        put(&mut self.buffers, alignment);
        put(&mut self.buffers, usize::from(content.is_err()));
        self.buffers.extend(content.unwrap_or_default());
        self.count += 1;
        self.count - 1
    }
}

fn put(bytes: &mut Vec<u8>, number: usize) {
    let number = u32::try_from(number).expect("jobs are small");
    bytes.extend(number.to_le_bytes());
}
