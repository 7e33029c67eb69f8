//! TCP sockets with a chosen source address and a time limit for everything.

use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use socket2::{Domain, MaybeUninitSlice, MsgHdrMut, Protocol, SockAddr, SockRef, Socket, Type};

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

/// A UDP socket like that of [`datagrams`], for [`receive_marked`].
pub fn marked_datagrams(netns: &Netns, at: SocketAddr) -> io::Result<UdpSocket> {
    let socket = datagrams(netns, at)?;
    match at {
        SocketAddr::V4(_) => SockRef::from(&socket).set_recv_tos_v4(true)?,
        SocketAddr::V6(_) => SockRef::from(&socket).set_recv_tclass_v6(true)?,
    }
    Ok(socket)
}

/// Receives a datagram: from whom, and with which DSCP.
pub fn receive_marked(socket: &UdpSocket) -> io::Result<(SocketAddr, u8)> {
    let (mut content, mut control) = ([MaybeUninit::<u8>::uninit(); 2048], [MaybeUninit::new(0_u8); 64]);
    let mut from = SockAddr::from(SocketAddr::from(([0_u16; 8], 0)));
    let mut buffers = [MaybeUninitSlice::new(&mut content)];
    let mut message =
        MsgHdrMut::new().with_addr(&mut from).with_buffers(&mut buffers).with_control(&mut control);
    SockRef::from(socket).recvmsg(&mut message, 0)?;
    let length = message.control_len();
    let other = |what| io::Error::new(io::ErrorKind::InvalidData, what);
    let from = from.as_socket().ok_or_else(|| other("no address"))?;
    // SAFETY: all of it was initialised above.
    let control = control.map(|byte| unsafe { byte.assume_init() });
    // One control message: a head of 16 bytes, then the TOS in one byte, or the traffic class in a word.
    let tos = match (length, from) {
        (17.., SocketAddr::V4(_)) => control[16],
        (20.., SocketAddr::V6(_)) => {
            i32::from_ne_bytes([control[16], control[17], control[18], control[19]]) as u8
        }
        _ => return Err(other("no TOS")),
    };
    Ok((from, tos >> 2))
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
