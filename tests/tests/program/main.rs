//! The XDP program on single frames: what goes in, the verdict, the one reason counted, and what
//! comes out, field by field. Needs root, and a build by `cargo xtask`.

mod bind;
mod cookies;
mod established;
mod handshake;
mod hellos;
mod icmp;
mod l4;
mod life;
mod qos;
mod quic;
mod races;
mod tickets;
mod verdicts;

use std::sync::Mutex;

use dispatcher_tests::harness::Machine;

/// A loaded data path. A program that the kernel refuses takes long to be refused: once is enough.
fn machine() -> Machine {
    static REFUSED: Mutex<Option<String>> = Mutex::new(None);
    let refused = REFUSED.lock().expect("nobody panics with this lock").clone();
    if let Some(error) = refused {
        panic!("loading the data path failed before: {error}");
    }
    Machine::new().unwrap_or_else(|error| {
        let text = format!("{error:#}");
        *REFUSED.lock().expect("nobody panics with this lock") =
            Some(text.lines().next().unwrap_or_default().to_owned());
        panic!("loading the data path: {text}")
    })
}
