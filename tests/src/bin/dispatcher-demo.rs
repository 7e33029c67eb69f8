//! The demo of `cargo xtask run`: clients, a dispatcher and servers in network namespaces, with the
//! real daemon and program between them, and a table of what happens.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use dispatcher_tests::demo::{Peers, Plan, run};

/// Show TLS sessions that stay on their backend
///
/// Everything is made in network namespaces and removed at the end; the host's interfaces are left
/// alone. Ends after --seconds, or on Ctrl-C. The exit code is not 0 if a returning session went
/// to another backend than its own, or a handshake failed.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// How long; without it until Ctrl-C
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// builtin: rustls on both sides; system: nginx and openssl
    #[arg(long, value_enum, default_value_t = Peers::Builtin)]
    peers: Peers,
    /// Number of servers
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    backends: u8,
    /// New connections a second at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let rate = args.rate.unwrap_or(match args.peers {
        Peers::Builtin => 80,
        Peers::System => 25,
    });
    let plan =
        Plan { seconds: args.seconds, peers: args.peers, backends: args.backends, rate, json: args.json };
    match run(&plan, &mut std::io::stdout()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("dispatcher-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
