//! The demo's second service: TLS ends at the dispatcher, and requests go to the same servers through its tunnels.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write},
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use dispatcher_user::api;

use super::{Summary, lock};
use crate::{
    daemon::{Daemon, Folder, Service},
    http,
    tls::{Authority, HOST, Identity, User, Version},
    topology::{Family, Topology},
};

/// Port of the service.
pub(super) const PORT: u16 = 8443;
/// Who shops; each keeps a cookie.
const SHOPPERS: u64 = 12;
/// Time between two requests.
const PAUSE: Duration = Duration::from_millis(50);
/// After so many visits a shopper throws the cookie away and begins anew.
const PATIENT_VISITS: u32 = 20;

/// The service, whose certificate goes to a folder.
pub(super) fn service(folder: &Folder, authority: &Authority) -> Result<Service> {
    let own = authority.issue("dispatcher")?;
    let certificate = folder.write("shop.pem", &format!("{}{}", own.certificate_pem, own.key_pem))?;
    let roots = folder.write("roots.pem", &authority.pem())?;
    Ok(Service::new("shop", PORT)
        .backend_port(super::PORT)
        .with("mode = \"terminate\"")
        .with("balance = \"weighted-round-robin\"")
        .with(&format!("terminate.certificates = [{{ certificate = \"{}\" }}]", certificate.display()))
        .with(&format!(
            "tunnels = {{ roots = \"{}\", server_name = \"{HOST}\", established = {TUNNELS} }}",
            roots.display()
        )))
}

/// To each server.
const TUNNELS: usize = 4;

/// Waits for the tunnels and shows one to each server.
pub(super) fn wait_for_tunnels(daemon: &Daemon, stop: &AtomicBool, out: &mut impl Write) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let found: Vec<api::TunnelBackend> = daemon.ask(&["tunnels", "backends"])?;
        if found.iter().all(|one| one.established >= TUNNELS) || stop.load(Ordering::Relaxed) {
            break;
        }
        if Instant::now() > deadline {
            bail!("tunnels were not established: {found:#?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut tunnels: Vec<api::Tunnel> = daemon.ask(&["tunnels"])?;
    tunnels.sort_by(|a, b| a.backend.cmp(&b.backend));
    tunnels.dedup_by(|a, b| a.backend == b.backend);
    writeln!(
        out,
        "Tunnels (SSL contexts) for port {PORT}, where TLS ends at the dispatcher; one of each server's:"
    )?;
    for tunnel in &tunnels {
        let group = tunnel.group.as_deref().unwrap_or("-");
        let api::Tunnel { backend, source, destination, cipher_suite, .. } = tunnel;
        writeln!(out, "  {backend}  {source} -> {destination}  {cipher_suite} {group}")?;
    }
    Ok(writeln!(out)?)
}

/// Those who shop.
pub(super) struct Shop<'a> {
    topology: &'a Topology,
    user: User,
    tally: Mutex<Tally>,
}

#[derive(Default)]
struct Shopper {
    cookie: Option<String>,
    home: Option<String>,
    visits: u32,
}

#[derive(Default)]
struct Tally {
    requests: u64,
    returning: u64,
    at_home: u64,
    /// Answers and those to returning shoppers, by server.
    per_backend: BTreeMap<String, (u64, u64)>,
    troubles: Vec<String>,
}

impl<'a> Shop<'a> {
    pub(super) fn new(topology: &'a Topology, authority: &Authority) -> Result<Self> {
        Ok(Self { topology, user: User::new(authority, Version::Tls13)?, tally: Mutex::default() })
    }

    /// Makes requests, each on a connection of its own, until told to stop.
    pub(super) fn work(&self, stop: &AtomicBool) {
        let mut shoppers: Vec<Shopper> = (0..SHOPPERS).map(|_| Shopper::default()).collect();
        let mut turn = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            let number = (turn * 5 % SHOPPERS) as usize;
            let family = if (turn / 3).is_multiple_of(2) { Family::V4 } else { Family::V6 };
            let shopper = &mut shoppers[number];
            let answer = self.visit(shopper, family, turn as usize);
            self.note(shopper, answer);
            if shopper.visits >= PATIENT_VISITS {
                *shopper = Shopper::default();
            }
            turn += 1;
            std::thread::sleep(PAUSE);
        }
    }

    /// Asks with the cookie that was given before; keeps the one that is given.
    fn visit(&self, shopper: &mut Shopper, family: Family, client: usize) -> Result<Identity> {
        let (from, to) = (self.topology.client(family, client), SocketAddr::new(family.vip(), PORT));
        let mut line = self.user.connect(&self.topology.clients, from, to)?;
        let cookie =
            shopper.cookie.as_ref().map(|cookie| format!("Cookie: {cookie}\r\n")).unwrap_or_default();
        write!(line, "GET / HTTP/1.1\r\nHost: {HOST}\r\n{cookie}Connection: close\r\n\r\n")?;
        line.flush()?;
        let head = http::read_head(&mut line)?.context("no answer")?;
        let mut body = vec![0; head.length as usize];
        line.read_exact(&mut body)?;
        if let Some(cookie) = head.cookie {
            shopper.cookie = Some(cookie);
        }
        if !head.line.contains(" 200 ") {
            bail!("{}: {}", head.line, String::from_utf8_lossy(&body));
        }
        Ok(serde_json::from_slice(&body)?)
    }

    fn note(&self, shopper: &mut Shopper, answer: Result<Identity>) {
        let mut tally = lock(&self.tally);
        tally.requests += 1;
        shopper.visits += 1;
        let backend = match answer {
            Ok(identity) => identity.backend,
            Err(error) => return tally.troubles.push(format!("shop: {error:#}")),
        };
        let landed = tally.per_backend.entry(backend.clone()).or_default();
        landed.0 += 1;
        match &shopper.home {
            None => shopper.home = Some(backend),
            Some(home) => {
                landed.1 += 1;
                tally.returning += 1;
                if *home == backend {
                    tally.at_home += 1;
                } else {
                    let trouble = format!("shop: a session of {home} came to {backend}");
                    tally.troubles.push(trouble);
                }
            }
        }
    }

    /// Left what the daemon counts, right what the shoppers saw.
    pub(super) fn table(&self, daemon: &Daemon) -> Result<String> {
        let mut backends: Vec<api::TunnelBackend> = daemon.ask(&["tunnels", "backends"])?;
        backends.sort_by(|a, b| a.backend.cmp(&b.backend));
        let tunnels: Vec<api::Tunnel> = daemon.ask(&["tunnels"])?;
        let tally = lock(&self.tally);
        let mut text =
            "shop, TLS ends |  tunnels  handshakes  requests  sessions |  answers  returning\n".to_owned();
        for backend in backends {
            let own = || tunnels.iter().filter(|one| one.backend == backend.backend);
            let (answers, returning) = tally.per_backend.get(&backend.backend).copied().unwrap_or_default();
            text += &format!(
                "{:<14} |  {:7}  {:10}  {:8}  {:8} |  {answers:7}  {returning:9}\n",
                backend.backend,
                backend.established,
                backend.handshakes,
                own().map(|one| one.requests).sum::<u64>(),
                own().map(|one| one.sessions).sum::<u32>(),
            );
        }
        Ok(text)
    }

    /// Adds what was seen.
    pub(super) fn sum(&self, sum: &mut Summary) {
        let tally = lock(&self.tally);
        sum.requests = tally.requests;
        sum.shoppers_returning = tally.returning;
        sum.shoppers_same_backend = tally.at_home;
    }

    pub(super) fn troubles(&self) -> Vec<String> {
        lock(&self.tally).troubles.clone()
    }
}
