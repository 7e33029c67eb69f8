//! `cargo xtask run`: the demo, or the daemon on real interfaces.

use std::{ffi::OsString, fs::File, path::PathBuf, process::Command};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

use crate::{
    build::{self, program},
    pins::Need,
    process::{demand_root, exec},
    setup,
};

/// Show the demo, or start the daemon with a configuration or on interfaces (root)
///
/// With neither --config nor --interface: the demo, with clients and servers in network namespaces of its
/// own; nothing on the host's interfaces changes. With --config FILE: the daemon as on a server. With
/// --interface IF: the daemon on these interfaces; what follows `--` goes to it as it is.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Configuration of the daemon (TOML)
    #[arg(long, value_name = "FILE", conflicts_with = "interface")]
    config: Option<PathBuf>,
    /// Interface to attach to; may be given several times
    #[arg(long, value_name = "IF")]
    interface: Vec<String>,
    /// Demo: how long
    #[arg(long, value_name = "N", conflicts_with_all = ["config", "interface"],
        value_parser = clap::value_parser!(u32).range(1..))]
    seconds: Option<u32>,
    /// Demo: write the figures to this file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "interface"])]
    json: Option<PathBuf>,
    /// Demo: built-in clients and servers, or nginx, curl and openssl
    #[arg(long, value_enum, conflicts_with_all = ["config", "interface"])]
    peers: Option<Peers>,
    /// Passed on to the program
    #[arg(last = true, value_name = "ARGS")]
    extra: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Peers {
    Builtin,
    System,
}

impl Peers {
    fn name(self) -> &'static str {
        match self {
            Self::Builtin => "builtin",
            Self::System => "system",
        }
    }
}

pub(crate) fn main(args: &Args) -> Result<()> {
    demand_root("attaching XDP programs", "")?;
    // Before anything is built, which may take minutes.
    if let Some(config) = &args.config {
        File::open(config).with_context(|| format!("--config {}", config.display()))?;
    }
    if let Some(json) = &args.json {
        let open = File::options().create(true).append(true).open(json);
        open.with_context(|| format!("--json {}: the figures could not be written", json.display()))?;
    }
    let need = match args.peers {
        Some(Peers::System) => Need::Test,
        Some(Peers::Builtin) | None => Need::Run,
    };
    build::all(&setup::ensure(need)?)?;
    exec(&mut command(args), "`cargo xtask build` should have made it")
}

/// The program to become, with its arguments.
fn command(args: &Args) -> Command {
    let mut command;
    if let Some(config) = &args.config {
        command = Command::new(program("dispatcherd"));
        command.arg("--config").arg(config);
    } else if !args.interface.is_empty() {
        command = Command::new(program("dispatcherd"));
        for interface in &args.interface {
            command.args(["--interface", interface]);
        }
    } else {
        command = Command::new(program("dispatcher-demo"));
        if let Some(seconds) = args.seconds {
            command.args(["--seconds", &seconds.to_string()]);
        }
        if let Some(json) = &args.json {
            command.arg("--json").arg(json);
        }
        if let Some(peers) = args.peers {
            command.args(["--peers", peers.name()]);
        }
    }
    command.args(&args.extra);
    command
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    /// What is started for a command line: the program's name and its arguments.
    fn started(line: &str) -> String {
        let cli = Cli::try_parse_from(line.split(' ')).expect("the line is valid");
        let command = command(&cli.args);
        let name = PathBuf::from(command.get_program());
        let words = std::iter::once(name.file_name().expect("a program's path")).chain(command.get_args());
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_is_started() {
        for (line, expected) in [
            ("run", "dispatcher-demo"),
            (
                "run --seconds 5 --json out.json --peers system -- -v",
                "dispatcher-demo --seconds 5 --json out.json --peers system -v",
            ),
            ("run --config d.toml", "dispatcherd --config d.toml"),
            (
                "run --interface eth0 --interface eth1 -- --mode skb",
                "dispatcherd --interface eth0 --interface eth1 --mode skb",
            ),
        ] {
            assert_eq!(started(line), expected);
        }
    }

    #[test]
    fn demo_options_do_not_mix_with_the_daemon() {
        for line in
            ["run --config a --interface b", "run --config a --seconds 3", "run --interface b --json c"]
        {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
