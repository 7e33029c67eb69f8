//! One tunnel: how it is opened and driven, and what is known about it while it lives.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::lease::Sender;
use super::pool::Pool;
use super::{Body, Carries, Context, State, Tls, http2, lock};
use crate::workers::here;

/// A peer that says nothing for this long is asked whether it lives: by TCP, and sooner by HTTP/2.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// How long a tunnel that is no longer needed has to say so to its peer.
const FAREWELL: Duration = Duration::from_secs(1);

/// The live tunnels.
#[derive(Default)]
pub(super) struct Registry {
    listed: Mutex<Listed>,
    /// The last one ended.
    empty: Notify,
}

#[derive(Default)]
struct Listed {
    last: u32,
    tunnels: BTreeMap<u32, Arc<Tunnel>>,
}

/// What is known about one tunnel.
pub(super) struct Tunnel {
    pub(super) id: u32,
    pub(super) pool: Arc<Pool>,
    /// The thread that drives it.
    pub(super) worker: usize,
    source: SocketAddr,
    destination: SocketAddr,
    version: &'static str,
    cipher_suite: &'static str,
    group: Option<&'static str>,
    alpn: Option<String>,
    pub(super) since: Instant,
    /// When it is to be replaced.
    pub(super) until: Option<Instant>,
    sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) in_flight: AtomicUsize,
    /// The most requests at once: 1 for HTTP/1.1, the peer's limit of streams for HTTP/2.
    pub(super) streams: AtomicUsize,
    pub(super) retiring: AtomicBool,
    /// A flow has it.
    pub(super) used: AtomicBool,
    killed: AtomicBool,
    /// Why reading ended.
    pub(super) failure: OnceLock<String>,
    /// The sender of HTTP/1.1 until hyper is ready for the next request.
    cooling: Mutex<Option<http1::SendRequest<Body>>>,
    /// The task that drives the requests.
    driver: AtomicWaker,
    /// The task that reads, which is the one that writes unless the tunnel was upgraded.
    reader: AtomicWaker,
}

/// Makes one attempt to open a tunnel and gives it to the pool. The error is one readable line.
pub(super) async fn open(pool: Arc<Pool>) -> Result<(), String> {
    let settings = Arc::clone(&pool.target.settings);
    let address = pool.target.address;
    let deadline = Instant::now() + settings.timeout;

    let socket = within(deadline, TcpStream::connect(address))
        .await
        .map_err(|e| format!("connect to {address}: {e}"))?;
    // Small requests must not wait for each other; where that cannot be set, they only are later.
    let _ = socket.set_nodelay(true);
    // A peer that vanished is found out, with HTTP/1.1 too.
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 3).with_retries(3);
    let _ = SockRef::from(&socket).set_tcp_keepalive(&keepalive);
    let stream = match &settings.tls {
        Some(Tls { config, name }) => {
            let handshake = TlsConnector::from(Arc::clone(config)).connect(name.clone(), socket);
            let stream = within(deadline, handshake)
                .await
                .map_err(|e| format!("TLS handshake with {address} as {}: {e}", name.to_str()))?;
            Either::Left(stream)
        }
        None => Either::Right(socket),
    };
    pool.count_handshake();

    let tunnel = pool.registry.add(&pool, &stream).map_err(|e| format!("connect to {address}: {e}"))?;
    log::debug!("{}: tunnel {} from {} is established", pool.target.name, tunnel.id, tunnel.source);
    let multiplexed = tunnel.alpn.as_deref() == Some("h2");
    let wire = Wire { stream, tunnel: Arc::clone(&tunnel) };
    if settings.carries == Carries::Flow {
        let (sender, asked) = oneshot::channel();
        pool.add(Arc::clone(&tunnel), Sender::Flow(sender));
        tokio::spawn(hold(tunnel, wire, asked));
        return Ok(());
    }
    if multiplexed {
        let opened = within(deadline, async {
            http2::open(&tunnel, wire).await.map_err(|error| tunnel.reason(Some(&error)))
        });
        let (sender, driver) = opened.await.map_err(|e| {
            tunnel.kill();
            format!("HTTP/2 with {address}: {e}")
        })?;
        pool.add(Arc::clone(&tunnel), Sender::Http2(sender));
        tokio::spawn(driver.run());
    } else {
        let (sender, connection) = within(deadline, http1::Builder::new().handshake(TokioIo::new(wire)))
            .await
            .map_err(|e| format!("HTTP/1.1 with {address}: {e}"))?;
        pool.add(Arc::clone(&tunnel), Sender::Http1(sender));
        tokio::spawn(drive1(tunnel, connection.with_upgrades()));
    }
    Ok(())
}

/// A number from 0 to 1.
pub(super) fn random() -> f64 {
    getrandom::u64().unwrap_or(u64::MAX) as f64 / u64::MAX as f64
}

