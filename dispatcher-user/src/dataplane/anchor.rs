//! A place for a program that is only run by command.
//!
//! Linux calls the XDP programs that are attached somewhere directly (`bpf_dispatcher`). A repeated
//! `BPF_PROG_TEST_RUN` of a program that is not attached puts it among them and takes it out again, and waits
//! for a grace period of RCU each time: 25 ms for a run that takes 30 us (6.18, two CPUs). So it gets a place
//! where no packet comes: the loopback interface, which is down, of a network namespace of its own.

use std::{fs::File, io, os::fd::OwnedFd, thread};

use super::{
    AttachMode,
    syscall::{self, Link},
};

/// The loopback interface has this index in every namespace.
const LOOPBACK: u32 = 1;

/// A program that stays attached until this is dropped.
#[derive(Debug)]
pub(super) struct Anchor {
    _link: Link,
    /// The namespace lives as long as this is open.
    _namespace: File,
}

impl Anchor {
    /// Makes the namespace, which takes CAP_SYS_ADMIN.
    pub(super) fn new(program: OwnedFd) -> io::Result<Self> {
        // The namespace is that of a thread, which ends when it is made.
        let thread = thread::Builder::new().name("anchor".to_owned()).spawn(move || {
            use std::os::fd::AsFd as _;
            syscall::new_namespace()?;
            let namespace = File::open("/proc/thread-self/ns/net")?;
            let link = Link::attach(program.as_fd(), LOOPBACK, AttachMode::Generic)?;
            Ok(Self { _link: link, _namespace: namespace })
        });
        thread?.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    }
}
