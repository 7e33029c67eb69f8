//! The least that a proxy can do which is made of the same libraries as the daemon: `floor` beside the dispatcher in
//! `tunnels`. It ends TLS, passes requests on over connections to backends that are open already, and answers. It knows
//! no sessions, limits, timeouts, logs or counters; it adds no header, checks nothing and tries nothing twice. As the daemon
//! does, it lets requests of one HTTP/2 connection write together.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use dispatcher_user::{gather::gather, workers::processors};
use http_body_util::{BodyExt as _, Either, Full};
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::Incoming,
    client::conn::{http1, http2},
    header::{CONNECTION, HOST},
    http::uri::{Authority, Scheme},
    rt::Executor,
    server::conn,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

/// Where it listens, and for whom.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Address to listen at
    listen: SocketAddr,
    /// Addresses of backends
    #[arg(required = true)]
    backends: Vec<SocketAddr>,
    /// Its certificate
    #[arg(long)]
    certificate: PathBuf,
    /// Its key
    #[arg(long)]
    key: PathBuf,
    /// Who signed the backends' certificates
    #[arg(long)]
    roots: PathBuf,
    /// The name in them
    #[arg(long)]
    name: String,
    /// Connections to each backend
    #[arg(long)]
    established: usize,
    /// Speak HTTP/2 to backends
    #[arg(long)]
    http2: bool,
}

/// An answer as it is passed on: HTTP/1.1 as a whole, as its connection must be given back.
type Answer = Response<Either<Full<Bytes>, Incoming>>;

/// Open connections to one backend.
enum Pool {
    Http1 { idle: Mutex<Vec<http1::SendRequest<Incoming>>>, args: Arc<Args>, backend: SocketAddr },
    Http2 { senders: Vec<http2::SendRequest<Incoming>>, next: AtomicUsize },
}

/// Runs what hyper needs for HTTP/2. The first task is the one that reads and writes, and [gathers](gather).
#[derive(Clone, Default, Debug)]
struct Gathering(Arc<AtomicBool>);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Gathering {
    fn execute(&self, future: F) {
        if self.0.swap(true, Ordering::Relaxed) {
            tokio::spawn(future);
        } else {
            tokio::spawn(gather(future));
        }
    }
}

/// Serves until it is ended, on as many threads as the daemon does, each with connections to backends of its own.
pub fn run(args: &Args) -> Result<()> {
    let (threads, acceptor) = (processors(), acceptor(args)?);
    let (sender, receiver) = mpsc::channel();
    for _ in 0..threads {
        let (args, acceptor, sender) = (args.clone(), acceptor.clone(), sender.clone());
        thread::spawn(move || sender.send(work(args, threads, acceptor)));
    }
    // None ends but by an error.
    receiver.recv()?
}

fn work(args: Args, threads: usize, acceptor: TlsAcceptor) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(Arc::new(args), threads, acceptor))
}

async fn serve(args: Arc<Args>, threads: usize, acceptor: TlsAcceptor) -> Result<()> {
    let (mut pools, established) = (Vec::new(), args.established.div_ceil(threads));
    for backend in &args.backends {
        let pool = Pool::open(&args, *backend, established).await;
        pools.push(pool.with_context(|| format!("connecting to {backend}"))?);
    }
    let pools = Arc::new(pools);
    let socket = if args.listen.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseport(true)?;
    socket.bind(args.listen).with_context(|| format!("{}", args.listen))?;
    let listener = socket.listen(1024)?;
    for client in 0.. {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (pools, acceptor) = (Arc::clone(&pools), acceptor.clone());
        drop(tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let service = service_fn(|request| {
                let pools = Arc::clone(&pools);
                async move { Ok::<_, Infallible>(answer(&pools, client, request).await) }
            });
            let io = TokioIo::new(stream);
            // What is wrong with a connection shows at its client.
            if http2 {
                let connection =
                    conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service);
                drop(gather(connection).await);
            } else {
                drop(conn::http1::Builder::new().serve_connection(io, service).await);
            }
        }));
    }
    Ok(())
}

