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
/// makes one lookup; and its first 40 bytes are all that an IPv4 packet needs, which with the hash
/// node (48 bytes, kernel 6.18) and the key are the first two cache lines of three.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Flow {
    /// Interface and MAC addresses, see [`Link`].
    pub ifindex: u32,
    /// See [`Link::macs`].
    pub macs: [u32; 3],
    /// `FLAG_*`, and from bit [`SHIFT_BIT`] on the window shift, see [`Flow::win_shift`].
    pub flags: u16,
    /// The lower bits of [`Globals::generation`](crate::globals::Globals::generation) at which the
    /// link was read from the backend; on a difference it is read again. Entries toward clients
    /// ignore it.
    pub generation: u16,
    /// Toward the client: added to the sequence number. Toward the backend: added to the
    /// acknowledgment number and the edges of SACK blocks (RFC 2018). Wraps. With [`FLAG_QUIC`]: the
    /// first four bytes of the connection ID in the flow's last packet.
    pub seq_add: u32,
    /// Toward the client: added to TSval. Toward the backend: added to TSecr (RFC 7323). Wraps.
    pub ts_add: u32,
    /// New source and destination port, as on the wire.
    pub ports: u32,
    /// Last word of the new source address: all of an IPv4 address.
    pub src_low: u32,
    /// Last word of the new destination address.
    pub dst_low: u32,
    /// The other words of the new source address.
    pub src_high: [u32; 3],
    /// The other words of the new destination address.
    pub dst_high: [u32; 3],
    /// VLAN tags, see [`Link::vlans`].
    pub vlans: [u32; 2],
    /// Backend index (not endpoint index).
    pub backend: u32,
    /// Stash slot of a flow that is not established yet. With [`FLAG_QUIC`]: the backend of packets whose
    /// connection ID nobody knows.
    pub slot: u32,
    /// Entry created, seconds of CLOCK_MONOTONIC.
    pub created: u32,
    /// Index into `FRONTENDS`.
    pub frontend: u16,
    /// SYNs sent to the backend so far. Toward the client, of an established flow: packets in which a
    /// ticket was looked for; with [`MARK_HTTP`] where a response's header stands (a state of
    /// [`http`](crate::http)); of QUIC the length of [`Flow::given_cid`], 0 for none.
    pub tries: u8,
    /// `MARK_*`, and from bit [`CLASS_BIT`] on the class, see [`Flow::class`].
    pub marks: u8,
    /// The rest of [`Flow::given_cid`], else zero; keeps an entry of the hash at three whole cache lines.
    pub reserved: [u32; 4],
}

/// First bit of the class in [`Flow::marks`].
pub const CLASS_BIT: u32 = 4;
/// Its bits.
pub const MARKS_CLASS: u8 = 0xf0;

/// First bit of the window shift in [`Flow::flags`].
pub const SHIFT_BIT: u32 = 11;

impl Flow {
    /// Window scaling: the window field is shifted left by this many bits, or right if negative.
    #[inline(always)]
    #[must_use]
    pub const fn win_shift(&self) -> i8 {
        (self.flags as i16 >> SHIFT_BIT) as i8
    }

    /// Number of its QoS class; 0 is the default one.
    #[inline(always)]
    #[must_use]
    pub const fn class(&self) -> u32 {
        self.marks as u32 >> CLASS_BIT
    }

    /// Sets the window shift, -16 to 15.
    #[inline(always)]
    pub const fn set_win_shift(&mut self, shift: i8) {
        self.flags = self.flags & ((1 << SHIFT_BIT) - 1) | (shift as u16) << SHIFT_BIT;
    }

    /// QUIC, toward the client: the connection ID that the server gave last, zero-filled.
    #[inline(always)]
    #[must_use]
    pub const fn given_cid(&self) -> [u32; 5] {
        let [b, c, d, e] = self.reserved;
        [self.seq_add, b, c, d, e]
    }

    /// Notes the connection ID that the server gave.
    #[inline(always)]
    pub const fn set_given_cid(&mut self, len: u8, words: &[u32; 5]) {
        self.tries = len;
        self.seq_add = words[0];
        self.reserved[0] = words[1];
        self.reserved[1] = words[2];
        self.reserved[2] = words[3];
        self.reserved[3] = words[4];
    }

    /// New source address.
    #[inline(always)]
    #[must_use]
    pub const fn src(&self) -> Addr {
        let [a, b, c] = self.src_high;
        Addr { words: [a, b, c, self.src_low] }
    }

    /// New destination address.
    #[inline(always)]
    #[must_use]
    pub const fn dst(&self) -> Addr {
        let [a, b, c] = self.dst_high;
        Addr { words: [a, b, c, self.dst_low] }
    }

    /// Sets the new source address.
    #[inline(always)]
    pub const fn set_src(&mut self, addr: &Addr) {
        self.src_high[0] = addr.words[0];
        self.src_high[1] = addr.words[1];
        self.src_high[2] = addr.words[2];
        self.src_low = addr.words[3];
    }

