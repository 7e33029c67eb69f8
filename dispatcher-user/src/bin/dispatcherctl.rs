//! `dispatcherctl`: asks the daemon, and tells it.

use std::{os::fd::AsFd, process::ExitCode};

use clap::Parser as _;
use dispatcher_user::ctl::{self, Terminal};
use rustix::termios::tcgetwinsize;

fn main() -> ExitCode {
    let args = ctl::Args::parse();
    let mut out = std::io::stdout();
    let given = ["COLUMNS", "LINES"].map(|name| std::env::var(name).ok());
    let look = || terminal(&std::io::stdout(), [&given[0], &given[1]].map(Option::as_deref));
    match ctl::run(&args, &mut out, &mut std::io::stderr(), &look) {
        Ok(()) => ctl::Exit::Good.into(),
        Err(error) => {
            eprintln!("dispatcherctl: {error}");
            error.exit().into()
        }
    }
}

/// The size of the terminal, if this is one: what it says, else what the environment says (`COLUMNS` and `LINES`). Serial
/// consoles do not say.
fn terminal(out: &impl AsFd, [columns, rows]: [Option<&str>; 2]) -> Option<Terminal> {
    let own = tcgetwinsize(out).ok()?;
    let size = |own: u16, given: Option<&str>| {
        let given = given.and_then(|given| given.parse().ok());
        Some(own).filter(|size| *size > 0).or(given).filter(|size| *size > 0)
    };
    Some(Terminal { columns: size(own.ws_col, columns), rows: size(own.ws_row, rows) })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::fd::{FromRawFd as _, OwnedFd},
        ptr::null_mut,
    };

    use super::*;

    /// Both ends of a terminal of this size.
    fn pair(ws_row: u16, ws_col: u16) -> (OwnedFd, OwnedFd) {
        let size = libc::winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 };
        let (mut one, mut other) = (0, 0);
        // SAFETY: two places for descriptors and a size, which outlive the call; name and settings may be null.
        let made =
            unsafe { libc::openpty(&raw mut one, &raw mut other, null_mut(), null_mut(), &raw const size) };
        assert_eq!(made, 0);
        // SAFETY: both were just opened and are nobody else's.
        unsafe { (OwnedFd::from_raw_fd(one), OwnedFd::from_raw_fd(other)) }
    }

    #[test]
    fn the_size_of_a_terminal() {
        for (rows, own, given, expected) in [
            (24, 80, None, Some(80)),
            (24, 80, Some("132"), Some(80)),
            (0, 77, None, Some(77)),
            (0, 0, Some("132"), Some(132)),
            (0, 0, Some("0"), None),
            (0, 0, Some("wide"), None),
            (0, 0, None, None),
        ] {
            let (_one, out) = pair(rows, own);
            let rows_given = Some(rows).filter(|rows| *rows > 0).or(Some(50));
            let expected = Some(Terminal { columns: expected, rows: rows_given });
            assert_eq!(terminal(&out, [given, Some("50")]), expected, "{rows} x {own}, {given:?}");
        }
        let file = File::open("/dev/null").expect("is there");
        assert_eq!(terminal(&file, [Some("80"); 2]), None, "no terminal gets whole lines");
    }
}
