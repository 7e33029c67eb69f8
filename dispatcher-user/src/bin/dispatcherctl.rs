//! `dispatcherctl`: asks the daemon, and tells it.

use std::process::ExitCode;

use clap::Parser as _;
use dispatcher_user::ctl;

fn main() -> ExitCode {
    let args = ctl::Args::parse();
    let mut out = std::io::stdout();
    let width = terminal_size::terminal_size_of(&out).map(|(columns, _)| columns.0);
    match ctl::run(&args, &mut out, &mut std::io::stderr(), width) {
        Ok(()) => ctl::Exit::Good.into(),
        Err(error) => {
            eprintln!("dispatcherctl: {error}");
            error.exit().into()
        }
    }
}
