//! Threads that serve clients and keep tunnels: each has a runtime of its own.
//!
//! What is done for a connection, from the client's socket to the backend's and back, is done on one thread where that can
//! be: no other is woken, and nothing is handed over. So a client's connection stays on the thread that it was given to,
//! and prefers tunnels of that thread.

use std::{
    cell::Cell,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    net::IpAddr,
    num::NonZero,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use tokio::{runtime::Handle, sync::watch};

/// One in so many connections may be more on a thread than on the one with the fewest, for the sake of clients that come
/// again.
const SLACK: usize = 16;

thread_local! {
    static HERE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The threads. Without any, the default, all is done by the runtime of whoever asks.
///
/// When it is dropped the threads end, and what runs on them is dropped.
#[derive(Debug, Default)]
pub struct Workers {
    all: Vec<Worker>,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
    /// Dropped, or true, at the end.
    ends: watch::Sender<bool>,
}

#[derive(Debug)]
struct Worker {
    runtime: Handle,
    /// Clients that it serves.
    clients: AtomicUsize,
}

impl Workers {
    /// As many threads as there are processors for us.
    ///
    /// # Errors
    /// Where the system gives no thread, or no epoll instance for one.
    pub fn start() -> io::Result<Arc<Self>> {
        let ends = watch::Sender::new(false);
        let (mut all, mut threads) = (Vec::new(), Vec::new());
        for index in 0..processors() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            all.push(Worker { runtime: runtime.handle().clone(), clients: AtomicUsize::new(0) });
            let mut end = ends.subscribe();
            let work = move || {
                HERE.set(Some(index));
                // The sender is gone at the latest with the daemon.
                drop(runtime.block_on(end.wait_for(|end| *end)));
            };
            threads.push(thread::Builder::new().name(format!("worker-{index}")).spawn(work)?);
        }
        Ok(Arc::new(Self { all, threads: Mutex::new(threads), ends }))
    }

    /// How many there are; one if there are none of our own.
    pub fn number(&self) -> usize {
        self.all.len().max(1)
    }

    /// The runtime of the worker with this index, or the caller's.
    ///
    /// # Panics
    /// Where there are no threads of our own, outside of a runtime.
    pub fn runtime(&self, index: usize) -> Handle {
        self.all.get(index).map_or_else(Handle::current, |worker| worker.runtime.clone())
    }

    /// A place for a client's connection: its address has a thread, so that one who comes again meets the same tunnels.
    /// If that one has too many, it is the one with the fewest.
    pub fn seat(self: &Arc<Self>, client: IpAddr) -> Seat {
        let clients = || self.all.iter().map(|worker| worker.clients.load(Relaxed));
        let fewest = clients().enumerate().min_by_key(|(_, clients)| *clients).unwrap_or_default();
        let mut hasher = DefaultHasher::new();
        client.hash(&mut hasher);
        let own = (hasher.finish() % self.number() as u64) as usize;
        let room = fewest.1 + clients().sum::<usize>() / SLACK;
        let index = if clients().nth(own).is_none_or(|clients| clients <= room) { own } else { fewest.0 };
        if let Some(worker) = self.all.get(index) {
            worker.clients.fetch_add(1, Relaxed);
        }
        Seat { workers: Arc::clone(self), index }
    }

    /// Ends the threads; what still runs on them is dropped. Returns when they have ended.
    pub fn end(&self) {
        self.ends.send_replace(true);
        for thread in std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner)) {
            if thread.join().is_err() {
                log::error!("a worker thread has panicked");
            }
        }
    }
}

/// Processors for us.
pub fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// The index of the worker that asks; none on other threads.
pub fn here() -> Option<usize> {
    HERE.get()
}

/// A client's place on a worker until this is dropped.
#[derive(Debug)]
pub struct Seat {
    workers: Arc<Workers>,
    index: usize,
}

impl Seat {
    /// The worker's runtime.
    pub fn runtime(&self) -> Handle {
        self.workers.runtime(self.index)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(worker) = self.workers.all.get(self.index) {
            worker.clients.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn workers(number: usize) -> Arc<Workers> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let worker = || Worker { runtime: runtime.handle().clone(), clients: AtomicUsize::new(0) };
        Arc::new(Workers { all: (0..number).map(|_| worker()).collect(), ..Workers::default() })
    }

    fn client(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(number).into()
    }

    #[test]
    fn who_comes_again_gets_the_same_thread() {
        let workers = workers(8);
        let first = workers.seat(client(1)).index;
        for _ in 0..100 {
            assert_eq!(workers.seat(client(1)).index, first);
        }
    }

    #[test]
    fn one_address_does_not_crowd_a_thread() {
        let workers = workers(4);
        let seats: Vec<Seat> = (0..1000).map(|_| workers.seat(client(1))).collect();
        let counts: Vec<usize> = workers.all.iter().map(|worker| worker.clients.load(Relaxed)).collect();
        assert!(counts.iter().all(|count| (200..=330).contains(count)), "{counts:?}");
        drop(seats);
        assert!(workers.all.iter().all(|worker| worker.clients.load(Relaxed) == 0));
    }

    #[test]
    fn few_connections_are_spread_evenly() {
        let workers = workers(2);
        let seats: Vec<Seat> = (0..12).map(|_| workers.seat(client(1))).collect();
        assert_eq!(seats.iter().filter(|seat| seat.index == 0).count(), 6);
    }

    #[test]
    fn tasks_know_their_thread_and_end_with_it() {
        let workers = Workers::start().expect("threads");
        let (sender, receiver) = std::sync::mpsc::channel();
        for index in 0..workers.number() {
            let sender = sender.clone();
            workers.runtime(index).spawn(async move {
                sender.send((index, here())).expect("it is read");
                // Until it is dropped.
                std::future::pending::<()>().await;
                drop(sender);
            });
        }
        drop(sender);
        for _ in 0..workers.number() {
            let (index, here) = receiver.recv().expect("each says so");
            assert_eq!(here, Some(index));
        }
        workers.end();
        assert!(receiver.recv().is_err(), "the tasks were dropped");
        assert_eq!(here(), None);
    }
}
