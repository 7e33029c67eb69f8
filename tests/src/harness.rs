//! The XDP program on single frames, by `BPF_PROG_TEST_RUN`: no interface, no daemon.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result, bail};
use dispatcher_common::{
    abi,
    addr::Addr,
    flow::Link,
    reason::Reason,
    service::{
        BACKEND_UP, Backend, FRONTEND_MISS_DAEMON, FRONTEND_OVER_HOLD, FRONTEND_PROXY_V2,
        FRONTEND_SOURCE_DISPATCHER, Frontend, MODE_L4, MODE_LOCAL, MODE_PASSTHROUGH, VipKey, endpoint_index,
        stable_id,
    },
    session::{KIND_QUIC_CID, KIND_TICKET_NAME, KIND_TLS_SESSION_ID, Session, SessionKey},
};
use dispatcher_user::dataplane::{Capacities, Dataplane, monotonic_ns, object};

use crate::{
    packet::{Body, Packet, Tcp, TcpOption, flags},
    topology::{Family, POOL},
};

/// What the kernel would do with the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// XDP_ABORTED: the program failed.
    Aborted,
    /// XDP_DROP.
    Drop,
    /// XDP_PASS.
    Pass,
    /// XDP_TX.
    Tx,
    /// XDP_REDIRECT.
    Redirect,
}

/// What became of a frame.
#[derive(Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The program's verdict.
    pub action: Action,
    /// The reason that was counted.
    pub reason: Reason,
    /// The frame afterwards.
    pub frame: Vec<u8>,
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} because of {:?}, {} bytes", self.action, self.reason, self.frame.len())
    }
}

impl Outcome {
    /// The frame afterwards, which must be a packet without a flaw.
    #[must_use]
    pub fn packet(&self) -> Packet {
        Packet::parse(&self.frame)
            .unwrap_or_else(|error| panic!("{self:?}: not a good packet: {error:#}\n{:02x?}", self.frame))
    }

    /// The TCP segment in the frame afterwards.
    #[must_use]
    pub fn tcp(&self) -> Tcp {
        self.packet().tcp().unwrap_or_else(|error| panic!("{self:?}: {error:#}")).clone()
    }
}

/// The services that a [`Machine`] offers, each on the VIPs of both families.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Service {
    /// `passthrough`.
    Plain = 443,
    /// `passthrough`, `source = "dispatcher"`.
    Pool = 444,
    /// The same with PROXY headers.
    Proxy = 445,
    /// `passthrough`, `miss = "daemon"`.
    Held = 446,
    /// `passthrough` without any backend.
    Empty = 447,
    /// `l4`, TCP and UDP.
    L4 = 80,
    /// `l4`, UDP, `affinity = "quic-cid"`.
    Quic = 4433,
    /// Served by a listener of the daemon.
    Local = 448,
    /// As `Held`, where connections wait until backends can take them.
    Queued = 449,
}

impl Service {
    const ALL: [Self; 9] = [
        Self::Plain,
        Self::Pool,
        Self::Proxy,
        Self::Held,
        Self::Empty,
        Self::L4,
        Self::Quic,
        Self::Local,
        Self::Queued,
    ];

    /// The IP protocol numbers of its frontends.
    fn protocols(self) -> &'static [u8] {
        match self {
            Self::Plain
            | Self::Pool
            | Self::Proxy
            | Self::Held
            | Self::Empty
            | Self::Local
            | Self::Queued => &[6],
            Self::L4 => &[6, 17],
            Self::Quic => &[17],
        }
    }

    fn flags(self) -> u32 {
        match self {
            Self::Plain | Self::Empty | Self::L4 | Self::Quic | Self::Local => 0,
            Self::Pool => FRONTEND_SOURCE_DISPATCHER,
            Self::Proxy => FRONTEND_SOURCE_DISPATCHER | FRONTEND_PROXY_V2,
            Self::Held => FRONTEND_MISS_DAEMON,
            Self::Queued => FRONTEND_MISS_DAEMON | FRONTEND_OVER_HOLD,
        }
    }

    /// Its stable id.
    #[must_use]
    pub fn id(self) -> u32 {
        stable_id(&format!("{self:?}"))
    }

    /// Its address of a family.
    #[must_use]
    pub fn at(self, family: Family) -> SocketAddr {
        SocketAddr::new(family.vip(), self as u16)
    }
}

