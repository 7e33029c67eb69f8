//! One request: session, backend, tunnel, answer.

use std::{
    convert::Infallible,
    error::Error,
    future::ready,
    io, iter,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
    },
    task::{self, Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use dispatcher_common::session::SessionKey;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    body::{Body as _, Frame, SizeHint},
    header::{
        ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HOST, HeaderName,
        HeaderValue, RETRY_AFTER, SET_COOKIE, TE, TRANSFER_ENCODING, UPGRADE,
    },
    http::{
        request::Parts,
        uri::{self, Authority, PathAndQuery, Scheme},
    },
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use tokio::{
    task::yield_now,
    time::{error::Elapsed, sleep, timeout, timeout_at},
};

use super::{
    Reached, Site, access, class,
    connection::{Busy, Client, View},
    forwarded::{self, REQUEST_ID},
    secure,
    sending::{self, Sending},
    session::{self, Binding},
};
use crate::{
    config::DEFAULT_CLASS,
    qos::{Permit, Refused},
    tunnels::{Body, BoxError, Lease, Preference, Reply, SendError, Tunnels, Unavailable},
};

/// Tunnels that one request is offered to.
const TRIES: usize = 5;
/// How long a request waits before the third tunnel, times the tunnels before.
const PAUSE: Duration = Duration::from_millis(1);
/// Longest answer that is read before it is passed on, bytes.
const SHORT: u64 = 16 << 10;
/// How long until backends may be back that have gone.
const MOMENT: Duration = Duration::from_millis(10);
/// How long a request waits for a tunnel.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a client is told when a request fails.
struct Failure {
    status: StatusCode,
    problem: String,
    /// What is for the operator alone.
    cause: Option<String>,
    /// It may try again soon.
    again: bool,
}

/// After these a connection of HTTP/1.1 ends.
const ENDING: [StatusCode; 4] = [
    StatusCode::BAD_REQUEST,
    StatusCode::METHOD_NOT_ALLOWED,
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::NOT_IMPLEMENTED,
];
/// What the log has in the place of a status where nobody was there to be answered.
const LEFT_BEFORE: u16 = 499;
/// What it says of that.
const LEFT_UNANSWERED: &str = "the client left before the answer";

fn failure(status: StatusCode, problem: impl Into<String>) -> Failure {
    Failure { status, problem: problem.into(), cause: None, again: false }
}

/// The body of a request as a client sends it.
pub(super) trait FromClient:
    hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static
{
}

impl<B: hyper::body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static> FromClient for B {}

/// Answers a request, whatever happens.
///
/// What needs no waiting is done at once: so what waits is small, and that is what a request costs in memory.
pub(super) fn answer<B: FromClient>(
    client: Arc<Client>,
    request: Request<B>,
) -> impl Future<Output = Result<Response<Sending<Watched>>, Infallible>> + Send + use<B> {
    let mut view = client.view();
    let id = client.request_id();
    let began = Instant::now();
    let told = view.site.log.is_some().then(|| Record::of(&request, &view.site, &id, began));
    let way = Way { secure: !client.clear, ..Way::default() };
    let mut watch = Watch { told, way, busy: Busy::new(&client) };
    let http1 = request.version() < Version::HTTP_2;
    let mut received = receive(&client, &view.site, request, &id);
    async move {
        let passed = match received {
            Ok(ref mut received) => pass_on(&client, &mut view, received, &mut watch.way).await,
            Err(failure) => Err(failure),
        };
        let (answer, error) = match passed {
            Ok(answer) => (answer, None),
            Err(failure) => {
                let (service, from) = (&view.site.service.name, client.address);
                let (status, reason) = (failure.status, failure.reason());
                log::debug!("{service} {from}: {status}: {reason} (request {id})");
                (failure.page(&id, http1), Some(reason))
            }
        };
        let (status, now) = (answer.status(), Instant::now());
        let took = now - began;
        client.counts().request(watch.way.secure, status.as_u16(), took);
        if let Some(told) = &mut watch.told {
            (told.status, told.error, told.took) = (status.as_u16(), error, Some(took));
            told.length = answer.body().size_hint().exact();
            // Nobody may ask for the body of what has none.
            told.complete = told.method == Method::HEAD;
        }
        Ok(answer.map(|body| {
            let mut body = Watched { body, watch };
            body.note(0);
            client.flows.follow(body, now)
        }))
    }
}

/// Which way a request went.
#[derive(Default)]
struct Way {
    backend: u32,
    /// 0 for none.
    tunnel: u32,
    secure: bool,
    tries: usize,
    /// Its class, and how long it waited for its turn, where it needed one.
    turn: Option<(u16, Duration)>,
}

/// What the access log says of a request and its answer.
struct Record {
    site: Arc<Site>,
    time: String,
    method: Method,
    host: Option<String>,
    path: String,
    version: Version,
    id: String,
    status: u16,
    /// Why we answered ourselves, or why the answer was not sent to its end.
    error: Option<String>,
    began: Instant,
    /// None before there was an answer.
    took: Option<Duration>,
    /// Of the body, where it is known, and what was given of it.
    length: Option<u64>,
    sent: u64,
    complete: bool,
}

impl Record {
    /// Of a request whose client may leave now.
    fn of<B>(request: &Request<B>, site: &Arc<Site>, id: &str, began: Instant) -> Box<Self> {
        let authority = request.uri().authority().map(Authority::to_string);
        let host = || request.headers().get(HOST)?.to_str().ok().map(str::to_owned);
        Box::new(Self {
            site: Arc::clone(site),
            time: access::time(),
            method: request.method().clone(),
            host: authority.or_else(host),
            path: request.uri().path().to_owned(),
            version: request.version(),
            id: id.to_owned(),
            status: LEFT_BEFORE,
            error: None,
            began,
            took: None,
            length: None,
            sent: 0,
            complete: false,
        })
    }

    /// Why nothing more was sent, if nothing else is known of it.
    fn ended(&self, client: &Client) -> Option<&str> {
        let left = if self.took.is_none() { LEFT_UNANSWERED } else { "the client left" };
        let stopped = *client.shared.terminator.closing.borrow();
        let why = if stopped { "the dispatcher is being stopped" } else { left };
        self.error.as_deref().or((!self.complete).then_some(why))
    }

    fn write(&self, client: &Client, way: &Way) {
        let Self { site, time, method, host, path, version, id, status, began, took, sent, .. } = self;
        let Some(log) = &site.log else { return };
        let all = began.elapsed();
        let reached = client.shared.terminator.reached(site.service.id);
        let name = reached.as_ref().and_then(|reached| reached.addresses.get(&way.backend));
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        let config = client.shared.config();
        let class =
            |id: u16| config.classes.iter().find(|one| one.id == id).map_or(DEFAULT_CLASS, |one| &one.name);
        log.write(&access::Line {
            time: time.clone(),
            service: &site.service.name,
            client: client.address.ip(),
            method: method.as_str(),
            host: host.as_deref(),
            path,
            version: match *version {
                Version::HTTP_2 => "2",
                Version::HTTP_10 => "1.0",
                _ => "1.1",
            },
            status: *status,
            sent_bytes: *sent,
            head_ms: ms(took.unwrap_or(all)),
            ms: ms(all),
            backend: name.and_then(|(name, _)| name.split_once('/')).map(|(_, backend)| backend),
            class: way.turn.map(|(id, _)| class(id)),
            queued_ms: way.turn.map(|(_, queued)| ms(queued)),
            tunnel: Some(way.tunnel).filter(|tunnel| *tunnel != 0),
            tries: way.tries,
            complete: self.complete && *status != LEFT_BEFORE,
            error: self.ended(client),
            request_id: id,
        });
    }
}

/// How a request's body gets on: until its end an answer is not due.
#[derive(Clone)]
struct Progress(Arc<Upload>);

struct Upload {
    /// When its last piece was sent.
    last: Mutex<Instant>,
    state: AtomicU8,
}

/// The backend has yet to ask for the next piece, or has all.
const TAKEN: u8 = 0;
/// The client has yet to send it.
const AWAITED: u8 = 1;
/// The client sent what cannot be read.
const BROKEN: u8 = 2;
/// The client is gone.
const LEFT: u8 = 3;

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(Upload { last: Mutex::new(Instant::now()), state: AtomicU8::new(TAKEN) }))
    }
}

