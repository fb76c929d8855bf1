//! With the feature `metal`: compiles `kernels/spmv.metal` for the GPU where Xcode is there, so
//! that programs need not.
//!
//! `UPG_METALLIB` names a compiled file to take instead, or `none`. Without one the library
//! compiles the source when it is first used, which every system with Metal can.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "kernels/spmv.metal";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(upg_metallib)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rerun-if-env-changed=UPG_METALLIB");
    let is_apple = std::env::var("CARGO_CFG_TARGET_VENDOR").is_ok_and(|vendor| vendor == "apple");
    if !is_apple || std::env::var_os("CARGO_FEATURE_METAL").is_none() {
        return;
    }
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo"));
    let library = folder.join("spmv.metallib");
    let is_made = match std::env::var_os("UPG_METALLIB") {
        Some(none) if none == "none" => false,
        Some(path) => {
            let path = Path::new(&path);
            println!("cargo::rerun-if-changed={}", path.display());
            // Somebody asked for this one.
            let copied = std::fs::copy(path, &library);
            copied.unwrap_or_else(|e| panic!("UPG_METALLIB, {}: {e}", path.display()));
            true
        }
        None => compile(&library),
    };
    if is_made {
        println!("cargo::rustc-cfg=upg_metallib");
    }
}

/// With the compiler of Xcode, which not every Mac has. Whether it did; a warning says what it does
/// not like.
fn compile(library: &Path) -> bool {
    let sdk = match std::env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos") => "macosx",
        Ok("ios") => "iphoneos",
        _ => return false,
    };
    let mut xcrun = Command::new("xcrun");
    xcrun
        .args(["-sdk", sdk, "metal", "-O3", "-o"])
        .arg(library)
        .arg(SOURCE);
    let Ok(out) = xcrun.output() else {
        return false;
    };
    let said = String::from_utf8_lossy(&out.stderr);
    for line in said.lines().filter(|line| line.contains(SOURCE)) {
        println!("cargo::warning={line}");
    }
    out.status.success()
}
