//! Tunnels to real TLS servers on the loopback.

use std::collections::HashSet;
use std::convert::Infallible;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion, version};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::either::Either;

use super::pool::{MOST_WAITING, WINDOW, delay};
use super::{
    Body, Carries, Lease, Preference, Reply, SendError, Settings, State, Target, Tls, Tunnels, Unavailable,
};

const NAME: &str = "backend.test";
const BACKEND: u32 = 7;
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_secs(3600);

/// A certificate authority.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    roots: Arc<RootCertStore>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone()).unwrap();
        Authority { issuer: Issuer::new(params, key), roots: Arc::new(roots) }
    }

    /// The one most tests trust.
    fn known() -> &'static Self {
        static KNOWN: OnceLock<Authority> = OnceLock::new();
        KNOWN.get_or_init(|| Authority::new("known"))
    }
}

/// What a server is like.
struct Setup {
    alpn: &'static [u8],
    versions: &'static [&'static SupportedProtocolVersion],
    name: &'static str,
    expired: bool,
    wants_certificate: bool,
    streams: u32,
    /// It speaks HTTP/1.1 without TLS.
    clear: bool,
}

const H2: Setup = Setup {
    alpn: b"h2",
    versions: rustls::ALL_VERSIONS,
    name: NAME,
    expired: false,
    wants_certificate: false,
    streams: 100,
    clear: false,
};
const H1: Setup = Setup { alpn: b"http/1.1", ..H2 };
const TLS12: &[&SupportedProtocolVersion] = &[&version::TLS12];

impl Setup {
    fn config(&self) -> ServerConfig {
        let authority = Authority::known();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([self.name.to_owned()]).unwrap();
        if self.expired {
            params.not_after = rcgen::date_time_ymd(2001, 2, 3);
        }
        let certificate = params.signed_by(&key, &authority.issuer).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(self.versions)
            .unwrap();
        let builder = if self.wants_certificate {
            let roots = Arc::clone(&authority.roots);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = vec![self.alpn.to_vec()];
        config
    }
}

/// What the connections of a server share.
struct Shared {
    /// TCP connections so far.
    accepted: AtomicUsize,
    /// Close each TCP connection at once.
    deaf: AtomicBool,
    /// Requests being answered now, and the most there were at once.
    running: AtomicUsize,
    most: AtomicUsize,
    /// Each `/gate` takes one permit.
    gate: Semaphore,
    /// Each change ends all connections.
    cut: watch::Sender<()>,
    /// Set: no new requests on the present connections.
    drain: watch::Sender<()>,
}

/// A TLS server. It ends when dropped.
struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

impl Server {
    async fn start(setup: &Setup) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            accepted: AtomicUsize::new(0),
            deaf: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            gate: Semaphore::new(0),
            cut: watch::Sender::new(()),
            drain: watch::Sender::new(()),
        });
        let acceptor = (!setup.clear).then(|| TlsAcceptor::from(Arc::new(setup.config())));
        let streams = setup.streams;
        let mut tasks = JoinSet::new();
        let all = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                all.accepted.fetch_add(1, SeqCst);
                if all.deaf.load(SeqCst) {
                    continue;
                }
                connections.spawn(serve(Arc::clone(&all), acceptor.clone(), socket, streams));
            }
        });
        Server { address, shared, _tasks: tasks }
    }

    fn accepted(&self) -> usize {
        self.shared.accepted.load(SeqCst)
    }
}

async fn serve(shared: Arc<Shared>, acceptor: Option<TlsAcceptor>, socket: TcpStream, streams: u32) {
    let mut cut = shared.cut.subscribe();
    let mut drain = shared.drain.subscribe();
    let peer = socket.peer_addr().unwrap();
    let (stream, http2) = match acceptor {
        Some(acceptor) => {
            let Ok(stream) = acceptor.accept(socket).await else { return };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            (Either::Left(stream), http2)
        }
        None => (Either::Right(socket), false),
    };
    let io = TokioIo::new(stream);
    let service = service_fn(move |request| answer(Arc::clone(&shared), peer, request));
    if http2 {
        let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        builder.max_concurrent_streams(streams);
        let mut connection = std::pin::pin!(builder.serve_connection(io, service));
        loop {
            tokio::select! {
                _ = cut.changed() => break,
                Ok(()) = drain.changed() => connection.as_mut().graceful_shutdown(),
                _ = connection.as_mut() => break,
            }
        }
    } else {
        let builder = hyper::server::conn::http1::Builder::new();
        let connection = builder.serve_connection(io, service).with_upgrades();
        tokio::select! {
            _ = cut.changed() => {}
            _ = connection => {}
        }
    }
}

/// Answers with the client's port, by which a test knows the tunnel.
async fn answer(
    shared: Arc<Shared>,
    peer: SocketAddr,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let running = shared.running.fetch_add(1, SeqCst) + 1;
    shared.most.fetch_max(running, SeqCst);
    let port = full(peer.port().to_string());
    let response = match request.uri().path() {
        "/gate" => {
            if let Ok(permit) = shared.gate.acquire().await {
                permit.forget();
            }
            Response::new(port)
        }
        "/endless" => {
            let first = Frame::data(Bytes::from_static(b"first"));
            let rest = futures_util::stream::pending();
            let frames = futures_util::StreamExt::chain(futures_util::stream::iter([Ok(first)]), rest);
            Response::new(Body::new(StreamBody::new(frames)))
        }
        "/flood" => {
            let frame = || Ok(Frame::data(Bytes::from_static(&[0; 65_536])));
            Response::new(Body::new(StreamBody::new(futures_util::stream::repeat_with(frame))))
        }
        "/echo" => {
            let whole = request.into_body().collect().await.map(|body| body.to_bytes());
            Response::new(full(whole.unwrap_or_default()))
        }
        "/upgrade" => {
            tokio::spawn(async move {
                let mut io = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                let mut word = [0; 4];
                while io.read_exact(&mut word).await.is_ok() {
                    io.write_all(&word).await.unwrap();
                    io.flush().await.unwrap();
                }
            });
            let mut response = Response::new(Body::new(Empty::new().map_err(|never| match never {})));
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", "upgrade".parse().unwrap());
            response.headers_mut().insert("upgrade", "echo".parse().unwrap());
            response
        }
        _ => Response::new(port),
    };
    shared.running.fetch_sub(1, SeqCst);
    Ok(response)
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Body::new(Full::new(bytes.into()).map_err(|never| match never {}))
}

