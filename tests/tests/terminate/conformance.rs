//! HTTP/2 toward clients against RFC 9113 and RFC 7541, a row for each rule. docs/conformance.md has the same list.

use crate::{
    frames::{
        ACK, COMPRESSION_ERROR, CONTINUATION, DATA, END_HEADERS, END_STREAM, End, FLOW_CONTROL_ERROR,
        FRAME_SIZE_ERROR, Frames, GOAWAY, HEADERS, PADDED, PING, PREFACE, PRIORITY, PROTOCOL_ERROR,
        PUSH_PROMISE, RST_STREAM, SETTINGS, STREAM_CLOSED, WHOLE, WINDOW_UPDATE, WITH_PRIORITY, block, frame,
        request,
    },
    mirror::Manner,
    scene::{COOKIE, Scene},
};

/// What has to come of a case.
#[derive(Clone, Copy)]
enum Due {
    /// The connection ends, with this code if the code can be read; it may be closed without one.
    Connection(u32),
    /// The connection ends; where the RFC has this code, h2 has PROTOCOL_ERROR for all faults of a frame's form.
    Coarse(u32),
    /// The stream is reset, or the connection ends, with one of these codes.
    Stream(&'static [u32]),
    /// A response with this status.
    Status(u16),
    /// The connection goes on.
    Alive,
}

/// A case: section of RFC 9113, or of another one, and what it is about.
struct Row(&'static str, &'static str, fn(&mut Frames), Due);

fn get(frames: &mut Frames, stream: u32) {
    frames.ask(stream, &[]);
}

fn open(frames: &mut Frames, stream: u32) {
    frames.send(HEADERS, END_HEADERS, stream, &request("POST", "/", &[]));
}

const ROWS: &[Row] = &[
    Row(
        "3.4",
        "a preface that is wrong",
        |f| {
            f.write(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n");
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row("4.1", "a frame of an unknown kind is ignored", |f| f.send(0x16, 0xff, 0, b"12345678"), Due::Alive),
    Row("4.1", "flags that are not defined are ignored", |f| f.send(PING, 0x16, 0, b"12345678"), Due::Alive),
    Row("4.1", "the reserved bit is ignored", |f| f.send(PING, 0, 1 << 31, b"12345678"), Due::Alive),
    Row(
        "4.2",
        "DATA of more than SETTINGS_MAX_FRAME_SIZE",
        |f| {
            open(f, 1);
            f.send(DATA, END_STREAM, 1, &[0; 16_385]);
        },
        Due::Stream(&[FRAME_SIZE_ERROR]),
    ),
    Row(
        "4.2",
        "DATA of just that size",
        |f| {
            open(f, 1);
            f.send(DATA, END_STREAM, 1, &[0; 16_384]);
        },
        Due::Status(200),
    ),
    Row(
        "4.2",
        "HEADERS of more than that size",
        |f| f.send(HEADERS, WHOLE, 1, &[0; 16_385]),
        Due::Connection(FRAME_SIZE_ERROR),
    ),
    Row(
        "4.3",
        "a header block that cannot be decoded",
        |f| f.send(HEADERS, WHOLE, 1, &[0xff; 4]),
        Due::Coarse(COMPRESSION_ERROR),
    ),
    Row(
        "4.3",
        "a PRIORITY frame inside a header block",
        |f| {
            f.send(HEADERS, END_STREAM, 1, &request("GET", "/", &[]));
            f.send(PRIORITY, 0, 1, &[0, 0, 0, 0, 1]);
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "4.3",
        "HEADERS of another stream inside a header block",
        |f| {
            f.send(HEADERS, END_STREAM, 1, &request("GET", "/", &[]));
            get(f, 3);
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "5.1",
        "DATA on an idle stream",
        |f| f.send(DATA, END_STREAM, 1, b"x"),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "5.1",
        "RST_STREAM on an idle stream",
        |f| f.send(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "5.1",
        "WINDOW_UPDATE on an idle stream",
        |f| f.send(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 8]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "5.1",
        "CONTINUATION on an idle stream",
        |f| f.send(CONTINUATION, END_HEADERS, 1, &request("GET", "/", &[])),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "5.1",
        "DATA on a stream whose end was sent",
        |f| {
            f.send(HEADERS, WHOLE, 1, &request("GET", "/slow/300", &[]));
            f.send(DATA, END_STREAM, 1, b"x");
        },
        Due::Coarse(STREAM_CLOSED),
    ),
    Row(
        "5.1",
        "HEADERS on a stream whose end was sent",
        |f| {
            f.send(HEADERS, WHOLE, 1, &request("GET", "/slow/300", &[]));
            get(f, 1);
        },
        Due::Coarse(STREAM_CLOSED),
    ),
    Row(
        "5.1",
        "DATA on a stream that was reset",
        |f| {
            open(f, 1);
            f.send(RST_STREAM, 0, 1, &[0, 0, 0, 8]);
            f.send(DATA, END_STREAM, 1, b"x");
        },
        Due::Stream(&[STREAM_CLOSED]),
    ),
    Row("5.1.1", "a stream of an even number", |f| get(f, 2), Due::Connection(PROTOCOL_ERROR)),
    Row(
        "5.1.1",
        "a stream with a lower number than another",
        |f| {
            get(f, 5);
            get(f, 3);
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "5.3.1",
        "a stream that depends on itself (of RFC 7540: no error any more)",
        |f| {
            f.send(PRIORITY, 0, 1, &[0, 0, 0, 1, 1]);
            get(f, 1);
        },
        Due::Stream(&[PROTOCOL_ERROR]),
    ),
    Row("6.1", "DATA of stream 0", |f| f.send(DATA, END_STREAM, 0, b"x"), Due::Connection(PROTOCOL_ERROR)),
    Row(
        "6.1",
        "padding longer than DATA",
        |f| {
            open(f, 1);
            f.send(DATA, END_STREAM | PADDED, 1, b"\x09x");
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.1",
        "DATA with padding",
        |f| {
            open(f, 1);
            f.send(DATA, END_STREAM | PADDED, 1, b"\x02x\0\0");
        },
        Due::Status(200),
    ),
    Row("6.2", "HEADERS of stream 0", |f| get(f, 0), Due::Connection(PROTOCOL_ERROR)),
    Row(
        "6.2",
        "padding longer than HEADERS",
        |f| f.send(HEADERS, WHOLE | PADDED, 1, b"\x20x"),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.2",
        "HEADERS with a priority",
        |f| {
            let block = [&[0, 0, 0, 3, 9][..], &request("GET", "/", &[])].concat();
            f.send(HEADERS, WHOLE | WITH_PRIORITY, 1, &block);
        },
        Due::Status(200),
    ),
    Row(
        "6.3",
        "PRIORITY of stream 0",
        |f| f.send(PRIORITY, 0, 0, &[0, 0, 0, 0, 1]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.3",
        "PRIORITY of another length than 5",
        |f| {
            open(f, 1);
            f.send(PRIORITY, 0, 1, &[0; 4]);
        },
        Due::Coarse(FRAME_SIZE_ERROR),
    ),
    Row(
        "6.4",
        "RST_STREAM of stream 0",
        |f| f.send(RST_STREAM, 0, 0, &[0, 0, 0, 8]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.4",
        "RST_STREAM of another length than 4",
        |f| {
            open(f, 1);
            f.send(RST_STREAM, 0, 1, &[0; 3]);
        },
        Due::Coarse(FRAME_SIZE_ERROR),
    ),
    Row(
        "6.5",
        "an acknowledgement of SETTINGS with content",
        |f| f.send(SETTINGS, ACK, 0, &[0; 6]),
        Due::Coarse(FRAME_SIZE_ERROR),
    ),
    Row("6.5", "SETTINGS of a stream", |f| f.send(SETTINGS, 0, 1, &[]), Due::Connection(PROTOCOL_ERROR)),
    Row(
        "6.5",
        "SETTINGS of a length that no 6 divides",
        |f| f.send(SETTINGS, 0, 0, &[0; 3]),
        Due::Coarse(FRAME_SIZE_ERROR),
    ),
    Row(
        "6.5.2",
        "SETTINGS_ENABLE_PUSH neither 0 nor 1",
        |f| f.send(SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.5.2",
        "SETTINGS_INITIAL_WINDOW_SIZE over 2^31 - 1",
        |f| f.send(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0]),
        Due::Coarse(FLOW_CONTROL_ERROR),
    ),
    Row(
        "6.5.2",
        "SETTINGS_MAX_FRAME_SIZE under 2^14",
        |f| f.send(SETTINGS, 0, 0, &[0, 5, 0, 0, 0x3f, 0xff]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.5.2",
        "SETTINGS_MAX_FRAME_SIZE over 2^24 - 1",
        |f| f.send(SETTINGS, 0, 0, &[0, 5, 1, 0, 0, 0]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.5.2",
        "a setting that nobody knows is ignored",
        |f| f.send(SETTINGS, 0, 0, &[0, 0xff, 0, 0, 0, 1]),
        Due::Alive,
    ),
    Row(
        "6.6",
        "PUSH_PROMISE of a client",
        |f| {
            open(f, 1);
            f.send(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &request("GET", "/", &[])].concat());
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row("6.7", "PING of a stream", |f| f.send(PING, 0, 1, b"12345678"), Due::Connection(PROTOCOL_ERROR)),
    Row(
        "6.7",
        "PING of another length than 8",
        |f| f.send(PING, 0, 0, b"123456"),
        Due::Coarse(FRAME_SIZE_ERROR),
    ),
    Row(
        "6.7",
        "an acknowledgement of PING is not answered",
        |f| f.send(PING, ACK, 0, b"unasked!"),
        Due::Alive,
    ),
    Row("6.8", "GOAWAY of a stream", |f| f.send(GOAWAY, 0, 1, &[0; 8]), Due::Connection(PROTOCOL_ERROR)),
    Row(
        "6.9",
        "WINDOW_UPDATE by 0 for the connection",
        |f| f.send(WINDOW_UPDATE, 0, 0, &[0; 4]),
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.9",
        "WINDOW_UPDATE by 0 for a stream",
        |f| {
            open(f, 1);
            f.send(WINDOW_UPDATE, 0, 1, &[0; 4]);
        },
        Due::Stream(&[PROTOCOL_ERROR]),
    ),
    Row(
        "6.9",
        "WINDOW_UPDATE of another length than 4",
        |f| f.send(WINDOW_UPDATE, 0, 0, &[0; 3]),
        Due::Coarse(FRAME_SIZE_ERROR),
    ),
    Row(
        "6.9.1",
        "a connection's window over 2^31 - 1",
        |f| {
            for _ in 0..2 {
                f.send(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]);
            }
        },
        Due::Connection(FLOW_CONTROL_ERROR),
    ),
    Row(
        "6.9.1",
        "a stream's window over 2^31 - 1",
        |f| {
            open(f, 1);
            for _ in 0..2 {
                f.send(WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]);
            }
        },
        Due::Stream(&[FLOW_CONTROL_ERROR]),
    ),
    Row(
        "6.9.1",
        "no body before a window is open",
        |f| {
            f.send(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
            get(f, 1);
        },
        Due::Status(200),
    ),
    Row(
        "6.10",
        "CONTINUATION after a header's end",
        |f| {
            get(f, 1);
            f.send(CONTINUATION, END_HEADERS, 1, &block(&[("a", "b")]));
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.10",
        "CONTINUATION of stream 0",
        |f| {
            f.send(HEADERS, END_STREAM, 1, &request("GET", "/", &[]));
            f.send(CONTINUATION, END_HEADERS, 0, &[]);
        },
        Due::Connection(PROTOCOL_ERROR),
    ),
    Row(
        "6.10",
        "a header in three pieces",
        |f| {
            let block = request("GET", "/", &[("a", "b")]);
            f.send(HEADERS, END_STREAM, 1, &block[..5]);
            f.send(CONTINUATION, 0, 1, &block[5..9]);
            f.send(CONTINUATION, END_HEADERS, 1, &block[9..]);
        },
        Due::Status(200),
    ),
    Row(
        "8.1",
        "a second HEADERS that does not end the stream",
        |f| {
            open(f, 1);
            f.send(HEADERS, END_HEADERS, 1, &block(&[("a", "b")]));
        },
        Due::Stream(&[PROTOCOL_ERROR]),
    ),
    Row(
        "8.1",
        "pseudo-header fields in trailers (malformed by the RFC; h2 leaves them out)",
        |f| {
            open(f, 1);
            f.send(HEADERS, WHOLE, 1, &block(&[(":method", "GET")]));
        },
        Due::Status(200),
    ),
    Row(
        "8.1",
        "an answer before the request's end",
        |f| {
            f.send(HEADERS, END_HEADERS, 1, &request("CONNECT", "/", &[]));
        },
        Due::Stream(&[PROTOCOL_ERROR]),
    ),
    Row(
        "RFC 7541 2.3.3",
        "an index that is in no table",
        |f| f.send(HEADERS, WHOLE, 1, &[&request("GET", "/", &[])[..], &[0xff, 0x80, 0x01]].concat()),
        Due::Coarse(COMPRESSION_ERROR),
    ),
    Row(
        "RFC 7541 6.1",
        "index 0",
        |f| f.send(HEADERS, WHOLE, 1, &[&request("GET", "/", &[])[..], &[0x80]].concat()),
        Due::Coarse(COMPRESSION_ERROR),
    ),
    Row(
        "RFC 7541 4.2",
        "a table's size changed at a block's end",
        |f| f.send(HEADERS, WHOLE, 1, &[&request("GET", "/", &[])[..], &[0x21]].concat()),
        Due::Coarse(COMPRESSION_ERROR),
    ),
    Row(
        "RFC 7541 6.3",
        "a table larger than was allowed",
        |f| f.send(HEADERS, WHOLE, 1, &[&[0x3f, 0xe2, 0x1f][..], &request("GET", "/", &[])].concat()),
        Due::Coarse(COMPRESSION_ERROR),
    ),
    Row(
        "RFC 7541 5.2",
        "a string that is cut short",
        |f| f.send(HEADERS, WHOLE, 1, &[&request("GET", "/", &[])[..], &[0, 9, b'x']].concat()),
        Due::Coarse(COMPRESSION_ERROR),
    ),
    Row(
        "RFC 7541 5.2",
        "a code with EOS in it",
        |f| {
            f.send(
                HEADERS,
                WHOLE,
                1,
                &[&request("GET", "/", &[])[..], &[0, 1, b'x', 0x84, 0xff, 0xff, 0xff, 0xff]].concat(),
            )
        },
        Due::Coarse(COMPRESSION_ERROR),
    ),
];

/// What comes after all that is to be passed over.
fn after(frames: &mut Frames, passed: fn(End) -> bool) -> End {
    loop {
        let end = frames.end(1);
        if !passed(end) {
            return end;
        }
    }
}

#[test]
fn http2_is_as_the_rfc_has_it() {
    let scene = Scene::mirrors(Manner::HTTP2, &[COOKIE]);
    let mut problems = Vec::new();
    for Row(section, what, send, due) in ROWS {
        // A wrong preface is said instead of the good one.
        let mut frames = if *section == "3.4" { Frames::silent(&scene) } else { Frames::open(&scene) };
        send(&mut frames);
        let (end, good) = match due {
            Due::Alive => {
                let end = frames.ping();
                (end, end == End::Pong)
            }
            Due::Status(status) => {
                let end = frames.end(1);
                (end, end == End::Status(*status))
            }
            Due::Connection(code) => {
                let end = after(&mut frames, |end| matches!(end, End::Status(_) | End::Reset(_)));
                (end, matches!(end, End::Goaway(found) if found == *code) || end == End::Closed)
            }
            Due::Coarse(code) => {
                let end = after(&mut frames, |end| matches!(end, End::Status(_)));
                (end, end == End::Goaway(PROTOCOL_ERROR) || end == End::Goaway(*code))
            }
            Due::Stream(codes) => {
                let end = after(&mut frames, |end| matches!(end, End::Status(_)));
                (
                    end,
                    matches!(end, End::Reset(found) | End::Goaway(found) if codes.contains(&found))
                        || end == End::Closed,
                )
            }
        };
        if !good {
            problems.push(format!("{section}: {what}: {end:?}"));
        }
    }
    assert_eq!(problems, [""; 0]);
    // All that came of it is past.
    let mut frames = Frames::silent(&scene);
    frames.write(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat());
    assert_eq!(frames.ping(), End::Pong);
}

#[test]
fn the_list_in_the_docs_is_this_one() {
    let text = include_str!("../../../docs/conformance.md");
    let lines = text.lines().filter_map(|line| line.strip_prefix("| ")).skip(1);
    let listed: Vec<_> = lines.filter_map(|line| line.split_once(" | ")).collect();
    let same = |((section, rest), Row(own, what, ..)): (&(&str, &str), &Row)| {
        section == own && rest.starts_with(&format!("{what} | "))
    };
    let different = listed.iter().zip(ROWS).find(|both| !same((both.0, both.1)));
    assert!(different.is_none(), "{:?}", different.map(|(line, _)| line));
    assert_eq!(listed.len(), ROWS.len());
}
