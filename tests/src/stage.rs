//! A topology with a running dispatcher and TLS servers: what scenarios begin with.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, ensure};

use crate::{
    daemon::{Daemon, Service},
    http, sockets,
    tls::{Authority, Identity, Manners, Server, User, Version, visit_in_clear},
    topology::{Family, Plan, Topology},
};

/// Port of the service and its servers.
pub const PORT: u16 = 443;

/// Dropped in the order of its fields: the dispatcher first, the namespaces last.
#[derive(Debug)]
pub struct Stage {
    /// The dispatcher.
    pub daemon: Daemon,
    /// A server in each backend's namespace, named `b1` and so on.
    pub servers: Vec<Server>,
    /// Who issued their certificates.
    pub authority: Authority,
    /// Where all that is.
    pub topology: Topology,
}

impl Stage {
    /// Two arms, three backends, a `passthrough` service `web` in native mode.
    #[must_use]
    pub fn usual() -> Self {
        Self::new(Plan::default(), "native", &web(), Manners::default())
    }

    /// As told. A scenario whose stage cannot be set has failed.
    #[must_use]
    pub fn new(plan: Plan, attach: &str, service: &Service, manners: Manners) -> Self {
        let set = || {
            let authority = Authority::new()?;
            let topology = Topology::new(plan)?;
            let servers = topology
                .backends
                .iter()
                .enumerate()
                .map(|(i, place)| {
                    Server::start(&place.netns, &format!("b{}", i + 1), PORT, &authority, manners)
                })
                .collect::<Result<_>>()?;
            let daemon = Daemon::start(&topology, attach, std::slice::from_ref(service))?;
            Ok::<_, anyhow::Error>(Self { daemon, servers, authority, topology })
        };
        set().unwrap_or_else(|error| panic!("setting the stage: {error:#}"))
    }

    /// Ends a server and starts another in its place, without its sessions and keys.
    pub fn restart(&mut self, number: usize, manners: Manners) {
        let old = self.servers.remove(number);
        let name = old.name.clone();
        drop(old);
        let place = &self.topology.backends[number];
        let server = Server::start(&place.netns, &name, PORT, &self.authority, manners)
            .unwrap_or_else(|error| panic!("restarting {name}: {error:#}"));
        self.servers.insert(number, server);
    }

    /// Someone new.
    #[must_use]
    pub fn user(&self, version: Version) -> User {
        User::new(&self.authority, version).unwrap_or_else(|error| panic!("making a user: {error:#}"))
    }

    /// The service's address of a family.
    #[must_use]
    pub fn at(&self, family: Family) -> SocketAddr {
        SocketAddr::new(family.vip(), PORT)
    }

    /// A visit from the client address with this number. It must be answered.
    #[must_use]
    pub fn visit(&self, user: &User, family: Family, client: usize) -> Identity {
        let from = self.from(family, client);
        user.visit(&self.topology.clients, from, self.at(family))
            .unwrap_or_else(|error| panic!("from {from}: {error}"))
    }

    /// The same without TLS.
    #[must_use]
    pub fn visit_in_clear(&self, family: Family, client: usize) -> Identity {
        let from = self.from(family, client);
        visit_in_clear(&self.topology.clients, from, self.at(family))
            .unwrap_or_else(|error| panic!("from {from}: {error}"))
    }

    /// A client's address.
    #[must_use]
    pub fn from(&self, family: Family, client: usize) -> IpAddr {
        self.topology.client(family, client)
    }

    /// A user who comes `times` times, each time from another address and port, by turns of families.
    /// All visits must reach one server, and all but the first must resume; its name.
    #[must_use]
    pub fn returns(&self, times: usize) -> String {
        let user = self.user(Version::Tls12);
        let visits: Vec<_> =
            (0..times).map(|turn| self.visit(&user, Family::BOTH[turn % 2], turn / 2)).collect();
        let servers: BTreeSet<_> = visits.iter().map(|identity| identity.backend.clone()).collect();
        assert_eq!(servers.len(), 1, "one session, several servers: {visits:#?}");
        let reused: String = visits.iter().map(|identity| identity.reused.as_str()).collect();
        assert_eq!(reused, format!(".{}", "r".repeat(times - 1)), "{visits:#?}");
        servers.into_iter().next().unwrap_or_default()
    }

    /// Downloads and uploads so many bytes over one connection, and checks their sums.
    pub fn transfer(&self, version: Version, family: Family, bytes: u64) -> Result<()> {
        let user = self.user(version);
        let mut line = user.connect(&self.topology.clients, self.from(family, 0), self.at(family))?;
        http::download(&mut line, bytes)?;
        http::upload(&mut line, bytes)
    }

    /// Opens a TCP connection and sends nothing.
    pub fn connect(&self, family: Family, client: usize) -> Result<std::net::TcpStream> {
        Ok(sockets::connect(&self.topology.clients, self.from(family, client), self.at(family))?)
    }

    /// Fails when packets were dropped for any reason but these.
    pub fn only_drops(&self, allowed: &[&str]) -> Result<()> {
        let drops = self.daemon.drops()?;
        ensure!(
            drops.iter().all(|(name, _)| allowed.contains(&name.as_str())),
            "packets were dropped: {drops:?}"
        );
        Ok(())
    }
}

/// The service `web`.
#[must_use]
pub fn web() -> Service {
    Service::new("web", PORT)
}
