//! The right to send one request, and what comes back.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Either};
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::client::conn::{TrySendError, http1};
use hyper::{Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::tunnel::{Tunnel, Wire};
use super::{Body, BoxError, http2};

/// How much of an answer is read that nobody wants any more, bytes.
const UNWANTED: usize = 64 << 10;
/// How long it may take.
const UNWANTED_PATIENCE: Duration = Duration::from_secs(1);

/// The sending half of a tunnel.
pub(super) enum Sender {
    /// One request at a time: the sender itself moves from hand to hand.
    Http1(http1::SendRequest<Body>),
    /// Many at once: each has a clone.
    Http2(http2::Sender),
    /// One flow: whoever asks through it is given the connection.
    Flow(oneshot::Sender<oneshot::Sender<Wire>>),
}

/// The right to send one request over an established tunnel. Dropped unused, it counts as nothing.
pub struct Lease {
    sender: Option<Sender>,
    flight: InFlight,
    home: u32,
}

/// A request that failed.
#[derive(Debug, thiserror::Error)]
#[error("a request over a tunnel failed")]
pub struct SendError {
    /// What the library says.
    #[source]
    pub error: BoxError,
    /// The request itself was at fault.
    pub malformed: bool,
    /// The request's body, if the backend has not acted on the request, and nothing of the body was sent: it may go over
    /// another tunnel.
    pub unprocessed: Option<Body>,
}

/// The body of a response. Its request is in flight until it ends or is dropped.
///
/// Dropped before its end, an HTTP/2 stream is reset. An HTTP/1.1 tunnel goes on if what is left is short, else it
/// is closed and replaced.
pub struct Reply {
    /// None once it is dropped.
    incoming: Option<Either<Incoming, crate::http2::Incoming>>,
    flight: Option<InFlight>,
}

impl Lease {
    pub(super) fn new(tunnel: &Arc<Tunnel>, sender: Sender, home: u32) -> Self {
        Lease { sender: Some(sender), flight: InFlight::new(tunnel), home }
    }

    /// The tunnel's id.
    pub fn id(&self) -> u32 {
        self.flight.0.id
    }

    /// The tunnel that was wanted, if it only had no room; else this one's id.
    pub fn home(&self) -> u32 {
        self.home
    }

    /// Whether the tunnel speaks HTTP/2, which decides what [`send`](Self::send) expects.
    pub fn is_http2(&self) -> bool {
        matches!(self.sender, Some(Sender::Http2(_)))
    }

    /// Sends a request and returns when the head of the response is there.
    ///
    /// The request goes out as it is. HTTP/1.1 needs a URI in origin form (`/path?query`) and a `Host` header;
    /// HTTP/2 an absolute URI (`https://authority/path?query`), from which its pseudo-headers are made, and no
    /// `Host`. The version field is set here.
    ///
    /// If this future is dropped, an HTTP/2 stream is reset. An HTTP/1.1 tunnel goes on if a short answer comes
    /// soon, else it is closed and replaced.
    /// After a 101 over HTTP/1.1, [`hyper::upgrade::on`] gives the connection; its tunnel is replaced.
    pub fn send(
        mut self,
        mut request: Request<Body>,
    ) -> impl Future<Output = Result<Response<Reply>, SendError>> + Send + use<> {
        let tunnel = Arc::clone(&self.flight.0);
        tunnel.requests.fetch_add(1, Relaxed);
        let mut sent = match self.sender.take() {
            Some(Sender::Http1(mut sender)) => {
                *request.version_mut() = hyper::Version::HTTP_11;
                let answer = Box::pin(sender.try_send_request(request));
                Either::Left(Asked { answer: Some((answer, sender)), tunnel: Arc::clone(&tunnel) })
            }
            Some(Sender::Http2(sender)) => {
                *request.version_mut() = hyper::Version::HTTP_2;
                Either::Right(http2::send(sender, request))
            }
            Some(Sender::Flow(_)) | None => {
                unreachable!("a lease of requests has its sender until it is sent")
            }
        };
        async move {
            // In flight until the reply is.
            let _lease = self;
            let answer = poll_fn(|cx| match &mut sent {
                Either::Left(asked) => asked.poll(cx).map_ok(|answer| answer.map(Either::Left)),
                Either::Right(asked) => asked.poll(cx).map_ok(|answer| answer.map(Either::Right)),
            });
            match answer.await {
                Ok(response) => {
                    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                        // Never taken back: the tunnel has left its pool for good.
                        tunnel.in_flight.fetch_add(1, Relaxed);
                    }
                    let flight = InFlight::new(&tunnel);
                    Ok(response.map(|incoming| {
                        let mut reply = Reply { incoming: Some(incoming), flight: Some(flight) };
                        reply.settle();
                        reply
                    }))
                }
                Err(error) => {
                    if error.unprocessed.is_some() {
                        tunnel.requests.fetch_sub(1, Relaxed);
                    }
                    Err(error)
                }
            }
        }
    }
}

