//! HTTP/2 over a tunnel.
//!
//! One task drives the connection; whoever has a request speaks to it by himself, without a task between.

use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Builder, Connection, ResponseFuture, SendRequest};
use h2::{Error, Ping, PingPong, Reason};
use hyper::body::Body as _;
use hyper::header::{CONTENT_LENGTH, HeaderValue};
use hyper::{Method, Request, Response};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::tunnel::{Tunnel, Wire};
use super::{Body, SendError};
use crate::gather::gather;
use crate::http2::{Incoming, pass};

/// A peer that says nothing for up to two of these is asked whether it lives.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A tunnel whose peer does not answer that within this time ends.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of one answer that a peer may send ahead of a client who does not read.
pub(super) const WINDOW: u32 = 128 << 10;
/// Bytes of all answers together: as many as can be, as else who does not read keeps the others from theirs.
const WINDOWS: u32 = (1 << 31) - 1;
/// Bytes of one request that are held for a peer who does not read.
const HELD: usize = 64 << 10;
/// Longest header of an answer, bytes.
const HEADER: u32 = 64 << 10;

/// What sends requests: each has a clone.
pub(super) type Sender = SendRequest<Bytes>;

/// Begins HTTP/2. Returns when the peer has said how many requests it takes.
pub(super) async fn open(tunnel: &Arc<Tunnel>, wire: Wire) -> Result<(Sender, Driver), Error> {
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        // Nothing is sent before the peer said how many requests it takes.
        .initial_max_send_streams(0)
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOWS)
        .max_header_list_size(HEADER)
        .max_send_buffer_size(HELD);
    let (sender, connection) = builder.handshake(wire).await?;
    let mut driver = Driver { tunnel: Arc::clone(tunnel), connection, open: Some(sender.clone()) };
    poll_fn(|cx| match driver.turn(cx) {
        Poll::Ready(end) => Poll::Ready(Err(end.err().unwrap_or_else(|| Reason::NO_ERROR.into()))),
        Poll::Pending if tunnel.streams.load(Relaxed) > 0 => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    })
    .await?;
    Ok((sender, driver))
}

/// Drives the requests of a tunnel and follows the peer's limit of streams.
pub(super) struct Driver {
    tunnel: Arc<Tunnel>,
    connection: Connection<Wire, Bytes>,
    /// Says when the peer takes no more requests. The connection ends when all senders are dropped, this one too.
    open: Option<Sender>,
}

impl Driver {
    /// Drives until the connection ends.
    pub(super) async fn run(mut self) {
        let pings = self.connection.ping_pong().map(|pings| keep_alive(Arc::clone(&self.tunnel), pings));
        let _pings = pings.map(|pings| AbortOnDropHandle::new(tokio::spawn(pings)));
        let end = gather(poll_fn(|cx| {
            let before = self.tunnel.streams.load(Relaxed);
            let turn = self.turn(cx);
            if self.tunnel.streams.load(Relaxed) > before {
                self.tunnel.pool.serve();
            }
            turn
        }));
        let end = end.await;
        self.tunnel.pool.ended(&self.tunnel, &self.tunnel.reason(end.err().as_ref().map(|error| error as _)));
    }

    /// One turn; ready when the connection has ended.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Self { tunnel, connection, open } = self;
        tunnel.follow(cx);
        let end = Pin::new(&mut *connection).poll(cx);
        tunnel.streams.store(connection.max_concurrent_send_streams(), Relaxed);
        if let Some(sender) = open {
            let refused = match sender.poll_ready(cx) {
                Poll::Ready(Err(refused)) => Some(refused),
                Poll::Ready(Ok(())) | Poll::Pending => None,
            };
            if end.is_pending()
                && let Some(refused) = &refused
            {
                // What is in flight goes on.
                tunnel.pool.ended(tunnel, &tunnel.reason(Some(refused)));
            }
            if refused.is_some() || tunnel.retiring.load(Relaxed) {
                *open = None;
            }
        }
        end
    }
}

/// Asks a peer that says nothing whether it lives, and ends the tunnel if it does not say so.
async fn keep_alive(tunnel: Arc<Tunnel>, mut pings: PingPong) {
    let mut heard = 0;
    loop {
        sleep(PING_INTERVAL).await;
        let received = || tunnel.received.load(Relaxed);
        if std::mem::replace(&mut heard, received()) != heard {
            continue;
        }
        match timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_pong)) => heard = received(),
            // It has ended.
            Ok(Err(_)) => return,
            Err(_) => {
                tunnel.failure.get_or_init(|| "the peer does not answer".to_owned());
                return tunnel.kill();
            }
        }
    }
}

/// Sends a request.
pub(super) fn send(mut sender: Sender, request: Request<Body>) -> Asked {
    let (mut head, body) = request.into_parts();
    // RFC 9110 section 8.6.
    if let Some(length) = body.size_hint().exact()
        && (length > 0 || !matches!(head.method, Method::GET | Method::HEAD | Method::DELETE))
        && !head.headers.contains_key(CONTENT_LENGTH)
    {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    let empty = body.is_end_stream();
    match sender.send_request(Request::from_parts(head, ()), empty) {
        Ok((answer, _)) if empty => Asked { answer: Ok(answer), body: Some(body), sending: None },
        Ok((answer, stream)) => {
            let sending = AbortOnDropHandle::new(tokio::spawn(pass(body, stream)));
            Asked { answer: Ok(answer), body: None, sending: Some(sending) }
        }
        Err(error) => Asked { answer: Err(Some(error)), body: Some(body), sending: None },
    }
}

/// A request until its answer begins. Dropped before, the stream is reset.
pub(super) struct Asked {
    /// Or why it was not sent.
    answer: Result<ResponseFuture, Option<Error>>,
    /// As long as nothing of it was sent.
    body: Option<Body>,
    sending: Option<AbortOnDropHandle<()>>,
}

impl Asked {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<Incoming>, SendError>> {
        let (error, unprocessed) = match &mut self.answer {
            Ok(answer) => match ready!(Pin::new(answer).poll(cx)) {
                Ok(answer) => {
                    let (head, stream) = answer.into_parts();
                    let incoming = Incoming::answer(&head.headers, stream, self.sending.take());
                    return Poll::Ready(Ok(Response::from_parts(head, incoming)));
                }
                Err(error) => {
                    // RFC 9113 section 8.7.
                    let refused = error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM);
                    let refused = refused && error.is_reset();
                    (error, self.body.take().filter(|_| refused))
                }
            },
            Err(error) => match error.take() {
                Some(error) => (error, self.body.take()),
                None => return Poll::Pending,
            },
        };
        Poll::Ready(Err(SendError { error: error.into(), malformed: false, unprocessed }))
    }
}