fn client() -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(Arc::clone(&Authority::known().roots))
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    tls
}

fn settings(established: usize) -> Settings {
    Settings {
        tls: Some(Tls { config: Arc::new(client()), name: ServerName::try_from(NAME).unwrap() }),
        carries: Carries::Requests,
        established,
        most: 4,
        max_age: LONG,
        timeout: PATIENCE,
    }
}

fn target(address: SocketAddr, settings: Settings) -> Target {
    Target { backend: BACKEND, name: "web/one".to_owned(), address, settings: Arc::new(settings) }
}

fn tunnels(address: SocketAddr, settings: Settings) -> Arc<Tunnels> {
    let tunnels = Tunnels::new(Arc::default());
    tunnels.follow(vec![target(address, settings)]);
    tunnels
}

/// Waits for something that must come.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = timeout(PATIENCE, async {
        while !is_so() {
            sleep(Duration::from_millis(2)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("this must come to an end")
}

fn open(tunnels: &Tunnels) -> Vec<u32> {
    tunnels.list().iter().filter(|one| one.state == State::Open).map(|one| one.id).collect()
}

async fn established(tunnels: &Tunnels, count: usize) {
    until("tunnels are established", || tunnels.backends()[0].established == count).await;
}

fn request(lease: &Lease, path: &str, body: Body) -> Request<Body> {
    let builder = match lease.is_http2() {
        true => Request::post(format!("https://{NAME}{path}")),
        false => Request::post(path).header("host", NAME),
    };
    builder.body(body).unwrap()
}

async fn send(lease: Lease, path: &str) -> Result<Response<Reply>, SendError> {
    let request = request(&lease, path, full(""));
    within(lease.send(request)).await
}

/// Sends a request and gives the port its tunnel comes from.
async fn port(lease: Lease, path: &str) -> u16 {
    let body = send(lease, path).await.unwrap().into_body();
    let bytes = within(body.collect()).await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap().parse().unwrap()
}

async fn lease(tunnels: &Tunnels) -> Lease {
    tunnels.wait(BACKEND, Preference::New, PATIENCE).await.unwrap()
}

/// The error text of a backend to which no tunnel can be kept.
async fn refusal(setup: &Setup, settings: Settings) -> String {
    let server = Server::start(setup).await;
    let tunnels = tunnels(server.address, settings);
    // For flows a tunnel is established until its peer speaks.
    let failed = || tunnels.backends().into_iter().find(|one| one.error.is_some() && one.established == 0);
    until("attempts fail", || failed().is_some()).await;
    let status = failed().unwrap();
    assert!(status.failed > 0);
    assert!(tunnels.take(BACKEND, Preference::New).is_none());
    status.error.unwrap().0
}

#[tokio::test]
async fn established_ahead_of_need_and_listed() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, settings(3));
    established(&tunnels, 3).await;
    let list = tunnels.list();
    assert_eq!(list.iter().map(|one| one.id).collect::<Vec<_>>(), [1, 2, 3]);
    for one in &list {
        assert_eq!((one.backend, one.name.as_str()), (BACKEND, "web/one"));
        assert_eq!(one.destination, server.address);
        assert_eq!(one.source.ip(), Ipv4Addr::LOCALHOST);
        assert_eq!(one.version, "TLSv1_3");
        assert!(one.cipher_suite.starts_with("TLS13_"), "{}", one.cipher_suite);
        assert_eq!(one.group, Some("X25519MLKEM768"));
        assert_eq!(one.alpn.as_deref(), Some("h2"));
        assert_eq!((one.requests, one.in_flight, one.state), (0, 0, State::Open));
        // The prefaces of HTTP/2.
        assert!(one.sent > 0 && one.received > 0);
    }
    let sources: HashSet<_> = list.iter().map(|one| one.source).collect();
    assert_eq!(sources.len(), 3);
    let status = tunnels.backends().remove(0);
    assert_eq!((status.handshakes, status.failed, status.error), (3, 0, None));
    assert_eq!(server.accepted(), 3);
}

#[tokio::test]
async fn http2_sends_many_requests_over_one_tunnel() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, settings(1));
    established(&tunnels, 1).await;
    let before = tunnels.list().remove(0);
    let mut requests = JoinSet::new();
    for _ in 0..50 {
        requests.spawn(port(tunnels.take(BACKEND, Preference::New).unwrap(), "/gate"));
    }
    until("all run at once", || server.shared.running.load(SeqCst) == 50).await;
    let during = tunnels.list().remove(0);
    assert_eq!((during.requests, during.in_flight), (50, 50));
    server.shared.gate.add_permits(50);
    for port in within(requests.join_all()).await {
        assert_eq!(port, before.source.port());
    }
    let after = tunnels.list().remove(0);
    assert_eq!((after.id, after.requests, after.in_flight), (before.id, 50, 0));
    assert!(after.sent > before.sent && after.received > before.received);
    assert_eq!(tunnels.backends()[0].handshakes, 1);
}