/// Backends of a [`Machine`].
pub const BACKENDS: u32 = 3;
/// MSS and window scale that it tells clients.
pub const OUR_MSS: u16 = 1440;
/// See [`OUR_MSS`].
pub const OUR_WSCALE: u8 = 9;
/// First and last port of the pool.
pub const POOL_PORTS: [u16; 2] = [40_000, 40_999];
/// MACs of frames that clients send: the dispatcher's and the client's.
pub const CLIENT_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 0xd0], [2, 0, 0, 0, 0, 0xc0]];

/// Address and port of a backend.
#[must_use]
pub fn backend_at(family: Family, backend: u32) -> SocketAddr {
    let host = 11 + backend as u16;
    let ip = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(10, 2, 0, host as u8)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, host)),
    };
    SocketAddr::new(ip, 8443)
}

/// MACs of frames to a backend.
#[must_use]
pub fn backend_macs(backend: u32) -> [[u8; 6]; 2] {
    [[2, 0, 0, 0, 1, backend as u8], [2, 0, 0, 0, 0, 0xd1]]
}

/// A client's address and port.
#[must_use]
pub fn client_at(family: Family, port: u16) -> SocketAddr {
    let ip = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(10, 1, 0, 10)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 10)),
    };
    SocketAddr::new(ip, port)
}

/// A loaded data path with services and backends, and nothing attached.
#[derive(Debug)]
pub struct Machine {
    dataplane: Dataplane,
    loopback: u32,
}

impl Machine {
    /// Loads the programs and fills the maps.
    pub fn new() -> Result<Self> {
        let capacities = Capacities {
            flows: 4096,
            sessions: 64,
            provisional: 64,
            frontends: 64,
            backends: 64,
            lb_table: 64,
            sources: 4,
            cookies: 2,
            stash_slots: 4096,
        };
        let dataplane = Dataplane::load(object(), &capacities)?;
        let loopback = dispatcher_user::dataplane::interface_index("lo").context("no loopback interface")?;
        let machine = Self { dataplane, loopback };
        machine.fill()?;
        Ok(machine)
    }

    /// The maps, for what a test wants to see or change.
    #[must_use]
    pub fn dataplane(&self) -> &Dataplane {
        &self.dataplane
    }

    /// The stable id of a backend.
    #[must_use]
    pub fn backend_id(backend: u32) -> u32 {
        stable_id(&format!("service/b{backend}"))
    }

    /// Maps a session to a backend.
    pub fn know(&self, service: Service, id: &[u8], session: Session) -> Result<()> {
        let key =
            SessionKey::new(service.id(), KIND_TLS_SESSION_ID, id).context("an ID has 1 to 32 bytes")?;
        Ok(self.dataplane.sessions().insert(key, session)?)
    }

    /// What the sessions map says of an ID.
    pub fn session(&self, service: Service, id: &[u8]) -> Result<Option<Session>> {
        let key =
            SessionKey::new(service.id(), KIND_TLS_SESSION_ID, id).context("an ID has 1 to 32 bytes")?;
        Ok(self.dataplane.sessions().get(&key)?)
    }

    /// Marks endpoints of a backend as reachable or not.
    pub fn set_up(&self, backend: u32, up: bool) -> Result<()> {
        for v4 in [true, false] {
            let index = endpoint_index(backend, v4);
            let mut endpoint = self.dataplane.backends().get(index)?;
            endpoint.flags = if up { BACKEND_UP } else { 0 };
            self.dataplane.backends().set(index, endpoint)?;
        }
        Ok(())
    }

    /// Changes the frontend of a service.
    pub fn change(&self, service: Service, family: Family, change: impl FnOnce(&mut Frontend)) -> Result<()> {
        let key = VipKey::new(service.at(family).ip(), service as u16, service.protocols()[0]);
        let index = self.dataplane.vips().get(&key)?.context("no such frontend")?;
        let mut frontend = self.dataplane.frontends().get(index)?;
        change(&mut frontend);
        Ok(self.dataplane.frontends().set(index, frontend)?)
    }

    /// Lets the daemon look alive, or dead for long.
    pub fn beat(&self, alive: bool) -> Result<()> {
        let heartbeat = if alive { monotonic_ns() } else { 1 };
        Ok(self.dataplane.update_globals(|globals| globals.heartbeat = heartbeat)?)
    }

