//! Builds what has a target configuration of its own. The libraries that emulators are started with, a file each, are compiled by rustc
//! itself (`env!("UMBRA_SEED")` for Bochs, `env!("UMBRA_TURNS")` for QEMU). The firmware is built by a nested cargo call, and this says where it is:
//!
//! * to this crate: `env!("UMBRA_FIRMWARE")`, the path of the main image, for `include_bytes!`;
//! * to the build scripts of crates that depend on this one: `DEP_UMBRA_FIRMWARE_DIR`, the directory with all images.
//!
//! The nested call has its own target directory inside `OUT_DIR`, so it never waits for the lock that the outer call holds. The image is
//! the same, byte for byte, wherever the workspace and cargo's home lie.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "firmware";
const MAIN_IMAGE: &str = "umbra-firmware";

/// Set for or by the outer call, and not to be inherited: flags and wrappers (clippy's, say), and what would change profile or place.
const NOT_INHERITED: &[&str] =
    &["RUSTFLAGS", "RUSTDOCFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CLIPPY_ARGS", "CLIPPY_CONF_DIR", "CARGO_INCREMENTAL"];
const NOT_INHERITED_PREFIXES: &[&str] =
    &["CARGO_BUILD_", "CARGO_PROFILE_", "CARGO_CFG_", "CARGO_FEATURE_", "CARGO_PKG_", "CARGO_MANIFEST_", "DEP_"];

fn main() -> Result<(), Box<dyn Error>> {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from).ok_or(format!("cargo did not set {name}"));
    let workspace = variable("CARGO_MANIFEST_DIR")?.parent().ok_or("no workspace above")?.to_owned();
    let out = variable("OUT_DIR")?;
    for input in ["guest-fw", "shared", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");

    let built = build(&workspace, &out.join("firmware-target"))?;
    let images = out.join("firmware");
    collect(&built, &images)?;
    println!("cargo::rustc-env=UMBRA_FIRMWARE={}", images.join(MAIN_IMAGE).display());
    println!("cargo::metadata=dir={}", images.display());

    for name in ["seed", "turns"] {
        let library = out.join(name).with_extension("so");
        preload(name, &workspace.join("monitor/preload").join(name).with_extension("rs"), &library)?;
        println!("cargo::rustc-env=UMBRA_{}={}", name.to_uppercase(), library.display());
    }
    Ok(())
}

/// Compiles a shared library of one file, without the C library and without symbols that would tell where it was.
fn preload(name: &str, source: &Path, library: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={}", source.display());
    let mut rustc = Command::new(env::var_os("RUSTC").ok_or("cargo did not set RUSTC")?);
    rustc
        .args(["--edition", "2024", "--crate-name", name, "--crate-type", "cdylib", "--target", TARGET])
        .args([
            "-Cpanic=abort",
            "-Copt-level=2",
            "-Cstrip=symbols",
            "-Clink-arg=-nostdlib",
            "-Clink-arg=-Wl,--build-id=none",
            "-o",
        ])
        .arg(library)
        .arg(source);
    let status = rustc.status()?;
    if !status.success() {
        return Err(format!("the build of {} ended with {status}", source.display()).into());
    }
    Ok(())
}

/// Runs the nested cargo and returns the directory that its images are in.
fn build(workspace: &Path, target_directory: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let mut cargo = Command::new(env::var_os("CARGO").ok_or("cargo did not set CARGO")?);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if NOT_INHERITED.contains(&&*text) || NOT_INHERITED_PREFIXES.iter().any(|prefix| text.starts_with(prefix)) {
            cargo.env_remove(&name);
        }
    }
    cargo
        .current_dir(workspace)
        .args(["build", "--package", "umbra-guest-fw", "--bins", "--profile", PROFILE, "--target", TARGET])
        .arg("--target-dir")
        .arg(target_directory)
        // Newer cargo versions may keep intermediate files apart, in a place of the user's choice that the outer call has locked.
        .env("CARGO_BUILD_BUILD_DIR", target_directory)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(workspace).join("\u{1f}"));
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("the firmware's build ended with {status}").into());
    }
    Ok(target_directory.join(TARGET).join(PROFILE))
}

/// In place of the workspace's flags (`.cargo/config.toml` links the monitor statically against a C library, which the firmware lacks).
fn flags(workspace: &Path) -> Vec<String> {
    let mut flags = vec![
        "-Crelocation-model=static".to_owned(),
        "-Ccode-model=small".to_owned(),
        "-Ctarget-feature=-crt-static".to_owned(),
        "-Cforce-unwind-tables=no".to_owned(),
    ];
    // The last prefix that matches wins, and either directory may lie in the other.
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let mut prefixes = vec![(workspace.to_owned(), "/umbra")];
    prefixes.extend(home.map(|home| (home, "/cargo")));
    prefixes.sort_by_key(|(path, _)| path.as_os_str().len());
    flags.extend(prefixes.iter().map(|(path, name)| format!("--remap-path-prefix={}={name}", path.display())));
    flags
}

/// Copies the images, and nothing else, to a directory of their own.
fn collect(built: &Path, images: &Path) -> Result<(), Box<dyn Error>> {
    if images.exists() {
        fs::remove_dir_all(images)?;
    }
    fs::create_dir_all(images)?;
    for entry in fs::read_dir(built)? {
        let entry = entry?;
        let name = entry.file_name();
        // Beside them lie dependency files (`.d`) and cargo's lock (`.cargo-lock`).
        if entry.file_type()?.is_file() && !name.to_string_lossy().contains('.') {
            fs::copy(entry.path(), images.join(name))?;
        }
    }
    Ok(())
}