#[tokio::test]
async fn http2_stays_below_the_peers_limit_of_streams() {
    let server = Server::start(&Setup { streams: 3, ..H2 }).await;
    let tunnels = tunnels(server.address, Settings { most: 1, ..settings(1) });
    established(&tunnels, 1).await;
    let leases: Vec<_> = (0..3).map(|_| tunnels.take(BACKEND, Preference::New).unwrap()).collect();
    assert!(tunnels.take(BACKEND, Preference::New).is_none());
    let mut waiting = Box::pin(tunnels.wait(BACKEND, Preference::New, PATIENCE));
    assert!(timeout(Duration::ZERO, waiting.as_mut()).await.is_err());
    drop(leases);
    let lease = within(waiting).await.unwrap();
    assert_eq!(tunnels.list()[0].in_flight, 1);
    assert_eq!(port(lease, "/").await, tunnels.list()[0].source.port());
    assert_eq!(tunnels.list()[0].requests, 1);
}

#[tokio::test]
async fn more_tunnels_are_opened_when_all_are_full_up_to_the_bound() {
    for setup in [&H1, &Setup { streams: 1, ..H2 }] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(1));
        let mut requests = JoinSet::new();
        for _ in 0..8 {
            let tunnels = Arc::clone(&tunnels);
            requests.spawn(async move { port(lease(&tunnels).await, "/gate").await });
        }
        until("four run at once", || server.shared.running.load(SeqCst) == 4).await;
        established(&tunnels, 4).await;
        assert!(tunnels.take(BACKEND, Preference::New).is_none());
        server.shared.gate.add_permits(8);
        let ports: HashSet<_> = within(requests.join_all()).await.into_iter().collect();
        assert_eq!(ports.len(), 4);
        assert_eq!(server.shared.most.load(SeqCst), 4);
        assert_eq!(tunnels.backends()[0].handshakes, 4);
    }
}

#[tokio::test]
async fn surplus_tunnels_are_closed_after_a_while() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, settings(2));
    let mut leases = Vec::new();
    for _ in 0..4 {
        leases.push(lease(&tunnels).await);
    }
    drop(leases);
    assert_eq!(tunnels.backends()[0].established, 4);
    // They were needed in the first window, not in the second.
    for _ in 0..2 {
        tokio::time::pause();
        tokio::time::advance(WINDOW).await;
        tokio::time::resume();
        tokio::task::yield_now().await;
    }
    established(&tunnels, 2).await;
    until("the surplus ends", || tunnels.list().len() == 2).await;
    assert_eq!(server.accepted(), 4);
}

#[tokio::test]
async fn http1_sends_one_request_at_a_time_and_keeps_alive() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, Settings { most: 1, ..settings(1) });
    established(&tunnels, 1).await;
    let first = tunnels.take(BACKEND, Preference::New).unwrap();
    assert!(!first.is_http2());
    assert!(tunnels.take(BACKEND, Preference::New).is_none());
    drop(first);
    let mut requests = JoinSet::new();
    for _ in 0..20 {
        let tunnels = Arc::clone(&tunnels);
        requests.spawn(async move { port(lease(&tunnels).await, "/").await });
    }
    let ports: HashSet<_> = within(requests.join_all()).await.into_iter().collect();
    let one = tunnels.list().remove(0);
    assert_eq!(ports, HashSet::from([one.source.port()]));
    assert_eq!((one.requests, one.alpn.as_deref()), (20, Some("http/1.1")));
    assert_eq!(server.shared.most.load(SeqCst), 1);
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn bodies_stream_both_ways() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(1));
        let lease = lease(&tunnels).await;
        let text = vec![b'x'; 1_000_000];
        let request = request(&lease, "/echo", full(text.clone()));
        let body = within(lease.send(request)).await.unwrap().into_body();
        assert_eq!(tunnels.list()[0].in_flight, 1);
        assert_eq!(within(body.collect()).await.unwrap().to_bytes(), text);
        let one = tunnels.list().remove(0);
        assert_eq!(one.in_flight, 0);
        assert!(one.sent > 1_000_000 && one.received > 1_000_000);
    }
}

#[tokio::test]
async fn the_wanted_tunnel_is_taken_while_it_can() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(3));
        established(&tunnels, 3).await;
        let wanted = tunnels.list().remove(1);
        for _ in 0..5 {
            let lease = tunnels.wait(BACKEND, Preference::of(wanted.id), PATIENCE).await.unwrap();
            assert_eq!(lease.id(), wanted.id);
            assert_eq!(port(lease, "/").await, wanted.source.port());
            until("it is idle", || {
                tunnels.take(BACKEND, Preference::of(wanted.id)).is_some_and(|l| l.id() == wanted.id)
            })
            .await;
        }
        assert_eq!(tunnels.list()[1].requests, 5);
        assert!(tunnels.take(BACKEND + 1, Preference::of(wanted.id)).is_none());
        assert!(tunnels.close(wanted.id));
        assert_ne!(tunnels.take(BACKEND, Preference::of(wanted.id)).unwrap().id(), wanted.id);
    }
}

#[tokio::test]
async fn the_least_busy_tunnel_is_taken() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, settings(3));
    established(&tunnels, 3).await;
    let leases: Vec<_> = (0..3).map(|_| tunnels.take(BACKEND, Preference::New).unwrap()).collect();
    assert_eq!(leases.iter().map(Lease::id).collect::<HashSet<_>>().len(), 3);
    drop(leases);
    for _ in 0..3 {
        port(tunnels.take(BACKEND, Preference::New).unwrap(), "/").await;
    }
    assert!(tunnels.list().iter().all(|one| one.requests == 1));
}

