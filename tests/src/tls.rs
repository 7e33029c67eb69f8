//! TLS servers that tell their name, and users that come back with their session.

use std::{
    io::{BufReader, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, ServerConfig, ServerConnection,
    StreamOwned, SupportedProtocolVersion,
    client::{ClientSessionMemoryCache, Resumption, Tls12Resumption},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
    server::{ProducesTickets, ServerSessionMemoryCache},
};
use serde::{Deserialize, Serialize};

use crate::{http, netns::Netns, sockets};

/// The name that all servers have a certificate for.
pub const HOST: &str = "service.test";

/// Longest page that is read.
const PAGE_MAX: u64 = 65_536;

/// What a server says about itself and the connection. nginx can say the same.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// The server's name.
    pub backend: String,
    /// `r`: the session was resumed; `.`: a new one.
    pub reused: String,
    /// `TLSv1.2`, `TLSv1.3`; empty without TLS.
    pub protocol: String,
    /// Address and port that the server sees.
    pub peer: String,
    /// Address and port that a PROXY header told; empty without one.
    pub proxied: String,
}

/// A certificate authority for one test.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
}

/// A certificate with its key, in DER.
pub struct Credentials {
    certificate: Vec<u8>,
    key: Vec<u8>,
    /// The certificate, in PEM.
    pub certificate_pem: String,
    /// The key, in PEM.
    pub key_pem: String,
}

impl Authority {
    /// Makes one.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        let (pem, certificate) = (certificate.pem(), certificate.der().clone());
        Ok(Self { issuer: Issuer::new(params, key), certificate, pem })
    }

    /// Its certificate, in PEM.
    #[must_use]
    pub fn pem(&self) -> String {
        self.pem.clone()
    }

    /// A certificate for [`HOST`] whose subject's common name is the server's.
    pub fn issue(&self, server: &str) -> Result<Credentials> {
        self.issue_for(server, HOST, false)
    }

    /// One for another name, which may be over.
    pub fn issue_for(&self, server: &str, name: &str, expired: bool) -> Result<Credentials> {
        let mut params = CertificateParams::new(vec![name.to_owned()])?;
        if expired {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2020, 2, 1);
        }
        params.distinguished_name.push(DnType::CommonName, server);
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Credentials {
            certificate: certificate.der().to_vec(),
            certificate_pem: certificate.pem(),
            key: key.serialize_der(),
            key_pem: key.serialize_pem(),
        })
    }
}

impl Credentials {
    /// The certificate, in DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.certificate
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

/// What a server does besides TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Manners {
    /// It expects a PROXY protocol v2 header.
    pub proxy: bool,
    /// It agrees to no key exchange that clients send a share for: every hello is answered with a
    /// HelloRetryRequest.
    pub retry: bool,
    /// It issues tickets sealed with a key of its own, which has a name.
    pub tickets: bool,
    /// Its tickets begin with random bytes instead of the key's name, as those of Go from 1.21 on.
    pub nameless: bool,
}

/// A server with session cache and keys of its own. It stops when dropped.
#[derive(Debug)]
pub struct Server {
    /// Its name.
    pub name: String,
    keys: Arc<Keyring>,
    served: Arc<AtomicU64>,
    status: Arc<AtomicU16>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts one. A connection whose first byte is no TLS record is served in clear.
    pub fn start(
        netns: &Netns,
        name: &str,
        port: u16,
        authority: &Authority,
        manners: Manners,
    ) -> Result<Self> {
        let keys = Arc::new(Keyring::new(manners.nameless)?);
        let config = Arc::new(server_config(authority, name, manners, &keys)?);
        let listener =
            sockets::listen(netns, port).with_context(|| format!("{name}: listening on port {port}"))?;
        socket2::SockRef::from(&listener).set_read_timeout(Some(Duration::from_millis(50)))?;
        let (served, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let status = Arc::new(AtomicU16::new(200));
        let desk = Desk {
            name: name.to_owned(),
            config,
            proxy: manners.proxy,
            served: Arc::clone(&served),
            status: Arc::clone(&status),
        };
        let thread = Some(std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || accept(&listener, &stop, &Arc::new(desk))
        }));
        Ok(Self { name: name.to_owned(), keys, served, status, stop, thread })
    }

    /// Seals tickets with a new key from now on; those of the old ones are still accepted.
    pub fn rotate(&self) -> Result<()> {
        self.keys.rotate()
    }

    /// Answers with this status code from now on.
    pub fn answer_with(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    /// Connections on which a request was answered.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Desk {
    name: String,
    config: Arc<ServerConfig>,
    proxy: bool,
    served: Arc<AtomicU64>,
    status: Arc<AtomicU16>,
}

