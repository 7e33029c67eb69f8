//! A limit of what is under way that follows the latency: as much as the server can do at once, and a little more
//! that waits there.
//!
//! After each window of time the limit is multiplied by the gradient, which is what an answer took without load by
//! what it takes now (between 0.5 and 1), and gets room for a short queue, its square root. So it grows as long as
//! answers do not get slower, and sinks when they do. What an answer takes without load is measured anew now and
//! then, with a quarter of the limit for two windows: else a server that has become slower would never be believed,
//! or its own queue would count as its best.

use std::time::Duration;

/// Latencies are looked at in windows of this length.
pub(super) const WINDOW: Duration = Duration::from_millis(100);
/// Answers that make a window; with less, it goes on.
const ANSWERS: u64 = 10;
/// So much slower answers are no sign of load.
const TOLERANCE: f64 = 1.5;
/// Part of a new limit that is taken over at once.
const SMOOTHING: f64 = 0.2;
/// Windows until the latency without load is measured anew: first, and at most, after twice as many each time. What
/// was measured first may have been under load.
const PROBES: [u32; 2] = [10, 300];
/// It begins with so much, and grows.
const START: u32 = 20;

/// The limit, and what it follows.
#[derive(Debug)]
pub(super) struct Adaptive {
    limit: f64,
    most: u32,
    /// What an answer takes without load, seconds; none where it is being measured.
    unloaded: Option<f64>,
    /// Windows until it is measured again, and from one time to the next.
    probe: u32,
    pause: u32,
    /// Windows of little load that are left.
    quiet: u32,
    began: Duration,
    sum: f64,
    answers: u64,
    /// The most that was under way in the window.
    peak: u32,
}

impl Adaptive {
    /// A new one.
    pub(super) fn new(most: u32, now: Duration) -> Self {
        Self {
            limit: f64::from(most.min(START)),
            most,
            unloaded: None,
            probe: PROBES[0],
            pause: PROBES[0],
            quiet: 0,
            began: now,
            sum: 0.0,
            answers: 0,
            peak: 0,
        }
    }

    /// As many may be under way, at least 1.
    pub(super) fn limit(&self) -> u32 {
        let limit = if self.quiet > 0 { self.limit / 4.0 } else { self.limit };
        (limit as u32).clamp(1, self.most.max(1))
    }

    /// Sets the most that the limit may be.
    pub(super) fn set(&mut self, most: u32) {
        self.most = most;
        self.limit = self.limit.min(f64::from(most));
    }

    /// Takes note of an answer, with what was under way when it came.
    pub(super) fn answered(&mut self, now: Duration, took: Duration, under_way: u32) {
        self.sum += took.as_secs_f64();
        self.answers += 1;
        self.peak = self.peak.max(under_way);
        if now.saturating_sub(self.began) >= WINDOW && self.answers >= ANSWERS {
            let (average, used) = (self.sum / self.answers as f64, self.peak);
            (self.began, self.sum, self.answers, self.peak) = (now, 0.0, 0, 0);
            self.look(average, used);
        }
    }

    fn look(&mut self, average: f64, used: u32) {
        if self.quiet > 0 {
            // The first of them still sees what was under way before.
            self.quiet -= 1;
            self.unloaded = (self.quiet == 0).then_some(average);
            return;
        }
        self.probe -= 1;
        if self.probe == 0 {
            self.pause = (self.pause * 2).min(PROBES[1]);
            (self.probe, self.quiet) = (self.pause, 2);
            return;
        }
        let unloaded = self.unloaded.map_or(average, |known| known.min(average));
        self.unloaded = Some(unloaded);
        let gradient = (TOLERANCE * unloaded / average.max(f64::MIN_POSITIVE)).clamp(0.5, 1.0);
        let next = self.limit * gradient + self.limit.sqrt();
        // What is not used up says nothing of more.
        if next > self.limit && f64::from(used) < self.limit / 2.0 {
            return;
        }
        self.limit += (next - self.limit) * SMOOTHING;
        self.limit = self.limit.clamp(1.0, f64::from(self.most.max(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that does so many things at once, each in 10 ms, and lets the rest wait; asked as much as the limit
    /// allows for so many windows.
    fn load(adaptive: &mut Adaptive, now: &mut Duration, capacity: u32, windows: u32) -> Vec<u32> {
        let mut limits = Vec::new();
        for _ in 0..windows {
            let under_way = adaptive.limit();
            let took =
                Duration::from_millis(10).mul_f64((f64::from(under_way) / f64::from(capacity)).max(1.0));
            for _ in 0..ANSWERS {
                *now += WINDOW / ANSWERS as u32;
                adaptive.answered(*now, took, under_way);
            }
            limits.push(adaptive.limit());
        }
        limits
    }

    #[test]
    fn it_finds_what_the_server_can_do() {
        for capacity in [1, 2, 10, 100, 700] {
            let mut now = Duration::ZERO;
            let mut adaptive = Adaptive::new(1000, now);
            // What it begins with may be too much, whose latency it must not take for the best.
            let limits = load(&mut adaptive, &mut now, capacity, 3000);
            let mut settled = limits[1000..].to_vec();
            settled.sort_unstable();
            let (low, high) = (settled[settled.len() / 20], settled[settled.len() * 19 / 20]);
            assert!(low >= capacity && high <= capacity * 4 + 8, "{capacity}: {low} to {high}");
        }
    }

    #[test]
    fn it_follows_a_server_that_changes() {
        let mut now = Duration::ZERO;
        let mut adaptive = Adaptive::new(1000, now);
        load(&mut adaptive, &mut now, 50, 1000);
        let slower = *load(&mut adaptive, &mut now, 10, 1000).last().expect("a limit");
        assert!((10..=60).contains(&slower), "{slower}");
        let faster = *load(&mut adaptive, &mut now, 200, 1000).last().expect("a limit");
        assert!((200..=820).contains(&faster), "{faster}");
    }

    #[test]
    fn it_stays_within_its_bounds() {
        let mut now = Duration::ZERO;
        let mut adaptive = Adaptive::new(20, now);
        assert!(load(&mut adaptive, &mut now, 1_000_000, 2000).iter().all(|limit| (1..=20).contains(limit)));
        adaptive.set(5);
        assert_eq!(adaptive.limit(), 5);
        adaptive.set(0);
        assert_eq!(adaptive.limit(), 1, "less than one would be none for ever");
        // Without load it does not grow.
        let mut adaptive = Adaptive::new(1000, now);
        load(&mut adaptive, &mut now, 10, 2000);
        let before = adaptive.limit;
        for _ in 0..1000 {
            now += WINDOW / 10;
            adaptive.answered(now, Duration::from_millis(10), 1);
        }
        assert!(adaptive.limit <= before, "{} {before}", adaptive.limit);
    }
}
