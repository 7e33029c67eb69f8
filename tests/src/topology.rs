//! Clients, a dispatcher and backends, each in a network namespace of its own.
//!
//! ```text
//! two arms, bridge        clients eth0 -- cl0 dispatcher be0 -- switch -- eth0 of each backend
//! two arms, a link each   clients eth0 -- cl0 dispatcher be0, be1 .. -- eth0 of each backend
//! one arm                 clients eth0 -- switch -- eth0 of each backend
//!                                            |
//!                                        arm0 dispatcher
//! ```
//!
//! Clients and backends have the dispatcher as their router. What it does not take for a service,
//! its kernel routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};

use crate::{netns::Netns, tagger::Tagger};

/// How the dispatcher reaches clients and backends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// An interface to the clients, another to a bridge with all backends.
    Bridge,
    /// An interface to the clients, another to each backend.
    Links,
    /// One interface to a bridge with clients and backends.
    OneArm,
}

/// What to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    /// How the parts are connected.
    pub shape: Shape,
    /// Number of backends, at most 99.
    pub backends: u8,
    /// Number of addresses that clients have in each family, at most 99.
    pub clients: u8,
    /// VLAN tags between clients and dispatcher, at most 2 and with two arms only. The dispatcher's
    /// kernel knows nothing of them, so it routes nothing from and to such clients.
    pub tags: u8,
}

impl Default for Plan {
    fn default() -> Self {
        Self { shape: Shape::Bridge, backends: 3, clients: 4, tags: 0 }
    }
}

/// The VIP addresses.
pub const VIP: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 1)),
];

/// Addresses of the dispatcher for `source = "dispatcher"`.
pub const POOL: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 2, 0, 2)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2))];

/// Address of a client on the backends' network.
pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 2, 0, 200);

/// One of two address families.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The VIP of this family.
    #[must_use]
    pub fn vip(self) -> IpAddr {
        self.of(VIP)
    }

    /// The address of this family.
    #[must_use]
    pub fn of(self, [v4, v6]: [IpAddr; 2]) -> IpAddr {
        match self {
            Self::V4 => v4,
            Self::V6 => v6,
        }
    }
}

/// A backend's place.
#[derive(Debug)]
pub struct Place {
    /// Its namespace.
    pub netns: Netns,
    /// Its IPv4 and IPv6 address.
    pub addresses: [IpAddr; 2],
}

impl Place {
    /// Its address of a family.
    #[must_use]
    pub fn address(&self, family: Family) -> IpAddr {
        family.of(self.addresses)
    }
}

/// The namespaces, connected. Dropping it removes them.
#[derive(Debug)]
pub struct Topology {
    /// What was made.
    pub plan: Plan,
    /// Where clients are.
    pub clients: Netns,
    /// Where the dispatcher is.
    pub dispatcher: Netns,
    /// Where the backends are.
    pub backends: Vec<Place>,
    /// The bridge, where the shape has one.
    pub switch: Option<Netns>,
    tagger: Option<(Tagger, Netns)>,
}

/// Offloads that a veth pair under XDP must not use: a packet's checksum must be in the packet, its
/// tags too, and it must be no larger than the MTU.
const PLAIN: [&str; 12] = [
    "tx",
    "off",
    "tso",
    "off",
    "gso",
    "off",
    "txvlan",
    "off",
    "rxvlan",
    "off",
    "tx-vlan-stag-hw-insert",
    "off",
];