    /// Runs the program on a frame. Exactly one reason must be counted, and it must fit the verdict.
    pub fn run(&self, frame: &[u8]) -> Result<Outcome> {
        let before = self.dataplane.reasons()?;
        let run = self.dataplane.run(abi::PROGRAM, frame, None, 1, 0)?;
        let after = self.dataplane.reasons()?;
        let counted: Vec<(Reason, u64)> = before
            .iter()
            .zip(&after)
            .filter(|(before, after)| before.1 != after.1)
            .map(|(before, after)| (after.0, after.1.wrapping_sub(before.1)))
            .collect();
        let [(reason, 1)] = *counted else { bail!("one reason must be counted once, but: {counted:?}") };
        let action = match run.retval {
            0 => Action::Aborted,
            1 => Action::Drop,
            2 => Action::Pass,
            3 => Action::Tx,
            4 => Action::Redirect,
            other => bail!("XDP action {other}"),
        };
        use dispatcher_common::reason::Kind;
        let expected = match reason.kind() {
            Kind::Forward => Action::Redirect,
            Kind::Pass => Action::Pass,
            Kind::Consume | Kind::Drop => Action::Drop,
        };
        if action != expected {
            bail!("{reason:?} was counted, but the verdict is {action:?}");
        }
        Ok(Outcome { action, reason, frame: run.data_out })
    }

    /// Runs the program on a packet and checks the reason.
    #[must_use]
    pub fn expect(&self, what: &str, packet: &Packet, reason: Reason) -> Outcome {
        let outcome =
            self.run(&packet.frame()).unwrap_or_else(|error| panic!("{what}: {error:#}\n{packet:?}"));
        assert_eq!(outcome.reason, reason, "{what}: {packet:?}");
        outcome
    }

    fn fill(&self) -> Result<()> {
        let d = &self.dataplane;
        for replay in 0..abi::REPLAY_MAPS {
            d.set_replay(replay, self.loopback)?;
        }
        for backend in 0..BACKENDS {
            d.backend_index().insert(Self::backend_id(backend), backend)?;
            for family in Family::BOTH {
                let at = backend_at(family, backend);
                let endpoint = Backend {
                    addr: at.ip().into(),
                    port: at.port().to_be(),
                    flags: BACKEND_UP,
                    id: Self::backend_id(backend),
                    link: Link {
                        ifindex: self.loopback,
                        macs: mac_words(backend_macs(backend)),
                        vlans: [0; 2],
                    },
                    mtu: 1500,
                    replay: 0,
                    ticket: 0,
                    reserved: [0; 2],
                };
                d.backends().set(endpoint_index(backend, family == Family::V4), endpoint)?;
            }
        }
        // The last backend is in no table: only sessions lead to it.
        let table: Vec<u32> = (0..BACKENDS - 1).collect();
        for (at, backend) in (0..).zip(&table) {
            d.lb_table().set(at, *backend)?;
        }
        for (at, address) in (0..).zip(POOL) {
            d.sources().set(at, Addr::from(address))?;
        }
        let mut index = 0;
        for service in Service::ALL {
            for family in Family::BOTH {
                for &protocol in service.protocols() {
                    let frontend = Frontend {
                        addr: family.vip().into(),
                        port: (service as u16).to_be(),
                        proto: protocol,
                        mode: match service {
                            Service::Local => MODE_LOCAL,
                            Service::L4 | Service::Quic => MODE_L4,
                            Service::Plain
                            | Service::Pool
                            | Service::Proxy
                            | Service::Held
                            | Service::Queued
                            | Service::Empty => MODE_PASSTHROUGH,
                        },
                        service: service.id(),
                        flags: service.flags(),
                        table_base: 0,
                        table_len: if service == Service::Empty { 0 } else { table.len() as u32 },
                        source_base: u32::from(family == Family::V6),
                        source_len: 1,
                        port_min: POOL_PORTS[0],
                        port_max: POOL_PORTS[1],
                        wscale: OUR_WSCALE,
                        mss: OUR_MSS,
                        session_ttl: 300,
                        provisional_ttl: 10,
                        ticket_formats: 1,
                        affinity: if service == Service::Quic {
                            [KIND_QUIC_CID, 0, 0, 0]
                        } else {
                            [KIND_TICKET_NAME, KIND_TLS_SESSION_ID, 0, 0]
                        },
                        ..Frontend::default()
                    };
                    d.frontends().set(index, frontend)?;
                    d.publish(VipKey::new(family.vip(), service as u16, protocol), index)?;
                    index += 1;
                }
            }
        }
        d.update_globals(|globals| {
            for family in Family::BOTH {
                globals.filter_add(family.vip());
                (0..BACKENDS).for_each(|backend| globals.filter_add(backend_at(family, backend).ip()));
            }
        })?;
        Ok(())
    }
}

