//! `cargo xtask test`: unit tests, and the scenarios in network namespaces.

use anyhow::Result;

use crate::{
    build,
    pins::Need,
    process::{cargo, demand_root, exec},
    setup,
};

/// Test everything (root), or with --host what needs neither root nor a BPF toolchain
///
/// The full run loads the BPF programs and makes network namespaces, which it removes again. The output
/// ends with cargo test's own result lines, and the exit code is cargo's.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Only dispatcher-common, dispatcher-user and xtask
    #[arg(long)]
    host: bool,
    /// Also what takes long or much: transfers of 100 MB, and a browser (chromium, which you install)
    #[arg(long, conflicts_with = "host")]
    full: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Scenarios run side by side; more only make each other's timings worse.
const SCENARIO_THREADS: &str = "--test-threads=2";

pub(crate) fn main(args: &Args) -> Result<()> {
    if args.host { host(args) } else { full(args) }
}

fn host(args: &Args) -> Result<()> {
    let mut command = cargo();
    command.args([
        "test",
        "--no-fail-fast",
        "-p",
        "dispatcher-common",
        "-p",
        "dispatcher-user",
        "-p",
        "xtask",
    ]);
    match setup::present() {
        Some(compiler) => {
            build::bpf(&compiler)?.tell(&mut command);
        }
        None => eprintln!(
            "xtask: no BPF toolchain, so dispatcher-user is tested without its objects; `cargo xtask setup` gets one"
        ),
    }
    if let Some(filter) = &args.filter {
        command.args(["--", filter]);
    }
    exec(&mut command, "is cargo installed?")
}

fn full(args: &Args) -> Result<()> {
    demand_root(
        "the full test loads BPF programs and makes network namespaces, which",
        "; `cargo xtask test --host` does without",
    )?;
    // The demo and the programs first: scenarios start them.
    let objects = build::all(&setup::ensure(Need::Test)?)?;
    let mut command = cargo();
    command.args(["test", "--release", "--no-fail-fast", "--workspace", "--exclude", "dispatcher-ebpf"]);
    objects.tell(&mut command).args(["--", SCENARIO_THREADS]);
    if args.full {
        command.env("DISPATCHER_FULL", "1").arg("--include-ignored");
    }
    command.args(&args.filter);
    exec(&mut command, "is cargo installed?")
}
