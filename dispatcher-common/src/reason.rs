//! Why a packet went where it went. Every packet ends in exactly one of these, counted once.

/// What happens to the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It (or the packet it was turned into) leaves on an interface.
    Forward,
    /// It goes up to the kernel's network stack.
    Pass,
    /// Its content was taken over (stashed, held, checked); nothing is lost.
    Consume,
    /// It is dropped.
    Drop,
}

macro_rules! reasons {
    ($($kind:ident { $($(#[doc = $doc:literal])+ $name:ident = $number:literal $text:literal,)+ })+) => {
        /// The reasons, with numbers that never change: an index into `REASONS`. A retired number is not used again.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u32)]
        pub enum Reason {
            $($($(#[doc = $doc])+ $name = $number,)+)+
        }

        impl Reason {
            /// All reasons, in order of their numbers.
            pub const ALL: &'static [Self] = &[$($(Self::$name,)+)+];

            /// What the reason does to the packet.
            #[inline(always)]
            #[must_use]
            pub const fn kind(self) -> Kind {
                match self {
                    $($(Self::$name)|+ => Kind::$kind,)+
                }
            }

            /// Stable name for output and metrics.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($(Self::$name => $text,)+)+ }
            }

            /// One sentence for people.
            #[must_use]
            pub const fn description(self) -> &'static str {
                match self { $($(Self::$name => concat!($($doc),+).trim_ascii(),)+)+ }
            }
        }
    };
}

reasons! {
    Forward {
        /// Packet of an established flow, to the backend.
        ToBackend = 0 "to_backend",
        /// Packet of an established flow, to the client.
        ToClient = 1 "to_client",
        /// SYN answered with a SYN-ACK that holds a cookie.
        SynAnswered = 2 "syn_answered",
        /// First data or datagram bound by a known session; the SYN, or the datagram, went to its backend.
        BoundHit = 3 "bound_hit",
        /// First data with an unknown identifier bound by the table.
        BoundMiss = 4 "bound_miss",
        /// First data that is TLS without an identifier, bound by the table.
        BoundFresh = 5 "bound_fresh",
        /// First data that is not TLS, bound by the table.
        BoundNonsecure = 6 "bound_nonsecure",
        /// First packet of a flow of an l4 service, bound by the table.
        BoundL4 = 7 "bound_l4",
        /// The SYN to the backend was sent again.
        SynRepeated = 8 "syn_repeated",
        /// The backend's SYN-ACK; the stashed data follows it back.
        Replayed = 9 "replayed",
        /// The backend's SYN-ACK answered with a bare ACK, as the stash no longer holds the data.
        AckedBackend = 10 "acked_backend",
        /// Data to a VIP that belongs to no flow, answered with RST.
        ResetClient = 11 "reset_client",
        /// A packet of a backend that belongs to no living flow, answered with RST.
        ResetBackend = 12 "reset_backend",
        /// A part of a hello was stashed and acknowledged to the client.
        AckedPart = 13 "acked_part",
        /// ICMP error translated and sent on.
        IcmpError = 14 "icmp_error",
        /// Packet with SYN, FIN or RST of an established flow.
        Control = 15 "control",
        /// A held hello, released by the daemon.
        Released = 16 "released",
        /// Clone of a SYN-ACK turned into a stashed segment (counted at the exit to the backend).
        EmittedSegment = 17 "emitted_segment",
        /// Clone turned into the SYN to the backend (counted at the exit to the backend).
        EmittedSyn = 18 "emitted_syn",
        /// TTL or hop limit ran out: ICMP time exceeded sent to the source.
        TimeExceeded = 19 "time_exceeded",
        /// No backend can take the connection: answered with RST.
        ResetNoBackend = 20 "reset_no_backend",
        /// SYN to a listener of the daemon whose queue is full, answered with a cookie of the kernel's.
        SynCookie = 21 "syn_cookie",
        /// The connection is over its backend's rate, or finds no room or no turn among those that wait: answered with RST.
        ResetOverRate = 22 "reset_over_rate",
    }
    Pass {
        /// Neither VIP nor backend.
        NotOurs = 32 "not_ours",
        /// Not IP: ARP, LLDP and others.
        NotIp = 33 "not_ip",
        /// To a VIP, but no service has this port or protocol.
        NoService = 34 "no_service",
        /// From a backend, but of no flow of ours.
        BackendOther = 35 "backend_other",
        /// ICMP that is no error about a flow of ours.
        IcmpOther = 36 "icmp_other",
        // 37: unused
        /// To a service that the daemon serves itself.
        ToDaemon = 38 "to_daemon",
    }
    Consume {
        /// Bare ACK that completes a handshake with a valid cookie.
        CookieAck = 48 "cookie_ack",
        /// Data stashed; more is needed, or the backend has not answered.
        Stashed = 49 "stashed",
        /// Hello held until the daemon picks a backend.
        Held = 50 "held",
        /// Packet of a flow whose backend has not answered yet and that carries nothing to keep.
        WaitingBackend = 51 "waiting_backend",
        /// RST without flow.
        ResetIgnored = 52 "reset_ignored",
        /// Clone that was not needed (counted at the exit to the backend).
        CloneUnused = 53 "clone_unused",
        /// RST from the backend on a SYN to a live flow: the next SYN opens a new one.
        StaleFlow = 54 "stale_flow",
    }
    Drop {
        /// Ethernet or VLAN header cut short.
        ShortFrame = 64 "short_frame",
        /// IP header cut short, of a wrong version or with a wrong length.
        BadIp = 65 "bad_ip",
        /// TCP or UDP header cut short or with a wrong length.
        BadTransport = 66 "bad_transport",
        /// Flags that no TCP segment has (none, SYN with FIN or RST).
        BadFlags = 67 "bad_flags",
        /// Fragment to a VIP: the ports of a flow cannot be read.
        Fragment = 68 "fragment",
        /// TTL or hop limit ran out and no answer could be made.
        TtlExpired = 69 "ttl_expired",
        /// TCP checksum wrong on data to be stashed (veth: is `tx off` set on the sender?).
        BadChecksum = 70 "bad_checksum",
        /// Data before the first segment; the client sends it again.
        BeforeFirst = 71 "before_first",
        /// Another packet was at the same stash slot for too long; it comes again.
        StashBusy = 72 "stash_busy",
        /// Both stash slots of the flow are taken by others.
        StashFull = 73 "stash_full",
        /// Data beyond what the stash can hold before the backend answers.
        StashBeyond = 74 "stash_beyond",
        /// No backend of the service is available, and there is no RST to answer with (UDP).
        NoBackend = 75 "no_backend",
        /// No free source port in the pool.
        NoSourcePort = 76 "no_source_port",
        /// The flow table refused an entry.
        FlowTable = 77 "flow_table",
        /// The frame could not be resized.
        NoRoom = 78 "no_room",
        /// IP options or extension headers that are too long or unknown.
        BadExtension = 79 "bad_extension",
        /// The answer of a backend to a SYN whose client's flow entry is gone.
        BadAnswer = 80 "bad_answer",
        /// Three or more VLAN tags.
        TooManyTags = 81 "too_many_tags",
        /// ICMP error whose inner packet is cut short.
        BadIcmp = 82 "bad_icmp",
        /// A map had no entry that must exist: the daemon and the program disagree.
        Internal = 83 "internal",
        /// A release for a slot that belongs to another flow by now.
        StaleRelease = 84 "stale_release",
        /// The program for the packet's stage could not be called: `STAGES` lacks it.
        NoStage = 85 "no_stage",
        /// QUIC long header that is cut short, or longer connection IDs than its version has.
        BadQuic = 86 "bad_quic",
        /// Over its backend's bandwidth.
        OverBandwidth = 87 "over_bandwidth",
        /// The connection is over its backend's rate; the client tries again.
        OverConnections = 88 "over_connections",
    }
}

/// Entries of the `REASONS` map.
pub const REASONS_MAX: u32 = 96;

impl Reason {
    /// The reason of a number, if there is one.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| *reason as u32 == number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_ordered_and_fit_the_map() {
        for pair in Reason::ALL.windows(2) {
            assert!((pair[0] as u32) < pair[1] as u32, "{:?}", pair);
        }
        assert!(Reason::ALL.iter().all(|r| (*r as u32) < REASONS_MAX));
        assert_eq!(Reason::from_number(70), Some(Reason::BadChecksum));
        assert_eq!(Reason::from_number(95), None);
    }

    #[test]
    fn names_are_unique_snake_case() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert!(reason.name().bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit()));
            assert!(Reason::ALL.iter().skip(i + 1).all(|other| other.name() != reason.name()));
        }
    }
}
