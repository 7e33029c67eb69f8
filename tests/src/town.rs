//! Clients who come, stay and return while a scenario does something to the dispatcher or to a server.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpStream},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use crate::{
    http, sockets,
    stage::PORT,
    tls::{Authority, Identity, Line, Server, User, Version},
    topology::{Family, Topology},
};

/// Nothing takes as long as this.
const LIMIT: Duration = Duration::from_secs(60);

/// Clients and servers.
#[derive(Debug)]
pub struct Town {
    /// Who issued the servers' certificates.
    pub authority: Authority,
    /// The servers.
    pub servers: Vec<Server>,
    /// Where all that is.
    pub topology: Topology,
}

impl Town {
    /// Someone new.
    #[must_use]
    pub fn user(&self, version: Version) -> User {
        User::new(&self.authority, version).unwrap_or_else(|error| panic!("making a user: {error:#}"))
    }

    /// A visit, each from another address, by turns of families.
    pub fn visit(&self, user: &User, turn: usize) -> Result<Identity, String> {
        self.on_a_stream(turn, |stream| user.visit_on(stream).map_err(anyhow::Error::from))
    }

    /// The same without TLS.
    pub fn visit_in_clear(&self, turn: usize) -> Result<Identity, String> {
        self.on_a_stream(turn, |stream| Ok(serde_json::from_str(&http::get(&mut Line::new(stream), "/")?)?))
    }

    /// An error says from where it was, for whoever has a capture.
    fn on_a_stream<T>(
        &self,
        turn: usize,
        visit: impl FnOnce(TcpStream) -> anyhow::Result<T>,
    ) -> Result<T, String> {
        let (from, to) = self.way(turn);
        let stream = sockets::connect(&self.topology.clients, from, to)
            .map_err(|error| format!("from {from}: connecting: {error}"))?;
        let from = stream.local_addr().map_err(|error| error.to_string())?;
        visit(stream).map_err(|error| format!("from {from}: {error:#}"))
    }

    fn way(&self, turn: usize) -> (std::net::IpAddr, SocketAddr) {
        let family = Family::BOTH[turn % 2];
        (self.topology.client(family, turn / 2), SocketAddr::new(family.vip(), PORT))
    }
}

/// A server that ends, with all that it knows.
#[derive(Debug)]
struct Loss {
    server: String,
    /// When it had ended: connections that were begun before may have been its own.
    over: Option<Instant>,
}

