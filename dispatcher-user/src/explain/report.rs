//! What is said of each flow, as JSON lines or as text.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use dispatcher_common::{
    reason::{Kind, Reason},
    session::{KIND_TICKET_NAME, Session, SessionKey},
};
use serde::Serialize;

use super::{
    Error,
    capture::Packet,
    flows::{Flow, Flows, Who},
    frame::{TCP, UDP},
    hello::{self, Cookie, Hello, Protocol, hex},
    lookup::Declared,
    machine::Machine,
    run::{Talk, Why, binds},
};
use crate::{api::to_hex, control::KINDS, counted};

/// A line of `explain --json`. Fields are added, never renamed.
#[derive(Serialize)]
pub(super) struct Line {
    flow: String,
    service: Option<String>,
    protocol: Option<Protocol>,
    secure: Option<bool>,
    complete: bool,
    tls_version: Option<String>,
    session_id: Option<String>,
    ticket_len: Option<usize>,
    psk_identity_len: Option<usize>,
    key_name: Option<String>,
    sni: Option<String>,
    cookie: Option<Cookie>,
    quic_version: Option<String>,
    dcid: Option<String>,
    scid: Option<String>,
    accepted_version: Option<String>,
    resumed: Option<bool>,
    looked_up: Option<Identifier>,
    tried: Vec<Identifier>,
    learned: Vec<Identifier>,
    verdict: &'static str,
    backend: Option<String>,
    reason: &'static str,
    notes: Vec<&'static str>,
    packets: Vec<Step>,
    #[serde(skip)]
    why: Why,
}

/// An identifier of the mapping table.
#[derive(Serialize, PartialEq)]
struct Identifier {
    kind: &'static str,
    id: String,
    /// Whose it is when all packets have run; of one that was tried: whose it was then.
    backends: Vec<String>,
}

/// A run of the program.
#[derive(Serialize)]
struct Step {
    /// The packet's number in the capture, from 1; null for one that explain has made.
    number: Option<usize>,
    reason: &'static str,
}

impl Line {
    /// All that is known of a flow.
    pub(super) fn new(
        flow: &Flow,
        flows: &Flows,
        talk: Talk,
        packets: &[Packet],
        machine: &Machine,
    ) -> Result<Self, Error> {
        let Said { client, server, secure } = Said::new(flow, flows, packets, machine, &talk)?;
        let known = |key: &SessionKey, session: Option<Session>| {
            let backends = session.map(|session| machine.names(&session)).unwrap_or_default();
            Identifier { kind: kind(key.kind), id: to_hex(key.id()), backends }
        };
        let identifier =
            |key: &SessionKey| -> Result<Identifier, Error> { Ok(known(key, machine.session(key)?)) };
        // Where the program has read a key's name, it knows by which format.
        let read = talk.identifier.as_ref().filter(|key| key.kind == KIND_TICKET_NAME);
        let key_name = read.map(|key| to_hex(key.id())).or_else(|| hex(client.key_name.as_ref()));
        let quic = client.quic.as_ref();
        let why = talk.why();
        let mut learned = Vec::new();
        for key in &talk.learned {
            learned.push(identifier(key)?);
        }
        Ok(Self {
            flow: name(&flow.who),
            service: flow.service.and_then(|index| machine.service(index)).map(|one| one.name.clone()),
            protocol: client.protocol,
            secure,
            complete: client.complete,
            tls_version: client.tls_version,
            session_id: hex(client.session_id.as_ref()),
            ticket_len: client.ticket_len,
            psk_identity_len: client.psk_identity_len,
            key_name,
            sni: client.sni,
            cookie: client.cookie,
            quic_version: quic.map(|one| format!("{:08x}", one.version)),
            dcid: quic.map(|one| to_hex(&one.dcid)),
            scid: quic.map(|one| to_hex(&one.scid)),
            accepted_version: server.version,
            resumed: server.resumed,
            looked_up: talk.identifier.as_ref().map(identifier).transpose()?,
            tried: talk.tried.iter().map(|one| known(&one.key, one.session)).collect(),
            learned,
            verdict: why.verdict(),
            backend: talk.backend,
            reason: why.name(),
            notes: talk.notes,
            packets: talk
                .results
                .iter()
                .map(|(index, why)| Step { number: index.map(|index| index + 1), reason: why.name() })
                .collect(),
            why,
        })
    }

