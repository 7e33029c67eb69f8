//! Frame -> addresses, ports and offsets.

use dispatcher_common::{
    addr::Addr,
    flow::FlowKey,
    opaque::{forget, opaque},
    reason::Reason,
};

use crate::packet::{Frame, Ipv4, Ipv6, MACS, Tcp, Udp, View};

/// TCP.
pub const TCP: u32 = 6;
/// UDP.
pub const UDP: u32 = 17;
/// ICMP.
pub const ICMP: u32 = 1;
/// ICMP for IPv6.
pub const ICMP6: u32 = 58;

const IPV4: u16 = 0x0800_u16.to_be();
const IPV6: u16 = 0x86dd_u16.to_be();
const VLAN: u16 = 0x8100_u16.to_be();
const QINQ: u16 = 0x88a8_u16.to_be();
/// More fragments, or an offset (RFC 791).
const FRAGMENT: u16 = 0x3fff_u16.to_be();
/// Ethertype after two tags that is a third: drop.
const TAGS_MAX: u32 = 2;

/// What the later stages need to know of a packet.
#[derive(Clone, Copy)]
pub struct Parsed {
    /// Addresses, ports, protocol.
    pub key: FlowKey,
    /// Offsets and facts in one word, which is one register and one thing to forget: from bit 0 the
    /// offset of the IP header (5 bits), from 8 that of the transport header (8 bits), from 16 the
    /// number of VLAN tags (2 bits), bit 18 IPv4, bit 19 fragment.
    layout: u32,
}

const V4: u32 = 1 << 18;
const FRAGMENTED: u32 = 1 << 19;

/// Where the headers of a packet stand.
pub trait Layout: Copy {
    /// Offset of the IP header.
    fn l3(self) -> usize;
    /// Offset of the transport header.
    fn l4(self) -> usize;
    /// True for IPv4.
    fn is_v4(self) -> bool;
}

/// The layout of nearly all packets: no tags, no IP options, no extension headers, no fragment. Known
/// when the program is compiled, so that it costs nothing.
#[derive(Clone, Copy)]
pub struct Plain<const V4: bool>;

impl<const V4: bool> Plain<V4> {
    const WORD: u32 = (IP_AT | l4_of(V4) << 8) as u32 | if V4 { self::V4 } else { 0 };
}

impl<const V4: bool> Layout for Plain<V4> {
    #[inline(always)]
    fn l3(self) -> usize {
        IP_AT
    }
    #[inline(always)]
    fn l4(self) -> usize {
        l4_of(V4)
    }
    #[inline(always)]
    fn is_v4(self) -> bool {
        V4
    }
}

const IP_AT: usize = MACS + 2;

const fn l4_of(v4: bool) -> usize {
    IP_AT + if v4 { size_of::<Ipv4>() } else { size_of::<Ipv6>() }
}

/// Any layout.
impl Layout for &Parsed {
    /// The mask tells the verifier what it cannot know of a stored value.
    #[inline(always)]
    fn l3(self) -> usize {
        Parsed::l3(self)
    }
    #[inline(always)]
    fn l4(self) -> usize {
        Parsed::l4(self)
    }
    #[inline(always)]
    fn is_v4(self) -> bool {
        Parsed::is_v4(self)
    }
}

impl Parsed {
    /// Of no packet yet.
    #[inline(always)]
    pub fn none() -> Self {
        // Known zeros would become a call of a byte-wise `memset`.
        let none = opaque(0) as u32;
        let addr = Addr { words: [none; 4] };
        Self { key: FlowKey { src: addr, dst: addr, ports: none, proto: none }, layout: none }
    }

    /// Offset of the IP header. The mask tells the verifier what it cannot know of a stored value.
    #[inline(always)]
    pub fn l3(&self) -> usize {
        opaque(self.layout as u64) as usize & 0x1f
    }

    /// Offset of the transport header.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        opaque(self.layout as u64) as usize >> 8 & 0xff
    }

    /// Number of VLAN tags, 0-2.
    #[inline(always)]
    pub fn tags(&self) -> u32 {
        self.layout >> 16 & 3
    }

    /// True for IPv4.
    #[inline(always)]
    pub fn is_v4(&self) -> bool {
        self.layout & V4 != 0
    }

    /// True for a fragment.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        self.layout & FRAGMENTED != 0
    }

    /// True for TCP.
    #[inline(always)]
    pub fn is_tcp(&self) -> bool {
        self.key.proto == TCP
    }
}

/// Reads the headers of a TCP or UDP packet of a plain layout, all but the ports; false for any other.
#[inline(always)]
pub fn plain<const V4: bool>(view: View, p: &mut Parsed) -> bool {
    if view.read::<u16>(MACS) != Some(if V4 { IPV4 } else { IPV6 }) {
        return false;
    }
    if V4 {
        let Some(ip) = view.ptr::<Ipv4>(IP_AT) else { return false };
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        if ip.version != 0x45 || ip.fragment & FRAGMENT != 0 {
            return false;
        }
        p.key.src = Addr::from_v4_word(ip.src);
        p.key.dst = Addr::from_v4_word(ip.dst);
        p.key.proto = ip.proto as u32;
    } else {
        let Some(ip) = view.ptr::<Ipv6>(IP_AT) else { return false };
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        if ip.head & 0xf0_u32 != 0x60 {
            return false;
        }
        p.key.src = Addr::load(&ip.src);
        p.key.dst = Addr::load(&ip.dst);
        p.key.proto = ip.next as u32;
    }
    p.layout = Plain::<V4>::WORD;
    p.key.proto == TCP || p.key.proto == UDP
}

