//! A client of HTTP/2 that writes its frames byte by byte (RFC 9113), so that they can be wrong.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use dispatcher_tests::{
    tls::{HOST, Line, User, Version},
    topology::Family,
};
use rustls::{ClientConnection, StreamOwned};

use crate::scene::{PORT, Scene};

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long an answer may take before it is none.
const SILENCE: Duration = Duration::from_secs(3);

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PUSH_PROMISE: u8 = 5;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

/// Of DATA and HEADERS; of SETTINGS and PING it is ACK.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const PADDED: u8 = 8;
pub(crate) const WITH_PRIORITY: u8 = 0x20;
/// A whole request in one HEADERS frame.
pub(crate) const WHOLE: u8 = END_STREAM | END_HEADERS;

pub(crate) const PROTOCOL_ERROR: u32 = 1;
pub(crate) const FLOW_CONTROL_ERROR: u32 = 3;
pub(crate) const STREAM_CLOSED: u32 = 5;
pub(crate) const FRAME_SIZE_ERROR: u32 = 6;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const COMPRESSION_ERROR: u32 = 9;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 11;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// What comes of something that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A response on the stream.
    Status(u16),
    /// The stream was reset, with this code.
    Reset(u32),
    /// The connection was ended, with this code.
    Goaway(u32),
    /// A PING was acknowledged.
    Pong,
    /// The connection was closed without a word.
    Closed,
    /// Nothing.
    Silence,
}

pub(crate) struct Frames {
    line: Line<StreamOwned<ClientConnection, TcpStream>>,
    /// Settings of the other side.
    pub(crate) settings: Vec<(u16, u32)>,
    /// It acknowledges nothing.
    mute: bool,
}

impl Frames {
    /// A connection on which nothing was said.
    pub(crate) fn silent(scene: &Scene) -> Self {
        let user = User::new(&scene.authority, Version::Tls13).expect("a user").with_protocol("h2");
        let (from, to) = (scene.topology.client(Family::V4, 0), SocketAddr::new(Family::V4.vip(), PORT));
        let mut line =
            user.connect(&scene.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(line.stream().conn.alpn_protocol(), Some(&b"h2"[..]));
        line.stream().sock.set_read_timeout(Some(SILENCE)).expect("a limit");
        Self { line, settings: Vec::new(), mute: false }
    }

    /// The same, who acknowledges nothing.
    pub(crate) fn mute(self) -> Self {
        Self { mute: true, ..self }
    }

    /// A connection on which requests can be sent.
    pub(crate) fn open(scene: &Scene) -> Self {
        let mut frames = Self::silent(scene);
        frames.write(PREFACE);
        frames.send(SETTINGS, 0, 0, &[]);
        // Its settings come before anything else.
        while frames.settings.is_empty() {
            assert!(frames.read().is_some(), "no settings");
        }
        frames
    }

    /// How long reading and writing may take from now on.
    pub(crate) fn patience(&mut self, limit: Duration) {
        let socket = &self.line.stream().sock;
        socket.set_read_timeout(Some(limit)).and(socket.set_write_timeout(Some(limit))).expect("a limit");
    }

    /// Writes bytes; whoever has closed the connection does not read them.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> bool {
        self.line.write_all(bytes).and_then(|()| self.line.flush()).is_ok()
    }