    /// Sets the new destination address.
    #[inline(always)]
    pub const fn set_dst(&mut self, addr: &Addr) {
        self.dst_high[0] = addr.words[0];
        self.dst_high[1] = addr.words[1];
        self.dst_high[2] = addr.words[2];
        self.dst_low = addr.words[3];
    }

    /// How the frame leaves.
    #[inline(always)]
    #[must_use]
    pub const fn link(&self) -> Link {
        let ([a, b, c], [d, e]) = (self.macs, self.vlans);
        Link { ifindex: self.ifindex, macs: [a, b, c], vlans: [d, e] }
    }

    /// Sets how the frame leaves.
    #[inline(always)]
    pub const fn set_link(&mut self, link: &Link) {
        self.ifindex = link.ifindex;
        self.macs[0] = link.macs[0];
        self.macs[1] = link.macs[1];
        self.macs[2] = link.macs[2];
        self.vlans[0] = link.vlans[0];
        self.vlans[1] = link.vlans[1];
    }
}

/// Packets go to the backend (else to the client).
pub const FLAG_TO_BACKEND: u16 = 1 << 0;
/// The SYN went to the backend, its SYN-ACK is not here yet.
pub const FLAG_SYN_SENT: u16 = 1 << 1;
/// The next packet with payload holds the ServerHello; QUIC: the server's connection ID.
pub const FLAG_LEARN: u16 = 1 << 2;
/// A FIN was seen in this entry's direction.
pub const FLAG_FIN: u16 = 1 << 3;
/// A FIN was seen in the other direction.
pub const FLAG_FIN_PEER: u16 = 1 << 4;
/// A RST was seen in either direction.
pub const FLAG_RST: u16 = 1 << 5;
/// The client sent a SYN on this live flow; the backend's answer decides.
pub const FLAG_RESYN: u16 = 1 << 6;
/// The backend did not agree to SACK: blocks toward it become NOPs.
pub const FLAG_NO_SACK: u16 = 1 << 7;
/// The frame carries or gets VLAN tags, so its head may move.
pub const FLAG_VLAN: u16 = 1 << 8;
/// Bound by an `l4` service: nothing but addresses is translated.
pub const FLAG_L4: u16 = 1 << 9;
/// The backend did not agree to timestamps: the option toward it becomes NOPs.
pub const FLAG_NO_TS: u16 = 1 << 10;
/// UDP toward the backend, where there is no window to shift: packets with another connection ID than the
/// last leave the fast path.
pub const FLAG_QUIC: u16 = 1 << SHIFT_BIT;
/// Any of these sends a packet off the fast path.
pub const FLAGS_SLOW: u16 =
    FLAG_SYN_SENT | FLAG_LEARN | FLAG_RESYN | FLAG_NO_SACK | FLAG_NO_TS | FLAG_VLAN | FLAG_RST;
/// The connection carries TLS.
pub const MARK_SECURE: u8 = 1 << 0;
/// The session identifier was known.
pub const MARK_HIT: u8 = 1 << 1;
/// HTTP in clear of a service that knows sessions by a cookie: responses may set one.
pub const MARK_HTTP: u8 = 1 << 2;

/// The connection has ended as far as both sides are concerned.
#[inline(always)]
#[must_use]
pub const fn is_closed(flags: u16) -> bool {
    flags & FLAG_RST != 0 || flags & (FLAG_FIN | FLAG_FIN_PEER) == (FLAG_FIN | FLAG_FIN_PEER)
}

const _: () = assert!(size_of::<FlowKey>() == 40);
const _: () = assert!(size_of::<Flow>() == 104);
const _: () = assert!(core::mem::offset_of!(Flow, src_high) == 40);
const _: () = assert!(FLAG_NO_TS < 1 << SHIFT_BIT);

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

    #[test]
    fn flags_and_window_shift_share_a_word() {
        for shift in -14..=14 {
            let mut flow = Flow { flags: FLAG_TO_BACKEND | FLAG_NO_TS, ..Flow::default() };
            flow.set_win_shift(7);
            flow.set_win_shift(shift);
            assert_eq!(flow.win_shift(), shift);
            flow.flags &= !FLAG_NO_TS;
            flow.flags |= FLAG_FIN;
            assert_eq!(flow.win_shift(), shift);
            flow.set_win_shift(0);
            assert_eq!(flow.flags, FLAG_TO_BACKEND | FLAG_FIN);
        }
    }

    #[test]
    fn addresses_come_back_whole() {
        let (a, b) = (Addr { words: [1, 2, 3, 4] }, Addr { words: [5, 6, 7, 8] });
        let mut flow = Flow::default();
        flow.set_src(&a);
        flow.set_dst(&b);
        assert_eq!((flow.src(), flow.dst()), (a, b));
    }
}
