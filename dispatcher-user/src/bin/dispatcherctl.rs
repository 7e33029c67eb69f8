//! `dispatcherctl`: asks the daemon, and tells it.

use std::{os::fd::AsFd, process::ExitCode};

use clap::Parser as _;
use dispatcher_user::ctl;
use rustix::termios::tcgetwinsize;

fn main() -> ExitCode {
    let args = ctl::Args::parse();
    let mut out = std::io::stdout();
    let width = columns(&out, std::env::var("COLUMNS").ok().as_deref());
    match ctl::run(&args, &mut out, &mut std::io::stderr(), width) {
        Ok(()) => ctl::Exit::Good.into(),
        Err(error) => {
            eprintln!("dispatcherctl: {error}");
            error.exit().into()
        }
    }
}

/// Columns of the terminal, if this is one: what it says, else what the environment says (`COLUMNS`). Serial
/// consoles do not say.
fn columns(out: &impl AsFd, given: Option<&str>) -> Option<u16> {
    let own = tcgetwinsize(out).ok()?.ws_col;
    let given = || given.and_then(|columns| columns.parse().ok()).filter(|columns| *columns > 0);
    if own > 0 { Some(own) } else { given() }
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
    fn terminal(ws_row: u16, ws_col: u16) -> (OwnedFd, OwnedFd) {
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
    fn the_width_of_a_terminal() {
        for (rows, own, given, expected) in [
            (24, 80, None, Some(80)),
            (24, 80, Some("132"), Some(80)),
            (0, 77, None, Some(77)),
            (0, 0, Some("132"), Some(132)),
            (0, 0, Some("0"), None),
            (0, 0, Some("wide"), None),
            (0, 0, None, None),
        ] {
            let (_one, out) = terminal(rows, own);
            assert_eq!(columns(&out, given), expected, "{rows} x {own}, {given:?}");
        }
        let file = File::open("/dev/null").expect("is there");
        assert_eq!(columns(&file, Some("80")), None, "no terminal gets whole lines");
    }
}