/// All requests of a client go to one backend.
async fn answer(pools: &[Pool], client: usize, request: Request<Incoming>) -> Answer {
    let sent = match pools.get(client % pools.len()) {
        Some(pool) => pool.send(request).await,
        None => None,
    };
    sent.unwrap_or_else(|| {
        let mut answer = Response::new(Either::Left(Full::default()));
        *answer.status_mut() = StatusCode::BAD_GATEWAY;
        answer
    })
}

impl Pool {
    async fn open(args: &Arc<Args>, backend: SocketAddr, established: usize) -> Result<Self> {
        if !args.http2 {
            let mut senders = Vec::new();
            for _ in 0..established {
                senders.push(open(args, backend).await?);
            }
            return Ok(Self::Http1 { idle: Mutex::new(senders), args: Arc::clone(args), backend });
        }
        let mut senders = Vec::new();
        for _ in 0..established {
            let io = connect(args, backend).await?;
            let (sender, connection) = http2::handshake(Gathering::default(), io).await?;
            tokio::spawn(connection);
            senders.push(sender);
        }
        Ok(Self::Http2 { senders, next: AtomicUsize::new(0) })
    }

    /// `None` if it fails.
    async fn send(&self, mut request: Request<Incoming>) -> Option<Answer> {
        // Of the client's connection only.
        request.headers_mut().remove(CONNECTION);
        match self {
            Self::Http1 { idle, args, backend } => {
                let idle = || idle.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(authority) = request.uri().authority().cloned() {
                    let path = request.uri().path_and_query().cloned()?;
                    *request.uri_mut() = path.into();
                    request.headers_mut().insert(HOST, authority.as_str().parse().ok()?);
                }
                *request.version_mut() = hyper::Version::HTTP_11;
                // Backends end connections, and a client who leaves takes the one with it on which its request was.
                let mut sender = loop {
                    let free = idle().pop();
                    let mut sender = match free {
                        Some(sender) => sender,
                        None => open(args, *backend).await.ok()?,
                    };
                    if sender.ready().await.is_ok() {
                        break sender;
                    }
                };
                let (head, body) = sender.send_request(request).await.ok()?.into_parts();
                let body = body.collect().await.ok()?.to_bytes();
                idle().push(sender);
                Some(Response::from_parts(head, Either::Left(Full::new(body))))
            }
            Self::Http2 { senders, next } => {
                if request.uri().authority().is_none() && request.method() != Method::CONNECT {
                    let host = request.headers_mut().remove(HOST)?;
                    let authority = Authority::try_from(host.as_bytes()).ok()?;
                    let mut parts = std::mem::take(request.uri_mut()).into_parts();
                    (parts.scheme, parts.authority) = (Some(Scheme::HTTPS), Some(authority));
                    *request.uri_mut() = Uri::from_parts(parts).ok()?;
                }
                *request.version_mut() = hyper::Version::HTTP_2;
                let at = next.fetch_add(1, Ordering::Relaxed) % senders.len();
                let mut sender = senders.get(at)?.clone();
                sender.ready().await.ok()?;
                Some(sender.send_request(request).await.ok()?.map(Either::Right))
            }
        }
    }
}

/// A connection of HTTP/1.1.
async fn open(args: &Args, backend: SocketAddr) -> Result<http1::SendRequest<Incoming>> {
    let (sender, connection) = http1::handshake(connect(args, backend).await?).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// An established TLS connection.
async fn connect(args: &Args, backend: SocketAddr) -> Result<TokioIo<TlsStream<TcpStream>>> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(&args.roots)? {
        roots.add(certificate?)?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![if args.http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
    let stream = TcpStream::connect(backend).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(args.name.clone())?;
    Ok(TokioIo::new(TlsConnector::from(Arc::new(config)).connect(name, stream).await?))
}

fn acceptor(args: &Args) -> Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(&args.certificate)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(&args.key)?;
    let builder = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder = builder.with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