#[tokio::test]
async fn new_sessions_are_spread_and_others_take_the_tunnel_that_was_used_last() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, settings(3));
    established(&tunnels, 3).await;
    let ask = async |wanted| {
        let lease = tunnels.take(BACKEND, wanted).unwrap();
        let id = lease.id();
        port(lease, "/").await;
        // Which puts it back behind all others.
        let free = || tunnels.take(BACKEND, Preference::Tunnel(id)).is_some_and(|lease| lease.id() == id);
        until("it is free", free).await;
        id
    };
    let homes = [ask(Preference::New).await, ask(Preference::New).await, ask(Preference::New).await];
    assert_eq!(homes.iter().collect::<HashSet<_>>().len(), 3);
    for _ in 0..3 {
        assert_eq!(ask(Preference::Any).await, homes[2]);
    }
    assert_eq!(ask(Preference::Tunnel(homes[0])).await, homes[0], "at home, where it is free");
    let busy = tunnels.take(BACKEND, Preference::Tunnel(homes[0])).unwrap();
    let other = tunnels.take(BACKEND, Preference::Tunnel(homes[0])).unwrap();
    assert_eq!((other.id(), other.home()), (homes[2], homes[0]), "and stays there, where it is not");
    drop((busy, other));
    assert_eq!(ask(Preference::New).await, homes[1]);
}

#[tokio::test]
async fn a_tunnel_cut_by_the_peer_is_replaced() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(2));
        established(&tunnels, 2).await;
        let before = open(&tunnels);
        // Used, so that its early end is no failure.
        for id in &before {
            port(tunnels.take(BACKEND, Preference::of(*id)).unwrap(), "/").await;
        }
        let failing = tokio::spawn(send(tunnels.take(BACKEND, Preference::of(before[0])).unwrap(), "/gate"));
        until("the request is there", || server.shared.running.load(SeqCst) == 1).await;
        server.shared.cut.send_replace(());
        let error = within(failing).await.unwrap().map(drop).unwrap_err();
        assert!(error.unprocessed.is_none());
        until("both are replaced", || open(&tunnels).len() == 2 && open(&tunnels)[0] > before[1]).await;
        port(lease(&tunnels).await, "/").await;
        assert_eq!(tunnels.backends()[0].failed, 0);
    }
}

#[tokio::test]
async fn after_a_goaway_a_tunnel_takes_no_more_but_finishes() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, settings(1));
    let old = lease(&tunnels).await;
    let id = old.id();
    let running = tokio::spawn(port(old, "/gate"));
    until("the request is there", || server.shared.running.load(SeqCst) == 1).await;
    server.shared.drain.send_replace(());
    until("it is replaced", || open(&tunnels).first().is_some_and(|new| *new > id)).await;
    assert_eq!(tunnels.list()[0].id, id);
    assert_eq!((tunnels.list()[0].state, tunnels.list()[0].in_flight), (State::Retiring, 1));
    server.shared.gate.add_permits(1);
    within(running).await.unwrap();
    until("it is gone", || tunnels.list()[0].id > id).await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let error = refusal(&Setup { expired: true, ..H2 }, settings(2)).await;
    assert!(error.contains("certificate expired"), "{error}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let error = refusal(&Setup { name: "other.test", ..H2 }, settings(2)).await;
    assert!(error.contains("not valid for name \"backend.test\""), "{error}");
}

#[tokio::test]
async fn an_unknown_authority_is_refused() {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(Arc::clone(&Authority::new("unknown").roots))
        .with_no_client_auth();
    let tls = Tls { config: Arc::new(tls), name: ServerName::try_from(NAME).unwrap() };
    let error = refusal(&H2, Settings { tls: Some(tls), ..settings(2) }).await;
    assert!(error.contains("UnknownIssuer"), "{error}");
    assert!(error.starts_with("TLS handshake with 127.0.0.1:"), "{error}");
    assert_eq!(error.lines().count(), 1);
}

#[tokio::test]
async fn a_peer_that_refuses_our_certificate_is_a_failure_with_a_reason() {
    for alpn in [H1.alpn, H2.alpn] {
        let setup = Setup { wants_certificate: true, alpn, ..H2 };
        let server = Server::start(&setup).await;
        let tunnels = tunnels(server.address, settings(1));
        until("attempts fail", || tunnels.backends()[0].failed >= 3).await;
        let (error, _) = tunnels.backends().remove(0).error.unwrap();
        assert!(error.contains("CertificateRequired"), "{error}");
    }
}

#[tokio::test]
async fn tls_1_2_works() {
    let server = Server::start(&Setup { versions: TLS12, ..H2 }).await;
    let tunnels = tunnels(server.address, settings(1));
    port(lease(&tunnels).await, "/").await;
    let one = tunnels.list().remove(0);
    assert_eq!(one.version, "TLSv1_2");
    assert!(one.cipher_suite.starts_with("TLS_ECDHE_ECDSA_"), "{}", one.cipher_suite);
}

#[tokio::test]
async fn a_server_that_comes_up_later_is_found() {
    let server = Server::start(&H2).await;
    server.shared.deaf.store(true, SeqCst);
    let tunnels = tunnels(server.address, settings(2));
    until("attempts fail", || tunnels.backends()[0].failed >= 3).await;
    let (error, since) = tunnels.backends().remove(0).error.unwrap();
    assert!(error.starts_with("TLS handshake with 127.0.0.1:"), "{error}");
    server.shared.deaf.store(false, SeqCst);
    established(&tunnels, 2).await;
    port(lease(&tunnels).await, "/").await;
    assert!(tunnels.backends()[0].error.as_ref().is_none_or(|(_, at)| *at == since));
    until("the trouble is over", || tunnels.backends()[0].error.is_none()).await;
}

