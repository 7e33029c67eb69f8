//! Packets become flows: who is the client, and which packets are whose.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
};

use dispatcher_common::tls::{Scan, scan_client_hello};

use super::{
    capture::Packet,
    frame::{self, Ends, Parsed, Sum, TCP, UDP},
    hello,
};
use crate::config::Config;

/// Bytes of a stream that are looked at.
const STREAM_MAX: usize = 16_384;

/// A connection, or packets that have no ports.
#[derive(Debug)]
pub(super) struct Flow {
    /// Whose.
    pub(super) who: Who,
    /// Its packets by their index in the capture.
    pub(super) packets: Vec<usize>,
    /// The client's initial sequence number, where the capture has its SYN.
    pub(super) isn: Option<u32>,
    /// Index of the server's SYN-ACK.
    pub(super) syn_ack: Option<usize>,
    /// Place of its service in the configuration.
    pub(super) service: Option<usize>,
}

/// Whose a packet is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Who {
    /// TCP or UDP.
    Ports {
        /// Protocol number.
        proto: u8,
        /// The client.
        client: SocketAddr,
        /// The server, or the VIP.
        server: SocketAddr,
    },
    /// Another protocol, or fragments.
    Addresses(Ends),
    /// No IP.
    Frame,
}

/// All flows, by their first packet.
#[derive(Debug, Default)]
pub(super) struct Flows {
    /// The flows.
    pub(super) flows: Vec<Flow>,
    /// Of each packet of the capture: the index of its flow.
    pub(super) of_packet: Vec<usize>,
    /// Of each packet of the capture: what stands where, if it has ports.
    pub(super) parsed: Vec<Option<Parsed>>,
    /// Senders of TCP segments whose checksums are all unfinished or wrong.
    offloaded: BTreeMap<IpAddr, bool>,
}

/// Services by VIP and protocol.
pub(super) type Vips = HashMap<(SocketAddr, u8), usize>;

/// The VIPs of a configuration.
pub(super) fn vips(config: &Config) -> Vips {
    let services = config.services.iter().enumerate();
    services
        .flat_map(|(index, one)| one.published().map(move |vip| ((vip, one.protocol.number()), index)))
        .collect()
}

impl Flows {
    /// Sorts packets into flows.
    pub(super) fn new(packets: &[Packet]) -> Self {
        let mut all = Self {
            parsed: packets.iter().map(|packet| frame::parse(&packet.frame, packet.cut)).collect(),
            ..Self::default()
        };
        all.look_at_sums(packets);
        let mut open: HashMap<(SocketAddr, SocketAddr, u8), usize> = HashMap::new();
        let mut others: BTreeMap<Option<Ends>, usize> = BTreeMap::new();
        for (index, packet) in packets.iter().enumerate() {
            let flow = match &all.parsed[index] {
                Some(parsed) => {
                    let (a, b) = (parsed.src.min(parsed.dst), parsed.src.max(parsed.dst));
                    let known = open.get(&(a, b, parsed.proto)).copied();
                    let same = known.filter(|flow| !begins_anew(&all.flows[*flow], parsed));
                    let flow = same.unwrap_or(all.flows.len());
                    open.insert((a, b, parsed.proto), flow);
                    flow
                }
                None => {
                    let ends = frame::ends(&packet.frame);
                    *others.entry(ends).or_insert(all.flows.len())
                }
            };
            all.take(index, flow, packet);
        }
        for flow in 0..all.flows.len() {
            all.settle(flow, packets);
        }
        all
    }

    /// Notes a packet in its flow, which may be a new one.
    fn take(&mut self, index: usize, flow: usize, packet: &Packet) {
        let parsed = self.parsed[index].as_ref();
        if flow == self.flows.len() {
            let who = match (parsed, frame::ends(&packet.frame)) {
                (Some(one), _) => Who::Ports { proto: one.proto, client: one.src, server: one.dst },
                (None, Some(ends)) => Who::Addresses(ends),
                (None, None) => Who::Frame,
            };
            self.flows.push(Flow { who, packets: Vec::new(), isn: None, syn_ack: None, service: None });
        }
        self.of_packet.push(flow);
        let flow = &mut self.flows[flow];
        flow.packets.push(index);
        if let Some(parsed) = parsed.filter(|one| one.proto == TCP) {
            if parsed.tcp.is_syn() && flow.isn.is_none() {
                flow.isn = Some(parsed.tcp.seq);
            }
            if parsed.tcp.is_syn_ack() && parsed.whole && flow.syn_ack.is_none() {
                flow.syn_ack = Some(index);
            }
        }
    }

