//! A backend that tells what it was sent: HTTP/1.1 and HTTP/2 by hyper, or bytes that were prepared.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use dispatcher_tests::{
    http::Noise,
    netns::Netns,
    sockets,
    tls::{Authority, Credentials},
};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{HeaderName, HeaderValue},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rustls::{
    RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpStream, runtime::Runtime, time::sleep};
use tokio_rustls::TlsAcceptor;

/// Length of a piece of a body.
const PIECE: usize = 64 << 10;

/// A request as a backend has got it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) backend: String,
    pub(crate) version: String,
    pub(crate) method: String,
    /// With the authority, where it came with one.
    pub(crate) uri: String,
    /// Lines of one name in the order they came.
    pub(crate) headers: BTreeMap<String, Vec<String>>,
    pub(crate) body: String,
    pub(crate) trailers: BTreeMap<String, Vec<String>>,
}

impl Seen {
    /// The only line of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        match self.headers.get(name).map(Vec::as_slice) {
            Some([only]) => Some(only),
            Some(lines) => panic!("{name}: {lines:?}"),
            None => None,
        }
    }
}

/// TLS of a backend.
#[derive(Clone, Copy)]
pub(crate) struct Manner<'m> {
    pub(crate) alpn: &'m [&'m str],
    pub(crate) only_tls12: bool,
    /// It wants to see a certificate of this authority.
    pub(crate) asks: Option<&'m Authority>,
}

impl Manner<'_> {
    pub(crate) const HTTP2: Self = Self { alpn: &["h2"], only_tls12: false, asks: None };
    pub(crate) const HTTP1: Self = Self { alpn: &["http/1.1"], only_tls12: false, asks: None };

    fn config(self, credentials: &Credentials) -> Result<Arc<ServerConfig>> {
        let versions: &[_] = if self.only_tls12 { &[&rustls::version::TLS12] } else { rustls::ALL_VERSIONS };
        let provider = Arc::new(ring::default_provider());
        let builder =
            ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions)?;
        let builder = match self.asks {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes())?)?;
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(
            vec![CertificateDer::from(credentials.der().to_vec())],
            PrivateKeyDer::from_pem_slice(credentials.key_pem.as_bytes())?,
        )?;
        config.alpn_protocols = self.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(Arc::new(config))
    }
}

#[derive(Default)]
struct Desk {
    name: String,
    seen: Mutex<Vec<Seen>>,
    /// Requests whose head has come.
    begun: AtomicU64,
}

/// A backend that mirrors. Dropped, it and all its connections are gone at once.
pub(crate) struct Mirror {
    pub(crate) name: String,
    desk: Arc<Desk>,
    runtime: Option<Runtime>,
}

impl Mirror {
    pub(crate) fn start(
        netns: &Netns,
        name: &str,
        port: u16,
        authority: &Authority,
        manner: Manner<'_>,
    ) -> Result<Self> {
        Self::with(netns, name, port, &authority.issue(name)?, manner)
    }

    /// One that shows a certificate.
    pub(crate) fn with(
        netns: &Netns,
        name: &str,
        port: u16,
        credentials: &Credentials,
        manner: Manner<'_>,
    ) -> Result<Self> {
        let acceptor = TlsAcceptor::from(manner.config(credentials)?);
        let listener = sockets::listen(netns, port).with_context(|| format!("{name}: listening"))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let desk = Arc::new(Desk { name: name.to_owned(), ..Desk::default() });
        runtime.spawn(accept(listener, acceptor, Arc::clone(&desk)));
        Ok(Self { name: name.to_owned(), desk, runtime: Some(runtime) })
    }

    /// The requests that have come whole.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        lock(&self.desk.seen).clone()
    }

    /// Requests of which at least the head has come.
    pub(crate) fn begun(&self) -> u64 {
        self.desk.begun.load(Ordering::Relaxed)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, desk: Arc<Desk>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (acceptor, desk) = (acceptor.clone(), Arc::clone(&desk));
        tokio::spawn(serve(stream, acceptor, desk));
    }
}

async fn serve(stream: TcpStream, acceptor: TlsAcceptor, desk: Arc<Desk>) {
    let _ = stream.set_nodelay(true);
    // Whoever refuses our certificate, or shows a bad one, is his own test's business.
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let service = service_fn(|request| answer(Arc::clone(&desk), request));
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http2().max_header_list_size(1 << 20);
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

fn full(text: impl Into<Bytes>) -> UnsyncBoxBody<Bytes, Infallible> {
    Full::new(text.into()).boxed_unsync()
}

fn lines(headers: &HeaderMap) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::<String, Vec<String>>::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        all.entry(name.as_str().to_owned()).or_default().push(value);
    }
    all
}