fn mac_words([a, b]: [[u8; 6]; 2]) -> [u32; 3] {
    let word = u32::from_ne_bytes;
    [word([a[0], a[1], a[2], a[3]]), word([a[4], a[5], b[0], b[1]]), word([b[2], b[3], b[4], b[5]])]
}

/// A client's connection to a service, as far as packets go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Talk {
    /// The client.
    pub client: SocketAddr,
    /// The service.
    pub vip: SocketAddr,
    /// The client's initial sequence number.
    pub isn: u32,
    /// Options of its SYN.
    pub options: Vec<TcpOption>,
    /// The sequence number of the SYN-ACK, once it is there.
    pub cookie: u32,
    /// TSval in its SYN; later segments carry the next ones.
    pub clock: u32,
    /// The last TSval that it received.
    pub echo: u32,
    /// VLAN tags on the client's side.
    pub tags: Vec<[u8; 4]>,
}

/// The window field in a client's segments.
pub const CLIENT_WINDOW: u16 = 501;
/// The window scale in a client's SYN.
pub const CLIENT_WSCALE: u8 = 7;

impl Talk {
    /// A connection with the options that Linux sends.
    #[must_use]
    pub fn new(service: Service, family: Family, port: u16) -> Self {
        let clock = 1000;
        Self {
            client: client_at(family, port),
            vip: service.at(family),
            isn: 0xfffffff0_u32.wrapping_add(u32::from(port)),
            options: vec![
                TcpOption::Mss(1460),
                TcpOption::SackPermitted,
                TcpOption::Timestamps(clock, 0),
                TcpOption::Nop,
                TcpOption::Wscale(CLIENT_WSCALE),
            ],
            cookie: 0,
            clock,
            echo: 0,
            tags: Vec::new(),
        }
    }

    /// The same with other options in the SYN.
    #[must_use]
    pub fn with_options(mut self, options: Vec<TcpOption>) -> Self {
        self.options = options;
        self
    }

    /// A packet of the client.
    #[must_use]
    pub fn packet(&self, tcp: Tcp) -> Packet {
        let tcp = Tcp { src: self.client.port(), dst: self.vip.port(), ..tcp };
        let mut packet = Packet::new(self.client.ip(), self.vip.ip(), Body::Tcp(tcp));
        packet.macs = CLIENT_MACS;
        packet.tags.clone_from(&self.tags);
        packet.tos = 0x48;
        packet
    }

    /// The SYN.
    #[must_use]
    pub fn syn(&self) -> Packet {
        let options = self.options.clone();
        self.packet(Tcp { seq: self.isn, flags: flags::SYN, window: 64_240, options, ..Tcp::default() })
    }

    /// A segment `offset` bytes into the client's stream, which acknowledges `taken` bytes.
    #[must_use]
    pub fn segment(&self, flags: u8, offset: u32, taken: u32, payload: &[u8]) -> Packet {
        self.packet(Tcp {
            seq: self.isn.wrapping_add(1).wrapping_add(offset),
            ack: self.cookie.wrapping_add(1).wrapping_add(taken),
            flags,
            window: CLIENT_WINDOW,
            options: self.stamps(),
            payload: payload.to_vec(),
            ..Tcp::default()
        })
    }

    /// The bare ACK of the handshake.
    #[must_use]
    pub fn ack(&self) -> Packet {
        self.segment(flags::ACK, 0, 0, &[])
    }

    /// Data.
    #[must_use]
    pub fn data(&self, offset: u32, payload: &[u8]) -> Packet {
        self.segment(flags::ACK | flags::PSH, offset, 0, payload)
    }

    /// The client agreed to timestamps.
    #[must_use]
    pub fn has_timestamps(&self) -> bool {
        self.options.iter().any(|option| matches!(option, TcpOption::Timestamps(..)))
    }

