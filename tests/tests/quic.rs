//! QUIC connections whose clients move, with a QUIC stack at both ends.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result};
use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::{Daemon, Folder, Service, config},
    netns::Netns,
    sockets,
    tls::{Authority, HOST},
    topology::{Family, Plan, Topology},
};
use quinn::{
    ClientConfig, Connection, ConnectionId, ConnectionIdGenerator, Endpoint, EndpointConfig, ServerConfig,
    TokioRuntime,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    version::TLS13,
};
use tokio::{runtime::Runtime, time::timeout};

const PORT: u16 = 4433;
const PATIENCE: Duration = sockets::PATIENCE;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Makes connection IDs of configuration 2: first byte, server ID of two bytes, nonce of six.
struct Routable {
    server: u8,
}

impl ConnectionIdGenerator for Routable {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut cid = [2 << 5 | 8, 0x5e, self.server, 0, 0, 0, 0, 0, 0];
        let random = provider().secure_random;
        random.fill(&mut cid[3..]).expect("random bytes");
        ConnectionId::new(&cid)
    }

    fn cid_len(&self) -> usize {
        9
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// A server that answers each stream with its name. With `routable` its connection IDs name it.
async fn serve(socket: UdpSocket, number: u8, routable: bool, authority: &Authority) -> Result<Endpoint> {
    let name = format!("b{number}");
    let issued = authority.issue(&name)?;
    let certificate = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes())?;
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes())?;
    let tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)?;
    let config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let mut own = EndpointConfig::default();
    if routable {
        own.cid_generator(move || Box::new(Routable { server: number }));
    }
    let endpoint = Endpoint::new(own, Some(config), socket, Arc::new(TokioRuntime))?;
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            let name = name.clone();
            tokio::spawn(async move {
                let connection = incoming.await?;
                loop {
                    let (mut send, mut receive) = connection.accept_bi().await?;
                    receive.read_to_end(64).await?;
                    send.write_all(name.as_bytes()).await?;
                    send.finish()?;
                }
                #[expect(unreachable_code, reason = "tells the type of errors")]
                Ok::<_, anyhow::Error>(())
            });
        }
    });
    Ok(endpoint)
}

/// A client's end on a socket of the clients' namespace.
fn client(topology: &Topology, from: SocketAddr, authority: &Authority) -> Result<Endpoint> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes())?)?;
    let tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = sockets::datagrams(&topology.clients, from)?;
    let mut endpoint = Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))?;
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?)));
    Ok(endpoint)
}

async fn connect(endpoint: &Endpoint, to: SocketAddr) -> Result<Connection> {
    Ok(timeout(PATIENCE, endpoint.connect(to, HOST)?).await.context("the handshake takes too long")??)
}

/// The name of the server at the other end.
async fn ask(connection: &Connection) -> Result<String> {
    let answer = async {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(b"who?").await?;
        send.finish()?;
        Ok::<_, anyhow::Error>(receive.read_to_end(64).await?)
    };
    let answer = timeout(PATIENCE, answer).await.context("no answer")??;
    Ok(String::from_utf8(answer)?)
}

