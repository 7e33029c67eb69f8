//! Puts the BPF object of the measurements where `bench::fastpath` embeds it from: the file that
//! `cargo xtask build` names in DISPATCHER_BENCH_OBJECT, or nothing.

use std::{env, fs, path::PathBuf};

const OBJECT: &str = "DISPATCHER_BENCH_OBJECT";

fn main() {
    println!("cargo::rerun-if-env-changed={OBJECT}");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bench.bpf");
    let object = match env::var_os(OBJECT) {
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo::rerun-if-changed={}", path.display());
            fs::read(&path).unwrap_or_else(|error| panic!("reading {OBJECT}={}: {error}", path.display()))
        }
        None => Vec::new(),
    };
    fs::write(&out, object).unwrap_or_else(|error| panic!("writing {}: {error}", out.display()));
}
