//! One check of an address.

use std::{
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::Empty;
use hyper::{Request, body::Bytes, header};
use hyper_util::rt::TokioIo;
use rustls::{client::Resumption, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use crate::{
    config::{Health, HttpCheck},
    discovery::probe::{self, Client, PROXY_LOCAL},
    reconcile::Unhealthy,
};

/// What is checked, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    /// The backend expects a PROXY header.
    pub(super) proxy: bool,
    pub(super) health: Health,
}

impl Target {
    pub(super) fn is(&self, address: SocketAddr, proxy: bool, health: &Health) -> bool {
        self.address == address && self.proxy == proxy && self.health == *health
    }
}

/// A client for all checks. It takes every certificate, and does each handshake in full.
pub(super) fn client() -> Result<Client, String> {
    let mut config = (*probe::client(rustls::ALL_VERSIONS)?).clone();
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// Nothing is wrong, or what is.
pub(super) async fn check(target: &Target, client: Client) -> Result<(), Unhealthy> {
    let patience = Duration::from_secs(u64::from(target.health.timeout));
    let late = || format!("no answer within {} s", target.health.timeout);
    let start = Instant::now();
    // Where no connection is made, nothing is there that the ones there were could go on with.
    let stream = match timeout(patience, TcpStream::connect(target.address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(Unhealthy { reason: said("connecting", &error), dead: true }),
        Err(_) => return Err(Unhealthy { reason: late(), dead: true }),
    };
    let left = patience.saturating_sub(start.elapsed());
    let answered = timeout(left, look(stream, target, client)).await.unwrap_or_else(|_| Err(late()));
    answered.map_err(|reason| Unhealthy { reason, dead: false })
}

async fn look(mut stream: TcpStream, target: &Target, client: Client) -> Result<(), String> {
    let Target { address, proxy, health } = target;
    if *proxy {
        stream.write_all(&PROXY_LOCAL).await.map_err(|error| said("writing", &error))?;
    }
    if !health.tls {
        return match &health.http {
            Some(http) => request(stream, target, http).await,
            None => Ok(()),
        };
    }
    let name = match &health.server_name {
        Some(name) => ServerName::try_from(name.clone()).map_err(|error| error.to_string())?,
        // Of an address, no name is sent.
        None => ServerName::from(address.ip()),
    };
    let stream = TlsConnector::from(client).connect(name, stream).await;
    let mut stream = stream.map_err(|error| said("TLS handshake", &error))?;
    match &health.http {
        Some(http) => request(stream, target, http).await,
        None => {
            // Whether the server hears the goodbye makes no difference.
            let _ = stream.shutdown().await;
            Ok(())
        }
    }
}

async fn request(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    target: &Target,
    http: &HttpCheck,
) -> Result<(), String> {
    let broken = |error: hyper::Error| format!("HTTP: {}", crate::one_line(&error));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let address = target.address.to_string();
    let host = http.host.as_ref().or(target.health.server_name.as_ref()).unwrap_or(&address);
    let request = Request::get(&http.path)
        .header(header::HOST, host)
        .header(header::USER_AGENT, "dispatcherd")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let mut answer = pin!(sender.send_request(request));
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        // Nothing more comes: it is here, or it is an error.
        _ = connection => answer.await,
    };
    let status = answer.map_err(broken)?.status().as_u16();
    if http.expect.iter().any(|range| range.contains(&status)) {
        Ok(())
    } else {
        Err(format!("status {status}"))
    }
}

fn said(doing: &str, error: &io::Error) -> String {
    let kind = error.kind();
    if kind == io::ErrorKind::ConnectionRefused {
        format!("{doing}: refused")
    } else if kind == io::ErrorKind::ConnectionReset {
        format!("{doing}: reset")
    } else {
        format!("{doing}: {error}")
    }
}
