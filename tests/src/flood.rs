//! Clients that send a server more datagrams than it is given, and the server, which counts what comes.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use crate::{
    netns::Netns,
    topology::{Family, Place},
};

/// Bytes of a datagram.
pub const DATAGRAM: usize = 1200;

/// Ends when dropped.
#[derive(Debug)]
pub struct Flood {
    port: u16,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Datagrams that came, by client.
    received: Arc<Mutex<BTreeMap<IpAddr, u64>>>,
    sent: Arc<AtomicU64>,
}

impl Flood {
    /// Starts the server, on both of its addresses.
    pub fn new(place: &Place, port: u16) -> io::Result<Self> {
        let (stop, sent) = (Arc::default(), Arc::default());
        let mut flood = Self { port, stop, threads: Vec::new(), received: Arc::default(), sent };
        for address in place.addresses {
            let socket = place.netns.run(|| UdpSocket::bind(SocketAddr::new(address, port)))?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let (stop, received) = (Arc::clone(&flood.stop), Arc::clone(&flood.received));
            flood.threads.push(std::thread::spawn(move || {
                let mut buffer = [0; 2048];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                        let mut received = received.lock().unwrap_or_else(PoisonError::into_inner);
                        *received.entry(from.ip()).or_default() += 1;
                    }
                }
            }));
        }
        Ok(flood)
    }

    /// Sends so many bits a second of datagrams from a client's address.
    pub fn send(&mut self, clients: &Netns, from: IpAddr, bits: u64) -> io::Result<()> {
        let family = if from.is_ipv4() { Family::V4 } else { Family::V6 };
        let socket = clients.run(|| UdpSocket::bind(SocketAddr::new(from, 0)))?;
        socket.connect(SocketAddr::new(family.vip(), self.port))?;
        let (stop, all) = (Arc::clone(&self.stop), Arc::clone(&self.sent));
        self.threads.push(std::thread::spawn(move || {
            let (began, mut sent) = (Instant::now(), 0);
            while !stop.load(Ordering::Relaxed) {
                let due = (began.elapsed().as_secs_f64() * bits as f64) as u64 / (DATAGRAM as u64 * 8);
                while sent < due {
                    // What is lost is lost.
                    let _ = socket.send(&[7; DATAGRAM]);
                    sent += 1;
                    all.fetch_add(1, Ordering::Relaxed);
                }
                sleep(Duration::from_millis(1));
            }
        }));
        Ok(())
    }

    /// Datagrams of all clients so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Datagrams that the server got so far, of each of these clients' addresses together.
    #[must_use]
    pub fn received(&self, clients: &[IpAddr]) -> u64 {
        let received = self.received.lock().unwrap_or_else(PoisonError::into_inner);
        clients.iter().filter_map(|client| received.get(client)).sum()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