#[tokio::test]
async fn trouble_is_over_when_no_tunnel_is_missing_any_more() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, settings(1));
    established(&tunnels, 1).await;
    server.shared.deaf.store(true, SeqCst);
    let lease = tunnels.take(BACKEND, Preference::New).unwrap();
    until("a second one is tried", || tunnels.backends()[0].failed >= 1).await;
    assert!(tunnels.backends()[0].error.is_some());
    drop(lease);
    until("the trouble is over", || tunnels.backends()[0].error.is_none()).await;
    assert_eq!(tunnels.backends()[0].handshakes, 1);
}

#[test]
fn delays_double_up_to_a_bound_with_full_jitter() {
    for (before, bound) in [(0, 100), (1, 200), (5, 3200), (6, 5000), (u32::MAX, 5000)] {
        let delays: Vec<_> = (0..200).map(|_| delay(before)).collect();
        let bound = Duration::from_millis(bound);
        assert!(delays.iter().all(|delay| *delay <= bound));
        assert!(delays.iter().any(|delay| *delay > bound / 2), "{before}");
        assert!(delays.iter().any(|delay| *delay < bound / 2), "{before}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotation_loses_no_request() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(2));
        established(&tunnels, 2).await;
        let stop = Arc::new(AtomicBool::new(false));
        let mut load = JoinSet::new();
        for _ in 0..6 {
            let (tunnels, stop) = (Arc::clone(&tunnels), Arc::clone(&stop));
            load.spawn(async move {
                let mut answered = 0;
                while !stop.load(SeqCst) {
                    port(lease(&tunnels).await, "/").await;
                    answered += 1;
                }
                answered
            });
        }
        for _ in 0..5 {
            let last = *open(&tunnels).last().unwrap();
            assert!(tunnels.rotate(None) >= 2);
            until("all are replaced", || open(&tunnels).first().is_some_and(|first| *first > last)).await;
        }
        stop.store(true, SeqCst);
        assert!(within(load.join_all()).await.iter().sum::<usize>() > 0);
        until("the old ones end", || tunnels.list().iter().all(|one| one.state == State::Open)).await;
        assert_eq!(tunnels.rotate(Some(BACKEND + 1)), 0);
    }
}

#[tokio::test]
async fn rotation_brings_the_new_tunnels_up_first() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, settings(2));
    established(&tunnels, 2).await;
    let before = open(&tunnels);
    server.shared.deaf.store(true, SeqCst);
    assert_eq!(tunnels.rotate(Some(BACKEND)), 2);
    until("attempts fail", || tunnels.backends()[0].failed >= 2).await;
    assert_eq!(open(&tunnels), before);
    port(tunnels.take(BACKEND, Preference::New).unwrap(), "/").await;
    server.shared.deaf.store(false, SeqCst);
    until("both are replaced", || open(&tunnels).first().is_some_and(|first| *first > before[1])).await;
    established(&tunnels, 2).await;
}

#[tokio::test]
async fn closing_a_tunnel_fails_its_requests_only() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(2));
        established(&tunnels, 2).await;
        let ids = open(&tunnels);
        let victim = tokio::spawn(send(tunnels.take(BACKEND, Preference::of(ids[0])).unwrap(), "/gate"));
        let other = tokio::spawn(port(tunnels.take(BACKEND, Preference::of(ids[1])).unwrap(), "/gate"));
        until("both are there", || server.shared.running.load(SeqCst) == 2).await;
        assert!(tunnels.close(ids[0]));
        assert!(within(victim).await.unwrap().is_err());
        until("it is gone", || tunnels.list()[0].id == ids[1]).await;
        assert!(!tunnels.close(ids[0]));
        server.shared.gate.add_permits(2);
        within(other).await.unwrap();
        established(&tunnels, 2).await;
        assert_eq!(tunnels.backends()[0].failed, 0);
    }
}

#[tokio::test]
async fn closing_reaches_a_tunnel_whose_reply_nobody_reads() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(1));
        let lease = lease(&tunnels).await;
        let id = lease.id();
        let reply = send(lease, "/flood").await.unwrap();
        assert!(tunnels.close(id));
        until("it is gone", || tunnels.list().iter().all(|one| one.id > id)).await;
        let body = within(reply.into_body().collect()).await;
        assert!(body.is_err());
    }
}

#[tokio::test]
async fn an_old_tunnel_is_replaced() {
    let server = Server::start(&H2).await;
    let max_age = Duration::from_millis(400);
    let tunnels = tunnels(server.address, Settings { max_age, ..settings(2) });
    established(&tunnels, 2).await;
    until("both are replaced", || {
        let open = open(&tunnels);
        // The new one comes first.
        assert!(open.len() >= 2, "{open:?}");
        open[0] > 2
    })
    .await;
    until("the old ones end", || tunnels.list().iter().all(|one| one.id > 2)).await;
    assert_eq!(tunnels.backends()[0].failed, 0);
}

