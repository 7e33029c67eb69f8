//! Clients' connections: accepted, ended TLS, served until they are idle or the service goes.

use std::{
    future::Future,
    io,
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use hyper::{
    server::conn::http1::{self, UpgradeableConnection},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::either::Either;

use super::{
    All, Followed, Front, Reached, Site, Terminator,
    counts::{Counts, Open, Refusal},
    draining::Draining,
    forwarded::Told,
    http2,
    lingering::Lingering,
    lock, relay, request, seconds,
    sending::Flows,
    session::Recent,
};
use crate::{
    dataplane::coarse,
    gather::gather,
    state::Shared,
    tunnels::{BoxError, Pools},
};

/// A client that says nothing for so long is asked by TCP whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(60);
/// Longest header of a request, bytes; of HTTP/1.1 also what is read ahead, and held for a client who does not read.
pub(super) const HEADER: u32 = 64 << 10;
/// How long what a client has sent may take to come once it is told to go.
pub(super) const GRACE: Duration = Duration::from_secs(1);
/// How HTTP/2 begins where it was not agreed on before (RFC 9113 section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long until more of it may have come: twice as long each time, as there may be many who never say more.
const MOMENT: Duration = Duration::from_millis(10);

/// What requests of one connection share.
pub(super) struct Client {
    pub(super) shared: Arc<Shared>,
    watching: Mutex<Watching>,
    pub(super) address: SocketAddr,
    /// It speaks in clear.
    pub(super) clear: bool,
    /// What it asked for by SNI, in lower case.
    pub(super) server_name: Option<String>,
    /// What backends are told of it.
    pub(super) told: Told,
    counts: Arc<Counts>,
    /// The session of the last request.
    pub(super) recent: Recent,
    /// Those under way.
    requests: AtomicU32,
    /// Begins the ids of its requests; the number of those that came ends them.
    id: u64,
    asked: AtomicU64,
    /// When its last request ended, milliseconds of [`coarse`].
    rests: AtomicU64,
    /// Answers on their way.
    pub(super) flows: Flows<request::Watched>,
}

impl Client {
    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// What it goes by now.
    pub(super) fn view(&self) -> Arc<View> {
        lock(&self.watching).view()
    }

    /// An id for its next request, 32 hexadecimal digits.
    pub(super) fn request_id(&self) -> String {
        let bytes = [self.id.to_be_bytes(), self.asked.fetch_add(1, Ordering::Relaxed).to_be_bytes()];
        crate::api::to_hex(bytes.as_flattened())
    }
}

/// What a connection goes by. It has one of its own, and makes another when something has changed: at each request all
/// processors would have to agree on who holds what all connections share.
pub(super) struct View {
    pub(super) site: Arc<Site>,
    /// The backends that can be reached, if any.
    pub(super) reached: Option<Arc<Reached>>,
    tunnels: Arc<Pools>,
    clear: Arc<Pools>,
}

impl View {
    /// The connections to backends for requests that are secure, or not.
    pub(super) fn pools(&self, secure: bool) -> &Pools {
        if secure { &self.tunnels } else { &self.clear }
    }
}

/// Where changes show.
struct Watching {
    site: watch::Receiver<Arc<Site>>,
    reached: watch::Receiver<All<Arc<Reached>>>,
    tunnels: watch::Receiver<Arc<Pools>>,
    clear: watch::Receiver<Arc<Pools>>,
    view: Option<Arc<View>>,
}

impl Watching {
    fn new(terminator: &Terminator, site: watch::Receiver<Arc<Site>>) -> Self {
        Self {
            site,
            reached: terminator.reached.subscribe(),
            tunnels: terminator.tunnels.subscribe(),
            clear: terminator.clear.subscribe(),
            view: None,
        }
    }

    fn view(&mut self) -> Arc<View> {
        // Of a service that is gone nothing changes any more.
        let changed = [
            self.site.has_changed(),
            self.reached.has_changed(),
            self.tunnels.has_changed(),
            self.clear.has_changed(),
        ];
        if changed.into_iter().any(|one| one.unwrap_or(false)) {
            self.view = None;
        }
        let view = self.view.get_or_insert_with(|| {
            let site = Arc::clone(&self.site.borrow_and_update());
            Arc::new(View {
                reached: self.reached.borrow_and_update().get(&site.service.id).cloned(),
                tunnels: Arc::clone(&self.tunnels.borrow_and_update()),
                clear: Arc::clone(&self.clear.borrow_and_update()),
                site,
            })
        });
        Arc::clone(view)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Err(error) = self.recent.flush(self.shared.dataplane.sessions()) {
            log::error!("{error}");
        }
    }
}

/// A request under way.
pub(super) struct Busy(Arc<Client>);

impl Busy {
    pub(super) fn new(client: &Arc<Client>) -> Self {
        client.requests.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(client))
    }

    pub(super) fn client(&self) -> &Client {
        &self.0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.rests.store(coarse().as_millis() as u64, Ordering::Relaxed);
        self.0.requests.fetch_sub(1, Ordering::Release);
    }
}

/// Accepts clients until the task is dropped.
pub(super) async fn accept(shared: Arc<Shared>, vip: SocketAddr, listener: StdListener) {
    // Not tokio's: clients' connections are other threads' from the first on.
    // SAFETY: the listener has its socket open, and the same one, until it is dropped, which only the `AsyncFd` does.
    let listener = match unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) } {
        Ok(listener) => listener,
        Err(error) => return log::error!("{vip}: {error}; nobody is served there"),
    };
    loop {
        match listener.async_io(Interest::READABLE, StdListener::accept).await {
            Ok((stream, address)) => {
                // The VIP may be another service's by now.
                let Some(front) = shared.terminator.at(vip) else { continue };
                serve_by(&shared, front, vip, stream, address);
            }
            Err(error) => {
                // Too many files, for example: those that are open end some time.
                log::warn!("{vip}: accepting: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Has a client served, if there are not too many.
fn serve_by(shared: &Arc<Shared>, front: Followed, vip: SocketAddr, stream: StdStream, address: SocketAddr) {
    let service = match &front {
        Front::Terminate(site) => Arc::clone(&site.borrow().service),
        Front::Relay(relay) => Arc::clone(&relay.borrow().service),
    };
    let counts = shared.terminator.counts(service.id);
    let Some(open) = counts.admit(service.max_connections.into()) else { return };
    let shared = Arc::clone(shared);
    let seat = shared.terminator.workers.seat(address.ip());
    let runtime = seat.runtime();
    drop(runtime.spawn(async move {
        let _seat = seat;
        let stream = match prepare(stream) {
            Ok(stream) => stream,
            Err(error) => return log::warn!("{vip}: {address}: {error}; it is not served"),
        };
        match front {
            Front::Terminate(site) => serve(shared, site, vip, stream, address, counts, open).await,
            Front::Relay(relay) => {
                let stream = Lingering::new(Either::Left(stream), Arc::clone(&shared), open);
                relay::serve(shared, relay, vip, stream, address, counts).await;
            }
        }
    }));
}

/// A client's connection, as this thread's runtime serves it.
fn prepare(stream: StdStream) -> io::Result<TcpStream> {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 6).with_retries(3);
    if let Err(error) = stream.set_nodelay(true).and(SockRef::from(&stream).set_tcp_keepalive(&keepalive)) {
        log::debug!("a client's connection: {error}");
    }
    stream.set_nonblocking(true)?;
    TcpStream::from_std(stream)
}

async fn serve(
    shared: Arc<Shared>,
    site: watch::Receiver<Arc<Site>>,
    vip: SocketAddr,
    stream: TcpStream,
    address: SocketAddr,
    counts: Arc<Counts>,
    open: Open,
) {
    let mut closing = shared.terminator.closing.subscribe();
    let now = Arc::clone(&site.borrow());
    let clear = now.terminate.clear.as_ref().is_some_and(|clear| clear.vips.contains(&vip));
    let mut server_name = None;
    let (stream, http2) = if clear {
        let http2 = tokio::select! {
            begins = begins_with_http2(&stream) => begins,
            () = sleep(seconds(now.terminate.idle_timeout)) => return,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        (Either::Left(stream), http2)
    } else {
        let acceptor = TlsAcceptor::from(Arc::clone(&now.tls));
        let limit = now.terminate.handshake_timeout;
        let handshake = tokio::select! {
            done = timeout(seconds(limit), acceptor.accept(stream).into_fallible()) => done,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        match handshake {
            Ok(Ok(stream)) => {
                let tls = stream.get_ref().1;
                let http2 = tls.alpn_protocol() == Some(b"h2");
                server_name = tls.server_name().map(str::to_ascii_lowercase);
                (Either::Right(stream), http2)
            }
            Ok(Err((error, stream))) => {
                counts.refuse(Refusal::Handshake);
                // It is told why.
                drop(Lingering::new(Either::Left(stream), shared, open));
                return log::debug!("{address}: handshake: {error}");
            }
            Err(_) => {
                counts.refuse(Refusal::HandshakeTimeout);
                return log::debug!("{address}: no handshake within {limit} s");
            }
        }
    };
    let idle_limit = seconds(now.terminate.idle_timeout);
    drop(now);
    let stream = Lingering::new(stream, Arc::clone(&shared), open);
    let client = Arc::new(Client {
        watching: Mutex::new(Watching::new(&shared.terminator, site.clone())),
        shared,
        address,
        clear,
        server_name,
        told: Told::of(address.ip(), clear),
        counts,
        recent: Recent::default(),
        requests: AtomicU32::new(0),
        id: getrandom::u64().unwrap_or_default(),
        asked: AtomicU64::new(0),
        rests: AtomicU64::new(coarse().as_millis() as u64),
        flows: Flows::default(),
    });
    let mut site = site;
    let ended = async {
        tokio::select! {
            // The daemon ends, or the service does.
            _ = closing.wait_for(|closing| *closing) => {}
            () = async { while site.changed().await.is_ok() {} } => {}
            () = idle(&client, None) => {}
        }
    };
    // Which asks those only when they have something to say, not at each turn of the connection.
    let mut ended = FuturesUnordered::from_iter([ended]);
    // It does not take part in that.
    let last = || async {
        sleep(GRACE).await;
        idle(&client, Some(GRACE)).await;
    };
    let result = if http2 {
        let connection = http2::Serving::new(Arc::clone(&client), stream);
        let work = until(connection, ended.next(), http2::Serving::graceful_shutdown, last);
        gather(work).await.unwrap_or(Ok(())).map_err(BoxError::from)
    } else {
        let answer = |request| Box::pin(request::answer(Arc::clone(&client), Draining::wrap(request)));
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(idle_limit);
        server.max_header_size(HEADER as usize).max_buf_size(HEADER as usize);
        let connection = server.serve_connection(TokioIo::new(stream), service_fn(answer)).with_upgrades();
        let work = until(connection, ended.next(), UpgradeableConnection::graceful_shutdown, last);
        work.await.unwrap_or(Ok(())).map_err(BoxError::from)
    };
    if let Err(error) = result {
        if let Some(why) = Refusal::of(&*error) {
            client.counts().refuse(why);
        }
        log::debug!("{address}: {}", crate::one_line(&*error));
    }
}

/// Serves a connection to its end. When it is to end before, it is told so, and has until `last` is ready.
async fn until<C: Future, L: Future>(
    connection: C,
    ended: impl Future,
    shutdown: impl FnOnce(Pin<&mut C>),
    last: impl FnOnce() -> L,
) -> Option<C::Output> {
    let mut connection = pin!(connection);
    tokio::select! {
        biased;
        result = &mut connection => return Some(result),
        _ = ended => {}
    }
    shutdown(connection.as_mut());
    tokio::select! {
        biased;
        result = &mut connection => Some(result),
        _ = last() => None,
    }
}

/// Whether a client in clear begins with HTTP/2, without asking for it before.
async fn begins_with_http2(stream: &TcpStream) -> bool {
    let mut bytes = [0; PREFACE.len()];
    let mut moment = MOMENT;
    loop {
        match stream.peek(&mut bytes).await {
            Ok(count) if count == PREFACE.len() => return bytes == *PREFACE,
            Ok(count) if count > 0 && PREFACE.starts_with(&bytes[..count]) => {
                sleep(moment).await;
                moment *= 2;
            }
            Ok(_) | Err(_) => return false,
        }
    }
}

/// Ready when no request has come for as long as the service allows, or for `rest`. Answers that nobody takes, or that do not
/// go on, for too long are cut.
async fn idle(client: &Client, rest: Option<Duration>) {
    loop {
        let (limit, stalled) = {
            let terminate = &client.view().site.terminate;
            (seconds(terminate.idle_timeout), seconds(terminate.response_timeout))
        };
        let rest = rest.unwrap_or(limit);
        let busy = client.requests.load(Ordering::Acquire) > 0;
        if busy {
            client.flows.cut(limit, stalled);
            sleep(limit.min(stalled) / 4).await;
            continue;
        }
        let rests = Duration::from_millis(client.rests.load(Ordering::Relaxed));
        let rested = coarse().saturating_sub(rests);
        if rested >= rest {
            return;
        }
        // By then a request may have come, and its answer have stalled.
        sleep((rest - rested).min(stalled)).await;
    }
}