impl Progress {
    /// The same body, whose progress is noted.
    fn watch(&self, body: impl FromClient) -> Body {
        Uploading { body: Box::pin(body), progress: self.clone() }.boxed_unsync()
    }

    fn state(&self) -> u8 {
        self.0.state.load(Ordering::Relaxed)
    }

    /// Waits for something as long as there is progress, and `limit` longer.
    async fn within<T>(
        &self,
        limit: Duration,
        mut work: impl Future<Output = T> + Unpin,
    ) -> Result<T, Elapsed> {
        *super::lock(&self.0.last) = Instant::now();
        loop {
            let due = *super::lock(&self.0.last) + limit;
            match timeout_at(due.into(), &mut work).await {
                Err(late) if *super::lock(&self.0.last) + limit <= Instant::now() => return Err(late),
                Err(_) => {}
                Ok(done) => return Ok(done),
            }
        }
    }
}

/// A body that tells how it gets on.
struct Uploading<B> {
    body: Pin<Box<B>>,
    progress: Progress,
}

impl<B: FromClient> hyper::body::Body for Uploading<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = self.body.as_mut().poll_frame(context).map_err(Into::into);
        let Upload { last, state } = &*self.progress.0;
        let now = match &polled {
            Poll::Pending => AWAITED,
            Poll::Ready(Some(Err(error))) if left(&**error) => LEFT,
            Poll::Ready(Some(Err(_))) => BROKEN,
            Poll::Ready(frame) => {
                if frame.is_some() {
                    *super::lock(last) = Instant::now();
                }
                TAKEN
            }
        };
        state.store(now, Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How connections end on which nothing was wrong but that they end.
const GONE: [io::ErrorKind; 5] = [
    io::ErrorKind::UnexpectedEof,
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::ConnectionAborted,
    io::ErrorKind::BrokenPipe,
    io::ErrorKind::TimedOut,
];

/// Whether a body broke off because its client is gone, not because it could not be read.
fn left(error: &(dyn Error + 'static)) -> bool {
    let mut causes = iter::successors(Some(error), |&error| error.source());
    causes.any(|cause| {
        let hyper = cause.downcast_ref::<hyper::Error>();
        hyper.is_some_and(|error| error.is_incomplete_message() || error.is_closed())
            || cause.downcast_ref::<io::Error>().is_some_and(|error| GONE.contains(&error.kind()))
            || cause.downcast_ref::<h2::Error>().is_some_and(|error| error.is_io() || error.is_reset())
    })
}

/// A request under way. Whatever becomes of it, the log says so in the end, where there is one.
struct Watch {
    told: Option<Box<Record>>,
    way: Way,
    busy: Busy,
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(told) = &self.told {
            told.write(self.busy.client(), &self.way);
        }
    }
}

/// A body whose request is under way until it has been read, or is dropped.
pub(super) struct Watched {
    body: Body,
    watch: Watch,
}

impl Watched {
    /// Takes note of what was sent, and whether that was all.
    fn note(&mut self, sent: usize) {
        if let Some(told) = &mut self.watch.told {
            told.sent += sent as u64;
            told.complete |= self.body.is_end_stream() || told.length == Some(told.sent);
        }
    }
}

impl sending::Told for Watched {
    fn cut(&mut self, why: &str) {
        if let Some(told) = &mut self.watch.told {
            told.error = Some(why.to_owned());
        }
    }
}

impl hyper::body::Body for Watched {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = task::ready!(Pin::new(&mut self.body).poll_frame(context));
        let sent = frame.as_ref().and_then(|frame| frame.as_ref().ok()).and_then(Frame::data_ref);
        let sent = sent.map_or(0, Bytes::len);
        self.note(sent);
        if let Some(told) = &mut self.watch.told {
            match &frame {
                Some(Err(error)) => {
                    told.error =
                        Some(format!("the backend's answer broke off: {}", crate::one_line(&**error)));
                }
                // Behind trailers nobody asks for more.
                Some(Ok(frame)) => told.complete |= frame.is_trailers(),
                None => told.complete = true,
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Failure {
    /// What the operator is told.
    fn reason(&self) -> String {
        match &self.cause {
            Some(cause) => format!("{}: {cause}", self.problem),
            None => self.problem.clone(),
        }
    }

    fn page(&self, id: &str, http1: bool) -> Response<Body> {
        let Self { status, problem, again, .. } = self;
        let text = format!("{status}: {problem} (request {id})\n");
        let mut response =
            Response::new(Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync());
        *response.status_mut() = *status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Ok(id) = HeaderValue::from_str(id) {
            headers.insert(REQUEST_ID, id);
        }
        if *status == StatusCode::METHOD_NOT_ALLOWED {
            let others = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");
            headers.insert(ALLOW, others);
        }
        if *again {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if http1 && ENDING.contains(status) {
            // What follows may have been meant as something else, or as the rest.
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// A request as it is passed on, to whichever backend.
struct Received {
    head: Parts,
    /// None once it was sent, and was not given back.
    body: Option<Body>,
    /// Of a body that is not empty.
    progress: Option<Progress>,
    authority: Authority,
    host: HeaderValue,
    /// What the connection is to become, and where that will be said.
    protocol: Option<HeaderValue>,
    upgraded: Option<OnUpgrade>,
    trailers: bool,
    /// Through a tunnel.
    secure: bool,
    session: Option<SessionKey>,
    /// The session's value, if it was made here.
    assigned: Option<String>,
    /// The client did not invent the session.
    confirmed: bool,
    /// Twice is as good as once.
    repeatable: bool,
}

impl Received {
    /// How its body gets on.
    fn uploads(&self) -> u8 {
        self.progress.as_ref().map_or(TAKEN, Progress::state)
    }
}

/// Looks at a request, and makes it one that can be passed on.
fn receive(
    client: &Client,
    site: &Site,
    mut request: Request<impl FromClient>,
    id: &str,
) -> Result<Received, Failure> {
    let authority = check(&request)?;
    let upgraded = wants_upgrade(&request).then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let protocol = upgraded.is_some().then(|| head.headers.get(UPGRADE).cloned()).flatten();
    let trailers = takes_trailers(&head.headers);
    strip(&mut head.headers, forwarded::is_alike);
    join_cookies(&mut head.headers);
    let host = client.told.tell(&mut head.headers, &authority, id);
    let given = session::of_request(&head.headers, &site.cookie).map(|value| session::key(site, value));
    let secure = is_secure(client, site, &head, given.is_some());
    // Ours is for secure connections only: browsers would not take it on others.
    let assigns = given.is_none() && site.terminate.assign_cookie && !client.clear;
    let assigned = if assigns { session::new_value() } else { None };
    let session = given.or_else(|| assigned.as_ref().map(|value| session::key(site, value.as_bytes())));
    // One that we gave, and that comes back, is no invention of the client's.
    let confirmed = given.is_some() && site.terminate.assign_cookie;
    let empty = body.is_end_stream();
    let progress = (!empty).then(Progress::default);
    let body = Some(progress.as_ref().map_or_else(nothing, |progress| progress.watch(body)));
    let repeatable = empty && head.method.is_safe();
    Ok(Received {
        head,
        body,
        progress,
        authority,
        host,
        protocol,
        upgraded,
        trailers,
        secure,
        session,
        assigned,
        confirmed,
        repeatable,
    })
}

async fn pass_on(
    client: &Arc<Client>,
    view: &mut Arc<View>,
    received: &mut Received,
    way: &mut Way,
) -> Result<Response<Body>, Failure> {
    let secure = received.secure;
    way.secure = secure;
    let (mut avoid, mut until) = (Vec::new(), None);
    loop {
        let leased = lease(client, view, received, way, &mut avoid, &mut until).await?;
        let Some(Leased { lease, backend, permit }) = leased else {
            // They may be back, or others be there.
            sleep(MOMENT).await;
            *view = client.view();
            avoid.clear();
            continue;
        };
        until = None;
        let (tunnel, home) = if secure { (lease.id(), lease.home()) } else { (0, 0) };
        (way.backend, way.tunnel, way.tries) = (backend, tunnel, way.tries + 1);
        let limit = super::seconds(view.site.terminate.response_timeout);
        let request = form(received, lease.is_http2());
        // In one place, as each that waits for it would have a place for it of its own.
        let mut exchange = pin!(exchange(lease.send(request), received.repeatable));
        let sent = match &received.progress {
            Some(progress) => progress.within(limit, exchange.as_mut()).await,
            None => timeout(limit, exchange.as_mut()).await,
        };
        let SendError { error, malformed, unprocessed } = match sent {
            Ok(Ok((response, whole))) => {
                if let Some(permit) = &permit {
                    permit.answered();
                }
                let binding = Binding { backend, tunnel: home, confirmed: true };
                // The backend is done with what was read to its end.
                let permit = permit.filter(|_| !whole);
                return finish(client, view, response, received, binding, permit);
            }
            Ok(Err(error)) => error,
            Err(_) if received.uploads() == AWAITED => {
                return Err(failure(
                    StatusCode::REQUEST_TIMEOUT,
                    format!("nothing more of the request's body came within {} s", limit.as_secs()),
                ));
            }
            Err(_) => {
                return Err(failure(
                    StatusCode::GATEWAY_TIMEOUT,
                    format!("the backend did not answer within {} s", limit.as_secs()),
                ));
            }
        };
        let unsent = unprocessed.is_some();
        received.body = unprocessed;
        if received.uploads() == LEFT {
            let status = StatusCode::from_u16(LEFT_BEFORE).unwrap_or(StatusCode::BAD_REQUEST);
            return Err(failure(status, LEFT_UNANSWERED));
        }
        if malformed || received.uploads() == BROKEN {
            return Err(failure(StatusCode::BAD_REQUEST, "the request's body cannot be read"));
        }
        let cause = || Some(crate::one_line(&*error));
        if !unsent && is_unreadable(&*error) {
            // The next would say the same, or break as this one did.
            let problem = failure(StatusCode::BAD_GATEWAY, "the backend's answer cannot be read");
            return Err(Failure { cause: cause(), ..problem });
        }
        if way.tries >= TRIES || !(unsent || received.repeatable) {
            if *client.shared.terminator.closing.borrow() {
                // It was no fault of the backend's.
                return Err(failure(StatusCode::SERVICE_UNAVAILABLE, "the dispatcher is being stopped"));
            }
            let problem = failure(StatusCode::BAD_GATEWAY, "the connection to the backend failed");
            return Err(Failure { cause: cause(), ..problem });
        }
        client.counts().retry();
        // Others may have ended with this one: they are asked first, and given a little time.
        match way.tries {
            1 => yield_now().await,
            tries => sleep(PAUSE * tries as u32).await,
        }
        // Another tunnel to the same backend, where there is one.
        if client.shared.terminator.road(secure).load(backend).established == 0 {
            avoid.push(backend);
        }
    }
}

/// Whether a backend did answer, but with what is no HTTP. What is wrong with a whole tunnel of HTTP/2 may be due to another
/// request's answer.
fn is_unreadable(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse)
        || error.downcast_ref::<h2::Error>().is_some_and(|error| error.is_reset() && error.is_library())
}

/// Takes the answer to a request that was sent. A short answer to a request that can be repeated is read to its end, and
/// so is told: a tunnel that ends on the way costs nothing then.
async fn exchange(
    sent: impl Future<Output = Result<Response<Reply>, SendError>>,
    repeatable: bool,
) -> Result<(Response<Body>, bool), SendError> {
    let (head, reply) = sent.await?.into_parts();
    let short = reply.size_hint().upper().is_some_and(|length| length <= SHORT);
    if !(repeatable && short) || head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Ok((Response::from_parts(head, reply.boxed_unsync()), false));
    }
    let broken = |error| SendError { error, malformed: false, unprocessed: None };
    let body = whole(reply).await.map_err(broken)?;
    Ok((Response::from_parts(head, body), true))
}

/// A short body that was read to its end: its length is known.
async fn whole(mut reply: Reply) -> Result<Body, BoxError> {
    let (mut data, mut trailers) = (Bytes::new(), None);
    while !reply.is_end_stream()
        && let Some(frame) = reply.frame().await
    {
        match frame?.into_data() {
            // Mostly there is one.
            Ok(piece) if data.is_empty() => data = piece,
            Ok(piece) => data = [data, piece].concat().into(),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    let body = Full::new(data).map_err(|never| match never {});
    Ok(match trailers {
        None => body.boxed_unsync(),
        Some(trailers) => body.with_trailers(ready(Some(Ok(trailers)))).boxed_unsync(),
    })
}

/// What may be passed on at all; returns for whom it is.
fn check<B>(request: &Request<B>) -> Result<Authority, Failure> {
    let refuse = |problem: &str| failure(StatusCode::BAD_REQUEST, problem);
    if request.method() == Method::CONNECT {
        return Err(failure(StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not served here"));
    }
    let headers = request.headers();
    let mut codings = headers.get_all(TRANSFER_ENCODING).into_iter();
    let known =
        codings.next().is_none_or(|coding| coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
    if !known || codings.next().is_some() {
        // The others would be lost on the way.
        return Err(failure(StatusCode::NOT_IMPLEMENTED, "no Transfer-Encoding but chunked is known here"));
    }
    if headers.get_all(HOST).iter().count() > 1 {
        return Err(refuse("there is more than one Host"));
    }
    let host = headers.get(HOST).map(|host| Authority::try_from(host.as_bytes()));
    let host = host.transpose().map_err(|_| refuse("the Host cannot be read"))?;
    let uri = request.uri();
    match (uri.scheme(), uri.authority()) {
        (Some(scheme), _) if *scheme != Scheme::HTTP && *scheme != Scheme::HTTPS => {
            return Err(refuse("the target is neither of http nor of https"));
        }
        (None, Some(_)) => return Err(refuse("the target has no path")),
        _ if uri.path() == "*" && request.method() != Method::OPTIONS => {
            return Err(refuse("the target * is for OPTIONS alone"));
        }
        _ => {}
    }
    let authority = match (uri.authority(), host) {
        // RFC 9113 section 8.3.1; in HTTP/1.1 the Host beside a whole target does not count (RFC 9112 section 3.2.2).
        (Some(authority), Some(host)) if request.version() == Version::HTTP_2 && *authority != host => {
            return Err(refuse("Host and :authority differ"));
        }
        (Some(authority), _) => authority.clone(),
        (None, Some(host)) => host,
        (None, None) => return Err(refuse("there is no Host")),
    };
    if authority.as_str().contains('@') {
        return Err(refuse("there is a user's name in the Host"));
    }
    if !is_one_place(&authority) {
        return Err(refuse("the Host is not one name or address, with a port up to 65535 or without"));
    }
    Ok(authority)
}

/// Whether a host, without a user, is one, and its port a number, or none.
fn is_one_place(authority: &Authority) -> bool {
    let host = authority.host();
    let rest = authority.as_str().get(host.len()..).unwrap_or_default();
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
    let port = rest.strip_prefix(':');
    !host.contains(',') && port.map_or(rest.is_empty(), |port| port.is_empty() || is_port(port))
}

/// Whether it goes through a tunnel: all that came over TLS does, and what is declared secure.
fn is_secure(client: &Client, site: &Site, head: &Parts, session: bool) -> bool {
    let rules = site.terminate.clear.as_ref().filter(|_| client.clear).map(|clear| &clear.secure);
    rules.is_none_or(|rules| {
        rules.iter().any(|rule| secure::is_for(rule, &head.method, head.uri.path(), session))
    })
}

/// Whether the connection is to become something else, though not HTTP/2: of the requests that follow there we would see
/// nothing.
fn wants_upgrade<B>(request: &Request<B>) -> bool {
    let headers = request.headers();
    let is = |name: &'static str| move |word: &[u8]| word.eq_ignore_ascii_case(name.as_bytes());
    request.version() == Version::HTTP_11
        && headers.contains_key(UPGRADE)
        && words(headers, &CONNECTION).any(is("upgrade"))
        && !words(headers, &UPGRADE).any(is("h2c"))
}

/// The words of a list, which may be in several lines.
fn words<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h [u8]> {
    let lines = headers.get_all(name).into_iter();
    lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b',')).map(<[u8]>::trim_ascii)
}

/// Whether what a backend switches to is, all of it, what it was asked for.
fn is_as_asked(headers: &HeaderMap, asked: Option<&HeaderValue>) -> bool {
    let asked = || asked.into_iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    let mut found = words(headers, &UPGRADE).peekable();
    found.peek().is_some() && found.all(|word| asked().any(|one| one.trim_ascii().eq_ignore_ascii_case(word)))
}

/// Whether the client takes trailers, which servers of gRPC want to see.
fn takes_trailers(headers: &HeaderMap) -> bool {
    let mut codings =
        headers.get_all(TE).into_iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    codings.any(|coding| {
        let name = coding.split(|byte| *byte == b';').next().unwrap_or_default();
        name.trim_ascii().eq_ignore_ascii_case(b"trailers")
    })
}

/// HTTP/2 may send each cookie in a field of its own, HTTP/1.1 may not (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let lines: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(line) = HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(COOKIE, line);
    }
}

/// Whether a field is of one connection only (RFC 9110 section 7.6.1), beside those that `Connection` names.
fn hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        // `Expect` we answer ourselves as soon as the body is wanted.
        "connection"
            | "expect"
            | "http2-settings"
            | "keep-alive"
            | "proxy-connection"
            | "te"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// Removes what is for one connection only, and other fields.
fn strip(headers: &mut HeaderMap, other: impl Fn(&HeaderName) -> bool) {
    // Most have none or one of them.
    let own: Vec<HeaderName> =
        headers.keys().filter(|name| hop_by_hop(name) || other(name)).cloned().collect();
    if own.is_empty() {
        return;
    }
    if headers.contains_key(TRANSFER_ENCODING) {
        // Beside it a length does not count (RFC 9112 section 6.3).
        headers.remove(CONTENT_LENGTH);
    }
    // What is said of the connection itself names no other field.
    let options = [&b"keep-alive"[..], b"close"];
    let named: Vec<HeaderName> = words(headers, &CONNECTION)
        .filter(|name| !options.iter().any(|option| option.eq_ignore_ascii_case(name)))
        .filter_map(|name| HeaderName::from_bytes(name).ok())
        .collect();
    for name in named.iter().chain(&own) {
        headers.remove(name);
    }
}

fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// What a request is sent with.
struct Leased {
    lease: Lease,
    backend: u32,
    /// Of a backend with a limit.
    permit: Option<Permit>,
}

/// A tunnel to the session's backend, or to the balancer's choice; a connection in clear for what is not secure.
/// Where a backend takes only so many requests at a time, it is waited for before that. None when all that are known are
/// to be avoided by now.
async fn lease(
    client: &Client,
    view: &View,
    received: &mut Received,
    way: &mut Way,
    avoid: &mut Vec<u32>,
    until: &mut Option<Instant>,
) -> Result<Option<Leased>, Failure> {
    // Exclusive only because its body, which nobody here looks at, cannot be shared by threads.
    let Received { head, session, confirmed, .. } = received;
    let key = session.as_ref();
    let unavailable = |problem: String| failure(StatusCode::SERVICE_UNAVAILABLE, problem);
    let (site, pools) = (&*view.site, view.pools(way.secure));
    let terminator = &client.shared.terminator;
    let road = terminator.road(way.secure);
    let sessions = client.shared.dataplane.sessions();
    let broken = |error: crate::dataplane::Error| {
        log::error!("{error}");
        failure(StatusCode::INTERNAL_SERVER_ERROR, "the session table cannot be read")
    };
    let Some(reached) = &view.reached else {
        return Err(unavailable("no backend of this service can be reached".to_owned()));
    };
    let known = match key.map(|key| (key, client.recent.find(key, reached))) {
        None => None,
        Some((_, Some(seen))) => Some(seen),
        Some((key, None)) => session::find(sessions, key, reached).map_err(broken)?,
    };
    let usable = |backend: u32, avoid: &[u32]| !avoid.contains(&backend) && !pools.is_failing(backend);
    let pick = |avoid: &[u32]| {
        let (qos, client) = (&client.shared.qos, client.address.ip());
        terminator.pick(qos, road, &site.service, &reached.pool, client, avoid).map(|one| one.id)
    };
    let known = known.filter(|(_, backend)| usable(*backend, avoid));
    let home = known.map_or(0, |(session, _)| session.tunnel);
    let mut wanted = if key.is_some() { Preference::of(home) } else { Preference::Any };
    let mut backend = match known.map(|(_, backend)| backend).or_else(|| pick(avoid)) {
        Some(backend) => backend,
        None if avoid.is_empty() => return Err(unavailable(nobody(road, reached))),
        None => return Ok(None),
    };
    loop {
        let permit = match client.shared.qos.gate(backend) {
            None => None,
            Some(gate) => {
                let class = class::class(client, site, head, known.as_ref().map(|(session, _)| session));
                let began = Instant::now();
                let entered = gate.enter(class, client.address.ip()).await;
                let waited = way.turn.map_or(Duration::ZERO, |(_, waited)| waited);
                way.turn = Some((class, waited + began.elapsed()));
                let busy = |refused: Refused| Failure { again: true, ..unavailable(refused.to_string()) };
                Some(entered.map_err(busy)?)
            }
        };
        let mut failed = false;
        let waited = match pools.take(backend, wanted) {
            Some(lease) => Ok(lease),
            None => {
                failed = pools.is_failing(backend);
                let until = *until.get_or_insert_with(|| Instant::now() + PATIENCE);
                road.wait(backend, wanted, until.saturating_duration_since(Instant::now())).await
            }
        };
        let lease = match waited {
            Ok(lease) => lease,
            Err(error) => {
                // Names and addresses of backends are not for clients.
                log::debug!("{error}");
                // Its tunnels are lost, or it is no backend any more.
                let elsewhere = matches!(error, Unavailable::Failing { .. } | Unavailable::Unknown(_));
                if !elsewhere || until.is_some_and(|until| Instant::now() >= until) {
                    return Err(unavailable("no tunnel to a backend was free in time".to_owned()));
                }
                avoid.push(backend);
                match pick(avoid) {
                    Some(other) => backend = other,
                    // It was the last whom to try again.
                    None if failed => return Err(unavailable(nobody(road, reached))),
                    None => return Ok(None),
                }
                wanted = if key.is_some() { Preference::New } else { Preference::Any };
                continue;
            }
        };
        let Some(key) = key else { return Ok(Some(Leased { lease, backend, permit })) };
        let tunnel = if way.secure { lease.home() } else { 0 };
        let binding = Binding { backend, tunnel, confirmed: *confirmed && known.is_some() };
        let service = &site.service;
        let bound =
            session::bind(sessions, key, binding, service, reached, &client.recent).map_err(broken)?;
        if bound == backend || !usable(bound, avoid) {
            return Ok(Some(Leased { lease, backend, permit }));
        }
        // Another first request of this session was faster.
        (backend, wanted) = (bound, Preference::New);
    }
}

/// Why no backend can be asked.
fn nobody(road: &Tunnels, reached: &Reached) -> String {
    let known = |backend: &u32| reached.addresses.contains_key(backend);
    let all = road.backends();
    match all.into_iter().filter(|one| known(&one.backend)).find_map(|one| one.error) {
        // The reason is for the operator: clients learn no names.
        Some((error, _)) => {
            log::debug!("no tunnel: {error}");
            "no tunnel to a backend of this service can be made".to_owned()
        }
        None => "no backend of this service takes requests".to_owned(),
    }
}

/// The request as the tunnel's HTTP version writes it. Its body can be sent once.
fn form(received: &mut Received, http2: bool) -> Request<Body> {
    let Received { head, body, authority, host, protocol, .. } = received;
    let mut request = Request::new(body.take().unwrap_or_else(nothing));
    *request.method_mut() = head.method.clone();
    *request.headers_mut() = head.headers.clone();
    let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    if http2 {
        let mut whole = uri::Parts::default();
        (whole.scheme, whole.authority) = (Some(Scheme::HTTPS), Some(authority.clone()));
        whole.path_and_query = Some(path);
        *request.uri_mut() = Uri::from_parts(whole).unwrap_or_default();
        *request.version_mut() = Version::HTTP_2;
        request.headers_mut().remove(HOST);
        if received.trailers {
            request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
        }
        return request;
    }
    *request.uri_mut() = Uri::from(path);
    request.headers_mut().insert(HOST, host.clone());
    if let Some(protocol) = protocol {
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(UPGRADE, protocol.clone());
    }
    request
}

/// Takes note of what the backend answered, and makes it the client's answer.
fn finish(
    client: &Arc<Client>,
    view: &View,
    mut response: Response<Body>,
    received: &mut Received,
    binding: Binding,
    permit: Option<Permit>,
) -> Result<Response<Body>, Failure> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(from) = received.upgraded.take() else {
            return Err(failure(StatusCode::BAD_GATEWAY, "the backend switched protocols unasked"));
        };
        if !is_as_asked(response.headers(), received.protocol.as_ref()) {
            return Err(failure(StatusCode::BAD_GATEWAY, "the backend switched to another protocol"));
        }
        let to = hyper::upgrade::on(&mut response);
        let busy = Busy::new(client);
        tokio::spawn(async move {
            let _until_then = (busy, permit);
            if let Ok((from, to)) = tokio::try_join!(from, to) {
                // Whoever ends it, the other side hears of it.
                drop(tokio::io::copy_bidirectional(&mut TokioIo::new(from), &mut TokioIo::new(to)).await);
            }
        });
        return Ok(response.map(|_| nothing()));
    }
    strip(response.headers_mut(), |_| false);
    let (site, mut sets) = (&*view.site, false);
    for line in response.headers().get_all(SET_COOKIE) {
        let Some(value) = session::of_set_cookie(line, &site.cookie) else { continue };
        sets = true;
        let Some(reached) = &view.reached else { continue };
        let key = session::key(site, value);
        let sessions = client.shared.dataplane.sessions();
        if let Err(error) = session::bind(sessions, &key, binding, &site.service, reached, &client.recent) {
            log::error!("{error}");
        }
    }
    if let Some(value) = &received.assigned
        && !sets
    {
        let line = format!("{}={value}; Path=/; Secure; HttpOnly; SameSite=Lax", site.cookie);
        if let Ok(line) = HeaderValue::try_from(line) {
            response.headers_mut().append(SET_COOKIE, line);
        }
    }
    *response.version_mut() = Version::default();
    Ok(match permit {
        None => response,
        Some(permit) => response.map(|body| Admitted { body, permit: Some(permit) }.boxed_unsync()),
    })
}

/// The body of an answer for which its backend has room until the body ends, or is dropped.
struct Admitted {
    body: Body,
    permit: Option<Permit>,
}

impl Admitted {
    fn settle(&mut self) {
        if self.body.is_end_stream() {
            self.permit = None;
        }
    }
}

impl hyper::body::Body for Admitted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = task::ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            Some(Ok(_)) => self.settle(),
            Some(Err(_)) | None => self.permit = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
