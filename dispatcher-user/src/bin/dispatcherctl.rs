//! `dispatcherctl`: asks the daemon, and tells it.

use std::process::ExitCode;

use clap::Parser as _;
use dispatcher_user::ctl;

fn main() -> ExitCode {
    let args = ctl::Args::parse();
    match ctl::run(&args, &mut std::io::stdout()) {
        Ok(()) => ctl::Exit::Good.into(),
        Err(error) => {
            eprintln!("dispatcherctl: {error}");
            error.exit().into()
        }
    }
}
