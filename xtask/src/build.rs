//! `cargo xtask build`: the BPF objects, then the host programs that embed them.

use std::{env, fs, path::PathBuf, process::Command, time::Instant};

use anyhow::{Context as _, Result, bail};

use crate::{
    pins::{self, Need},
    process::{cargo, run_quietly, target_dir},
    setup,
    toolchain::Compiler,
    train,
};

/// Build the BPF objects, then the daemon, the command line and the test programs (release)
///
/// The objects go to target/bpf/bpfel-unknown-none/release/{dispatcher,bench}. The host programs embed
/// them: they are told where by DISPATCHER_BPF_OBJECT and DISPATCHER_BENCH_OBJECT at compile time, so a
/// plain `cargo build` makes a daemon without a data path. The compiler for BPF is looked for as
/// `cargo xtask setup` says; DISPATCHER_BPF_RUSTC=/path/to/rustc overrules that.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Only the BPF objects
    #[arg(long, conflicts_with = "debug_host")]
    bpf_only: bool,
    /// Host programs unoptimised, with all checks (target/debug)
    #[arg(long)]
    debug_host: bool,
    /// The daemon and the command line as they are deployed: optimised as a whole, which takes minutes (target/dist),
    /// and for what `cargo xtask train` saw, if that was run before
    #[arg(long, conflicts_with_all = ["bpf_only", "debug_host"])]
    dist: bool,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let compiler = setup::ensure(Need::Build)?;
    let objects = bpf(&compiler)?;
    if args.bpf_only {
        println!("{}\n{}", objects.dispatcher.display(), objects.bench.display());
        return Ok(());
    }
    let profile = match (args.debug_host, args.dist) {
        (true, _) => Profile::Debug,
        (_, true) => Profile::Dist,
        _ => Profile::Release,
    };
    host(&objects, profile)
}

/// Everything in release, for commands that run what was built.
pub(crate) fn all(compiler: &Compiler) -> Result<Objects> {
    let objects = bpf(compiler)?;
    host(&objects, Profile::Release)?;
    Ok(objects)
}

/// What is deployed, and the programs that measure it.
pub(crate) fn dist(compiler: &Compiler) -> Result<()> {
    host(&bpf(compiler)?, Profile::Dist)
}

/// Where the built BPF objects are.
#[derive(Debug)]
pub(crate) struct Objects {
    pub(crate) dispatcher: PathBuf,
    pub(crate) bench: PathBuf,
}

impl Objects {
    /// Tells the compilation of the host programs which objects to embed.
    pub(crate) fn tell<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("DISPATCHER_BPF_OBJECT", &self.dispatcher).env("DISPATCHER_BENCH_OBJECT", &self.bench)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Profile {
    Debug,
    Release,
    Dist,
}

/// Where a release program of the host is.
pub(crate) fn program(name: &str) -> PathBuf {
    target_dir().join("release").join(name)
}

/// Where a program is that was built as it is deployed.
pub(crate) fn dist_program(name: &str) -> PathBuf {
    target_dir().join("dist").join(name)
}

/// Builds the BPF objects.
pub(crate) fn bpf(compiler: &Compiler) -> Result<Objects> {
    stage("bpf", || {
        let mut command = bpf_cargo(compiler, "build")?;
        command.args(["--release", "--bins"]);
        run_quietly(
            &mut command,
            &format!(
                "the messages above are the compiler's ({compiler}); `cargo xtask setup --check` shows what it found"
            ),
        )
    })?;
    let folder = bpf_target_dir().join(pins::BPF_TARGET).join("release");
    let objects = Objects { dispatcher: folder.join("dispatcher"), bench: folder.join("bench") };
    for object in [&objects.dispatcher, &objects.bench] {
        let bytes =
            fs::read(object).with_context(|| format!("reading {} that was just built", object.display()))?;
        if let Err(reason) = inspect(&bytes) {
            bail!("{} {reason}; remove target/bpf and build again", object.display());
        }
    }
    Ok(objects)
}

/// `cargo VERB` for dispatcher-ebpf on the BPF target, in a target folder of its own: flags and compiler
/// differ from the host's, and sharing one folder would make each build undo the other.
pub(crate) fn bpf_cargo(compiler: &Compiler, verb: &str) -> Result<Command> {
    bpf_cargo_with(compiler, verb, &[])
}

/// [`bpf_cargo`] with more compiler flags.
pub(crate) fn bpf_cargo_with(compiler: &Compiler, verb: &str, flags: &[&str]) -> Result<Command> {
    for_bpf(compiler.cargo(), verb, flags)
}

/// Clippy for dispatcher-ebpf where the compiler has one beside it, outside rustup.
pub(crate) fn bpf_clippy(compiler: &Compiler) -> Result<Option<Command>> {
    compiler.own_clippy().map(|command| for_bpf(command, "clippy", &[])).transpose()
}

fn for_bpf(mut command: Command, verb: &str, flags: &[&str]) -> Result<Command> {
    command
        .args([verb, "--package", "dispatcher-ebpf", "--target", pins::BPF_TARGET, "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(bpf_target_dir())
        .env("CARGO_ENCODED_RUSTFLAGS", bpf_flags(env::consts::ARCH, flags)?)
        // Cut into many units, the program is another one, which no verifier has seen.
        .env("CARGO_INCREMENTAL", "0")
        .env_remove("CARGO_TARGET_DIR");
    Ok(command)
}

/// Flags in cargo's own encoding, which allows quotes and spaces inside one flag.
fn bpf_flags(host: &str, more: &[&str]) -> Result<String> {
    let registers = bpf_target_arch(host)?;
    let mut flags = vec![
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // rustc hands this on to the linker, which refuses a second `--cpu`.
        format!("-Ctarget-cpu={}", pins::BPF_CPU),
        format!("--cfg=bpf_target_arch=\"{registers}\""),
    ];
    flags.extend(more.iter().map(|&flag| flag.to_owned()));
    Ok(flags.join("\x1f"))
}

/// The kernel's register layout that aya's bindings are compiled for.
fn bpf_target_arch(host: &str) -> Result<&'static str> {
    match host {
        "x86_64" => Ok("x86_64"),
        "aarch64" => Ok("aarch64"),
        _ => bail!("building BPF objects for {host} hosts is untried; add {host} to xtask/src/build.rs"),
    }
}

fn bpf_target_dir() -> PathBuf {
    target_dir().join("bpf")
}

/// Says why the bytes are not a BPF object with type information, which aya needs for maps and relocations.
fn inspect(object: &[u8]) -> Result<(), &'static str> {
    const EM_BPF: u64 = 247;
    if object.get(..6) != Some(b"\x7fELF\x02\x01") || number(object, 18, 2) != Some(EM_BPF) {
        return Err("is not a BPF object");
    }
    match sections(object) {
        None => Err("is cut short"),
        Some(names) if !names.contains(&b".BTF".as_slice()) => Err("has no BTF section"),
        Some(_) => Ok(()),
    }
}

/// Names of the sections of a little-endian 64-bit ELF file.
fn sections(object: &[u8]) -> Option<Vec<&[u8]>> {
    let at = |offset, width| usize::try_from(number(object, offset, width)?).ok();
    let (table, size, count, names) = (at(40, 8)?, at(58, 2)?, at(60, 2)?, at(62, 2)?);
    let header = |index: usize| index.checked_mul(size)?.checked_add(table);
    let strings = object.get(at(header(names)?.checked_add(24)?, 8)?..)?;
    (0..count).map(|index| strings.get(at(header(index)?, 4)?..)?.split(|&byte| byte == 0).next()).collect()
}

/// A little-endian number of `width` bytes at `offset`.
fn number(bytes: &[u8], offset: usize, width: usize) -> Option<u64> {
    let field = bytes.get(offset..offset.checked_add(width)?)?;
    Some(field.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)))
}

