//! How a client's connection ends.
//!
//! Linux answers with RST what arrives at a socket that is closed, and the client loses what it has not read yet: the
//! answer to an upload that still goes on, a TLS alert, the last answer before the daemon ends. So only what we send is
//! ended at first, and what comes is thrown away until the client ends too (RFC 9112 section 9.6).

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
    runtime::Handle,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;

use super::counts::Open;
use crate::state::Shared;

/// A client that sends nothing for so long has got what there was, or is gone.
pub(super) const QUIET: Duration = Duration::from_secs(5);
/// The same once the daemon ends: nobody is served meanwhile.
const QUIET_AT_END: Duration = Duration::from_millis(500);
/// A client that does not stop sending is waited for no longer.
pub(super) const LONGEST: Duration = Duration::from_secs(30);
/// What is thrown away at a time, bytes.
const PIECE: usize = 16 << 10;

/// What is spoken with a client, in clear or by TLS.
pub(super) type Spoken = Either<TcpStream, TlsStream<TcpStream>>;

/// A client's connection, which may be dropped at any time: it ends as above, and takes a client's place until then.
pub(super) struct Lingering(Option<Held>);

struct Held {
    stream: Spoken,
    /// We have ended.
    said: bool,
    /// The client has ended.
    over: bool,
    shared: Arc<Shared>,
    _open: Open,
}

impl Lingering {
    pub(super) fn new(stream: Spoken, shared: Arc<Shared>, open: Open) -> Self {
        Self(Some(Held { stream, said: false, over: false, shared, _open: open }))
    }

    /// Fails when the client has taken nothing of what there is for him for so long, be it that he vanished or does not read.
    pub(super) fn give_up_after(&self, time: Duration) {
        let Some(held) = &self.0 else { return };
        if let Err(error) = SockRef::from(held.socket()).set_tcp_user_timeout(Some(time)) {
            log::debug!("a client's connection: {error}");
        }
    }

    fn held(&mut self) -> io::Result<&mut Held> {
        // None only while it is dropped.
        self.0.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn stream(&mut self) -> io::Result<Pin<&mut Spoken>> {
        self.held().map(|held| Pin::new(&mut held.stream))
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        // Outside of a runtime there is nobody to wait.
        let waits = self.0.take().filter(|held| !(held.said && held.over));
        if let (Some(held), Ok(runtime)) = (waits, Handle::try_current()) {
            runtime.spawn(held.linger());
        }
    }
}

impl Held {
    fn socket(&self) -> &TcpStream {
        match &self.stream {
            Either::Left(clear) => clear,
            Either::Right(tls) => tls.get_ref().0,
        }
    }

    async fn linger(mut self) {
        let mut closing = self.shared.terminator.closing.subscribe();
        // TLS has a word for it, too (RFC 8446 section 6.1).
        if !self.said && !matches!(timeout(QUIET, self.stream.shutdown()).await, Ok(Ok(()))) {
            return;
        }
        let end = Instant::now() + LONGEST;
        while !self.over && Instant::now() < end {
            let quiet = if *closing.borrow() { QUIET_AT_END } else { QUIET };
            tokio::select! {
                read = timeout_at(end.min(Instant::now() + quiet), self.discard()) => match read {
                    Ok(Ok(count)) if count > 0 => {}
                    _ => return,
                },
                // The sender is as old as what we hold.
                _ = closing.changed() => {}
            }
        }
    }

    /// Reads once from the socket, whatever it is; how much that was.
    async fn discard(&mut self) -> io::Result<usize> {
        let socket = match &mut self.stream {
            Either::Left(clear) => clear,
            Either::Right(tls) => tls.get_mut().0,
        };
        poll_fn(|context| {
            let mut room = [MaybeUninit::uninit(); PIECE];
            let mut bytes = ReadBuf::uninit(&mut room);
            ready!(Pin::new(&mut *socket).poll_read(context, &mut bytes))?;
            Poll::Ready(Ok(bytes.filled().len()))
        })
        .await
    }
}

impl AsyncRead for Lingering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let held = self.held()?;
        let before = bytes.filled().len();
        let read = ready!(Pin::new(&mut held.stream).poll_read(context, bytes));
        held.over |= read.is_ok() && bytes.filled().len() == before && bytes.remaining() > 0;
        Poll::Ready(read)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.as_ref().is_some_and(|held| held.stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let held = self.held()?;
        let ended = ready!(Pin::new(&mut held.stream).poll_shutdown(context));
        held.said |= ended.is_ok();
        Poll::Ready(ended)
    }
}
