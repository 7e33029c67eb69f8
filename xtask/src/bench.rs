//! `cargo xtask bench`: one measurement.

use std::{ffi::OsString, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    build::{self, dist_program},
    pins::Need,
    process::{demand_root, exec},
    setup,
};

/// Measure (root): sets up, builds what is deployed (`build --dist`) and starts dispatcher-bench
///
/// `cargo xtask bench list` shows the names. Numbers are only worth comparing on one machine that does
/// nothing else.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Which measurement
    name: String,
    /// Fewer rounds: shows that it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Passed on to dispatcher-bench
    #[arg(last = true, value_name = "ARGS")]
    extra: Vec<OsString>,
}

pub(crate) fn main(args: &Args) -> Result<()> {
    demand_root("measuring XDP programs", "")?;
    build::dist(&setup::ensure(Need::Test)?)?;
    exec(&mut command(args), "`cargo xtask build --dist` should have made it")
}

fn command(args: &Args) -> Command {
    let mut command = Command::new(dist_program("dispatcher-bench"));
    command.arg(&args.name);
    if args.quick {
        command.arg("--quick");
    }
    if let Some(json) = &args.json {
        command.arg("--json").arg(json);
    }
    command.args(&args.extra);
    command
}
