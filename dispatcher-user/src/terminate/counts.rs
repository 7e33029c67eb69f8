//! What is counted of a service that the daemon serves itself.

use std::{
    array,
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use dispatcher_common::service::{BUCKETS, Histogram};

use crate::workers::{here, processors};

/// Why a client is not served any longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The service has as many clients as it may have.
    Limit,
    /// The TLS handshake failed.
    Handshake,
    /// It took too long.
    HandshakeTimeout,
    /// What came is no request.
    Malformed,
    /// The header of a request is too large.
    TooLarge,
    /// The header of a request, or the first bytes of a relayed connection, took too long.
    Timeout,
    /// A violation of HTTP/2, or more of its frames than anybody needs.
    Http2,
    /// No backend could take a relayed connection.
    NoBackend,
}

impl Refusal {
    /// All, with the names that metrics have.
    pub(crate) const ALL: [(Self, &'static str); 8] = [
        (Self::Limit, "limit"),
        (Self::Handshake, "handshake"),
        (Self::HandshakeTimeout, "handshake_timeout"),
        (Self::Malformed, "malformed"),
        (Self::TooLarge, "too_large"),
        (Self::Timeout, "timeout"),
        (Self::Http2, "http2"),
        (Self::NoBackend, "no_backend"),
    ];

    /// What ended a client's HTTP connection; none where it only went away.
    pub(super) fn of(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        let mut found = None;
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<hyper::Error>() {
                found = if error.is_parse_too_large() {
                    Some(Self::TooLarge)
                } else if error.is_parse() {
                    Some(Self::Malformed)
                } else if error.is_timeout() {
                    Some(Self::Timeout)
                } else {
                    found
                };
            }
            if let Some(error) = error.downcast_ref::<h2::Error>() {
                // Only what we say of the client, not what it says of us, is its fault.
                return (error.is_library() && !error.is_io()).then_some(Self::Http2).or(found);
            }
            cause = error.source();
        }
        found
    }
}

/// Classes of status codes: 1xx to 5xx.
pub(crate) const CLASSES: usize = 5;

/// Counters of one service; they outlive a reload.
#[derive(Debug)]
pub(crate) struct Counts {
    accepted: AtomicU64,
    open: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
    retried: AtomicU64,
    /// A share of each worker's own.
    requests: Vec<Requests>,
}

/// Counters of requests. Those of two workers are in no cache line together.
#[derive(Debug)]
#[repr(align(128))]
struct Requests {
    /// In clear, and through tunnels.
    classes: [[AtomicU64; CLASSES]; 2],
    /// Of times until the answer's head.
    buckets: [AtomicU64; BUCKETS],
    sum: AtomicU64,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            classes: array::from_fn(|_| array::from_fn(|_| AtomicU64::default())),
            buckets: array::from_fn(|_| AtomicU64::default()),
            sum: AtomicU64::default(),
        }
    }
}

/// The same as numbers.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    pub(crate) accepted: u64,
    pub(crate) open: u64,
    /// In the order of [`Refusal::ALL`].
    pub(crate) refused: [u64; Refusal::ALL.len()],
    pub(crate) requests: [[u64; CLASSES]; 2],
    pub(crate) retried: u64,
    pub(crate) times: Histogram,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            accepted: AtomicU64::default(),
            open: AtomicU64::default(),
            refused: array::from_fn(|_| AtomicU64::default()),
            retried: AtomicU64::default(),
            requests: (0..processors()).map(|_| Requests::default()).collect(),
        }
    }
}

impl Counts {
    /// A client that is served until this is dropped; none, and counted, where there are `most` already.
    pub(super) fn admit(self: &Arc<Self>, most: u64) -> Option<Open> {
        if self.open.fetch_add(1, Relaxed) >= most {
            self.open.fetch_sub(1, Relaxed);
            self.refuse(Refusal::Limit);
            return None;
        }
        self.accepted.fetch_add(1, Relaxed);
        Some(Open(Arc::clone(self)))
    }

    pub(super) fn refuse(&self, why: Refusal) {
        let place = Refusal::ALL.iter().position(|(one, _)| *one == why);
        if let Some(counter) = place.and_then(|place| self.refused.get(place)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn request(&self, secure: bool, status: u16, took: Duration) {
        let class = usize::from(status / 100).clamp(1, CLASSES) - 1;
        let Some(own) = self.requests.get(here().unwrap_or_default()) else { return };
        own.classes[usize::from(secure)][class].fetch_add(1, Relaxed);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        own.buckets[Histogram::bucket(ns)].fetch_add(1, Relaxed);
        own.sum.fetch_add(ns, Relaxed);
    }

    pub(super) fn retry(&self) {
        self.retried.fetch_add(1, Relaxed);
    }

    pub(crate) fn read(&self) -> Counted {
        let read = |counter: &AtomicU64| counter.load(Relaxed);
        let sum = |one: &dyn Fn(&Requests) -> u64| self.requests.iter().map(one).sum();
        Counted {
            accepted: read(&self.accepted),
            open: read(&self.open),
            refused: self.refused.each_ref().map(read),
            requests: array::from_fn(|way| {
                array::from_fn(|class| sum(&|own| read(&own.classes[way][class])))
            }),
            retried: read(&self.retried),
            times: Histogram {
                buckets: array::from_fn(|bucket| sum(&|own| read(&own.buckets[bucket]))),
                sum: sum(&|own| read(&own.sum)),
            },
        }
    }
}

/// A client that is served.
pub(super) struct Open(Arc<Counts>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_clients_than_there_may_be() {
        let counts = Arc::new(Counts::default());
        let first = counts.admit(2);
        let second = counts.admit(2);
        assert!(first.is_some() && second.is_some() && counts.admit(2).is_none());
        drop(first);
        assert!(counts.admit(2).is_some(), "one went");
        let counted = counts.read();
        assert_eq!((counted.accepted, counted.open, counted.refused[0]), (3, 1, 1));
    }

    #[test]
    fn requests_are_counted_by_way_and_class() {
        let counts = Counts::default();
        for (secure, status) in
            [(true, 200), (true, 204), (false, 404), (true, 101), (true, 599), (true, 999)]
        {
            counts.request(secure, status, Duration::from_micros(3));
        }
        let counted = counts.read();
        assert_eq!(counted.requests, [[0, 0, 0, 1, 0], [1, 2, 0, 0, 2]]);
        assert_eq!((counted.times.count(), counted.times.sum), (6, 18_000));
    }
}