impl Registry {
    /// Lists a new tunnel.
    fn add(&self, pool: &Arc<Pool>, stream: &Transport) -> io::Result<Arc<Tunnel>> {
        let (socket, tls) = match stream {
            Either::Left(stream) => (stream.get_ref().0, Some(stream.get_ref().1)),
            Either::Right(socket) => (socket, None),
        };
        let (source, destination) = (socket.local_addr()?, socket.peer_addr()?);
        let alpn = tls.and_then(|tls| tls.alpn_protocol());
        let alpn = alpn.map(|name| String::from_utf8_lossy(name).into_owned());
        let unknown = if tls.is_some() { "unknown" } else { "none" };
        let max_age = pool.target.settings.max_age;
        let since = Instant::now();
        let mut listed = lock(&self.listed);
        let id = loop {
            listed.last = listed.last.wrapping_add(1);
            if listed.last != 0 && !listed.tunnels.contains_key(&listed.last) {
                break listed.last;
            }
        };
        let tunnel = Arc::new(Tunnel {
            id,
            pool: Arc::clone(pool),
            worker: here().unwrap_or_default(),
            source,
            destination,
            version: tls
                .and_then(|tls| tls.protocol_version())
                .and_then(|version| version.as_str())
                .unwrap_or(unknown),
            cipher_suite: tls
                .and_then(|tls| tls.negotiated_cipher_suite())
                .and_then(|suite| suite.suite().as_str())
                .unwrap_or(unknown),
            group: tls
                .and_then(|tls| tls.negotiated_key_exchange_group())
                .and_then(|group| group.name().as_str()),
            streams: AtomicUsize::new(usize::from(alpn.as_deref() != Some("h2"))),
            alpn,
            since,
            until: since.checked_add(max_age - max_age.div_f64(10.0).mul_f64(random())),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            retiring: AtomicBool::new(false),
            used: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            failure: OnceLock::new(),
            cooling: Mutex::new(None),
            driver: AtomicWaker::new(),
            reader: AtomicWaker::new(),
        });
        listed.tunnels.insert(id, Arc::clone(&tunnel));
        Ok(tunnel)
    }

    fn remove(&self, id: u32) {
        let mut listed = lock(&self.listed);
        listed.tunnels.remove(&id);
        if listed.tunnels.is_empty() {
            self.empty.notify_waiters();
        }
    }

    pub(super) fn one(&self, id: u32) -> Option<Arc<Tunnel>> {
        lock(&self.listed).tunnels.get(&id).cloned()
    }

    pub(super) fn all(&self) -> Vec<Arc<Tunnel>> {
        lock(&self.listed).tunnels.values().cloned().collect()
    }

