//! A client's connection of HTTP/2: each request is a task.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Error, Reason, RecvStream,
    server::{Builder, Connection, Handshake, SendResponse},
};
use hyper::{
    Request, Response, StatusCode,
    body::Body as _,
    header::{CONTENT_LENGTH, DATE, HeaderValue},
};
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::sleep,
};

use super::{
    connection::{Client, HEADER},
    counts::Refusal,
    request,
};
use crate::http2::{Incoming, pass};

/// Requests at a time.
const STREAMS: u32 = 128;
/// Requests that were reset before they were looked at (CVE-2023-44487): with one more the connection ends.
const RESETS: usize = 20;
/// Streams that we had to reset because of what was sent on them (CVE-2025-8671).
const FAULTS: usize = 128;
/// Bytes of bodies that a client may send ahead of a backend that does not read: in one request, and in all.
const WINDOWS: [u32; 2] = [256 << 10, 1 << 20];
/// Bytes of one answer that are held for a client who does not read.
const HELD: usize = 64 << 10;
/// How long a client that was answered before it sent all has to see that, until it is told that no more is wanted: there
/// are some (curl 7.88) that forget the answer when both come together.
const PAUSE: Duration = Duration::from_millis(250);

/// Serves a connection until it ends.
pub(super) struct Serving<T> {
    client: Arc<Client>,
    state: State<T>,
}

enum State<T> {
    /// The client has yet to say that it speaks HTTP/2.
    Begins(Handshake<T, Bytes>),
    Serves(Connection<T, Bytes>),
    /// It was to end before.
    Ended,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Serving<T> {
    pub(super) fn new(client: Arc<Client>, stream: T) -> Self {
        let mut builder = Builder::new();
        builder
            .max_concurrent_streams(STREAMS)
            // What is beyond that h2 answers with 431, too, but does not tell.
            .max_header_list_size(2 * HEADER)
            .max_pending_accept_reset_streams(RESETS)
            .max_local_error_reset_streams(Some(FAULTS))
            .initial_window_size(WINDOWS[0])
            .initial_connection_window_size(WINDOWS[1])
            .max_send_buffer_size(HELD);
        Self { client, state: State::Begins(builder.handshake(stream)) }
    }

    /// It takes no more requests, and ends when those that it has are answered.
    pub(super) fn graceful_shutdown(mut self: Pin<&mut Self>) {
        match &mut self.state {
            State::Serves(connection) => connection.graceful_shutdown(),
            before @ (State::Begins(_) | State::Ended) => *before = State::Ended,
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Future for Serving<T> {
    type Output = Result<(), Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        loop {
            let connection = match &mut self.state {
                State::Begins(handshake) => {
                    self.state = State::Serves(ready!(Pin::new(handshake).poll(context))?);
                    continue;
                }
                State::Serves(connection) => connection,
                State::Ended => return Poll::Ready(Ok(())),
            };
            match ready!(connection.poll_accept(context)) {
                Some(asked) => {
                    let (request, mut reply) = asked?;
                    if header(&request) > HEADER as usize {
                        self.client.counts().refuse(Refusal::TooLarge);
                        let mut answer = Response::new(());
                        *answer.status_mut() = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
                        if let Err(error) = reply.send_response(answer, true) {
                            log::debug!("an answer cannot be sent: {error}");
                        }
                        continue;
                    }
                    // Boxed, as tokio moves what it spawns, and all of it once more at its end.
                    tokio::spawn(Box::pin(respond(Arc::clone(&self.client), request, reply)));
                }
                None => return Poll::Ready(Ok(())),
            }
        }
    }
}

/// Length of a request's header, as RFC 9113 section 6.5.2 has it; of its target about.
fn header(request: &Request<RecvStream>) -> usize {
    let target = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    let fields = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 32);
    target + fields.sum::<usize>()
}

/// Answers a request, unless its client takes it back.
async fn respond(client: Arc<Client>, request: Request<RecvStream>, mut reply: SendResponse<Bytes>) {
    let (head, stream) = request.into_parts();
    let (request, received) = Incoming::request(&head.headers, stream);
    let answered = {
        let mut answer = pin!(request::answer(client, Request::from_parts(head, request)));
        let answered = poll_fn(|context| match answer.as_mut().poll(context) {
            Poll::Ready(Ok(answer)) => Poll::Ready(Some(answer)),
            Poll::Pending => reply.poll_reset(context).map(|_| None),
        });
        answered.await
    };
    let Some(answer) = answered else { return };
    let (mut head, body) = answer.into_parts();
    if !head.headers.contains_key(DATE) {
        // RFC 9110 section 6.6.1.
        let now = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now()).ok();
        let now = now.and_then(|now| HeaderValue::try_from(now).ok());
        now.into_iter().for_each(|now| drop(head.headers.insert(DATE, now)));
    }
    let whole = body.is_end_stream();
    if let Some(length) = body.size_hint().exact().filter(|_| !whole)
        && !head.headers.contains_key(CONTENT_LENGTH)
    {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    match reply.send_response(Response::from_parts(head, ()), whole) {
        Ok(stream) if !whole => pass(body, stream).await,
        Ok(_) => {}
        Err(error) => {
            log::debug!("an answer cannot be sent: {error}");
            reply.send_reset(Reason::INTERNAL_ERROR);
        }
    }
    if received.is_some_and(|received| !received.load(Relaxed)) {
        // With the last that holds the stream it is reset.
        sleep(PAUSE).await;
    }
}