fn accept(listener: &TcpListener, stop: &AtomicBool, desk: &Arc<Desk>) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((stream, _)) = listener.accept() else { continue };
        let desk = Arc::clone(desk);
        // A client that goes away, or talks nonsense, is its own test's business.
        std::thread::spawn(move || desk.serve(stream));
    }
}

impl Desk {
    fn serve(&self, mut stream: TcpStream) -> Result<()> {
        sockets::limit(&stream)?;
        stream.set_nodelay(true)?;
        let proxied = if self.proxy { read_proxy_header(&mut stream)?.to_string() } else { String::new() };
        let mut identity = Identity {
            backend: self.name.clone(),
            reused: ".".into(),
            protocol: String::new(),
            peer: plain_address(stream.peer_addr()?).to_string(),
            proxied,
        };
        let mut first = [0];
        if stream.peek(&mut first)? == 0 {
            return Ok(());
        }
        if first != [22] {
            return self.answer(&mut BufReader::new(Both(stream)), &identity);
        }
        let mut tls = ServerConnection::new(Arc::clone(&self.config))?;
        tls.complete_io(&mut stream)?;
        if tls.handshake_kind() == Some(HandshakeKind::Resumed) {
            identity.reused = "r".into();
        }
        identity.protocol = protocol(tls.protocol_version()).to_owned();
        self.answer(&mut BufReader::new(Both(StreamOwned::new(tls, stream))), &identity)
    }

    fn answer<S: Read + Write>(&self, stream: &mut BufReader<Both<S>>, identity: &Identity) -> Result<()> {
        self.served.fetch_add(1, Ordering::Relaxed);
        while let Some(head) = http::read_head(stream)? {
            let mut words = head.line.split(' ');
            let (method, path) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
            if let Some(length) = path.strip_prefix("/bytes/") {
                let length: u64 = length.parse()?;
                let stream = stream.get_mut();
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n")?;
                std::io::copy(&mut http::Noise::default().take(length), stream)?;
                stream.flush()?;
                continue;
            }
            if path == "/hang" {
                // Until the client goes, or patience ends.
                let _ = std::io::BufRead::fill_buf(stream);
                return Ok(());
            }
            if path == "/echo" {
                let stream = stream.get_mut();
                write!(
                    stream,
                    "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
                )?;
                stream.flush()?;
                let mut line = [0; 5];
                stream.read_exact(&mut line)?;
                stream.write_all(&line)?;
                return Ok(stream.flush()?);
            }
            let cookie = match path.strip_prefix("/login/") {
                Some(value) => format!("Set-Cookie: sid={value}; Path=/\r\n"),
                None => String::new(),
            };
            let body = if method == "POST" {
                http::hash(stream, head.length)?
            } else {
                serde_json::to_string(identity)?
            };
            let stream = stream.get_mut();
            let status = self.status.load(Ordering::Relaxed);
            write!(
                stream,
                "HTTP/1.1 {status} As told\r\n{cookie}Content-Length: {}\r\n\r\n{body}",
                body.len()
            )?;
            stream.flush()?;
            if head.close {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn server_config(
    authority: &Authority,
    name: &str,
    manners: Manners,
    keys: &Arc<Keyring>,
) -> Result<ServerConfig> {
    let credentials = authority.issue(name)?;
    let mut provider = ring::default_provider();
    if manners.retry {
        provider.kx_groups = vec![ring::kx_group::SECP384R1];
    }
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from(credentials.certificate)],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(credentials.key)),
        )?;
    if manners.tickets {
        config.ticketer = Arc::clone(keys) as _;
    }
    // Without a ticketer, sessions are found by their ID in this server's cache only.
    config.session_storage = ServerSessionMemoryCache::new(65_536);
    Ok(config)
}

/// Ticket keys, the newest first: it seals, all open.
#[derive(Debug)]
struct Keyring {
    keys: Mutex<Vec<Arc<dyn ProducesTickets>>>,
    /// The first 16 bytes of a ticket, the key's name, are put last.
    nameless: bool,
}

impl Keyring {
    const NAME: usize = 16;

    fn new(nameless: bool) -> Result<Self> {
        let ring = Self { keys: Mutex::default(), nameless };
        ring.rotate()?;
        Ok(ring)
    }

    fn keys(&self) -> MutexGuard<'_, Vec<Arc<dyn ProducesTickets>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rotate(&self) -> Result<()> {
        let new = ring::Ticketer::new()?;
        self.keys().insert(0, new);
        Ok(())
    }
}