    pub(crate) fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.write(&frame(kind, flags, stream, payload));
    }

    /// Sends a request of which nothing more is to come.
    pub(crate) fn ask(&mut self, stream: u32, more: &[(&str, &str)]) {
        self.whole(stream, &request("GET", "/", more));
    }

    /// Sends a header of which nothing more is to come, in as many frames as it takes.
    pub(crate) fn whole(&mut self, stream: u32, block: &[u8]) {
        let mut pieces = block.chunks(16 << 10).enumerate().peekable();
        while let Some((number, piece)) = pieces.next() {
            let last = if pieces.peek().is_none() { END_HEADERS } else { 0 };
            let first = if number == 0 { END_STREAM } else { 0 };
            self.send(if number == 0 { HEADERS } else { CONTINUATION }, first | last, stream, piece);
        }
    }

    /// The next frame; none if nothing comes, or the connection was closed. Settings and pings are acknowledged.
    pub(crate) fn read(&mut self) -> Option<Frame> {
        self.next().ok()
    }

    fn next(&mut self) -> Result<Frame, End> {
        let broken = |error: std::io::Error| {
            let late = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            if late { End::Silence } else { End::Closed }
        };
        let mut head = [0; 9];
        self.line.read_exact(&mut head).map_err(broken)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        self.line.read_exact(&mut payload).map_err(broken)?;
        let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
        let frame = Frame { kind: head[3], flags: head[4], stream, payload };
        if self.mute || frame.flags & ACK != 0 {
            return Ok(frame);
        }
        if frame.kind == SETTINGS {
            self.settings.extend(frame.payload.chunks_exact(6).map(|one| {
                (u16::from_be_bytes([one[0], one[1]]), u32::from_be_bytes([one[2], one[3], one[4], one[5]]))
            }));
            self.send(SETTINGS, ACK, 0, &[]);
        } else if frame.kind == PING {
            self.send(PING, ACK, 0, &frame.payload);
        }
        Ok(frame)
    }

    /// What comes of a stream, or of the connection.
    pub(crate) fn end(&mut self, stream: u32) -> End {
        loop {
            let frame = match self.next() {
                Ok(frame) => frame,
                Err(end) => return end,
            };
            let code = |at: usize| {
                frame.payload.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
            };
            match frame.kind {
                HEADERS if frame.stream == stream => return End::Status(status(&frame.payload)),
                RST_STREAM if frame.stream == stream => return End::Reset(code(0)),
                // No error yet: a connection that is drained.
                GOAWAY if code(4) != 0 => return End::Goaway(code(4)),
                _ => {}
            }
        }
    }

    /// Is the connection alive after all that was sent?
    pub(crate) fn ping(&mut self) -> End {
        self.send(PING, 0, 0, b"are you?");
        loop {
            match self.next() {
                Ok(frame) if frame.kind == PING && frame.flags & ACK != 0 && frame.payload == b"are you?" => {
                    return End::Pong;
                }
                Ok(frame) if frame.kind == GOAWAY => {
                    let code =
                        frame.payload.get(4..8).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
                    if code != 0 {
                        return End::Goaway(code);
                    }
                }
                Ok(_) => {}
                Err(end) => return end,
            }
        }
    }
}

/// A frame's bytes.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A block of header fields: literals that are not indexed, with new names (RFC 7541 section 6.2.2).
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let text = |bytes: &mut Vec<u8>, text: &str| {
        // An integer with a prefix of 7 bits (section 5.1).
        match text.len() {
            short @ 0..127 => bytes.push(short as u8),
            long => {
                bytes.push(127);
                let mut rest = long - 127;
                while rest >= 128 {
                    bytes.push(rest as u8 | 128);
                    rest >>= 7;
                }
                bytes.push(rest as u8);
            }
        }
        bytes.extend(text.as_bytes());
    };
    for (name, value) in fields {
        bytes.push(0);
        text(&mut bytes, name);
        text(&mut bytes, value);
    }
    bytes
}

/// The block of a good request, with more fields.
pub(crate) fn request(method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let usual = [(":method", method), (":scheme", "https"), (":authority", HOST), (":path", path)];
    block(&[&usual[..], more].concat())
}

/// The status of a response: its first field (section 8.3.2), with an index or as a literal of three digits.
fn status(block: &[u8]) -> u16 {
    // Updates of the table's size come first.
    let block = &block[block.iter().take_while(|byte| **byte & 0xe0 == 0x20).count()..];
    match block {
        [index @ 0x88..=0x8e, ..] => [200, 204, 206, 304, 400, 404, 500][usize::from(index - 0x88)],
        [0x08 | 0x48, 0x03, digits @ ..] if digits.len() >= 3 => {
            String::from_utf8_lossy(&digits[..3]).parse().unwrap_or(0)
        }
        [0x08 | 0x48, coded @ ..] if coded.len() > 3 => {
            let bits = coded[1..4].iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << 8;
            let mut at = 0;
            // Digits in the code of appendix B: 0 to 2 have five bits, 3 to 9 six.
            (0..3).fold(0, |number, _| {
                let short = (bits << at) >> 27;
                let digit = if short < 3 {
                    at += 5;
                    short
                } else {
                    at += 6;
                    ((bits << (at - 6)) >> 26).wrapping_sub(25) + 3
                };
                number * 10 + digit as u16
            })
        }
        _ => panic!("no status at the start of {block:02x?}"),
    }
}
