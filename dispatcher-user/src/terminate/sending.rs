//! Answers on their way to clients: one of which nothing is taken, or nothing comes, for too long lets go of its tunnel.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, Weak},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

use super::lock;
use crate::tunnels::BoxError;

/// The body of an answer: dropped when it was read, or is cut.
pub(super) struct Sending<B>(Arc<Mutex<Flow<B>>>);

struct Flow<B> {
    rest: Result<B, Cut>,
    /// Since when nobody has asked for the next piece, or the backend is waited for.
    since: Instant,
    /// Who waits for the backend.
    waits: Option<Waker>,
}

/// Why the rest of an answer is not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
enum Cut {
    #[error("the client took nothing for too long")]
    Untaken,
    #[error("the backend sent nothing for too long")]
    Stalled,
}

/// A body that is told why its rest is not sent.
pub(super) trait Told {
    fn cut(&mut self, why: &str);
}

/// The answers of one connection.
pub(super) struct Flows<B>(Mutex<Vec<Weak<Mutex<Flow<B>>>>>);

impl<B> Default for Flows<B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<B> Flows<B> {
    /// `now` is the present time, which the caller has asked for anyway.
    pub(super) fn follow(&self, body: B, now: Instant) -> Sending<B> {
        let flow = Flow { rest: Ok(body), since: now, waits: None };
        let flow = Arc::new(Mutex::new(flow));
        let mut all = lock(&self.0);
        if all.len() == all.capacity() {
            all.retain(|one| one.strong_count() > 0);
        }
        all.push(Arc::downgrade(&flow));
        Sending(flow)
    }

    /// Lets go of answers of which nothing was taken, or nothing came, for so long.
    pub(super) fn cut(&self, untaken: Duration, stalled: Duration)
    where
        B: Told,
    {
        lock(&self.0).retain(|one| {
            let Some(flow) = one.upgrade() else { return false };
            let mut flow = lock(&flow);
            let (limit, cut) = match flow.waits {
                None => (untaken, Cut::Untaken),
                Some(_) => (stalled, Cut::Stalled),
            };
            if flow.since.elapsed() >= limit {
                if let Ok(body) = &mut flow.rest {
                    body.cut(&cut.to_string());
                }
                flow.rest = Err(cut);
                flow.waits.take().into_iter().for_each(Waker::wake);
            }
            flow.rest.is_ok()
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
        let (polled, ended) = match &mut flow.rest {
            Ok(body) => (Pin::new(&mut *body).poll_frame(context), body.is_end_stream()),
            Err(cut) => return Poll::Ready(Some(Err((*cut).into()))),
        };
        if !ended && (polled.is_ready() || flow.waits.is_none()) {
            flow.since = Instant::now();
        }
        flow.waits = polled.is_pending().then(|| context.waker().clone());
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).rest.as_ref().is_ok_and(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).rest.as_ref().map(|body| body.size_hint()).unwrap_or_default()
    }
}
