//! `cargo xtask check`: what must be clean before a commit.

use anyhow::Result;

/// Formatting, lints for host and BPF, documentation, licences
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {}

pub(crate) fn main(_args: &Args) -> Result<()> {
    Ok(())
}