#[tokio::test]
async fn changed_settings_or_address_replace_and_the_same_keep() {
    let (server, other) = (Server::start(&H1).await, Server::start(&H1).await);
    let tunnels = Tunnels::new(Arc::default());
    let first = target(server.address, settings(1));
    tunnels.follow(vec![first.clone()]);
    established(&tunnels, 1).await;
    tunnels.follow(vec![first.clone()]);
    assert_eq!(open(&tunnels), [1]);

    // The request in flight finishes, who waits is served by the new tunnels.
    let running = tokio::spawn(port(tunnels.take(BACKEND, Preference::of(1)).unwrap(), "/gate"));
    until("the request is there", || server.shared.running.load(SeqCst) == 1).await;
    let second = Target { settings: Arc::new(settings(1)), ..first };
    tunnels.follow(vec![second.clone()]);
    let retiring = tunnels.list().remove(0);
    assert_eq!((retiring.id, retiring.state, retiring.in_flight), (1, State::Retiring, 1));
    let waiting = {
        let tunnels = Arc::clone(&tunnels);
        tokio::spawn(async move { lease(&tunnels).await.id() })
    };
    tokio::task::yield_now().await;
    let third = Target { address: other.address, ..second };
    tunnels.follow(vec![third]);
    let id = within(waiting).await.unwrap();
    assert!(tunnels.list().iter().any(|one| one.id == id && one.destination == other.address));
    server.shared.gate.add_permits(1);
    within(running).await.unwrap();
    until("the old one ends", || tunnels.list().iter().all(|one| one.destination == other.address)).await;

    tunnels.follow(Vec::new());
    assert!(tunnels.take(BACKEND, Preference::New).is_none());
    assert!(matches!(
        tunnels.wait(BACKEND, Preference::New, PATIENCE).await,
        Err(Unavailable::Unknown(BACKEND))
    ));
    until("all end", || tunnels.list().is_empty()).await;
}

#[tokio::test]
async fn an_upgraded_tunnel_leaves_the_pool_and_is_replaced() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, settings(1));
    let lease = lease(&tunnels).await;
    let id = lease.id();
    let mut request = request(&lease, "/upgrade", full(""));
    request.headers_mut().insert("connection", "upgrade".parse().unwrap());
    request.headers_mut().insert("upgrade", "echo".parse().unwrap());
    let response = within(lease.send(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut io = TokioIo::new(within(hyper::upgrade::on(response)).await.unwrap());
    until("it is replaced", || open(&tunnels).first().is_some_and(|new| *new > id)).await;
    let mut word = *b"ping";
    io.write_all(&word).await.unwrap();
    io.flush().await.unwrap();
    within(io.read_exact(&mut word)).await.unwrap();
    assert_eq!(&word, b"ping");
    let one = tunnels.list().remove(0);
    assert_eq!((one.id, one.state, one.in_flight), (id, State::Retiring, 1));
    assert_eq!(tunnels.backends()[0].established, 1);
    // Closing it reaches who reads from it.
    assert!(tunnels.close(id));
    assert!(within(io.read_exact(&mut word)).await.is_err());
    drop(io);
    assert!(tunnels.list().iter().all(|one| one.id > id));
}

#[tokio::test]
async fn requests_in_clear_are_sent_in_the_same_way() {
    let server = Server::start(&Setup { clear: true, ..H1 }).await;
    let tunnels = tunnels(server.address, Settings { tls: None, most: 1, ..settings(1) });
    established(&tunnels, 1).await;
    assert_eq!(port(lease(&tunnels).await, "/").await, tunnels.list()[0].source.port());
    assert_eq!(port(lease(&tunnels).await, "/").await, tunnels.list()[0].source.port());
    let [one] = tunnels.list().try_into().unwrap();
    assert_eq!((one.version, one.cipher_suite, one.group, one.requests), ("none", "none", None, 2));
    assert_eq!(server.accepted(), 1);
}

fn for_flows(established: usize) -> Settings {
    let mut config = client();
    config.alpn_protocols.clear();
    let tls = Tls { config: Arc::new(config), name: ServerName::try_from(NAME).unwrap() };
    Settings { tls: Some(tls), carries: Carries::Flow, ..settings(established) }
}

#[tokio::test]
async fn a_flow_has_a_connection_of_its_own() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, for_flows(2));
    established(&tunnels, 2).await;
    let unused = tunnels.take(BACKEND, Preference::New).unwrap();
    let id = unused.id();
    drop(unused);
    let lease = tunnels.take(BACKEND, Preference::of(id)).unwrap();
    let mut stream = within(lease.stream()).await.expect("it is there");
    let used = tunnels.list().into_iter().find(|one| one.id == id).unwrap();
    assert_eq!((used.state, used.in_flight, used.requests), (State::Used, 1, 1));
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.ends_with(&format!("\r\n\r\n{}", used.source.port())), "{answer}");
    // Another has taken its place.
    established(&tunnels, 2).await;
    assert!(!open(&tunnels).contains(&id));
    drop(stream);
    until("it is gone", || tunnels.list().len() == 2).await;
    assert_eq!((server.accepted(), tunnels.backends()[0].failed), (3, 0));
}

#[tokio::test]
async fn a_flow_can_be_cut() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, for_flows(1));
    established(&tunnels, 1).await;
    let mut stream =
        within(tunnels.take(BACKEND, Preference::New).unwrap().stream()).await.expect("it is there");
    let id = tunnels.list().iter().find(|one| one.state == State::Used).unwrap().id;
    let (read, closed) = tokio::join!(within(stream.read_u8()), async {
        sleep(Duration::from_millis(20)).await;
        tunnels.close(id)
    });
    assert!(closed);
    assert!(read.unwrap_err().to_string().contains("closed on our side"));
}

#[tokio::test]
async fn what_waits_for_a_flow_is_replaced_when_its_peer_ends_it() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, for_flows(2));
    established(&tunnels, 2).await;
    let before = open(&tunnels);
    server.shared.cut.send_replace(());
    until("others are there", || {
        let now = open(&tunnels);
        now.len() == 2 && now.iter().all(|id| !before.contains(id))
    })
    .await;
    // Who is no longer followed is told so.
    tunnels.follow(Vec::new());
    until("all have ended", || tunnels.list().is_empty()).await;
}

