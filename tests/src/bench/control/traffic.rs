//! Light traffic through a service that nobody changes, and what of it is lost.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    sockets,
    topology::{Family, Topology},
};

/// A message, and its echo.
const MESSAGE: &[u8] = b"here I am\n";
/// Time between two messages of a connection.
const PAUSE: Duration = Duration::from_millis(1);
/// Connections that stay.
const KEPT: usize = 2;

/// Servers that say what they hear.
pub(super) struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Echo {
    /// One at each backend.
    pub(super) fn start(topology: &Topology, port: u16) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for place in &topology.backends {
            let listener = sockets::listen(&place.netns, port).context("an echo server")?;
            listener.set_nonblocking(true)?;
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, _)) => drop(thread::spawn(move || echo(stream))),
                        Err(_) => thread::sleep(PAUSE),
                    }
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Until the client closes or says nothing for long.
fn echo(mut stream: TcpStream) {
    let _ = stream.set_nonblocking(false);
    let _ = sockets::limit(&stream);
    let mut buffer = [0; MESSAGE.len()];
    while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
}

/// What was seen so far.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    /// Messages that came back.
    pub(super) messages: u64,
    /// Connections that were made.
    pub(super) connections: u64,
    /// Connections that failed, at whatever point.
    pub(super) lost: u64,
    /// Segments that clients sent again.
    pub(super) again: u64,
}

#[derive(Default)]
struct Counts {
    messages: AtomicU64,
    connections: AtomicU64,
    lost: AtomicU64,
    again: AtomicU64,
}

/// Clients that talk until this is ended.
pub(super) struct Traffic {
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
    threads: Vec<JoinHandle<()>>,
}

impl Traffic {
    /// Two connections that stay, and one after the other that do not.
    pub(super) fn start(topology: &Topology, port: u16) -> Self {
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let threads = (0..=KEPT).map(|number| {
            let (stop, counts) = (Arc::clone(&stop), Arc::clone(&counts));
            let from = topology.client(Family::V4, number);
            let to = SocketAddr::new(Family::V4.vip(), port);
            topology.clients.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let more = || number < KEPT && !stop.load(Ordering::Relaxed);
                    if talk(from, to, &counts, more).is_err() {
                        counts.lost.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        });
        let threads = threads.collect();
        Self { stop, counts, threads }
    }

    /// Ends it and says what was seen.
    pub(super) fn end(mut self) -> Seen {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Seen {
            messages: read(&self.counts.messages),
            connections: read(&self.counts.connections),
            lost: read(&self.counts.lost),
            again: read(&self.counts.again),
        }
    }
}

/// One connection.
fn talk(from: std::net::IpAddr, to: SocketAddr, counts: &Counts, more: impl Fn() -> bool) -> Result<()> {
    let mut stream = sockets::connect_here(from, to)?;
    counts.connections.fetch_add(1, Ordering::Relaxed);
    let mut buffer = [0; MESSAGE.len()];
    let result = loop {
        let once = stream.write_all(MESSAGE).and_then(|()| stream.read_exact(&mut buffer));
        if let Err(error) = once {
            break Err(error.into());
        }
        counts.messages.fetch_add(1, Ordering::Relaxed);
        thread::sleep(PAUSE);
        if !more() {
            break Ok(());
        }
    };
    counts.again.fetch_add(sent_again(&stream), Ordering::Relaxed);
    // Nobody waits in TIME_WAIT.
    sockets::reset(stream)?;
    result
}

/// Segments that the kernel has sent again on a connection.
fn sent_again(stream: &TcpStream) -> u64 {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut size = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `info`, whose fields are integers: zeros are one.
    let info = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut size,
        );
        info.assume_init()
    };
    u64::from(info.tcpi_total_retrans)
}