    fn stamps(&self) -> Vec<TcpOption> {
        if self.has_timestamps() {
            vec![TcpOption::Nop, TcpOption::Nop, TcpOption::Timestamps(self.clock + 1, self.echo)]
        } else {
            Vec::new()
        }
    }

    /// Sends the SYN and takes note of the answer.
    pub fn shake(&mut self, machine: &Machine) -> Tcp {
        let answer = machine.expect("the SYN", &self.syn(), Reason::SynAnswered).tcp();
        self.cookie = answer.seq;
        self.echo = answer.timestamps().map_or(0, |stamps| stamps.0);
        answer
    }

    /// Takes the connection as far as the SYN to the backend, which is returned.
    pub fn bind(&mut self, machine: &Machine, data: &[u8], reason: Reason) -> Packet {
        self.shake(machine);
        let _ = machine.expect("the handshake's ACK", &self.ack(), Reason::CookieAck);
        machine.expect("the first data", &self.data(0, data), reason).packet()
    }

    /// Takes the connection until it is established. `data` must bind with `reason`.
    pub fn establish(&mut self, machine: &Machine, data: &[u8], reason: Reason) -> Far {
        let syn = self.bind(machine, data, reason);
        let far = Far::new(&syn);
        let _ = machine.expect("the backend's SYN-ACK", &far.syn_ack(), Reason::Replayed);
        far
    }
}

/// The backend's side of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Far {
    /// Address and port that the backend sees as its client.
    pub client: SocketAddr,
    /// The backend.
    pub backend: SocketAddr,
    /// The client's initial sequence number, as the backend sees it.
    pub isn: u32,
    /// The backend's.
    pub own_isn: u32,
    /// TSval of the backend's SYN-ACK.
    pub clock: u32,
    /// TSval of the SYN.
    pub echo: Option<u32>,
    /// Options of the SYN-ACK.
    pub options: Vec<TcpOption>,
}

/// The window scale in a backend's SYN-ACK.
pub const BACKEND_WSCALE: u8 = 6;

impl Far {
    /// A backend that has received a SYN.
    #[must_use]
    pub fn new(syn: &Packet) -> Self {
        let tcp = syn.tcp().unwrap_or_else(|error| panic!("a SYN to the backend: {error:#}"));
        let clock = 0x7000_0000;
        let echo = tcp.timestamps().map(|stamps| stamps.0);
        let mut options = vec![TcpOption::Mss(1460), TcpOption::SackPermitted];
        if let Some(echo) = echo {
            options.push(TcpOption::Timestamps(clock, echo));
        }
        options.extend([TcpOption::Nop, TcpOption::Wscale(BACKEND_WSCALE)]);
        Self {
            client: SocketAddr::new(syn.src, tcp.src),
            backend: SocketAddr::new(syn.dst, tcp.dst),
            isn: tcp.seq,
            own_isn: 0xffff_ff00,
            clock,
            echo,
            options,
        }
    }

    /// A packet of the backend.
    #[must_use]
    pub fn packet(&self, tcp: Tcp) -> Packet {
        let tcp = Tcp { src: self.backend.port(), dst: self.client.port(), ..tcp };
        let mut packet = Packet::new(self.backend.ip(), self.client.ip(), Body::Tcp(tcp));
        packet.macs = [[2, 0, 0, 0, 0, 0xd1], [2, 0, 0, 0, 1, 0]];
        packet
    }

    /// The SYN-ACK.
    #[must_use]
    pub fn syn_ack(&self) -> Packet {
        self.packet(Tcp {
            seq: self.own_isn,
            ack: self.isn.wrapping_add(1),
            flags: flags::SYN | flags::ACK,
            window: 65_160,
            options: self.options.clone(),
            ..Tcp::default()
        })
    }

    /// A segment `offset` bytes into the backend's stream, which acknowledges `taken` bytes.
    #[must_use]
    pub fn segment(&self, flags: u8, offset: u32, taken: u32, payload: &[u8]) -> Packet {
        let mut options = Vec::new();
        if let Some(echo) = self.echo {
            options = vec![TcpOption::Nop, TcpOption::Nop, TcpOption::Timestamps(self.clock + 5, echo)];
        }
        self.packet(Tcp {
            seq: self.own_isn.wrapping_add(1).wrapping_add(offset),
            ack: self.isn.wrapping_add(1).wrapping_add(taken),
            flags,
            window: 509,
            options,
            payload: payload.to_vec(),
            ..Tcp::default()
        })
    }
}
