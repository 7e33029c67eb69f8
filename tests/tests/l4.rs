//! Services in `l4` mode, on real sockets.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use dispatcher_tests::{
    daemon::{Daemon, Service},
    sockets,
    stage::{Stage, web},
    tls::{Manners, Version},
    topology::{Family, Plan, Topology},
};

#[test]
fn tcp_with_tls_inside() {
    let stage = Stage::new(Plan::default(), "native", &web().with("mode = \"l4\""), Manners::default());
    let mut servers = BTreeSet::new();
    for version in Version::BOTH {
        for family in Family::BOTH {
            for client in 0..8 {
                servers.insert(stage.visit(&stage.user(version), family, client).backend);
            }
            stage.transfer(version, family, 1_000_000).unwrap_or_else(|error| panic!("{error:#}"));
        }
    }
    assert_eq!(servers.len(), 3, "{servers:?}");
    stage.only_drops(&[]).expect("nothing is dropped");
}

/// A server that answers each datagram with its name and the datagram.
struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(socket: UdpSocket, name: &str) -> Self {
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a limit");
        let stop = Arc::new(AtomicBool::new(false));
        let (name, stopped) = (name.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
                let answer = [name.as_bytes(), b":", &buffer[..length]].concat();
                let _ = socket.send_to(&answer, from);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn udp() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let mut echoes = Vec::new();
    for (i, place) in topology.backends.iter().enumerate() {
        for family in Family::BOTH {
            let at = SocketAddr::new(place.address(family), 53);
            echoes
                .push(Echo::start(sockets::datagrams(&place.netns, at).expect("a socket"), &format!("b{i}")));
        }
    }
    let service = Service::new("dns", 53).with("protocol = \"udp\"").with("mode = \"l4\"");
    let _daemon = Daemon::start(&topology, "native", &[service]).expect("dispatcherd");
    for family in Family::BOTH {
        let mut servers = BTreeSet::new();
        for client in 0..24 {
            let from = SocketAddr::new(topology.client(family, client), 0);
            let socket = sockets::datagrams(&topology.clients, from).expect("a socket");
            // Connected: answers from anyone but the VIP are not heard.
            socket.connect(SocketAddr::new(family.vip(), 53)).expect("connects");
            let mut names = BTreeSet::new();
            for length in [0, 1, 33, 1200] {
                let question = vec![client as u8; length];
                socket.send(&question).expect("sends");
                let mut buffer = [0; 2048];
                let got = socket
                    .recv(&mut buffer)
                    .unwrap_or_else(|error| panic!("{length} bytes, {family:?}: {error}"));
                let (name, echo) = buffer[..got].split_at(3);
                assert_eq!(echo, question, "{length} bytes");
                names.insert(name.to_vec());
            }
            assert_eq!(names.len(), 1, "one flow, several servers");
            servers.extend(names);
        }
        assert_eq!(servers.len(), 3, "{family:?}");
    }
}