/// What a NAT does to one client: its datagrams leave from a port that can change.
struct Nat {
    outside: Arc<Mutex<UdpSocket>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Nat {
    fn new(inside: UdpSocket, outside: UdpSocket) -> io::Result<Self> {
        for socket in [&inside, &outside] {
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        }
        let client: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
        let outside = Arc::new(Mutex::new(outside));
        let stop = Arc::new(AtomicBool::new(false));
        let current = |outside: &Mutex<UdpSocket>| outside.lock().expect("no panic").try_clone();
        let (inward, outward) = (Arc::new(inside), Arc::clone(&outside));
        let out = std::thread::spawn({
            let (inside, outside, stop) = (Arc::clone(&inward), Arc::clone(&outward), Arc::clone(&stop));
            let client = Arc::clone(&client);
            move || {
                let mut buffer = [0; 2048];
                while !stop.load(Ordering::Relaxed) {
                    let Ok((length, from)) = inside.recv_from(&mut buffer) else { continue };
                    *client.lock().expect("no panic") = Some(from);
                    let _ = current(&outside).and_then(|socket| socket.send(&buffer[..length]));
                }
            }
        });
        let back = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut buffer = [0; 2048];
                while !stop.load(Ordering::Relaxed) {
                    let got = current(&outward).and_then(|socket| socket.recv(&mut buffer));
                    let (Ok(length), Some(client)) = (got, *client.lock().expect("no panic")) else {
                        continue;
                    };
                    let _ = inward.send_to(&buffer[..length], client);
                }
            }
        });
        Ok(Self { outside, stop, threads: vec![out, back] })
    }

    /// From now on the client's datagrams come from this socket; what comes to the old one is lost.
    fn rebind(&self, outside: UdpSocket) {
        outside.set_read_timeout(Some(Duration::from_millis(20))).expect("a limit");
        *self.outside.lock().expect("no panic") = outside;
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn connected(netns: &Netns, from: SocketAddr, to: SocketAddr) -> UdpSocket {
    let socket = sockets::datagrams(netns, from).expect("a socket");
    socket.connect(to).expect("connects");
    socket
}

/// Servers in the backends' namespaces.
async fn servers(topology: &Topology, routable: bool, authority: &Authority) -> Vec<Endpoint> {
    let mut servers = Vec::new();
    for (number, place) in (1..).zip(&topology.backends) {
        for family in Family::BOTH {
            let socket = sockets::datagrams(&place.netns, SocketAddr::new(place.address(family), PORT));
            let server = serve(socket.expect("a socket"), number, routable, authority).await;
            servers.push(server.unwrap_or_else(|error| panic!("server b{number}: {error:#}")));
        }
    }
    servers
}

fn service() -> Service {
    Service::new("quic", PORT)
        .with("protocol = \"udp\"")
        .with("mode = \"l4\"")
        .with("affinity = \"quic-cid\"")
}

#[test]
fn a_connection_goes_on_after_nat_rebinding() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let authority = Authority::new().expect("a certificate authority");
    let runtime = Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let _servers = servers(&topology, false, &authority).await;
        let daemon = Daemon::start(&topology, "native", &[service()]).expect("dispatcherd");
        let mut seen = BTreeSet::new();
        let mut connections = 0;
        for family in Family::BOTH {
            let vip = SocketAddr::new(family.vip(), PORT);
            for number in 0..6 {
                let at = |number| SocketAddr::new(topology.client(family, number), 0);
                let inside = sockets::datagrams(&topology.clients, at(0)).expect("a socket");
                let inside_at = inside.local_addr().expect("an address");
                let nat = Nat::new(inside, connected(&topology.clients, at(1), vip)).expect("a NAT");
                let endpoint = client(&topology, at(0), &authority).expect("a client");
                let connection = connect(&endpoint, inside_at).await.unwrap_or_else(|e| panic!("{e:#}"));
                let name = ask(&connection).await.expect("an answer");
                connections += 1;
                for turn in 0..4 {
                    nat.rebind(connected(&topology.clients, at(number + turn), vip));
                    let again = ask(&connection).await;
                    let again = again.unwrap_or_else(|error| {
                        panic!("{family:?}, connection {number} of {name}, after {turn} changes: {error:#}")
                    });
                    assert_eq!(again, name);
                }
                seen.insert(name);
                let known = daemon.sessions().expect("a list");
                let known: Vec<_> = known.iter().filter(|one| one.kind == "quic-cid").collect();
                assert_eq!(known.len(), connections, "one ID a connection: {known:?}");
                assert!(known.iter().all(|one| one.id.len() == 16 && one.state == "confirmed"), "{known:?}");
            }
        }
        assert!(seen.len() > 1, "one server had all connections: {seen:?}");
        assert!(daemon.counter(Reason::BoundHit).expect("a counter") >= 40, "each change is a known ID");
        assert_eq!(daemon.drops().expect("counters"), []);
    });
}

