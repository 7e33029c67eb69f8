//! One look at a backend: TLS connections that get tickets and come back with them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use dispatcher_common::tls;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, SignatureScheme,
    SupportedProtocolVersion,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_util::either::Either;

use crate::tunnels::{Preference, Tunnels};

/// For a connection and its handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// For a ticket after the handshake (TLS 1.3): servers send it at once.
const TICKET_PATIENCE: Duration = Duration::from_millis(500);

/// A PROXY protocol v2 header that says: no client, it is the proxy itself (specification section 2.2).
pub(crate) const PROXY_LOCAL: [u8; 16] =
    [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x20, 0, 0, 0];

/// Whom to look at.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) address: SocketAddr,
    /// It is reached through a tunnel to this backend.
    pub(super) tunnel: Option<(Arc<Tunnels>, u32)>,
    /// The name to ask for.
    pub(super) server_name: Option<String>,
    /// The backend expects a PROXY header.
    pub(super) proxy: bool,
}

/// A client that keeps the sessions it is given.
pub(crate) type Client = Arc<ClientConfig>;

/// A client that speaks these versions.
pub(crate) fn client(versions: &[&'static SupportedProtocolVersion]) -> Result<Client, String> {
    let provider = Arc::new(ring::default_provider());
    let any = Arc::new(Any { algorithms: provider.signature_verification_algorithms });
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(any)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// What a connection was like.
pub(super) struct Seen {
    /// The ticket in our hello; empty for none.
    pub(super) ticket: Vec<u8>,
    /// The server resumed the session.
    pub(super) resumed: bool,
}

/// One connection, with whatever session the client has for the name.
pub(super) async fn connect(target: &Target, client: &Client) -> Result<Seen, String> {
    let work = async {
        let name = match &target.server_name {
            Some(name) => ServerName::try_from(name.clone()).map_err(|error| error.to_string())?,
            // Of an address, no name is sent.
            None => ServerName::from(target.address.ip()),
        };
        let mut stream = match &target.tunnel {
            None => {
                let stream = TcpStream::connect(target.address).await;
                Either::Left(stream.map_err(|error| format!("connecting: {error}"))?)
            }
            Some((tunnels, backend)) => {
                let lease = tunnels
                    .wait(*backend, Preference::Any, PATIENCE)
                    .await
                    .map_err(|error| error.to_string())?;
                Either::Right(lease.stream().await.ok_or("the tunnel ended")?)
            }
        };
        if target.proxy {
            stream.write_all(&PROXY_LOCAL).await.map_err(|error| format!("writing: {error}"))?;
        }
        talk(&mut stream, client, name).await
    };
    timeout(PATIENCE, work).await.unwrap_or_else(|_| Err("no answer within 5 s".to_owned()))
}

async fn talk(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    client: &Client,
    name: ServerName<'static>,
) -> Result<Seen, String> {
    let mut tls = ClientConnection::new(Arc::clone(client), name).map_err(|error| error.to_string())?;
    let mut hello = Vec::new();
    tls.write_tls(&mut hello).map_err(|error| error.to_string())?;
    let ticket = ticket_of(&hello);
    send(stream, &hello).await?;
    while tls.is_handshaking() {
        receive(stream, &mut tls).await?;
    }
    let tls13 = tls.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3);
    if tls13 {
        // A server that has none to give says nothing.
        let _ = timeout(TICKET_PATIENCE, async {
            while tls.tls13_tickets_received() == 0 && receive(stream, &mut tls).await.is_ok() {}
        })
        .await;
    }
    let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
    tls.send_close_notify();
    let mut goodbye = Vec::new();
    if tls.write_tls(&mut goodbye).is_ok() {
        // Whether the server hears it makes no difference.
        let _ = send(stream, &goodbye).await;
    }
    Ok(Seen { ticket, resumed })
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), String> {
    let sent = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    sent.await.map_err(|error| format!("writing: {error}"))
}

async fn receive(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    tls: &mut ClientConnection,
) -> Result<(), String> {
    let mut bytes = [0; 4096];
    let len = stream.read(&mut bytes).await.map_err(|error| format!("reading: {error}"))?;
    if len == 0 {
        return Err("the server closed the connection during the handshake".to_owned());
    }
    let mut rest = bytes.get(..len).unwrap_or_default();
    while !rest.is_empty() {
        tls.read_tls(&mut rest).map_err(|error| error.to_string())?;
        let state = tls.process_new_packets();
        let mut answer = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut answer).map_err(|error| error.to_string())?;
        }
        send(stream, &answer).await?;
        state.map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// The ticket in a hello, read as the data path reads it.
fn ticket_of(hello: &[u8]) -> Vec<u8> {
    let mut message = vec![0; hello.len()];
    let len = tls::join_records(hello, hello.len(), |from, to, len| {
        let (Some(source), Some(target)) = (hello.get(from..from + len), message.get_mut(to..to + len))
        else {
            return false;
        };
        target.copy_from_slice(source);
        true
    });
    message.truncate(len);
    let mut found = tls::ClientHello::default();
    if message.is_empty() || !tls::client_hello(message.as_slice(), &mut found) {
        return Vec::new();
    }
    let span = if found.psk.len != 0 { found.psk } else { found.ticket };
    span.of(&message).to_vec()
}

/// Takes every certificate. A look sends no secret and believes nothing but which tickets a backend's
/// address accepts; whoever can answer in a backend's place gets its connections anyway.
#[derive(Debug)]
struct Any {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
