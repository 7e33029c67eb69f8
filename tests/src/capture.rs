//! Captures made by hand: connections as frames, and pcap files of frames.

use std::{net::SocketAddr, path::Path};

use anyhow::{Context as _, Result};

use crate::packet::{Body, Packet, Tcp, TcpOption, flags};

/// Link type of Ethernet in a pcap file.
pub const ETHERNET: u32 = 1;

/// The bytes of a pcap file (little endian, microseconds).
#[must_use]
pub fn pcap<F: AsRef<[u8]>>(link: u32, frames: &[F]) -> Vec<u8> {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let mut out = words(&[0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, link]);
    for (second, frame) in (0..).zip(frames) {
        let frame = frame.as_ref();
        let len = frame.len() as u32;
        out.extend(words(&[second, 0, len, len]));
        out.extend(frame);
    }
    out
}

/// Writes a pcap file of Ethernet frames.
pub fn write<F: AsRef<[u8]>>(path: &Path, frames: &[F]) -> Result<()> {
    std::fs::write(path, pcap(ETHERNET, frames)).with_context(|| format!("writing {}", path.display()))
}

/// A connection between a client and a server, as a capture without the dispatcher shows it.
#[derive(Clone, Debug)]
pub struct Scene {
    /// The client.
    pub client: SocketAddr,
    /// The server.
    pub server: SocketAddr,
    /// Initial sequence numbers of client and server.
    pub isns: [u32; 2],
    /// Stream bytes that each has sent.
    pub sent: [u32; 2],
    /// VLAN tags.
    pub tags: Vec<[u8; 4]>,
    /// What was sent so far.
    pub packets: Vec<Packet>,
    /// The last TSval of each.
    pub clocks: [u32; 2],
}

impl Scene {
    /// A connection of which nothing was sent.
    #[must_use]
    pub fn new(client: SocketAddr, server: SocketAddr) -> Self {
        let isns = [0x1000_0000 + u32::from(client.port()), 0xffff_ff00];
        let (clocks, sent) = ([5000, 900_000], [0; 2]);
        Self { client, server, isns, sent, tags: Vec::new(), packets: Vec::new(), clocks }
    }

    /// The handshake: SYN, SYN-ACK, ACK.
    #[must_use]
    pub fn open(mut self) -> Self {
        let head = |val, ecr| {
            let stamps = TcpOption::Timestamps(val, ecr);
            vec![TcpOption::Mss(1460), TcpOption::SackPermitted, stamps, TcpOption::Nop, TcpOption::Wscale(7)]
        };
        let [client, server] = self.clocks;
        let [isn, far_isn] = self.isns;
        self.push(0, Tcp { seq: isn, flags: flags::SYN, options: head(client, 0), ..Tcp::default() });
        let both = flags::SYN | flags::ACK;
        let ack = isn.wrapping_add(1);
        let options = head(server, client);
        self.push(1, Tcp { seq: far_isn, ack, flags: both, options, ..Tcp::default() });
        self.segment(0, flags::ACK, &[]);
        self
    }

    /// The client sends.
    #[must_use]
    pub fn says(mut self, payload: &[u8]) -> Self {
        self.segment(0, flags::ACK | flags::PSH, payload);
        self
    }

    /// The server sends.
    #[must_use]
    pub fn answers(mut self, payload: &[u8]) -> Self {
        self.segment(1, flags::ACK | flags::PSH, payload);
        self
    }

    /// Both end.
    #[must_use]
    pub fn close(mut self) -> Self {
        for side in [0, 1] {
            self.segment(side, flags::ACK | flags::FIN, &[]);
            self.sent[side] += 1;
        }
        self.segment(0, flags::ACK, &[]);
        self
    }

    /// A segment of the client (side 0) or the server (side 1).
    pub fn segment(&mut self, side: usize, flags: u8, payload: &[u8]) {
        let other = 1 - side;
        self.clocks[side] += 1;
        let stamps = TcpOption::Timestamps(self.clocks[side], self.clocks[other]);
        let tcp = Tcp {
            seq: self.isns[side].wrapping_add(1).wrapping_add(self.sent[side]),
            ack: self.isns[other].wrapping_add(1).wrapping_add(self.sent[other]),
            flags,
            options: vec![TcpOption::Nop, TcpOption::Nop, stamps],
            payload: payload.to_vec(),
            ..Tcp::default()
        };
        self.push(side, tcp);
        self.sent[side] += payload.len() as u32;
    }

    fn push(&mut self, side: usize, tcp: Tcp) {
        let mut ends = [self.client, self.server];
        ends.rotate_left(side);
        let [from, to] = ends;
        let tcp = Tcp { src: from.port(), dst: to.port(), window: 500, ..tcp };
        let mut packet = Packet::new(from.ip(), to.ip(), Body::Tcp(tcp));
        packet.macs.rotate_left(side);
        packet.tags.clone_from(&self.tags);
        self.packets.push(packet);
    }

    /// The frames.
    #[must_use]
    pub fn frames(&self) -> Vec<Vec<u8>> {
        self.packets.iter().map(Packet::frame).collect()
    }
}
