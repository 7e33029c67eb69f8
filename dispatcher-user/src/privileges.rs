//! After start the daemon needs to write maps, to ask for neighbours and to listen, and nothing else of what root may.

use caps::{CapSet, Capability, CapsHashSet};

/// What the data path needs: maps and test runs; netlink.
pub const NEEDED: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];

/// What is kept: the same, and ports below 1024, on which a service of a reload may have to listen.
pub const KEPT: [Capability; 4] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
    Capability::CAP_NET_BIND_SERVICE,
];

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A capability set cannot be changed.
    #[error("dropping capabilities: {0}; start with --keep-privileges if this system forbids it")]
    Capabilities(#[from] caps::errors::CapsError),
    /// The flag cannot be set.
    #[error("setting no_new_privs: {0}")]
    NoNewPrivileges(std::io::Error),
}

/// True with the capabilities that loading a program takes.
#[must_use]
pub fn may_load() -> bool {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    has(Capability::CAP_SYS_ADMIN) || NEEDED.into_iter().all(has)
}

/// Drops all capabilities but those in [`KEPT`], of this thread and of those it will start, for good.
pub fn drop_privileges() -> Result<(), Error> {
    let needed: CapsHashSet = KEPT.into_iter().collect();
    for capability in caps::all() {
        if !needed.contains(&capability) && caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
            // Kernels that do not know a capability have none to drop.
            if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&needed).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)?;
    // SAFETY: a call with integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(Error::NoNewPrivileges(std::io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_loses_what_it_does_not_need() {
        // Capabilities belong to threads: the other tests keep theirs.
        let thread = std::thread::spawn(|| {
            drop_privileges().expect("drops");
            let left = caps::read(None, CapSet::Permitted).expect("reads");
            assert!(left.iter().all(|capability| KEPT.contains(capability)), "{left:?}");
            assert!(!caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN).expect("reads"));
            // Threads started later inherit the loss.
            let inherited = std::thread::spawn(|| caps::read(None, CapSet::Permitted).expect("reads"));
            assert_eq!(inherited.join().expect("joins"), left);
            let status = std::fs::read_to_string("/proc/thread-self/status").expect("reads");
            assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        });
        thread.join().expect("no panic");
    }
}
