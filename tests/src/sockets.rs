//! TCP sockets with a chosen source address and a time limit for everything.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// No step of a test takes as long as this.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Connects from an address inside a namespace.
pub fn connect(netns: &Netns, from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    connect_from(netns, SocketAddr::new(from, 0), to)
}

/// Connects from an address and port (0 for any) inside a namespace.
pub fn connect_from(netns: &Netns, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    open(netns.run(|| unconnected(to))?, from, to)
}

/// Connects from an address in the namespace of this thread.
pub fn connect_here(from: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    open(unconnected(to)?, SocketAddr::new(from, 0), to)
}

fn unconnected(to: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))
}

fn open(socket: Socket, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    socket.set_reuse_address(from.port() != 0)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let stream = TcpStream::from(socket);
    limit(&stream)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Listens on a port of a namespace, on all addresses of both families.
pub fn listen(netns: &Netns, port: u16) -> io::Result<TcpListener> {
    let listen = || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(([0_u16; 8], port)).into())?;
        socket.listen(1024)?;
        Ok::<TcpListener, io::Error>(socket.into())
    };
    // A child that another test has just forked may have a listener that was closed here, until it becomes another
    // program.
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match netns.run(listen) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// A UDP socket on an address of a namespace.
pub fn datagrams(netns: &Netns, at: SocketAddr) -> io::Result<UdpSocket> {
    let socket = netns.run(|| UdpSocket::bind(at))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Lets no read or write wait longer than [`PATIENCE`].
pub fn limit(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

/// Closes with RST instead of FIN.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    Socket::from(stream).set_linger(Some(Duration::ZERO))
}
