//! What processes use of the machine.

use std::fs;

use anyhow::{Context as _, Result, ensure};

/// Open files that a measurement may need; children inherit the limit.
pub const FILES: u64 = 20_000;

/// CPU seconds of children that have been waited for.
pub fn children() -> f64 {
    // SAFETY: all-zero is a valid rusage, and the call writes one.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// CPU seconds of a process.
pub fn process(id: u32) -> Result<f64> {
    let path = format!("/proc/{id}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // The name is in parentheses and may hold anything; user and system time are the 12th and 13th
    // field behind it.
    let (_, fields) = text.rsplit_once(')').with_context(|| format!("{path}: {text}"))?;
    let mut ticks = 0_u64;
    for field in fields.split_whitespace().skip(11).take(2) {
        ticks += field.parse::<u64>().with_context(|| format!("{path}: {text}"))?;
    }
    // SAFETY: takes and returns numbers.
    let tick = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / tick as f64)
}

/// The kernel's threads that handle packets when softirqs take too long.
pub fn packet_threads() -> Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("reading /proc")?;
    let named = entries.flatten().filter(|entry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
    });
    Ok(named.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Allows as many open files as the measurement needs; children inherit it.
pub fn raise_files() -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls are given one rlimit.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max.min(FILES);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    ensure!(done, "raising the limit of open files: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Memory of a process that is in use, bytes. Buffers of its sockets are the kernel's and not in it.
pub fn resident(id: u32) -> Result<f64> {
    let path = format!("/proc/{id}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes =
        line.and_then(|line| line.trim().strip_suffix(" kB")).with_context(|| format!("{path}: {text}"))?;
    Ok(kibibytes.parse::<f64>().with_context(|| format!("{path}: {text}"))? * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_time_and_memory() {
        assert!(process(std::process::id()).expect("reads") >= 0.0);
        assert!(resident(std::process::id()).expect("reads") > 4096.0);
        assert!(!packet_threads().expect("reads").is_empty());
    }
}
