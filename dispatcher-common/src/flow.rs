//! The flow table: one entry a direction, found by the packet's own addresses and ports.

use crate::addr::Addr;

/// What a packet carries: source, destination, ports, protocol. 40 bytes without padding.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port, then destination port, both as on the wire: the first word of TCP and UDP headers.
    pub ports: u32,
    /// IP protocol number (6 TCP, 17 UDP), host order.
    pub proto: u32,
}

/// Joins two ports that are in host order to the word a [`FlowKey`] holds.
#[inline(always)]
#[must_use]
pub const fn ports_word(src: u16, dst: u16) -> u32 {
    let (s, d) = (src.to_be_bytes(), dst.to_be_bytes());
    u32::from_ne_bytes([s[0], s[1], d[0], d[1]])
}

/// The two ports (source, destination) of a [`FlowKey::ports`] word, in host order.
#[inline(always)]
#[must_use]
pub const fn ports_of(word: u32) -> (u16, u16) {
    let b = word.to_ne_bytes();
    (u16::from_be_bytes([b[0], b[1]]), u16::from_be_bytes([b[2], b[3]]))
}

/// A ports word with source and destination exchanged.
#[inline(always)]
#[must_use]
pub const fn ports_swapped(word: u32) -> u32 {
    word.rotate_left(16)
}

impl FlowKey {
    /// The key of packets in the other direction, when no address is translated.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self { src: self.dst, dst: self.src, ports: ports_swapped(self.ports), proto: self.proto }
    }
}

/// How a frame leaves: interface, MAC addresses, VLAN tags. 24 bytes.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Link {
    /// Interface index to redirect to (the lower device of a VLAN interface).
    pub ifindex: u32,
    /// Destination MAC, then source MAC, as at the start of the frame; words in memory order.
    pub macs: [u32; 3],
    /// VLAN tags from the outermost: TPID and TCI as on the wire (0: no tag).
    pub vlans: [u32; 2],
}

/// What is done to a packet of a flow. Everything the established path needs is here, so that it
/// makes one lookup: 104 bytes, which with the 40-byte key fill three cache lines of the LRU hash.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Flow {
    /// How the frame leaves.
    pub link: Link,
    /// [`Globals::generation`](crate::globals::Globals::generation) at which `link` was read from
    /// the backend; on a difference it is read again. Entries toward clients ignore it.
    pub generation: u32,
    /// See the `FLAG_*` constants.
    pub flags: u32,
    /// New source address.
    pub src: Addr,
    /// New destination address.
    pub dst: Addr,
    /// New source and destination port, as on the wire.
    pub ports: u32,
    /// Toward the client: added to the sequence number. Toward the backend: added to the
    /// acknowledgment number and the edges of SACK blocks (RFC 2018). Wraps.
    pub seq_add: u32,
    /// Toward the client: added to TSval. Toward the backend: added to TSecr (RFC 7323). Wraps.
    pub ts_add: u32,
    /// One's complement sum that takes the transport checksum from the old addresses and ports to the new.
    pub l4_delta: u16,
    /// The same for the IPv4 header checksum (addresses only; TTL comes on top).
    pub ip_delta: u16,
    /// Window scaling: the window field is shifted left by this many bits, or right if negative.
    pub win_shift: i8,
    /// SYNs sent to the backend so far.
    pub tries: u8,
    /// Index into `FRONTENDS`.
    pub frontend: u16,
    /// Backend index (not endpoint index).
    pub backend: u32,
    /// Stash slot of a flow that is not established yet.
    pub slot: u32,
    /// Entry created, seconds of CLOCK_MONOTONIC.
    pub created: u32,
    /// Unused, zero; keeps an entry of the hash at three cache lines.
    pub reserved: [u32; 2],
}

/// Packets go to the backend (else to the client).
pub const FLAG_TO_BACKEND: u32 = 1 << 0;
/// The SYN went to the backend, its SYN-ACK is not here yet.
pub const FLAG_SYN_SENT: u32 = 1 << 1;
/// The next packet with payload holds the ServerHello.
pub const FLAG_LEARN: u32 = 1 << 2;
/// A FIN was seen in this entry's direction.
pub const FLAG_FIN: u32 = 1 << 3;
/// A FIN was seen in the other direction.
pub const FLAG_FIN_PEER: u32 = 1 << 4;
/// A RST was seen in either direction.
pub const FLAG_RST: u32 = 1 << 5;
/// The client sent a SYN on this live flow; the backend's answer decides.
pub const FLAG_RESYN: u32 = 1 << 6;
/// The backend did not agree to SACK: blocks toward it become NOPs.
pub const FLAG_NO_SACK: u32 = 1 << 7;
/// The connection carries TLS.
pub const FLAG_SECURE: u32 = 1 << 8;
/// The frame carries or gets VLAN tags, so its head may move.
pub const FLAG_VLAN: u32 = 1 << 9;
/// Bound by an `l4` service: nothing but addresses is translated.
pub const FLAG_L4: u32 = 1 << 10;
/// The session identifier was known (for display).
pub const FLAG_HIT: u32 = 1 << 11;
/// The backend did not agree to timestamps: the option toward it becomes NOPs.
pub const FLAG_NO_TS: u32 = 1 << 12;
/// Any of these sends a packet off the fast path.
pub const FLAGS_SLOW: u32 =
    FLAG_SYN_SENT | FLAG_LEARN | FLAG_RESYN | FLAG_NO_SACK | FLAG_NO_TS | FLAG_VLAN | FLAG_RST;
/// The connection has ended as far as both sides are concerned.
#[inline(always)]
#[must_use]
pub const fn is_closed(flags: u32) -> bool {
    flags & FLAG_RST != 0 || flags & (FLAG_FIN | FLAG_FIN_PEER) == (FLAG_FIN | FLAG_FIN_PEER)
}

const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<Flow>() == 104);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_keep_wire_order() {
        let word = ports_word(443, 51000);
        assert_eq!(word.to_ne_bytes(), [1, 187, 199, 56]);
        assert_eq!(ports_of(word), (443, 51000));
        assert_eq!(ports_of(ports_swapped(word)), (51000, 443));
    }
}