/// Clients that come and go until they are told to stop.
#[derive(Debug, Default)]
pub struct Crowd {
    stop: AtomicBool,
    visits: AtomicU64,
    megabytes: AtomicU64,
    excused: AtomicU64,
    problems: Mutex<Vec<String>>,
    loss: Mutex<Option<Loss>>,
    newcomers: Mutex<BTreeSet<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Crowd {
    /// Lets `users` come and go and two connections stay, while `work` is done. With each visit of a user come
    /// somebody new and `in_clear` others without TLS.
    ///
    /// Everybody must be served, and whoever has a session must be known at home. Panics otherwise.
    pub fn around(town: &Town, users: usize, in_clear: usize, work: impl FnOnce(&Self)) {
        /// Ends a crowd, also when a test fails.
        struct End<'c>(&'c Crowd);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.stop.store(true, Ordering::Relaxed);
            }
        }
        let crowd = Self::default();
        std::thread::scope(|scope| {
            let crowd = &crowd;
            let _end = End(crowd);
            for number in 0..users {
                scope.spawn(move || crowd.come_and_go(town, number, in_clear));
            }
            for family in Family::BOTH {
                scope.spawn(move || crowd.stay(town, family));
            }
            crowd.go_on();
            work(crowd);
            crowd.go_on();
        });
        assert_eq!(*lock(&crowd.problems), [""; 0]);
    }

    /// Visits so far.
    #[must_use]
    pub fn visits(&self) -> u64 {
        self.visits.load(Ordering::Relaxed)
    }

    /// Connections that ended with the server that they were made to.
    #[must_use]
    pub fn excused(&self) -> u64 {
        self.excused.load(Ordering::Relaxed)
    }

    /// Where those without a session have been sent since this was last asked.
    #[must_use]
    pub fn newcomers(&self) -> BTreeSet<String> {
        std::mem::take(&mut *lock(&self.newcomers))
    }

    /// Ends a server by `end`. Connections that are made meanwhile may fail, and who has a session there begins
    /// anew; all else must go on.
    pub fn lose(&self, server: &str, end: impl FnOnce()) {
        *lock(&self.loss) = Some(Loss { server: server.to_owned(), over: None });
        end();
        if let Some(loss) = lock(&self.loss).as_mut() {
            loss.over = Some(Instant::now());
        }
    }

    fn problem(&self, problem: String) {
        lock(&self.problems).push(problem);
    }

    /// True when something begun then, by someone of this home, may have gone wrong.
    fn excuses(&self, began: Instant, home: &str) -> bool {
        let loss = lock(&self.loss);
        let excused = loss
            .as_ref()
            .is_some_and(|loss| loss.server == home || loss.over.is_none_or(|over| began < over));
        self.excused.fetch_add(excused.into(), Ordering::Relaxed);
        excused
    }

    /// One user comes back, by turns of families, and must always land at home; others are new each time.
    fn come_and_go(&self, town: &Town, number: usize, in_clear: usize) {
        let version = Version::BOTH[number % 2];
        let (mut user, mut home) = (town.user(version), None::<String>);
        let mut turn = number;
        while !self.stop.load(Ordering::Relaxed) {
            turn += 1;
            let began = Instant::now();
            match (town.visit(&user, turn), &home) {
                (Ok(identity), None) => home = Some(identity.backend),
                (Ok(identity), Some(home)) if identity.backend == *home && identity.reused == "r" => {}
                (result, known) => {
                    if !self.excuses(began, known.as_deref().unwrap_or_default()) {
                        self.problem(format!("of {known:?}: {result:?}"));
                    }
                    (user, home) = (town.user(version), None);
                }
            }
            for newcomer in 0..=in_clear {
                let secure = newcomer == 0;
                let began = Instant::now();
                let done =
                    if secure { town.visit(&town.user(version), turn) } else { town.visit_in_clear(turn) };
                match done {
                    Ok(identity) => drop(lock(&self.newcomers).insert(identity.backend)),
                    Err(_) if self.excuses(began, "") => {}
                    Err(problem) => self.problem(format!("newcomer: {problem}")),
                }
            }
            self.visits.fetch_add(2 + in_clear as u64, Ordering::Relaxed);
        }
    }

    /// One connection on which bytes never end, not to the last server.
    fn stay(&self, town: &Town, family: Family) {
        let (from, to) = (town.topology.client(family, 3), SocketAddr::new(family.vip(), PORT));
        let avoided = format!("b{}", town.topology.backends.len());
        let connect = || -> anyhow::Result<_> {
            for _ in 0..20 {
                let mut line = town.user(Version::Tls13).connect(&town.topology.clients, from, to)?;
                let identity: Identity = serde_json::from_str(&http::get(&mut line, "/")?)?;
                if identity.backend != avoided {
                    return Ok(line);
                }
            }
            anyhow::bail!("everybody is sent to {avoided}")
        };
        let mut line = match connect() {
            Ok(line) => line,
            Err(error) => return self.problem(error.to_string()),
        };
        while !self.stop.load(Ordering::Relaxed) {
            if let Err(error) = http::download(&mut line, 1_000_000) {
                return self.problem(format!("download: {error:#}"));
            }
            self.megabytes.fetch_add(1, Ordering::Relaxed);
            // Others need the machine too.
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits until so much more has happened.
    pub fn go_on(&self) {
        let (visits, megabytes) = (&self.visits, &self.megabytes);
        let before = [visits, megabytes].map(|count| count.load(Ordering::Relaxed));
        until("clients hang", || {
            assert_eq!(*lock(&self.problems), [""; 0]);
            visits.load(Ordering::Relaxed) >= before[0] + 48
                && megabytes.load(Ordering::Relaxed) >= before[1] + 8
        });
    }
}

/// Waits until something is so.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(20));
    }
}
