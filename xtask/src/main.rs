//! `cargo xtask`: set up, build, run, test, check and measure Dispatcher.
//!
//! One file per command; this one only says which commands there are and what they promise.

mod bench;
mod build;
mod check;
mod pins;
mod process;
mod run;
mod setup;
mod test;
mod toolchain;
mod train;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set up, build, run, test, check and measure Dispatcher",
    after_help = "\
New here?     cargo xtask run             (root) sets up, builds and shows the demo
Every day:    cargo xtask test --host     needs no root
              cargo xtask check           before a commit
              cargo xtask test            (root) everything, in network namespaces
On a server:  cargo xtask build --dist    after `cargo xtask train` (root), if it is to be fastest
              cargo xtask run --config dispatcher.toml       (root)

Root with your own cargo:  sudo -E env \"PATH=$PATH\" cargo xtask ..."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Args),
    Build(build::Args),
    Run(run::Args),
    Test(test::Args),
    Check(check::Args),
    Bench(bench::Args),
    Train(train::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Setup(args) => setup::main(&args),
        Command::Build(args) => build::main(&args),
        Command::Run(args) => run::main(&args),
        Command::Test(args) => test::main(&args),
        Command::Check(args) => check::main(&args),
        Command::Bench(args) => bench::main(&args),
        Command::Train(args) => train::main(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
