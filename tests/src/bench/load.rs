//! Load by programs that others made: wrk and h2load.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::netns::Netns;

/// A running generator; it is ended when dropped.
pub struct Generator(Option<Child>);

impl Generator {
    /// wrk with one thread, against a URL.
    pub fn wrk(netns: &Netns, url: &str, seconds: u32, connections: u8, more: &[&str]) -> Result<Self> {
        let mut command = netns.command("wrk");
        command.args(["-t1", &format!("-c{connections}"), &format!("-d{seconds}s"), "--timeout", "2s"]);
        command.args(more).arg(url);
        Self::start(command)
    }

    /// h2load with one thread, against a URL.
    pub fn h2load(netns: &Netns, url: &str, seconds: u32, more: &[&str]) -> Result<Self> {
        let mut command = netns.command("h2load");
        command.args(["-t1", "-D", &format!("{seconds}s")]).args(more).arg(url);
        Self::start(command)
    }

    fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command
            .spawn()
            .with_context(|| format!("starting {command:?}; `cargo xtask setup` says how to get it"))?;
        Ok(Self(Some(child)))
    }

    /// Waits for its end; what it said.
    pub fn finish(mut self) -> Result<String> {
        let child = self.0.take().context("has ended")?;
        let output = child.wait_with_output().context("waiting for a generator")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "a generator: {}: {}", output.status, errors.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What a generator found.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Found {
    /// Requests that were answered.
    pub requests: u64,
    /// The same a second.
    pub rate: f64,
    /// Requests and connections that failed.
    pub failed: u64,
    /// The median, milliseconds, where it was asked for.
    pub p50: Option<f64>,
    /// The 99th percentile.
    pub p99: Option<f64>,
}

impl Found {
    /// Reads what wrk said.
    pub fn by_wrk(text: &str) -> Result<Self> {
        Self::read_wrk(text).with_context(|| format!("wrk said:\n{text}"))
    }

    /// Reads what h2load said.
    pub fn by_h2load(text: &str) -> Result<Self> {
        Self::read_h2load(text).with_context(|| format!("h2load said:\n{text}"))
    }

    fn read_h2load(text: &str) -> Result<Self> {
        // finished in 1.00s, 37420.00 req/s, 2.07MB/s
        let finished = text.lines().find(|line| line.starts_with("finished in ")).context("no rate")?;
        let rate = finished.split(", ").find_map(|part| part.strip_suffix(" req/s")).context("no rate")?;
        let requests =
            text.lines().find_map(|line| line.strip_prefix("requests: ")).context("no requests")?;
        let count = |name: &str| -> Result<u64> {
            let part = requests.split(", ").find_map(|part| part.strip_suffix(name));
            part.with_context(|| format!("not said:{name}"))?.parse().context("a number of requests")
        };
        Ok(Self {
            requests: count(" succeeded")?,
            rate: rate.parse().context("the rate")?,
            failed: count(" failed")? + count(" timeout")?,
            p50: None,
            p99: None,
        })
    }

    fn read_wrk(text: &str) -> Result<Self> {
        let line = |start: &str| text.lines().map(str::trim).find_map(|line| line.strip_prefix(start));
        let requests =
            text.lines().find_map(|line| line.split_once(" requests in ")).context("no requests")?;
        let rate = line("Requests/sec:").context("no rate")?;
        let numbers = |text: &str| -> u64 {
            text.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse::<u64>().ok()).sum()
        };
        let failed =
            line("Socket errors:").map_or(0, numbers) + line("Non-2xx or 3xx responses:").map_or(0, numbers);
        let percentile = |start| line(start).map(|text| milliseconds(text.trim())).transpose();
        Ok(Self {
            requests: requests.0.trim().parse().context("the number of requests")?,
            rate: rate.trim().parse().context("the rate")?,
            failed,
            p50: percentile("50%")?,
            p99: percentile("99%")?,
        })
    }
}

/// A duration as wrk writes it.
fn milliseconds(text: &str) -> Result<f64> {
    for (unit, factor) in [("us", 0.001), ("ms", 1.0), ("s", 1000.0)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>().with_context(|| format!("duration {text}"))? * factor);
        }
    }
    bail!("duration {text}")
}

/// Milliseconds of each request by a log of h2load.
pub fn latencies(log: &Path) -> Result<Vec<f64>> {
    let text = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    let latency = |line: &str| {
        // Start, status, microseconds.
        let microseconds = line.split('\t').nth(2)?.parse::<f64>().ok()?;
        Some(microseconds / 1000.0)
    };
    text.lines().map(|line| latency(line).with_context(|| format!("h2load logged {line}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_says_is_read() {
        let text = "Running 1s test @ http://198.51.100.1:80/\n  1 threads and 2 connections\n  \
            Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency   123.45us   67.00us   1.20ms   88.00%\n  \
            Latency Distribution\n     50%  112.00us\n     75%  140.00us\n     90%    0.20ms\n     99%    1.02ms\n  \
            15791 requests in 1.10s, 2.50MB read\n  Socket errors: connect 1, read 2, write 0, timeout 3\n\
            Requests/sec:  14355.10\nTransfer/sec:      2.27MB\n";
        let found = Found::by_wrk(text).expect("reads");
        assert_eq!((found.requests, found.failed), (15_791, 6));
        assert_eq!((found.p50, found.p99), (Some(0.112), Some(1.02)));
        assert_eq!(found.rate, 14_355.1);
        assert!(Found::by_wrk("").is_err());
        assert!(milliseconds("3 parsecs").is_err());
    }

    #[test]
    fn what_h2load_says_is_read() {
        let text = "starting benchmark...\nApplication protocol: h2\n\n\
            finished in 1.00s, 37420.00 req/s, 2.07MB/s\n\
            requests: 37425 total, 37436 started, 37422 done, 37420 succeeded, 2 failed, 1 errored, 3 timeout\n\
            status codes: 37420 2xx, 0 3xx, 1 4xx, 0 5xx\n";
        let found = Found::by_h2load(text).expect("reads");
        assert_eq!((found.requests, found.rate, found.failed), (37_420, 37_420.0, 5));
        assert!(Found::by_h2load("").is_err());
    }
}