    /// Returns when no tunnel lives.
    pub(super) async fn emptied(&self) {
        loop {
            let mut emptied = pin!(self.empty.notified());
            emptied.as_mut().enable();
            if lock(&self.listed).tunnels.is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

impl Tunnel {
    pub(super) fn context(&self) -> Context {
        let target = &self.pool.target;
        Context {
            id: self.id,
            backend: target.backend,
            name: target.name.clone(),
            source: self.source,
            destination: self.destination,
            version: self.version,
            cipher_suite: self.cipher_suite,
            group: self.group,
            alpn: self.alpn.clone(),
            age: self.since.elapsed(),
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
            requests: self.requests.load(Relaxed),
            in_flight: self.in_flight.load(Relaxed),
            state: match (self.used.load(Relaxed), self.retiring.load(Relaxed)) {
                (true, _) => State::Used,
                (false, true) => State::Retiring,
                (false, false) => State::Open,
            },
        }
    }

    /// Ends it at once: reads, writes and flushes fail from now on.
    pub(super) fn kill(&self) {
        self.retiring.store(true, Relaxed);
        self.killed.store(true, Relaxed);
        self.reader.wake();
    }

    /// It takes no more requests, and ends when nothing is in flight.
    pub(super) fn retire(&self) {
        self.retiring.store(true, Relaxed);
        self.driver.wake();
    }

    /// Who drives the requests waits for this too.
    pub(super) fn follow(&self, cx: &TaskContext<'_>) {
        self.driver.register(cx.waker());
    }

    /// Takes the sender back to the pool as soon as hyper is ready for the next request.
    pub(super) fn cool(&self, sender: http1::SendRequest<Body>) {
        *lock(&self.cooling) = Some(sender);
        self.driver.wake();
    }

    /// The sender, if hyper is ready for the next request.
    fn poll_cooled(&self, cx: &mut TaskContext<'_>) -> Option<http1::SendRequest<Body>> {
        let mut cooling = lock(&self.cooling);
        match cooling.as_mut()?.poll_ready(cx) {
            Poll::Ready(ready) => cooling.take().filter(|_| ready.is_ok()),
            Poll::Pending => None,
        }
    }

    /// The reason of an end: what the wire met, else what the library says.
    pub(super) fn reason(&self, error: Option<&(dyn Error + 'static)>) -> String {
        match (self.failure.get(), error) {
            (Some(failure), _) => failure.clone(),
            (None, Some(error)) => chain(error),
            (None, None) => "closed".to_owned(),
        }
    }
}

/// Drives HTTP/1.1 and gives the sender back after each request.
async fn drive1(tunnel: Arc<Tunnel>, connection: impl Future<Output = hyper::Result<()>>) {
    let mut connection = pin!(connection);
    let end = poll_fn(|cx| {
        tunnel.follow(cx);
        let polled = connection.as_mut().poll(cx);
        if polled.is_pending()
            && let Some(sender) = tunnel.poll_cooled(cx)
        {
            tunnel.pool.give_back(&tunnel, Sender::Http1(sender));
        }
        polled
    })
    .await;
    tunnel.pool.ended(&tunnel, &tunnel.reason(end.err().as_ref().map(|error| error as _)));
    lock(&tunnel.cooling).take();
}

/// Holds a connection until a flow asks for it, or until it ends.
async fn hold(tunnel: Arc<Tunnel>, mut wire: Wire, mut asked: oneshot::Receiver<oneshot::Sender<Wire>>) {
    let reason = tokio::select! {
        biased;
        asked = &mut asked => {
            match asked {
                // Whoever asks and goes away leaves it to be closed.
                Ok(give) => drop(give.send(wire)),
                Err(_retired) => drop(timeout_at(Instant::now() + FAREWELL, wire.shutdown()).await),
            }
            return;
        }
        read = wire.read_u8() => match read {
            Ok(_) => "the peer spoke before it was asked".to_owned(),
            Err(error) => tunnel.failure.get().cloned().unwrap_or_else(|| line(&error.to_string())),
        },
    };
    tunnel.pool.ended(&tunnel, &reason);
}

/// A connection, with TLS or in clear.
type Transport = Either<TlsStream<TcpStream>, TcpStream>;

/// The connection of a tunnel, which is listed until this is dropped. Counts, and can be killed.
pub(super) struct Wire {
    stream: Transport,
    tunnel: Arc<Tunnel>,
}

impl Wire {
    /// The stream, unless it was killed.
    fn alive(&mut self) -> io::Result<Pin<&mut Transport>> {
        if self.tunnel.killed.load(Relaxed) {
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the tunnel was closed on our side",
            ));
        }
        Ok(Pin::new(&mut self.stream))
    }

    fn count_sent(
        &mut self,
        cx: &mut TaskContext<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        match &written {
            Poll::Ready(Ok(count)) => drop(self.tunnel.sent.fetch_add(*count as u64, Relaxed)),
            Poll::Ready(Err(_)) => ready!(self.hear(cx)),
            Poll::Pending => {}
        }
        written
    }

    /// Writing has failed: why the peer has gone can be read soon, as an alert of TLS for example.
    fn hear(&mut self, cx: &mut TaskContext<'_>) -> Poll<()> {
        let mut bytes = [0; 1024];
        let mut buf = ReadBuf::new(&mut bytes);
        loop {
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf));
            if let Err(error) = &read {
                self.tunnel.failure.get_or_init(|| line(&error.to_string()));
            }
            if read.is_err() || buf.filled().is_empty() {
                return Poll::Ready(());
            }
            buf.clear();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.tunnel.reader.register(cx.waker());
        let before = buf.filled().len();
        let polled = self.alive()?.poll_read(cx, buf);
        let count = buf.filled().len() - before;
        self.tunnel.received.fetch_add(count as u64, Relaxed);
        if count == 0 && matches!(polled, Poll::Ready(Ok(()))) && buf.remaining() > 0 {
            self.tunnel.failure.get_or_init(|| "closed by the peer".to_owned());
        }
        if let Poll::Ready(Err(error)) = &polled {
            self.tunnel.failure.get_or_init(|| line(&error.to_string()));
        }
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = self.alive()?.poll_write(cx, bytes);
        self.count_sent(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.alive()?.poll_write_vectored(cx, slices);
        self.count_sent(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        let flushed = self.alive()?.poll_flush(cx);
        if let Poll::Ready(Err(_)) = &flushed {
            ready!(self.hear(cx));
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        self.alive()?.poll_shutdown(cx)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        log::debug!("{}: tunnel {} is gone", self.tunnel.pool.target.name, self.tunnel.id);
        self.tunnel.pool.registry.remove(self.tunnel.id);
    }
}

/// A step's result before the deadline.
async fn within<T, E: ToString>(
    deadline: Instant,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match timeout_at(deadline, step).await {
        Ok(result) => result.map_err(|error| line(&error.to_string())),
        Err(_elapsed) => Err("no answer in time".to_owned()),
    }
}

/// An error with its causes.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    line(&text)
}

/// A text from outside as one line of bounded length.
fn line(text: &str) -> String {
    text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
