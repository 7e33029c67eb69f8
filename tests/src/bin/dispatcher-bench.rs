//! The measurements of `cargo xtask bench`.

use std::{io::stdout, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use dispatcher_tests::bench::{affinity, connections, control, fastpath, floor, qos, tunnels};

/// The daemon's, for the floor that it is compared with.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measure the dispatcher
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Show the names of the measurements
    List,
    /// Percent of sessions resumed, and resuming handshakes a second, beside HAProxy, nginx and nftables
    Affinity(Common),
    /// Real connections through namespaces, beside routing and nftables
    Connections(Common),
    /// The daemon: reloads, tables, misses, memory, lists
    Control {
        #[command(flatten)]
        common: Common,
        /// Only one part
        #[arg(long, value_enum)]
        only: Option<control::Part>,
    },
    /// Nanoseconds a packet, by BPF_PROG_RUN
    Fastpath {
        #[command(flatten)]
        common: Common,
        /// Measure this BPF object instead of the one that was built in
        #[arg(long, value_name = "FILE")]
        object: Option<PathBuf>,
        /// Only cases with this in their name, and the goals that need no others
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
    },
    /// Shares beside weights while a server is saturated, beside HAProxy
    Qos {
        #[command(flatten)]
        common: Common,
        /// Only one part
        #[arg(long, value_enum)]
        only: Option<qos::Part>,
    },
    /// Requests through established tunnels, beside HAProxy
    Tunnels {
        #[command(flatten)]
        common: Common,
        /// Beside this dispatcherd instead: what a change brings
        #[arg(long, value_name = "FILE")]
        against: Option<PathBuf>,
        /// Also the least that a proxy made of the same libraries can do
        #[arg(long, conflicts_with = "against")]
        floor: bool,
        /// Only cases with this in their name
        #[arg(long, value_name = "TEXT")]
        only: Option<String>,
    },
    /// That proxy
    #[command(hide = true)]
    Floor(floor::Args),
}

#[derive(clap::Args)]
struct Common {
    /// Fewer rounds: shows that it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Args::parse().bench {
        Bench::List => {
            println!("affinity     sessions resumed, beside HAProxy, nginx and nftables");
            println!("connections  real connections through namespaces, beside routing and nftables");
            println!("control      the daemon: reloads, tables, misses, memory, lists");
            println!("fastpath     nanoseconds a packet, by BPF_PROG_RUN");
            println!("qos          shares beside weights while a server is saturated, beside HAProxy");
            println!("tunnels      requests through established tunnels, beside HAProxy");
            return ExitCode::SUCCESS;
        }
        Bench::Affinity(common) => affinity::run(common.quick)
            .and_then(|report| report.publish(&mut stdout(), common.json.as_deref())),
        Bench::Connections(common) => connections::run(common.quick)
            .and_then(|report| report.publish(&mut stdout(), common.json.as_deref())),
        Bench::Control { common, only } => control::run(common.quick, only)
            .and_then(|report| report.publish(&mut stdout(), common.json.as_deref())),
        Bench::Qos { common, only } => qos::run(common.quick, only)
            .and_then(|report| report.publish(&mut stdout(), common.json.as_deref())),
        Bench::Tunnels { common, against, floor, only } => {
            tunnels::run(common.quick, against.as_deref(), floor, only.as_deref())
                .and_then(|report| report.publish(&mut stdout(), common.json.as_deref()))
        }
        Bench::Floor(args) => floor::run(&args),
        Bench::Fastpath { common, object, only } => {
            fastpath::run(common.quick, object.as_deref(), only.as_deref())
                .and_then(|report| report.publish(&mut stdout(), common.json.as_deref()))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dispatcher-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