#[test]
fn migration_to_ids_that_came_encrypted() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let authority = Authority::new().expect("a certificate authority");
    let runtime = Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let _servers = servers(&topology, true, &authority).await;
        let services = [service()
            .each("quic_server_id = \"5e0{}\"")
            .with("[[service.quic_lb]]\nconfig_id = 2\nserver_id_length = 2")];
        let mut daemon = Daemon::start(&topology, "native", &services).expect("dispatcherd");
        let mut seen = BTreeSet::new();
        for family in Family::BOTH {
            let vip = SocketAddr::new(family.vip(), PORT);
            for number in 0..4 {
                let at = |number| SocketAddr::new(topology.client(family, number), 0);
                let endpoint = client(&topology, at(number), &authority).expect("a client");
                let connection = connect(&endpoint, vip).await.unwrap_or_else(|e| panic!("{e:#}"));
                let name = ask(&connection).await.expect("an answer");
                for turn in 1..4 {
                    // The client knows that it moves, and takes an ID that we have never seen.
                    let socket = sockets::datagrams(&topology.clients, at(number + turn)).expect("a socket");
                    endpoint.rebind(socket).expect("rebinds");
                    let again = ask(&connection).await;
                    let again = again.unwrap_or_else(|error| {
                        panic!("{family:?}, connection {number} of {name}, move {turn}: {error:#}")
                    });
                    assert_eq!(again, name);
                }
                // Without a flow table, at a new place.
                drop(daemon);
                daemon = Daemon::start(&topology, "native", &services).expect("dispatcherd");
                endpoint
                    .rebind(sockets::datagrams(&topology.clients, at(number)).expect("a socket"))
                    .expect("rebinds");
                assert_eq!(ask(&connection).await.expect("an answer of the same connection"), name);
                seen.insert(name);
            }
        }
        assert!(seen.len() > 1, "one server had all connections: {seen:?}");
        let known = daemon.sessions().expect("a list");
        let ids: BTreeSet<_> =
            known.iter().map(|one| (one.kind.as_str(), one.id.as_str(), one.backend.as_str())).collect();
        let expected = [("025e01", "b1"), ("025e02", "b2"), ("025e03", "b3")];
        assert_eq!(ids, expected.map(|(id, backend)| ("quic-server-id", id, backend)).into());
        let refused = daemon.ask::<serde_json::Value>(&["sessions", "remove", "025e01"]);
        let refused = refused.expect_err("the configuration says it").to_string();
        assert!(refused.contains("quic_server_id"), "{refused}");
        assert_eq!(daemon.sessions().expect("a list").len(), 3);
    });
}

#[test]
fn a_connection_goes_on_over_a_reboot() {
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let authority = Authority::new().expect("a certificate authority");
    let folder = Folder::new().expect("a folder");
    let state = format!("state = \"{}\"", folder.path().join("state.redb").display());
    let text = config(&topology, "native", &[service()]).replace("state = \"none\"", &state);
    let runtime = Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let _servers = servers(&topology, false, &authority).await;
        let mut daemon = Daemon::start_with(&topology.dispatcher, &text).expect("dispatcherd");
        let mut connections = Vec::new();
        for family in Family::BOTH {
            // So many that they do not all go to one server by chance.
            for number in 0..8 {
                let from = SocketAddr::new(topology.client(family, number), 0);
                let endpoint = client(&topology, from, &authority).expect("a client");
                let connection =
                    connect(&endpoint, SocketAddr::new(family.vip(), PORT)).await.expect("connects");
                let name = ask(&connection).await.expect("an answer");
                connections.push((endpoint, connection, name));
            }
        }
        let seen: BTreeSet<&str> = connections.iter().map(|(_, _, name)| name.as_str()).collect();
        assert!(seen.len() > 1, "one server had all connections: {seen:?}");
        daemon.stop().expect("ends");
        daemon.again(&topology.dispatcher, &text).expect("dispatcherd again");
        assert!(daemon.process().log().contains("restored 16 sessions\n"));
        for (_, connection, name) in &connections {
            // No flow is known any more, and the short header does not say how long its ID is.
            assert_eq!(ask(connection).await.expect("an answer of the same connection"), *name);
        }
        assert_eq!(daemon.status().expect("status").hits, 16);
    });
}