impl Lease {
    /// The connection itself, for one flow; none if it has just ended. The tunnel leaves its pool and is replaced.
    pub async fn stream(mut self) -> Option<Stream> {
        let Some(Sender::Flow(sender)) = self.sender.take() else { return None };
        let tunnel = &self.flight.0;
        tunnel.used.store(true, Relaxed);
        tunnel.requests.fetch_add(1, Relaxed);
        tunnel.pool.remove(tunnel);
        let (give, given) = oneshot::channel();
        sender.send(give).ok()?;
        let wire = given.await.ok()?;
        Some(Stream { wire, _flight: InFlight::new(tunnel) })
    }
}

/// A tunnel's connection, given to one flow. It is in flight until this is dropped.
pub struct Stream {
    wire: Wire,
    _flight: InFlight,
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.wire).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(sender @ (Sender::Http1(_) | Sender::Flow(_))) = self.sender.take() {
            self.flight.0.pool.give_back(&self.flight.0, sender);
        }
    }
}

impl Reply {
    /// Ends the flight if no more is to come.
    fn settle(&mut self) {
        if self.is_end_stream() {
            self.flight = None;
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let (Some(flight), Some(incoming)) = (self.flight.take(), self.incoming.take()) else { return };
        let Either::Left(incoming) = incoming else { return };
        let short = incoming.size_hint().upper().is_some_and(|left| left <= UNWANTED as u64);
        if let (true, Ok(runtime)) = (short, Handle::try_current()) {
            runtime.spawn(async move {
                // Hyper takes the tunnel's next request once all has been read.
                let _ = timeout(UNWANTED_PATIENCE, skip(incoming)).await;
                drop(flight);
            });
        }
    }
}

impl hyper::body::Body for Reply {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(incoming).poll_frame(cx));
        match &frame {
            Some(Ok(_)) => self.settle(),
            Some(Err(_)) | None => self.flight = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(|incoming| incoming.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(SizeHint::default, |incoming| incoming.size_hint())
    }
}

type Answer = Result<Response<Incoming>, TrySendError<Request<Body>>>;
type Answering = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A request of HTTP/1.1 until its answer begins. If whoever asked has gone before, the answer is read and thrown
/// away: clients that leave cost no tunnels.
struct Asked {
    answer: Option<(Answering, http1::SendRequest<Body>)>,
    tunnel: Arc<Tunnel>,
}

impl Asked {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<Incoming>, SendError>> {
        let Some((answer, _)) = &mut self.answer else { return Poll::Pending };
        let answer = ready!(answer.as_mut().poll(cx));
        if let Some((_, sender)) = self.answer.take() {
            self.tunnel.cool(sender);
        }
        Poll::Ready(answer.map_err(|mut failed| {
            let unprocessed = failed.take_message().map(Request::into_body);
            let error = failed.into_error();
            SendError { malformed: error.is_user(), error: error.into(), unprocessed }
        }))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let Some((answer, sender)) = self.answer.take() else { return };
        // There is none when the daemon ends.
        let Ok(runtime) = Handle::try_current() else { return };
        let (tunnel, flight) = (Arc::clone(&self.tunnel), InFlight::new(&self.tunnel));
        runtime.spawn(async move {
            let _flight = flight;
            let skipped = timeout(UNWANTED_PATIENCE, async {
                let response = answer.await.ok()?;
                // What switches protocols goes on as something else.
                let upgraded = response.status() == StatusCode::SWITCHING_PROTOCOLS;
                if upgraded { None } else { skip(response.into_body()).await }
            });
            if skipped.await.is_ok_and(|skipped| skipped.is_some()) {
                tunnel.cool(sender);
            }
        });
    }
}

/// Reads a body to its end, if it is short.
async fn skip(mut body: Incoming) -> Option<()> {
    let mut left = UNWANTED;
    while let Some(frame) = body.frame().await {
        left = left.checked_sub(frame.ok()?.data_ref().map_or(0, Bytes::len))?;
    }
    Some(())
}

/// Counts one request in flight.
struct InFlight(Arc<Tunnel>);

impl InFlight {
    fn new(tunnel: &Arc<Tunnel>) -> Self {
        tunnel.in_flight.fetch_add(1, Relaxed);
        InFlight(Arc::clone(tunnel))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Relaxed);
        self.0.pool.serve();
    }
}