/// Reads Ethernet and IP headers. Transport ports come later, see [`ports`], because packets that
/// are not ours are passed whatever they hold.
#[inline(always)]
pub fn network(view: View) -> Result<Parsed, Reason> {
    let mut at = MACS;
    let mut tags = 0;
    let mut ethertype: u16 = view.read(at).ok_or(Reason::ShortFrame)?;
    at += 2;
    if ethertype == VLAN || ethertype == QINQ {
        tags = 1;
        ethertype = view.read(at + 2).ok_or(Reason::ShortFrame)?;
        at += 4;
        if ethertype == VLAN || ethertype == QINQ {
            tags = TAGS_MAX;
            ethertype = view.read(at + 2).ok_or(Reason::ShortFrame)?;
            at += 4;
            if ethertype == VLAN || ethertype == QINQ {
                return Err(Reason::TooManyTags);
            }
        }
    }
    let l3 = at as u32;
    if ethertype == IPV4 {
        let ip = view.ptr::<Ipv4>(at).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        let words = (ip.version & 0xf) as usize;
        if ip.version >> 4 != 4 || words < 5 {
            return Err(Reason::BadIp);
        }
        let (src, dst) = (Addr::from_v4_word(ip.src), Addr::from_v4_word(ip.dst));
        return Ok(Parsed {
            key: FlowKey { src, dst, ports: 0, proto: ip.proto as u32 },
            layout: l3
                | ((at + words * 4) as u32) << 8
                | tags << 16
                | V4
                | if ip.fragment & FRAGMENT != 0 { FRAGMENTED } else { 0 },
        });
    }
    if ethertype == IPV6 {
        let ip = view.ptr::<Ipv6>(at).ok_or(Reason::BadIp)?;
        // SAFETY: `ptr` checked the bounds.
        let ip = unsafe { &*ip };
        if ip.head & 0xf0_u32 != 0x60 {
            return Err(Reason::BadIp);
        }
        let (src, dst) = (Addr::load(&ip.src), Addr::load(&ip.dst));
        return Ok(Parsed {
            key: FlowKey { src, dst, ports: 0, proto: ip.next as u32 },
            layout: l3 | ((at + size_of::<Ipv6>()) as u32) << 8 | tags << 16,
        });
    }
    Err(Reason::NotIp)
}

/// Lets the verifier forget how the offsets came about: the ways through [`network`] (tags, families)
/// become one. `salt` is anything out of a map.
#[inline(always)]
pub fn merge(p: &mut Parsed, salt: u32) {
    p.layout = forget(p.layout as usize, salt as u64) as u32;
}

/// Skips IPv6 extension headers (RFC 8200 section 4) of a packet to or from one of our addresses.
/// Returns the transport protocol and offset, and whether it is a fragment.
#[inline(never)]
pub fn extensions(frame: &Frame, p: &mut Parsed) -> bool {
    let view = frame.view();
    for _ in 0..6 {
        let at = p.l4();
        let Some([next, len]) = view.read::<[u8; 2]>(at) else { return false };
        let size = match p.key.proto {
            // hop-by-hop options, routing, destination options
            0 | 43 | 60 => (len as usize + 1) * 8,
            44 => {
                p.layout |= FRAGMENTED;
                8
            }
            _ => return true,
        };
        if at + size > 0xff - 60 {
            return false;
        }
        p.key.proto = next as u32;
        p.layout = p.layout & !0xff00 | ((at + size) as u32) << 8;
    }
    false
}

/// Reads the ports of TCP and UDP and checks that the header is there.
#[inline(always)]
pub fn ports(view: View, at: usize, p: &mut Parsed) -> Result<(), Reason> {
    if p.key.proto == TCP {
        let tcp = view.ptr::<Tcp>(at).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        p.key.ports = unsafe { (*tcp).ports };
    } else {
        let udp = view.ptr::<Udp>(at).ok_or(Reason::BadTransport)?;
        // SAFETY: `ptr` checked the bounds.
        p.key.ports = unsafe { (*udp).ports };
    }
    Ok(())
}

/// The end of the packet by its IP header: offset in the frame. `None` when the frame is shorter.
#[inline(always)]
pub fn packet_end(view: View, p: &Parsed) -> Option<usize> {
    let l3 = p.l3();
    let end = if p.is_v4() {
        // SAFETY: `ptr` checked the bounds.
        let len = unsafe { (*view.ptr::<Ipv4>(l3)?).len };
        l3 + u16::from_be(len) as usize
    } else {
        // SAFETY: `ptr` checked the bounds.
        let len = unsafe { (*view.ptr::<Ipv6>(l3)?).len };
        l3 + size_of::<Ipv6>() + u16::from_be(len) as usize
    };
    if end > view.len() { None } else { Some(end) }
}