    /// How the connection is secure, for people.
    fn secured(&self) -> String {
        let whole =
            |what: &str| if self.complete { format!("whole {what}") } else { format!("{what} not whole") };
        match (self.protocol, self.secure) {
            (Some(Protocol::Tls), _) => {
                let offers = self.tls_version.as_deref().unwrap_or("a version that is not known yet");
                format!("TLS, offers {offers}, {}", whole("hello"))
            }
            (Some(Protocol::Quic), _) => {
                format!("QUIC, version {}", self.quic_version.as_deref().unwrap_or("unknown"))
            }
            (Some(Protocol::Http), Some(true)) => {
                format!("HTTP, declared secure by its session cookie, {}", whole("head"))
            }
            (Some(Protocol::Http), Some(false)) => {
                format!("no: HTTP in clear, {}", whole("head"))
            }
            (Some(Protocol::Http), None) => {
                format!("not known yet: HTTP, {}, and a session cookie may follow", whole("head"))
            }
            (None, Some(true)) => "declared so by a session cookie".to_owned(),
            (None, Some(false)) => "no".to_owned(),
            (None, None) => "not known: the capture has too little of what the client says".to_owned(),
        }
    }

    /// True when identifiers were looked up for a flow and nobody's. (A QUIC client makes up its first ID.)
    pub(super) fn missed(&self) -> bool {
        let bound = matches!(self.why, Why::Reason(reason) if binds(reason));
        let tried = &self.tried;
        let nobodys = !tried.is_empty() && tried.iter().all(|one| one.backends.is_empty());
        bound && nobodys && self.protocol != Some(Protocol::Quic)
    }

    /// Nothing to tell in text but that it is not ours.
    fn passes(&self) -> bool {
        self.service.is_none() && matches!(self.why, Why::Reason(reason) if reason.kind() == Kind::Pass)
    }
}

/// What client and server of a flow say in clear.
#[derive(Default)]
struct Said {
    client: Hello,
    server: hello::Answer,
    /// Whether it is secure, if that is known.
    secure: Option<bool>,
}

impl Said {
    fn new(
        flow: &Flow,
        flows: &Flows,
        packets: &[Packet],
        machine: &Machine,
        talk: &Talk,
    ) -> Result<Self, Error> {
        let Who::Ports { proto, client: near, server: vip } = flow.who else {
            return Ok(Self { secure: Some(false), ..Self::default() });
        };
        let stream = flows.stream(flow, packets, near);
        let client = if proto == UDP { hello::of_datagram(&stream) } else { hello::of_stream(&stream) };
        let secure = if client.is_encrypted() {
            Some(true)
        } else if proto == TCP && stream.is_empty() {
            None
        } else {
            let frontend = flow.service.map(|_| machine.frontend(vip, proto)).transpose()?.flatten();
            let walked = frontend.map(|frontend| machine.cookie(&frontend, &stream)).transpose()?.flatten();
            match Declared::by(walked) {
                Declared::Yes => Some(true),
                // Where it is bound the program waits no longer.
                Declared::Open if talk.backend.is_none() => None,
                Declared::Open | Declared::No => Some(false),
            }
        };
        let server = if client.protocol == Some(Protocol::Tls) {
            hello::of_server(&flows.stream(flow, packets, vip), &client)
        } else {
            hello::Answer::default()
        };
        Ok(Self { client, server, secure })
    }
}

/// `tcp` or `udp`.
pub(super) fn protocol_name(proto: u8) -> &'static str {
    if proto == TCP { "tcp" } else { "udp" }
}

fn name(who: &Who) -> String {
    match who {
        Who::Ports { proto, client, server } => {
            format!("{client} -> {server}/{}", protocol_name(*proto))
        }
        Who::Addresses(ends) => {
            let proto = match ends.proto {
                1 => "icmp".to_owned(),
                58 => "icmpv6".to_owned(),
                // Fragments, and headers that lie.
                TCP => "tcp without ports".to_owned(),
                UDP => "udp without ports".to_owned(),
                other => format!("protocol {other}"),
            };
            format!("{} -> {}/{proto}", ends.src, ends.dst)
        }
        Who::Frame => "not IP".to_owned(),
    }
}

