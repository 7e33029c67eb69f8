//! Bodies over HTTP/2, of clients and of backends.

use std::{
    error::Error,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use hyper::{
    HeaderMap,
    body::{Body, Frame, SizeHint},
    header::CONTENT_LENGTH,
};
use tokio_util::task::AbortOnDropHandle;

use crate::tunnels::BoxError;

/// Sends a body to its end, or until the peer wants no more of it. A body that breaks off resets the stream.
pub(crate) async fn pass<B>(mut body: B, mut stream: SendStream<Bytes>)
where
    B: Body<Data = Bytes, Error = BoxError> + Unpin,
{
    loop {
        let frame = poll_fn(|cx| match stream.poll_reset(cx) {
            Poll::Ready(_) => Poll::Ready(Err(())),
            Poll::Pending => Pin::new(&mut body).poll_frame(cx).map(Ok),
        });
        let Ok(frame) = frame.await else { return };
        let sent = match frame.map(|frame| frame.map(Frame::into_data)) {
            None => return drop(stream.send_data(Bytes::new(), true)),
            Some(Err(error)) => return stream.send_reset(reason(&*error)),
            Some(Ok(Ok(data))) => {
                let last = body.is_end_stream();
                if !data.is_empty() {
                    // Room that is asked for is kept from other requests: it is the connection's.
                    stream.reserve_capacity(1);
                    let room = poll_fn(|cx| match stream.capacity() {
                        0 => stream.poll_capacity(cx),
                        room => Poll::Ready(Some(Ok(room))),
                    });
                    if !matches!(room.await, Some(Ok(_))) {
                        return;
                    }
                }
                if last {
                    return drop(stream.send_data(data, true));
                }
                stream.send_data(data, false)
            }
            Some(Ok(Err(frame))) => match frame.into_trailers() {
                Ok(trailers) => {
                    stream.reserve_capacity(0);
                    return drop(stream.send_trailers(trailers));
                }
                Err(_unknown) => Ok(()),
            },
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Why a stream is reset whose body broke off: as the other side said, if it spoke HTTP/2.
fn reason(error: &(dyn Error + 'static)) -> Reason {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(reason) = error.downcast_ref::<h2::Error>().and_then(h2::Error::reason) {
            return reason;
        }
        cause = error.source();
    }
    Reason::INTERNAL_ERROR
}

/// Whose body it is that is received.
enum Of {
    /// A request's; and what is told that all of it has come, where it has one.
    Request(Option<Arc<AtomicBool>>),
    /// An answer's; and what sends the body of its request, where that has one.
    Answer(Option<AbortOnDropHandle<()>>),
}

/// The body of a request or an answer that is received. Dropped before its end, the stream is reset, a request's with its
/// last part.
pub(crate) struct Incoming {
    stream: RecvStream,
    /// What is left of it, if the peer said so.
    left: Option<u64>,
    /// All data was read; trailers may follow.
    read: bool,
    /// Nothing follows, which the stream, that others share, need not be asked again.
    over: bool,
    of: Of,
}

impl Incoming {
    /// A client's; and what will be told that all of it has come, where there is more than a header.
    pub(crate) fn request(headers: &HeaderMap, stream: RecvStream) -> (Self, Option<Arc<AtomicBool>>) {
        let mut request = Self::new(headers, stream, Of::Request(None));
        let whole = (!request.over).then(Arc::<AtomicBool>::default);
        request.of = Of::Request(whole.clone());
        (request, whole)
    }

    /// A backend's; `sending` sends the body of its request, where that has one.
    pub(crate) fn answer(
        headers: &HeaderMap,
        stream: RecvStream,
        sending: Option<AbortOnDropHandle<()>>,
    ) -> Self {
        Self::new(headers, stream, Of::Answer(sending))
    }

    fn new(headers: &HeaderMap, stream: RecvStream, of: Of) -> Self {
        let over = stream.is_end_stream();
        let left = if over { Some(0) } else { length(headers) };
        Self { stream, left, read: false, over, of }
    }

    /// What the stream's error means. One without a fault tells that nothing more of the request is wanted
    /// (RFC 9113 section 8.1), after an answer that is whole.
    fn ended(&self, error: h2::Error) -> Option<Result<Frame<Bytes>, h2::Error>> {
        let whole = self.left.is_none_or(|left| left == 0);
        let fine = error.reason() == Some(Reason::NO_ERROR) && whole;
        (!fine).then_some(Err(error))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.is_end_stream() {
            return;
        }
        match &mut self.of {
            Of::Request(Some(whole)) => whole.store(true, Relaxed),
            // An answer may be whole before the request is.
            Of::Answer(sending) => drop(sending.take().map(AbortOnDropHandle::detach)),
            Of::Request(None) => {}
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.read {
            match ready!(self.stream.poll_data(cx)) {
                Some(Ok(data)) => {
                    // It cannot be more than what was taken.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    self.over = self.stream.is_end_stream();
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(self.ended(error)),
                None => self.read = true,
            }
        }
        Poll::Ready(match ready!(self.stream.poll_trailers(cx)) {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => self.ended(error),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

/// How long the peer says that a body is. That it says so once and truly is looked after by h2.
fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
