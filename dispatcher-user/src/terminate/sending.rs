//! Answers on their way to clients: one of which nothing is taken for too long lets go of its tunnel.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, Weak},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::lock;
use crate::tunnels::BoxError;

/// The body of an answer: dropped when it was read, or is cut.
pub(super) struct Sending<B>(Arc<Mutex<Flow<B>>>);

struct Flow<B> {
    rest: Option<B>,
    /// Since when nobody has asked for the next piece; none while the backend is waited for.
    untaken: Option<Instant>,
}

/// The answers of one connection.
pub(super) struct Flows<B>(Mutex<Vec<Weak<Mutex<Flow<B>>>>>);

impl<B> Default for Flows<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B> Flows<B> {
    pub(super) fn follow(&self, body: B) -> Sending<B> {
        let flow = Flow { rest: Some(body), untaken: Some(Instant::now()) };
        let flow = Arc::new(Mutex::new(flow));
        let mut all = lock(&self.0);
        if all.len() == all.capacity() {
            all.retain(|one| one.strong_count() > 0);
        }
        all.push(Arc::downgrade(&flow));
        Sending(flow)
    }

    /// Lets go of answers of which nothing was taken for so long.
    pub(super) fn cut(&self, limit: Duration) {
        lock(&self.0).retain(|one| {
            let Some(flow) = one.upgrade() else { return false };
            let mut flow = lock(&flow);
            if flow.untaken.is_some_and(|since| since.elapsed() >= limit) {
                flow.rest = None;
            }
            flow.rest.is_some()
        });
    }
}

impl<B: hyper::body::Body<Data = Bytes, Error = BoxError> + Unpin> hyper::body::Body for Sending<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut flow = lock(&self.0);
        let Some(body) = &mut flow.rest else {
            return Poll::Ready(Some(Err("the client took nothing for too long".into())));
        };
        let polled = Pin::new(body).poll_frame(context);
        flow.untaken = polled.is_ready().then(Instant::now);
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).rest.as_ref().is_some_and(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).rest.as_ref().map(|body| body.size_hint()).unwrap_or_default()
    }
}
