//! `cargo xtask check`: what must be clean before a commit.

use std::{process::Command, time::Duration};

use anyhow::{Result, bail};

use crate::{
    build::{self, Objects, bpf_cargo, bpf_cargo_with, bpf_clippy, stage},
    pins::{self, Need},
    process::{cargo, find, run, run_quietly, shown, try_within},
    setup,
    toolchain::Compiler,
};

/// Check formatting, lints of host and BPF code, documentation, licences; warnings are errors
///
/// Every stage runs, also after one that fails, so that one run shows all there is to mend. A stage that
/// this machine cannot do is named at the end, with what it lacks.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Leave out cargo-deny (which is compiled first if it is not installed: five minutes)
    #[arg(long)]
    without_deny: bool,
}

/// What became of a stage.
enum Outcome {
    Done,
    Skipped(String),
}

pub(crate) fn main(args: &Args) -> Result<()> {
    let compiler = setup::ensure(Need::Build)?;
    let objects = build::bpf(&compiler)?;
    let mut report = Report::default();
    report.add("fmt", format);
    report.add("clippy", || clippy_host(&objects));
    report.add("clippy for bpf", || clippy_bpf(&compiler));
    report.add("doc", || doc(&objects));
    if !args.without_deny {
        report.add("deny", deny);
    }
    report.end()
}

#[derive(Default)]
struct Report {
    failed: Vec<String>,
    skipped: Vec<String>,
}

impl Report {
    fn add(&mut self, name: &str, work: impl FnOnce() -> Result<Outcome>) {
        match stage(name, work) {
            Ok(Outcome::Done) => {}
            Ok(Outcome::Skipped(what)) => self.skipped.push(format!("{name}: {what}")),
            Err(error) => self.failed.push(format!("{name}: {error:#}")),
        }
    }

    fn end(self) -> Result<()> {
        for skipped in &self.skipped {
            eprintln!("xtask: skipped: {skipped}");
        }
        if self.failed.is_empty() {
            eprintln!("xtask: check passed");
            return Ok(());
        }
        bail!("check found something to mend:\n  {}", self.failed.join("\n  "))
    }
}

fn format() -> Result<Outcome> {
    run_quietly(
        cargo().args(["fmt", "--all", "--check", "--", "--color=never"]),
        "`cargo fmt --all` mends it",
    )?;
    Ok(Outcome::Done)
}

fn clippy_host(objects: &Objects) -> Result<Outcome> {
    let mut command = cargo();
    command.args(["clippy", "--workspace", "--exclude", "dispatcher-ebpf", "--all-targets"]);
    objects.tell(&mut command).args(["--", "-Dwarnings"]);
    run_quietly(&mut command, "the messages above are clippy's")?;
    Ok(Outcome::Done)
}

/// Clippy must be of the same release as the compiler, or it cannot read what that made of `core`.
fn clippy_bpf(compiler: &Compiler) -> Result<Outcome> {
    if let Err(error) = offer_clippy(compiler) {
        let mut command = bpf_cargo_with(compiler, "check", &["-Dwarnings"])?;
        run_quietly(command.args(["--release", "--bins"]), "the messages above are the compiler's")?;
        return Ok(Outcome::Skipped(format!("{error:#}; ran `cargo check` with warnings denied instead")));
    }
    let mut command = match bpf_clippy(compiler)? {
        Some(command) => command,
        None => bpf_cargo(compiler, "clippy")?,
    };
    command.args(["--release", "--bins", "--", "-Dwarnings"]);
    run_quietly(&mut command, "the messages above are clippy's")?;
    Ok(Outcome::Done)
}

/// Sees to it that there is a clippy that belongs to the compiler.
fn offer_clippy(compiler: &Compiler) -> Result<()> {
    match compiler {
        Compiler::Nightly | Compiler::Active => {
            try_within(compiler.cargo().args(["clippy", "--version"]), Duration::from_secs(30))
        }
        Compiler::Chosen(_) if compiler.own_clippy().is_none() => {
            bail!("there is no cargo-clippy beside {compiler}")
        }
        Compiler::Distribution(_) if compiler.own_clippy().is_none() => {
            setup::apt_install(&[pins::DEBIAN_CLIPPY])
        }
        Compiler::Chosen(_) | Compiler::Distribution(_) => Ok(()),
    }
}

fn doc(objects: &Objects) -> Result<Outcome> {
    let mut command = cargo();
    command
        .args(["doc", "--no-deps", "--workspace", "--exclude", "dispatcher-ebpf"])
        .env("RUSTDOCFLAGS", "-Dwarnings");
    run_quietly(objects.tell(&mut command), "the messages above are rustdoc's")?;
    Ok(Outcome::Done)
}

fn deny() -> Result<Outcome> {
    if find("cargo-deny").is_none() {
        let mut install = cargo();
        install.args(["install", "--locked", "cargo-deny", "--version", pins::CARGO_DENY]);
        println!(
            "install   {} (compiles it: five minutes or more; --without-deny leaves it out)",
            shown(&install)
        );
        if let Err(error) = run(&mut install, "cargo-deny checks licences and advisories") {
            return Ok(Outcome::Skipped(format!("{error:#}")));
        }
    }
    let fetch = try_within(cargo_deny().args(["fetch", "db"]), Duration::from_secs(60));
    let then = "deny.toml says what is allowed and why";
    match fetch {
        Ok(()) => {
            run_quietly(cargo_deny().arg("check"), then)?;
            Ok(Outcome::Done)
        }
        Err(error) => {
            // It reads the manifests of other platforms' crates too.
            run_quietly(cargo().args(["fetch", "--locked"]), "crates cannot be fetched")?;
            let offline = ["--offline", "check", "licenses", "bans", "sources"];
            run_quietly(cargo_deny().args(offline), then)?;
            Ok(Outcome::Skipped(format!("advisories, whose database could not be fetched ({error:#})")))
        }
    }
}

fn cargo_deny() -> Command {
    let mut command = cargo();
    command.arg("deny");
    command
}
