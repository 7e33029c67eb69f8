//! The scene: servers, a daemon in front of them, and clients.

use std::{
    any::Any,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use dispatcher_tests::{
    daemon::{Daemon, Folder, Service, config},
    http,
    system::Nginx,
    tls::{Authority, HOST, Identity, Line, Manners, Server, User, Version},
    topology::{Family, Plan, Topology},
    town::until,
};
use dispatcher_user::api;
use rustls::{ClientConnection, StreamOwned};

use crate::mirror::{Manner, Mirror, Seen};

/// Port of the service and of its backends.
pub(crate) const PORT: u16 = 443;
/// Tunnels to each backend.
pub(crate) const ESTABLISHED: usize = 4;
pub(crate) const COOKIE: &str = "affinity = \"http-cookie:sid\"";

/// What answers in the backends' namespaces.
pub(crate) enum Servers {
    /// HTTP/2; `/login` sets the cookie.
    Nginx { _running: Vec<Nginx> },
    /// HTTP/1.1; `/login/VALUE` sets the cookie.
    Own(Vec<Server>),
    /// What they were sent can be asked.
    Mirrors(Vec<Mirror>),
    /// Whatever a test has set up.
    Others(#[expect(dead_code, reason = "held until the end of the test")] Vec<Box<dyn Any + Send + Sync>>),
}

/// Dropped in this order.
pub(crate) struct Scene {
    pub(crate) daemon: Daemon,
    pub(crate) servers: Servers,
    pub(crate) folder: Folder,
    pub(crate) text: String,
    pub(crate) authority: Authority,
    pub(crate) topology: Topology,
}

pub(crate) type Connection = Line<StreamOwned<ClientConnection, TcpStream>>;

impl Scene {
    /// A service in front of servers that have been started, as soon as tunnels to all of them are there.
    pub(crate) fn new(http2: bool, lines: &[&str]) -> Self {
        let scene = Self::begin(http2, lines).unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
        until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
        scene
    }

    pub(crate) fn begin(http2: bool, lines: &[&str]) -> Result<Self> {
        Self::before(lines, |topology, authority| {
            let places =
                topology.backends.iter().enumerate().map(|(i, place)| (format!("b{}", i + 1), place));
            Ok(if http2 {
                let all = places.map(|(name, place)| Nginx::with_http2(&place.netns, &name, PORT, authority));
                Servers::Nginx { _running: all.collect::<Result<_>>()? }
            } else {
                let manners = Manners::default();
                let all =
                    places.map(|(name, place)| Server::start(&place.netns, &name, PORT, authority, manners));
                Servers::Own(all.collect::<Result<_>>()?)
            })
        })
    }

    /// A service in front of [`Mirror`]s, as soon as there are tunnels.
    pub(crate) fn mirrors(manner: Manner<'_>, lines: &[&str]) -> Self {
        let scene = Self::before(lines, |topology, authority| {
            let places = topology.backends.iter().enumerate();
            let all = places.map(|(i, place)| {
                Mirror::start(&place.netns, &format!("b{}", i + 1), PORT, authority, manner)
            });
            Ok(Servers::Mirrors(all.collect::<Result<_>>()?))
        });
        let scene = scene.unwrap_or_else(|error| panic!("setting the scene: {error:#}"));
        until("tunnels are established", || scene.tunnels().len() == 3 * ESTABLISHED);
        scene
    }

    /// The requests that mirrors have got.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        let Servers::Mirrors(mirrors) = &self.servers else { panic!("no mirrors") };
        mirrors.iter().flat_map(Mirror::seen).collect()
    }

    /// A service in front of servers.
    pub(crate) fn before(
        lines: &[&str],
        servers: impl FnOnce(&Topology, &Authority) -> Result<Servers>,
    ) -> Result<Self> {
        let authority = Authority::new()?;
        let topology = Topology::new(Plan::default())?;
        let folder = Folder::new()?;
        let own = authority.issue("dispatcher")?;
        let certificate = folder.write("web.pem", &own.certificate_pem)?;
        let key = folder.write("web.key", &own.key_pem)?;
        let roots = folder.write("roots.pem", &authority.pem())?;
        let servers = servers(&topology, &authority)?;
        let mut shop = Service::new("shop", PORT).with("mode = \"terminate\"");
        for line in lines {
            shop = shop.with(line);
        }
        if !lines.iter().any(|line| line.starts_with("terminate.certificates")) {
            shop = shop.with(&format!(
                "terminate.certificates = [{{ certificate = \"{}\", key = \"{}\" }}]",
                certificate.display(),
                key.display()
            ));
        }
        let shop = shop.with(&format!("tunnels.roots = \"{}\"", roots.display()));
        let shop = if lines.iter().any(|line| line.starts_with("tunnels.established")) {
            shop
        } else {
            shop.with(&format!("tunnels.established = {ESTABLISHED}"))
        };
        let shop = if lines.iter().any(|line| line.starts_with("tunnels.server_name")) {
            shop
        } else {
            shop.with(&format!("tunnels.server_name = \"{HOST}\""))
        };
        let text = config(&topology, "native", &[shop]);
        let daemon = Daemon::start_with(&topology.dispatcher, &text)?;
        Ok(Self { daemon, servers, folder, text, authority, topology })
    }

    pub(crate) fn tunnels(&self) -> Vec<api::Tunnel> {
        self.daemon.ask(&["tunnels"]).expect("tunnels")
    }

    pub(crate) fn tunnel_backends(&self) -> Vec<api::TunnelBackend> {
        self.daemon.ask(&["tunnels", "backends"]).expect("backends")
    }

    pub(crate) fn handshakes(&self) -> u64 {
        self.tunnel_backends().iter().map(|one| one.handshakes).sum()
    }

    pub(crate) fn sessions(&self) -> Vec<api::Session> {
        self.daemon.ask(&["sessions", "list"]).expect("sessions")
    }

    pub(crate) fn connect(&self, family: Family, client: usize) -> Connection {
        let user = User::new(&self.authority, Version::Tls13).expect("a user");
        let (from, to) = (self.topology.client(family, client), SocketAddr::new(family.vip(), PORT));
        user.connect(&self.topology.clients, from, to).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Asks for a path with curl, with what is in a jar of cookies; what the service says.
    pub(crate) fn curl(&self, jar: &str, family: Family, arguments: &[&str], path: &str) -> Result<String> {
        let vip = match family {
            Family::V4 => family.vip().to_string(),
            Family::V6 => format!("[{}]", family.vip()),
        };
        let file = |name: &str| self.folder.path().join(name).to_string_lossy().into_owned();
        let (jar, roots) = (file(jar), file("roots.pem"));
        let (to, url) = (format!("{HOST}:{PORT}:{vip}"), format!("https://{HOST}:{PORT}{path}"));
        let mut all =
            vec!["-sS", "--max-time", "10", "--cacert", &roots, "-b", &jar, "-c", &jar, "--resolve", &to];
        all.extend(arguments);
        all.push(&url);
        self.topology.clients.execute("curl", &all)
    }

    pub(crate) fn visit(&self, jar: &str, family: Family, arguments: &[&str], path: &str) -> Identity {
        let answer = self.curl(jar, family, arguments, path).unwrap_or_else(|error| panic!("{error:#}"));
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error}: {answer}"))
    }
}

/// Sends a text and reads one answer: its first line, its header and its body.
pub(crate) fn say(line: &mut Connection, text: &str) -> Result<(String, String)> {
    line.write_all(text.as_bytes())?;
    line.flush()?;
    let head = http::read_head(line)?.context("no answer")?;
    let mut body = vec![0; head.length as usize];
    line.read_exact(&mut body)?;
    Ok((head.line, String::from_utf8_lossy(&body).into_owned()))
}

/// Memory that the daemon has, bytes.
pub(crate) fn memory(scene: &mut Scene) -> u64 {
    let file = format!("/proc/{}/status", scene.daemon.process().id());
    let text = std::fs::read_to_string(file).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Processor time that the daemon has used.
pub(crate) fn processor(scene: &mut Scene) -> Duration {
    let file = format!("/proc/{}/stat", scene.daemon.process().id());
    let text = std::fs::read_to_string(file).expect("it runs");
    let (_, rest) = text.rsplit_once(')').expect("its name");
    let ticks = rest.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok());
    // A hundredth of a second each (USER_HZ).
    Duration::from_millis(ticks.sum::<u64>() * 10)
}