    /// Finds out who is the client: who sent the SYN, did not send the SYN-ACK, sent a ClientHello; else
    /// who has the higher port, or of UDP who was first.
    fn settle(&mut self, flow: usize, packets: &[Packet]) {
        let Flow { who, packets: own, .. } = &self.flows[flow];
        let Who::Ports { proto: TCP, client, server } = who else { return };
        let segments =
            || own.iter().filter_map(|index| Some((self.parsed[*index].as_ref()?, &packets[*index].frame)));
        let by_syn = segments().find(|(one, _)| one.tcp.is_syn()).map(|(one, _)| one.src);
        let by_syn_ack = || segments().find(|(one, _)| one.tcp.is_syn_ack()).map(|(one, _)| one.dst);
        let by_hello = || {
            let hello = |(one, frame): &(&Parsed, &Vec<u8>)| {
                let payload = one.payload(frame);
                payload.len() > 5 && scan_client_hello(payload) != Scan::NotTls
            };
            segments().find(hello).map(|(one, _)| one.src)
        };
        let by_port = || if client.port() < server.port() { *server } else { *client };
        let found = by_syn.or_else(by_syn_ack).or_else(by_hello).unwrap_or_else(by_port);
        self.turn(flow, found);
    }

    fn turn(&mut self, flow: usize, to: SocketAddr) {
        if let Who::Ports { client, server, .. } = &mut self.flows[flow].who
            && *client != to
        {
            std::mem::swap(client, server);
        }
    }

    /// Finds the flows' services. Who talks to a VIP is its client.
    pub(super) fn find_services(&mut self, vips: &Vips) {
        for index in 0..self.flows.len() {
            let Who::Ports { proto, client, server } = self.flows[index].who else { continue };
            let service = vips.get(&(server, proto));
            if service.is_none() && vips.contains_key(&(client, proto)) && self.flows[index].isn.is_none() {
                self.turn(index, server);
            }
            let Who::Ports { server, .. } = self.flows[index].who else { continue };
            self.flows[index].service = vips.get(&(server, proto)).copied();
        }
    }

    /// The first bytes that one side sends, as far as the capture has them.
    pub(super) fn stream(&self, flow: &Flow, packets: &[Packet], from: SocketAddr) -> Vec<u8> {
        let sent = |index: &&usize| self.parsed[**index].as_ref().is_some_and(|one| one.src == from);
        let segments: Vec<(&Parsed, &[u8])> = flow
            .packets
            .iter()
            .filter(sent)
            .filter_map(|index| {
                let parsed = self.parsed[*index].as_ref()?;
                Some((parsed, parsed.payload(&packets[*index].frame)))
            })
            .collect();
        let Some((first, payload)) = segments.first() else { return Vec::new() };
        if first.proto == UDP {
            return payload.to_vec();
        }
        // A SYN takes a number; without one the stream begins with the first segment.
        let syn = segments.iter().find(|(one, _)| one.tcp.is_syn() || one.tcp.is_syn_ack());
        let start = syn.map_or(first.tcp.seq, |(one, _)| one.tcp.seq.wrapping_add(1));
        let parts = segments.iter().map(|(one, bytes)| {
            let seq = one.tcp.seq.wrapping_add(u32::from(one.tcp.is_syn() || one.tcp.is_syn_ack()));
            (seq.wrapping_sub(start), *bytes)
        });
        hello::joined(parts, STREAM_MAX)
    }

    /// True when a sender's checksums are the hardware's to finish: every segment of it that is no longer
    /// than a frame has a wrong one.
    pub(super) fn is_offloaded(&self, sender: IpAddr) -> bool {
        self.offloaded.get(&sender).copied().unwrap_or(false)
    }

    fn look_at_sums(&mut self, packets: &[Packet]) {
        for (parsed, packet) in self.parsed.iter().zip(packets) {
            let Some(parsed) = parsed.as_ref().filter(|one| one.proto == TCP && one.whole) else { continue };
            // Receive offload merges segments and leaves no good checksum.
            if packet.frame.len() > 1600 {
                continue;
            }
            let all = self.offloaded.entry(parsed.src.ip()).or_insert(true);
            *all &= parsed.sum != Sum::Right;
        }
    }
}

/// A SYN with another number than the flow's opens a new connection of the same ports, and so does one
/// after packets of an older connection.
fn begins_anew(flow: &Flow, parsed: &Parsed) -> bool {
    let Who::Ports { proto: TCP, .. } = flow.who else { return false };
    parsed.tcp.is_syn() && flow.isn != Some(parsed.tcp.seq)
}