#[tokio::test]
async fn a_peer_that_speaks_first_is_none_for_flows() {
    // Its settings of HTTP/2.
    let mut settings = for_flows(1);
    if let Some(tls) = &mut settings.tls {
        tls.config = Arc::new(client());
    }
    let error = refusal(&H2, settings).await;
    assert!(error.contains("spoke before it was asked"), "{error}");
}

#[tokio::test]
async fn a_reply_dropped_half_way_costs_an_http1_tunnel_but_no_http2_tunnel() {
    for (setup, kept) in [(&H1, false), (&H2, true)] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(1));
        let lease = lease(&tunnels).await;
        let id = lease.id();
        let mut body = send(lease, "/endless").await.unwrap().into_body();
        let frame = within(body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "first");
        assert_eq!(tunnels.list()[0].in_flight, 1);
        drop(body);
        if !kept {
            until("it is replaced", || open(&tunnels).first().is_some_and(|new| *new > id)).await;
        }
        let lease = tunnels.wait(BACKEND, Preference::New, PATIENCE).await.unwrap();
        assert_eq!(lease.id() == id, kept);
        port(lease, "/").await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_costs_no_tunnel() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, Settings { most: 1, ..settings(1) });
    let first = lease(&tunnels).await;
    let id = first.id();
    // It leaves before the answer begins.
    let asked = request(&first, "/gate", full(""));
    assert!(timeout(Duration::from_millis(50), first.send(asked)).await.is_err());
    server.shared.gate.add_permits(1);
    // It leaves before the body of the answer was read.
    let second = within(tunnels.wait(BACKEND, Preference::New, PATIENCE)).await.unwrap();
    drop(send(second, "/").await.unwrap());
    let third = within(tunnels.wait(BACKEND, Preference::New, PATIENCE)).await.unwrap();
    assert_eq!(third.id(), id);
    port(third, "/").await;
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_request_that_was_not_sent_is_given_back() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, settings(1));
    let lease = lease(&tunnels).await;
    let id = lease.id();
    port(tunnels.take(BACKEND, Preference::of(id)).unwrap(), "/").await;
    server.shared.cut.send_replace(());
    until("it is gone", || tunnels.list().iter().all(|one| one.id > id)).await;
    let request = request(&lease, "/", full("kept"));
    let error = within(lease.send(request)).await.map(drop).unwrap_err();
    let body = error.unprocessed.expect("nothing was sent");
    let lease = tunnels.wait(BACKEND, Preference::New, PATIENCE).await.unwrap();
    let again = super::tests::request(&lease, "/", body);
    assert_eq!(within(lease.send(again)).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn who_does_not_read_keeps_nobody_else_waiting() {
    let server = Server::start(&H2).await;
    let tunnels = tunnels(server.address, Settings { most: 1, ..settings(1) });
    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(send(lease(&tunnels).await, "/flood").await.unwrap());
    }
    until("all that may come has come", || tunnels.list()[0].received >= 8 * u64::from(super::http2::WINDOW))
        .await;
    port(lease(&tunnels).await, "/").await;
    assert_eq!((tunnels.list().len(), tunnels.list()[0].in_flight), (1, unread.len()));
}

/// A connection of HTTP/2 as h2 has it, of which each frame can be sent.
async fn raw(listener: &TcpListener) -> h2::server::Connection<impl AsyncRead + AsyncWrite + Unpin, Bytes> {
    let acceptor = TlsAcceptor::from(Arc::new(H2.config()));
    let (socket, _) = listener.accept().await.unwrap();
    h2::server::handshake(acceptor.accept(socket).await.unwrap()).await.unwrap()
}

#[tokio::test]
async fn what_a_peer_refuses_is_given_back_where_nothing_of_it_was_sent() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let tunnels = tunnels(listener.local_addr().unwrap(), Settings { most: 1, ..settings(1) });
    let server = tokio::spawn(async move {
        let mut connection = raw(&listener).await;
        // RFC 9113 section 8.7: only that code says that nothing was done.
        let mut codes =
            [h2::Reason::REFUSED_STREAM, h2::Reason::REFUSED_STREAM, h2::Reason::CANCEL].into_iter();
        while let Some(Ok((_, mut reply))) = connection.accept().await {
            match codes.next() {
                Some(code) => reply.send_reset(code),
                None => drop(reply.send_response(Response::new(()), true).unwrap()),
            }
        }
    });
    for (text, again) in [("", true), ("once", false), ("", false)] {
        let lease = lease(&tunnels).await;
        let request = request(&lease, "/", full(text));
        let error = within(lease.send(request)).await.map(drop).unwrap_err();
        assert_eq!(error.unprocessed.is_some(), again, "{text:?} {error:?}");
    }
    // The tunnel is as good as before.
    assert_eq!(send(lease(&tunnels).await, "/").await.unwrap().status(), StatusCode::OK);
    drop(tunnels);
    within(server).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_is_gone_without_a_word_is_found_out() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let tunnels = tunnels(listener.local_addr().unwrap(), Settings { most: 1, ..settings(1) });
    let mut connection = raw(&listener).await;
    let asked = lease(&tunnels).await;
    let id = asked.id();
    let request = request(&asked, "/", full(""));
    let asked = tokio::spawn(asked.send(request));
    // It takes the request, and nothing more.
    within(connection.accept()).await.unwrap().unwrap();
    // From now on time passes where nothing is done.
    tokio::time::pause();
    let gone = timeout(2 * PATIENCE, async {
        while tunnels.list().iter().any(|one| one.id == id) {
            sleep(Duration::from_secs(1)).await;
        }
    });
    gone.await.expect("it has ended");
    let error = timeout(PATIENCE, asked).await.unwrap().unwrap().map(drop).unwrap_err();
    assert!(error.unprocessed.is_none(), "{error:?}");
}