impl Topology {
    /// Makes the namespaces, addresses and routes.
    pub fn new(plan: Plan) -> Result<Self> {
        let dispatcher = Netns::new("dispatcher")?;
        let clients = Netns::new("clients")?;
        let switch = match plan.shape {
            Shape::Bridge | Shape::OneArm => Some(Netns::new("switch")?),
            Shape::Links => None,
        };
        let backends = (0..plan.backends)
            .map(|i| {
                Ok(Place {
                    netns: Netns::new(&format!("b{}", i + 1))?,
                    addresses: backend_addresses(plan, i),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        let mut topology = Self { plan, clients, dispatcher, backends, switch, tagger: None };
        topology.connect()?;
        Ok(topology)
    }

    /// The dispatcher's interfaces, clients' side first.
    #[must_use]
    pub fn interfaces(&self) -> Vec<String> {
        match self.plan.shape {
            Shape::Bridge => vec!["cl0".into(), "be0".into()],
            Shape::OneArm => vec!["arm0".into()],
            Shape::Links => {
                let links = (0..self.plan.backends).map(|i| format!("be{i}"));
                std::iter::once("cl0".into()).chain(links).collect()
            }
        }
    }

    /// A client's address; `number` counts from 0 and wraps.
    #[must_use]
    pub fn client(&self, family: Family, number: usize) -> IpAddr {
        let host = 10 + (number % usize::from(self.plan.clients)) as u8;
        family.of([
            Ipv4Addr::new(10, 1, 0, host).into(),
            Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, u16::from(host)).into(),
        ])
    }

    /// A client at [`NEAR`], where the backends are on a bridge.
    pub fn near(&self) -> Result<Netns> {
        let netns = Netns::new("near")?;
        let switch = self.switch.as_ref().context("no switch")?;
        cable(&netns, "eth0", switch, "near")?;
        switch.ip("link set near master br0")?;
        netns.ip(&format!("address add {NEAR}/24 dev eth0"))?;
        Ok(netns)
    }

    /// Drops a share of the packets that leave and reach a namespace.
    pub fn lose(netns: &Netns, percent: u8) -> Result<()> {
        netns.nft(&format!(
            "table inet loss {{
                chain i {{ type filter hook input priority 0; meta l4proto tcp numgen random mod 100 < {percent} drop; }}
                chain o {{ type filter hook output priority 0; meta l4proto tcp numgen random mod 100 < {percent} drop; }}
            }}"
        ))
    }

    /// Ends what [`lose`](Self::lose) began.
    pub fn lose_nothing(netns: &Netns) -> Result<()> {
        netns.nft("delete table inet loss")
    }

    fn connect(&mut self) -> Result<()> {
        for netns in self.all() {
            netns.sysctl(&[
                "ipv6/conf/all/accept_dad=0",
                "ipv6/conf/default/accept_dad=0",
                "ipv6/conf/all/accept_ra=0",
                "ipv6/conf/default/accept_ra=0",
            ])?;
        }
        self.dispatcher.sysctl(&[
            "ipv4/ip_forward=1",
            "ipv6/conf/all/forwarding=1",
            "ipv4/conf/all/rp_filter=0",
            "ipv4/conf/default/rp_filter=0",
            "ipv4/conf/all/send_redirects=0",
            "ipv4/conf/default/send_redirects=0",
        ])?;
        if let Some(switch) = &self.switch {
            switch.ip("link add br0 type bridge stp_state 0 mcast_snooping 0\nlink set br0 up")?;
        }
        match self.plan.shape {
            Shape::Bridge => {
                self.reach_clients()?;
                self.plug(&self.dispatcher, "be0", "p0")?;
            }
            Shape::Links => self.reach_clients()?,
            Shape::OneArm => {
                self.plug(&self.dispatcher, "arm0", "p0")?;
                self.plug(&self.clients, "eth0", "pc")?;
            }
        }
        for (i, place) in self.backends.iter().enumerate() {
            match self.plan.shape {
                Shape::Links => cable(&self.dispatcher, &format!("be{i}"), &place.netns, "eth0")?,
                Shape::Bridge | Shape::OneArm => self.plug(&place.netns, "eth0", &format!("p{}", i + 1))?,
            }
        }
        self.client_side()?;
        self.backend_side()?;
        let vips = format!("address add {}/32 dev lo\naddress add {}/128 dev lo", VIP[0], VIP[1]);
        self.dispatcher.ip(&vips)
    }

    fn all(&self) -> impl Iterator<Item = &Netns> {
        [&self.clients, &self.dispatcher]
            .into_iter()
            .chain(&self.switch)
            .chain(self.backends.iter().map(|b| &b.netns))
    }

    fn reach_clients(&mut self) -> Result<()> {
        if self.plan.tags == 0 {
            return cable(&self.dispatcher, "cl0", &self.clients, "eth0");
        }
        let netns = Netns::new("tagger")?;
        cable(&self.clients, "eth0", &netns, "plain")?;
        cable(&self.dispatcher, "cl0", &netns, "trunk")?;
        let tagger = Tagger::new(&netns, "plain", "trunk", self.plan.tags)?;
        self.tagger = Some((tagger, netns));
        Ok(())
    }

    fn plug(&self, netns: &Netns, device: &str, port: &str) -> Result<()> {
        let Some(switch) = &self.switch else { return Ok(()) };
        cable(netns, device, switch, port)?;
        switch.ip(&format!("link set {port} master br0"))
    }

    fn client_side(&self) -> Result<()> {
        let arm = if self.plan.shape == Shape::OneArm { "arm0" } else { "cl0" };
        self.dispatcher.ip(&format!(
            "address add 10.1.0.1/24 dev {arm}\naddress add 2001:db8:1::1/64 dev {arm} nodad"
        ))?;
        let mut commands = String::new();
        for number in 0..usize::from(self.plan.clients) {
            let (v4, v6) = (self.client(Family::V4, number), self.client(Family::V6, number));
            commands += &format!("address add {v4}/24 dev eth0\naddress add {v6}/64 dev eth0 nodad\n");
        }
        commands += "route add default via 10.1.0.1\nroute add default via 2001:db8:1::1\n";
        if self.tagger.is_some() {
            let mac = mac(&self.dispatcher, arm)?;
            commands += &format!("neighbour replace 10.1.0.1 lladdr {mac} dev eth0\n");
            commands += &format!("neighbour replace 2001:db8:1::1 lladdr {mac} dev eth0\n");
            // A veth takes frames of MTU plus one tag: the second costs four bytes of payload.
            commands += "link set eth0 mtu 1496\n";
        }
        self.clients.ip(&commands)
    }

    fn backend_side(&self) -> Result<()> {
        let mut routers = String::new();
        match self.plan.shape {
            Shape::Bridge => routers += &router("be0", 0),
            Shape::OneArm => routers += &router("arm0", 0),
            Shape::Links => {
                for i in 0..self.plan.backends {
                    routers += &router(&format!("be{i}"), i);
                }
            }
        }
        self.dispatcher.ip(&routers)?;
        for (i, place) in self.backends.iter().enumerate() {
            let net = if self.plan.shape == Shape::Links { i } else { 0 };
            let [v4, v6] = place.addresses;
            place.netns.ip(&format!(
                "address add {v4}/24 dev eth0\naddress add {v6}/64 dev eth0 nodad\n\
                 route add default via 10.2.{net}.1\nroute add default via 2001:db8:2:{net}::1\n"
            ))?;
        }
        Ok(())
    }
}

/// Addresses of the dispatcher toward a network of backends: its own and the pool's.
fn router(device: &str, net: u8) -> String {
    let mut commands = format!(
        "address add 10.2.{net}.1/24 dev {device}\naddress add 2001:db8:2:{net}::1/64 dev {device} nodad\n"
    );
    if net == 0 {
        commands += &format!(
            "address add {}/24 dev {device}\naddress add {}/64 dev {device} nodad\n",
            POOL[0], POOL[1]
        );
    }
    commands
}

fn backend_addresses(plan: Plan, i: u8) -> [IpAddr; 2] {
    let net = if plan.shape == Shape::Links { i } else { 0 };
    let host = 11 + i;
    [
        Ipv4Addr::new(10, 2, net, host).into(),
        Ipv6Addr::new(0x2001, 0xdb8, 2, u16::from(net), 0, 0, 0, u16::from(host)).into(),
    ]
}

/// Connects two namespaces by a veth pair. The far end has GRO, hence NAPI: without it, or an XDP
/// program, frames that are redirected to the near end vanish (6.18).
pub fn cable(near: &Netns, device: &str, far: &Netns, end: &str) -> Result<()> {
    near.ip(&format!("link add {device} type veth peer name {end} netns {}", far.name()))?;
    near.execute("ethtool", &[&["-K", device], PLAIN.as_slice(), &["gro", "off"]].concat())?;
    far.execute("ethtool", &[&["-K", end], PLAIN.as_slice(), &["gro", "on"]].concat())?;
    near.ip(&format!("link set {device} up"))?;
    far.ip(&format!("link set {end} up"))
}

/// The MAC address of a device.
pub fn mac(netns: &Netns, device: &str) -> Result<String> {
    let text = netns.execute("ip", &["-json", "link", "show", "dev", device])?;
    let links: serde_json::Value = serde_json::from_str(&text)?;
    let mac = links.pointer("/0/address").and_then(|mac| mac.as_str());
    mac.map(str::to_owned).with_context(|| format!("no MAC address in what `ip link show dev {device}` says"))
}