impl ProducesTickets for Keyring {
    fn enabled(&self) -> bool {
        true
    }
    fn lifetime(&self) -> u32 {
        self.keys().first().map_or(0, |key| key.lifetime())
    }
    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut ticket = self.keys().first()?.encrypt(plain)?;
        if self.nameless {
            let name = Self::NAME.min(ticket.len());
            ticket.rotate_left(name);
        }
        Some(ticket)
    }
    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let mut ticket = ticket.to_vec();
        if self.nameless {
            let name = Self::NAME.min(ticket.len());
            ticket.rotate_right(name);
        }
        self.keys().iter().find_map(|key| key.decrypt(&ticket))
    }
}

/// Reads a PROXY protocol v2 header; the client's address in it.
fn read_proxy_header(stream: &mut TcpStream) -> Result<SocketAddr> {
    let mut fixed = [0; 16];
    stream.read_exact(&mut fixed).context("reading a PROXY header")?;
    ensure!(fixed.starts_with(b"\r\n\r\n\0\r\nQUIT\n"), "not a PROXY v2 header: {fixed:02x?}");
    if fixed[12] == 0x20 {
        // LOCAL: the proxy itself, without an address.
        return Ok(SocketAddr::from(([0, 0, 0, 0], 0)));
    }
    ensure!(fixed[12] == 0x21, "neither LOCAL nor PROXY: {fixed:02x?}");
    let mut rest = vec![0; usize::from(u16::from_be_bytes([fixed[14], fixed[15]]))];
    stream.read_exact(&mut rest).context("reading the addresses of a PROXY header")?;
    let port = |at: usize| rest.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let address: Option<SocketAddr> = match fixed[13] {
        0x11 => rest.first_chunk::<4>().zip(port(8)).map(|(ip, port)| (*ip, port).into()),
        0x21 => rest.first_chunk::<16>().zip(port(32)).map(|(ip, port)| (*ip, port).into()),
        _ => None,
    };
    address.with_context(|| format!("PROXY header of family {:#04x} with {} bytes", fixed[13], rest.len()))
}

/// An IPv4 address that a socket of both families reports as IPv6.
fn plain_address(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn protocol(version: Option<rustls::ProtocolVersion>) -> &'static str {
    match version {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLSv1.2",
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "",
    }
}

/// Buffers what is read, hands through what is written.
#[derive(Debug)]
pub struct Both<S>(S);

impl<S: Read> Read for Both<S> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<S: Write> Write for Both<S> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.0.write(buffer)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// A buffered stream that requests can be sent on.
#[derive(Debug)]
pub struct Line<S: Read + Write>(BufReader<Both<S>>);

impl<S: Read + Write> Line<S> {
    /// Wraps a stream.
    pub fn new(stream: S) -> Self {
        Self(BufReader::new(Both(stream)))
    }

    /// The stream.
    pub fn stream(&mut self) -> &mut S {
        &mut self.0.get_mut().0
    }
}

impl<S: Read + Write> Read for Line<S> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<S: Read + Write> std::io::BufRead for Line<S> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.0.fill_buf()
    }
    fn consume(&mut self, amount: usize) {
        self.0.consume(amount);
    }
}

impl<S: Read + Write> Write for Line<S> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.0.get_mut().write(buffer)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.0.get_mut().flush()
    }
}

/// A version of TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// TLS 1.2, with sessions found by their ID.
    Tls12,
    /// TLS 1.3: each hello has a fresh random session ID.
    Tls13,
}

impl Version {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Tls12, Self::Tls13];

    fn supported(self) -> &'static SupportedProtocolVersion {
        match self {
            Self::Tls12 => &rustls::version::TLS12,
            Self::Tls13 => &rustls::version::TLS13,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Tls12 => "TLSv1.2",
            Self::Tls13 => "TLSv1.3",
        }
    }
}

/// Someone with one session store, whatever address the connections come from.
#[derive(Clone, Debug)]
pub struct User {
    config: Arc<ClientConfig>,
    version: Version,
}

/// How a connection failed.
#[derive(Debug)]
pub enum Failure {
    /// No TCP connection.
    Connect(anyhow::Error),
    /// No TLS connection.
    Handshake(anyhow::Error),
    /// No answer, or a wrong one.
    Request(anyhow::Error),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(error) => write!(f, "connecting: {error:#}"),
            Self::Handshake(error) => write!(f, "handshake: {error:#}"),
            Self::Request(error) => write!(f, "request: {error:#}"),
        }
    }
}

impl std::error::Error for Failure {}