#[tokio::test]
async fn waiting_is_bounded_and_says_why_it_failed() {
    // Bound but not listening: connections are refused.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let tunnels = tunnels(socket.local_addr().unwrap(), settings(1));
    until("attempts fail", || tunnels.backends()[0].failed >= 1).await;
    let error = loop {
        let short = Duration::from_millis(1);
        let error = tunnels.wait(BACKEND, Preference::New, short).await.map(drop).unwrap_err();
        // Else the next attempt has ended just then.
        if !matches!(error, Unavailable::Failing { .. }) {
            break error;
        }
    };
    let text = error.to_string();
    assert!(
        text.starts_with("web/one: no tunnel could take the request within 1ms; connect to 127."),
        "{text}"
    );
    assert!(text.contains("refused"), "{text}");

    // Who waits is told with the next attempt.
    let late = within(tunnels.wait(BACKEND, Preference::New, PATIENCE)).await.map(drop).unwrap_err();
    assert!(matches!(&late, Unavailable::Failing { error, .. } if error.contains("refused")), "{late}");
}

#[tokio::test]
async fn only_so_many_wait() {
    // Nobody says anything on its connections.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let tunnels = tunnels(silent.local_addr().unwrap(), settings(1));
    let waits = || Box::pin(tunnels.wait(BACKEND, Preference::New, PATIENCE));
    let mut waiting: Vec<_> = (0..MOST_WAITING).map(|_| waits()).collect();
    for one in &mut waiting {
        assert!(timeout(Duration::ZERO, one).await.is_err());
    }
    let crowded = tunnels.wait(BACKEND, Preference::New, PATIENCE).await;
    assert!(matches!(crowded, Err(Unavailable::Crowded { waiting: MOST_WAITING, .. })));
    // One that gave up makes room.
    drop(waiting.pop());
    let mut next = waits();
    assert!(timeout(Duration::ZERO, next.as_mut()).await.is_err());
    // All are told when the backend is gone.
    tunnels.follow(Vec::new());
    for one in waiting {
        assert!(matches!(within(one).await, Err(Unavailable::Unknown(BACKEND))));
    }
}

#[tokio::test]
async fn who_waits_is_served_in_order() {
    let server = Server::start(&H1).await;
    let tunnels = tunnels(server.address, Settings { most: 1, ..settings(1) });
    let first = lease(&tunnels).await;
    let mut waiting: Vec<_> =
        (0..3).map(|_| Box::pin(tunnels.wait(BACKEND, Preference::New, PATIENCE))).collect();
    for one in &mut waiting {
        assert!(timeout(Duration::ZERO, one).await.is_err());
    }
    drop(waiting.remove(0));
    drop(first);
    let second = within(waiting.remove(0)).await.unwrap();
    assert!(timeout(Duration::ZERO, waiting[0].as_mut()).await.is_err());
    drop(second);
    within(waiting.remove(0)).await.unwrap();
}

#[tokio::test]
async fn shutdown_lets_requests_finish_but_not_for_ever() {
    for setup in [&H1, &H2] {
        let server = Server::start(setup).await;
        let tunnels = tunnels(server.address, settings(2));
        let running = tokio::spawn(port(lease(&tunnels).await, "/gate"));
        until("the request is there", || server.shared.running.load(SeqCst) == 1).await;
        let mut shutdown = Box::pin(tunnels.shutdown(LONG));
        assert!(timeout(Duration::ZERO, shutdown.as_mut()).await.is_err());
        server.shared.gate.add_permits(1);
        within(running).await.unwrap();
        within(shutdown).await;
        assert!(tunnels.list().is_empty());

        tunnels.follow(vec![target(server.address, settings(1))]);
        let stuck = tokio::spawn(send(lease(&tunnels).await, "/gate"));
        until("the request is there", || server.shared.running.load(SeqCst) == 1).await;
        tunnels.shutdown(Duration::from_millis(1)).await;
        assert!(within(stuck).await.unwrap().is_err());
        until("all end", || tunnels.list().is_empty()).await;
    }
}

#[tokio::test]
async fn nothing_is_left_when_the_manager_is_dropped() {
    let servers = [Server::start(&H1).await, Server::start(&H2).await];
    // Takes connections and says nothing.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    // Says nothing after the TLS handshake.
    let mute = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let mute_address = mute.local_addr().unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(H2.config()));
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut streams = Vec::new();
        while let Ok((socket, _)) = mute.accept().await {
            streams.push(acceptor.accept(socket).await);
        }
    });
    let idle = alive();
    let tunnels = Tunnels::new(Arc::default());
    let addresses = [servers[0].address, servers[1].address, silent.local_addr().unwrap(), mute_address];
    let targets = addresses
        .iter()
        .zip(1..)
        .map(|(address, backend)| Target { backend, ..target(*address, settings(2)) });
    tunnels.follow(targets.collect());
    until("tunnels are established", || tunnels.list().len() == 6).await;
    for backend in [1, 2] {
        port(tunnels.wait(backend, Preference::New, PATIENCE).await.unwrap(), "/").await;
    }
    assert!(alive() > idle + 4);
    let unused = tunnels.take(1, Preference::New).unwrap();
    let reply = send(tunnels.take(2, Preference::New).unwrap(), "/endless").await.unwrap();
    let registry = Arc::downgrade(&tunnels.registry);
    drop(tunnels);
    drop((unused, reply));
    until("all tasks end", || alive() == idle).await;
    until("nothing keeps itself alive", || registry.strong_count() == 0).await;
}

fn alive() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}