fn host(objects: &Objects, profile: Profile) -> Result<()> {
    let (name, flags): (_, &[&str]) = match profile {
        Profile::Debug => ("host (debug)", &["--workspace", "--exclude", "dispatcher-ebpf"]),
        Profile::Release => ("host", &["--release", "--workspace", "--exclude", "dispatcher-ebpf"]),
        Profile::Dist => (
            "host (optimised as a whole)",
            &["--profile=dist", "--bin=dispatcherd", "--bin=dispatcherctl", "--bin=dispatcher-bench"],
        ),
    };
    let trained = train::flag().filter(|_| profile == Profile::Dist);
    stage(name, || {
        let mut command = cargo();
        command.arg("build").args(flags);
        if let Some(flag) = &trained {
            eprintln!("xtask: with {flag}");
            command.env("CARGO_ENCODED_RUSTFLAGS", flag);
        }
        run_quietly(objects.tell(&mut command), "the messages above are the compiler's")
    })
}

/// One line per stage: what is being done, then how long it took.
pub(crate) fn stage<T>(name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("xtask: {name} ...");
    let start = Instant::now();
    let result = work()?;
    eprintln!("xtask: {name} done in {:.1} s", start.elapsed().as_secs_f32());
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header, a string table at 64 and section headers behind it.
    fn elf(machine: u8, names: &[&str]) -> Vec<u8> {
        let strings: Vec<u8> = names.iter().flat_map(|name| name.bytes().chain([0])).collect();
        let table = 64 + strings.len();
        let mut file = vec![0; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = machine;
        file[40] = table as u8;
        file[58] = 64;
        file[60] = names.len() as u8;
        file.extend(&strings);
        let mut name_offset = 0;
        for name in names {
            let mut header = [0; 64];
            header[0] = name_offset;
            header[24] = 64; // where the strings are; read from the header that `names` points at
            file.extend(header);
            name_offset += name.len() as u8 + 1;
        }
        file
    }

    #[test]
    fn objects_need_btf() {
        assert_eq!(inspect(&elf(247, &["xdp", ".BTF", ".BTF.ext"])), Ok(()));
        assert_eq!(inspect(&elf(247, &["xdp", ".BTF.ext"])), Err("has no BTF section"));
        assert_eq!(inspect(&elf(62, &["xdp", ".BTF"])), Err("is not a BPF object"));
        assert_eq!(inspect(b""), Err("is not a BPF object"));
    }

    #[test]
    fn cut_objects_are_refused_at_every_length() {
        let whole = elf(247, &[".BTF"]);
        for length in 0..whole.len() - 32 {
            assert!(inspect(&whole[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn flags_are_separated_as_cargo_expects() {
        let flags = bpf_flags("x86_64", &["-Dwarnings"]).expect("x86_64 is known");
        let flags: Vec<_> = flags.split('\x1f').collect();
        assert!(flags.contains(&"--cfg=bpf_target_arch=\"x86_64\""));
        assert!(flags.contains(&"-Ctarget-cpu=v3"));
        assert_eq!(flags.last(), Some(&"-Dwarnings"));
    }

    #[test]
    fn unknown_hosts_are_an_error() {
        assert!(bpf_flags("m68k", &[]).is_err());
    }
}