/// Prints JSON, a line a flow.
pub(super) fn json(lines: &[Line], out: &mut dyn Write) -> io::Result<()> {
    for line in lines {
        serde_json::to_writer(&mut *out, line)?;
        writeln!(out)?;
    }
    out.flush()
}

/// Prints text, a block a flow; what is not ours in one line.
pub(super) fn text(lines: &[Line], packets: bool, out: &mut dyn Write) -> io::Result<()> {
    let (passing, ours): (Vec<&Line>, Vec<&Line>) = lines.iter().partition(|line| line.passes());
    for line in ours {
        block(line, packets, out)?;
    }
    if !passing.is_empty() {
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        passing
            .iter()
            .flat_map(|line| &line.packets)
            .for_each(|step| *reasons.entry(step.reason).or_default() += 1);
        let reasons: Vec<String> =
            reasons.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
        writeln!(out, "to the kernel: {} ({})", counted(passing.len(), "more flow"), reasons.join(", "))?;
    }
    out.flush()
}

fn block(line: &Line, packets: bool, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "{}", line.flow)?;
    let mut row = |name: &str, value: &str| writeln!(out, "  {name:<11}{value}");
    if let Some(service) = &line.service {
        row("service", service)?;
    }
    row("secure", &line.secured())?;
    let some = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let lengths = [("ticket", line.ticket_len), ("PSK identity", line.psk_identity_len)];
    let sealed: Vec<String> = lengths
        .iter()
        .filter_map(|(name, len)| {
            len.filter(|len| *len > 0).map(|len| format!("{name} of {}", counted(len, "byte")))
        })
        .collect();
    let rows = [
        ("sni", some(&line.sni)),
        ("session id", some(&line.session_id)),
        ("ticket", (!sealed.is_empty()).then(|| sealed.join(", "))),
        ("key name", some(&line.key_name)),
        ("cookie", line.cookie.as_ref().map(|cookie| format!("yes ({})", cookie.shown()))),
        ("dcid", some(&line.dcid)),
        ("scid", some(&line.scid)),
        ("server", line.accepted_version.as_ref().map(|version| accepted(version, line.resumed))),
        ("looked up", (!line.tried.is_empty()).then(|| looked_up(line))),
        (
            "learned",
            (!line.learned.is_empty())
                .then(|| line.learned.iter().map(Identifier::shown).collect::<Vec<_>>().join("; ")),
        ),
    ];
    for (name, value) in rows {
        if let Some(value) = value {
            row(name, &value)?;
        }
    }
    let to = line.backend.as_ref().map(|backend| format!(" to {backend}")).unwrap_or_default();
    row("verdict", &format!("{}{to}: {}", line.verdict, line.reason))?;
    row("", line.why.description())?;
    for note in &line.notes {
        row("note", note)?;
    }
    if packets {
        let steps = line.packets.iter().map(|step| {
            let number = step.number.map_or_else(|| "made".to_owned(), |number| number.to_string());
            format!("{number} {}", step.reason)
        });
        row("packets", &steps.collect::<Vec<_>>().join(", "))?;
    }
    writeln!(out)
}

/// What was looked up, in its order: whose each was, and which decided.
fn looked_up(line: &Line) -> String {
    let mut all: Vec<String> = line.tried.iter().map(Identifier::shown).collect();
    let same = |a: &Identifier, b: &Identifier| (a.kind, &a.id) == (b.kind, &b.id);
    let decided = line.tried.last().zip(line.looked_up.as_ref()).is_some_and(|(last, one)| same(last, one));
    if let Some(last) = all.last_mut().filter(|_| decided && line.why == Why::Reason(Reason::BoundHit)) {
        last.push_str(", which decides");
    }
    all.join("\n             then ")
}

fn accepted(version: &str, resumed: Option<bool>) -> String {
    let resumed = match resumed {
        Some(true) => ", resumes the session",
        Some(false) => ", a new session",
        None => "",
    };
    format!("accepts {version}{resumed}")
}

fn kind(number: u8) -> &'static str {
    KINDS.iter().find(|(kind, _)| *kind == number).map_or("unknown", |(_, name)| name)
}

impl Identifier {
    fn shown(&self) -> String {
        let whose = if self.backends.is_empty() { "nobody's".to_owned() } else { self.backends.join(",") };
        format!("{} {}: {whose}", self.kind, self.id)
    }
}
