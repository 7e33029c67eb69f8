//! What is left of a request's body over HTTP/1.1 when nobody wants more of it.
//!
//! The next request of the connection comes behind it. So it is read and thrown away, for a while: if it does not end, the
//! connection does.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::{
    Request,
    body::{Body, Frame, Incoming, SizeHint},
    header::EXPECT,
};
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};

use super::lingering::{LONGEST, QUIET};

/// A request's body, which is drained if it is dropped before its end.
pub(super) struct Draining {
    /// None once it is dropped, and where there is none.
    body: Option<Incoming>,
    /// The client sends it without being asked, or was asked.
    comes: bool,
}

impl Draining {
    pub(super) fn wrap(request: Request<Incoming>) -> Request<Self> {
        let comes = !request.headers().contains_key(EXPECT);
        request.map(|body| Self { body: Some(body).filter(|body| !body.is_end_stream()), comes })
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        // A client that was not told to go on does not send it, or sends it nevertheless: nobody can tell.
        let Some(body) = self.body.take().filter(|body| self.comes && !body.is_end_stream()) else { return };
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(drain(body));
        }
    }
}

async fn drain(mut body: Incoming) {
    let end = Instant::now() + LONGEST;
    while let Ok(Some(Ok(_))) = timeout_at(end.min(Instant::now() + QUIET), body.frame()).await {}
}

impl Body for Draining {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.comes = true;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}