async fn answer(desk: Arc<Desk>, request: Request<Incoming>) -> Result<Answer, hyper::Error> {
    desk.begun.fetch_add(1, Ordering::Relaxed);
    let (head, mut body) = request.into_parts();
    let mut seen = Seen {
        backend: desk.name.clone(),
        version: format!("{:?}", head.version),
        method: head.method.to_string(),
        uri: head.uri.to_string(),
        headers: lines(&head.headers),
        ..Seen::default()
    };
    let path = head.uri.path().to_owned();
    let number = |prefix: &str| path.strip_prefix(prefix).and_then(|number| number.parse::<u64>().ok());
    if path == "/early" {
        let mut answer = Response::new(full("no"));
        *answer.status_mut() = StatusCode::UNAUTHORIZED;
        return Ok(answer);
    }
    if path == "/stall" {
        sleep(Duration::from_secs(6)).await;
    }
    let mut sum = Sum::default();
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => {
                sum.add(&data);
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    seen.trailers = lines(&trailers);
                }
            }
        }
    }
    seen.body = sum.end();
    lock(&desk.seen).push(seen.clone());
    if let Some(length) = number("/bytes/") {
        return Ok(Response::new(noise(length)));
    }
    if let Some(status) = number("/status/") {
        let mut answer = Response::new(full(""));
        *answer.status_mut() = StatusCode::from_u16(status as u16).unwrap_or_default();
        return Ok(answer);
    }
    if let Some(milliseconds) = number("/slow/") {
        sleep(Duration::from_millis(milliseconds)).await;
    }
    let text = serde_json::to_string(&seen).unwrap_or_default();
    let mut answer = Response::new(full(text.clone()));
    if head.method == hyper::Method::HEAD {
        // Hyper would send the body with HTTP/2.
        *answer.body_mut() = full("");
        answer.headers_mut().insert(hyper::header::CONTENT_LENGTH, text.len().into());
    }
    let mut add = |name: &'static str, value: &'static str| {
        answer.headers_mut().append(HeaderName::from_static(name), HeaderValue::from_static(value));
    };
    match path.as_str() {
        "/half" => {
            // The rest never comes.
            let begun = futures_util::stream::iter([Ok(Frame::data(Bytes::from_static(b"half")))]);
            let rest = futures_util::stream::pending();
            *answer.body_mut() = StreamBody::new(futures_util::StreamExt::chain(begun, rest)).boxed_unsync();
        }
        "/hop" => {
            for (name, value) in
                [("keep-alive", "timeout=9"), ("proxy-connection", "x"), ("x-named", "x"), ("x-kept", "x")]
            {
                add(name, value);
            }
            if head.version == hyper::Version::HTTP_11 {
                add("connection", "x-named, close");
            }
        }
        // Of HTTP/2: with HTTP/1.1 hyper does not let it pass.
        "/longer" => add("content-length", "9"),
        "/named" => add("set-cookie", "sid=from-the-backend; Path=/"),
        "/trailers" => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            add("trailer", "grpc-status");
            let frames = [Frame::data(Bytes::from(text)), Frame::trailers(trailers)].map(Ok);
            *answer.body_mut() = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        }
        _ => {}
    }
    Ok(answer)
}

/// Bytes of [`Noise`], made as they are taken.
fn noise(length: u64) -> UnsyncBoxBody<Bytes, Infallible> {
    let noise = Noise::default().take(length);
    let pieces = futures_util::stream::unfold(noise, |mut noise| async move {
        let mut piece = vec![0; PIECE.min(noise.limit() as usize)];
        noise.read_exact(&mut piece).ok()?;
        (!piece.is_empty()).then(|| (Ok(Frame::data(Bytes::from(piece))), noise))
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// Short bodies as they are, long ones as length and SHA-256.
#[derive(Default)]
struct Sum {
    first: Vec<u8>,
    length: u64,
    sha: sha2::Sha256,
}

impl Sum {
    fn add(&mut self, data: &[u8]) {
        sha2::Digest::update(&mut self.sha, data);
        self.length += data.len() as u64;
        let room = 256_usize.saturating_sub(self.first.len());
        self.first.extend_from_slice(&data[..room.min(data.len())]);
    }

    fn end(self) -> String {
        if self.length <= 256 {
            return String::from_utf8_lossy(&self.first).into_owned();
        }
        let sum: String = sha2::Digest::finalize(self.sha).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{} {sum}", self.length)
    }
}

/// What a [`Prepared`] says to `/0`, `/1` and so on; and does it close the connection then?
pub(crate) type Answers = &'static [(bool, &'static [u8])];

/// A backend that answers with bytes.
pub(crate) struct Prepared {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Prepared {
    pub(crate) fn start(netns: &Netns, port: u16, authority: &Authority, answers: Answers) -> Result<Self> {
        let config = Manner::HTTP1.config(&authority.issue("prepared")?)?;
        let listener = sockets::listen(netns, port)?;
        socket2::SockRef::from(&listener).set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let Ok((stream, _)) = listener.accept() else { continue };
                    let config = Arc::clone(&config);
                    std::thread::spawn(move || -> Result<()> {
                        // It has the listener's.
                        sockets::limit(&stream)?;
                        let tls = ServerConnection::new(config)?;
                        let mut stream = BufReader::new(StreamOwned::new(tls, stream));
                        let mut head = String::new();
                        while stream.read_line(&mut head)? > 0 {
                            if head.ends_with("\r\n\r\n") {
                                let number = head.split(['/', ' ']).nth(2).and_then(|word| word.parse().ok());
                                let answer = answers.get(number.unwrap_or(0_usize)).copied();
                                let (close, bytes) = answer.unwrap_or((true, b""));
                                head.clear();
                                stream.get_mut().write_all(bytes)?;
                                stream.get_mut().flush()?;
                                if close {
                                    break;
                                }
                            }
                        }
                        stream.get_mut().conn.send_close_notify();
                        Ok(stream.get_mut().flush()?)
                    });
                }
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