impl User {
    /// A user who trusts the authority and has no session yet.
    pub fn new(authority: &Authority, version: Version) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate.clone())?;
        let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version.supported()])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(8)))
            .tls12_resumption(Tls12Resumption::SessionIdOnly);
        Ok(Self { config: Arc::new(config), version })
    }

    /// The same user, who takes tickets in TLS 1.2 too.
    #[must_use]
    pub fn with_tickets(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(8)))
            .tls12_resumption(Tls12Resumption::SessionIdOrTickets);
        Self { config: Arc::new(config), version: self.version }
    }

    /// The same user, who takes no session: each handshake is a full one.
    #[must_use]
    pub fn forgetful(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = Resumption::disabled();
        Self { config: Arc::new(config), version: self.version }
    }

    /// The same user, who speaks one protocol above TLS.
    #[must_use]
    pub fn with_protocol(&self, name: &str) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.alpn_protocols = vec![name.as_bytes().to_vec()];
        Self { config: Arc::new(config), version: self.version }
    }

    /// The same user with a hello that needs more than `bytes`.
    #[must_use]
    pub fn with_long_hello(&self, bytes: usize) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        // Protocols that no server here knows of, so that it ignores the extension.
        config.alpn_protocols = (0..bytes / 200 + 1).map(|i| format!("{i:0>200}").into_bytes()).collect();
        Self { config: Arc::new(config), version: self.version }
    }

    /// Connects from an address to a service and does the handshake.
    pub fn connect(
        &self,
        netns: &Netns,
        from: IpAddr,
        to: SocketAddr,
    ) -> Result<Line<StreamOwned<ClientConnection, TcpStream>>, Failure> {
        let stream = sockets::connect(netns, from, to)
            .with_context(|| format!("from {from} to {to}"))
            .map_err(Failure::Connect)?;
        self.secure(stream).map_err(Failure::Handshake)
    }

    /// Does the handshake on a stream.
    pub fn secure(&self, mut stream: TcpStream) -> Result<Line<StreamOwned<ClientConnection, TcpStream>>> {
        let mut tls = ClientConnection::new(Arc::clone(&self.config), ServerName::try_from(HOST)?)?;
        while tls.is_handshaking() {
            tls.complete_io(&mut stream)?;
        }
        Ok(Line::new(StreamOwned::new(tls, stream)))
    }

    /// Connects, asks who answers, and closes.
    pub fn visit(&self, netns: &Netns, from: IpAddr, to: SocketAddr) -> Result<Identity, Failure> {
        let line = self.connect(netns, from, to)?;
        self.ask(line)
    }

    /// The same on a TCP connection.
    pub fn visit_on(&self, stream: TcpStream) -> Result<Identity, Failure> {
        self.ask(self.secure(stream).map_err(Failure::Handshake)?)
    }

    /// Connects, asks any HTTP server for a page, and reads to the end: was the session resumed?
    pub fn resumes(&self, netns: &Netns, from: IpAddr, to: SocketAddr) -> Result<bool, Failure> {
        self.ask_any(self.connect(netns, from, to)?)
    }

    /// The same on a TCP connection.
    pub fn resumes_on(&self, stream: TcpStream) -> Result<bool, Failure> {
        self.ask_any(self.secure(stream).map_err(Failure::Handshake)?)
    }

    fn ask_any(&self, mut line: Line<StreamOwned<ClientConnection, TcpStream>>) -> Result<bool, Failure> {
        let ask = |line: &mut Line<StreamOwned<ClientConnection, TcpStream>>| {
            write!(line, "GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n")?;
            line.flush()?;
            let mut page = Vec::new();
            // Not every server says that it closes.
            if let Err(error) = line.take(PAGE_MAX).read_to_end(&mut page)
                && error.kind() != ErrorKind::UnexpectedEof
            {
                return Err(error).context("reading a page");
            }
            ensure!(page.starts_with(b"HTTP/1."), "no page: {}", String::from_utf8_lossy(&page));
            Ok(line.stream().conn.handshake_kind() == Some(HandshakeKind::Resumed))
        };
        ask(&mut line).map_err(Failure::Request)
    }

    fn ask(&self, mut line: Line<StreamOwned<ClientConnection, TcpStream>>) -> Result<Identity, Failure> {
        let ask = |line: &mut Line<StreamOwned<ClientConnection, TcpStream>>| {
            let identity: Identity = serde_json::from_str(&http::get(line, "/")?)?;
            let tls = &mut line.stream().conn;
            let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
            if identity.protocol != self.version.name() || resumed != (identity.reused == "r") {
                bail!("client and server disagree: resumed {resumed}, {identity:?}");
            }
            tls.send_close_notify();
            line.flush()?;
            Ok(identity)
        };
        ask(&mut line).map_err(Failure::Request)
    }
}

/// Connects without TLS, asks who answers, and closes.
pub fn visit_in_clear(netns: &Netns, from: IpAddr, to: SocketAddr) -> Result<Identity, Failure> {
    let stream = sockets::connect(netns, from, to)
        .with_context(|| format!("from {from} to {to}"))
        .map_err(Failure::Connect)?;
    let ask = |mut line: Line<TcpStream>| Ok(serde_json::from_str(&http::get(&mut line, "/")?)?);
    ask(Line::new(stream)).map_err(Failure::Request)
}
