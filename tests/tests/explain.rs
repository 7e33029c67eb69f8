//! `dispatcherctl explain` on captures: those of made connections, and one of a real exchange.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use clap::Parser as _;
use dispatcher_common::addr::Addr;
use dispatcher_tests::{
    bench::sniff::Sniffer,
    capture::{self, Scene},
    daemon::{Daemon, Folder},
    hello,
    netns::Netns,
    packet::{Body, Icmp, Packet, Udp},
    tls::{Authority, HOST, Manners, Server, User, Version},
    topology::cable,
};
use dispatcher_user::ctl;
use serde_json::{Value, json};

const VIP: &str = "192.0.2.10:443";
const CONFIG: &str = r#"
pin = "none"
state = "none"
interfaces = ["eth0"]
[[service]]
name = "web"
vip = ["192.0.2.10:443", "[2001:db8::10]:443"]
EXTRA
[[service.backend]]
name = "a"
address = ["10.0.0.1:8443", "[fd00::1]:8443"]
[[service.backend]]
name = "b"
address = ["10.0.0.2:8443", "[fd00::2]:8443"]
[[service]]
name = "mail"
vip = "192.0.2.10:25"
mode = "l4"
[[service.backend]]
name = "m"
address = "10.0.0.3:25"
[[service]]
name = "quic"
vip = "192.0.2.10:8443"
protocol = "udp"
mode = "l4"
affinity = "quic-cid"
[[service.backend]]
name = "a"
address = "10.0.0.1:443"
[[service.backend]]
name = "b"
address = "10.0.0.2:443"
"#;

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

fn client(port: u16) -> SocketAddr {
    SocketAddr::new([203, 0, 113, 7].into(), port)
}

fn scene(port: u16) -> Scene {
    Scene::new(client(port), address(VIP))
}

fn hexed(bytes: &[u8]) -> String {
    dispatcher_user::api::to_hex(bytes)
}

/// A place for captures and a configuration.
struct Desk {
    folder: Folder,
    extra: &'static str,
    hints: RefCell<String>,
}

impl Desk {
    fn new() -> Self {
        Self { folder: Folder::new().expect("a folder"), extra: "", hints: RefCell::default() }
    }

    /// With lines for the service `web`.
    fn with(extra: &'static str) -> Self {
        Self { extra, ..Self::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, file: &Path, arguments: &[&str]) -> (String, Result<(), ctl::Error>) {
        let line = ["dispatcherctl", "explain", file.to_str().expect("a name")];
        let args = ctl::Args::try_parse_from(line.iter().chain(arguments)).expect("a command line");
        let (mut out, mut hints) = (Vec::new(), Vec::new());
        let result = ctl::run(&args, &mut out, &mut hints, &|| None);
        self.hints.replace(String::from_utf8(hints).expect("text"));
        (String::from_utf8(out).expect("text"), result)
    }

    /// What the last run has said beside its answer.
    fn hints(&self) -> String {
        self.hints.borrow().clone()
    }

    fn capture<F: AsRef<[u8]>>(&self, frames: &[F]) -> PathBuf {
        let path = self.path("file.pcap");
        capture::write(&path, frames).expect("writing a capture");
        path
    }

    fn config(&self) -> String {
        let path = self.path("dispatcher.toml");
        std::fs::write(&path, CONFIG.replace("EXTRA", self.extra)).expect("writing a configuration");
        path.to_str().expect("a name").to_owned()
    }

    /// The lines of JSON for frames, with the configuration.
    fn json<F: AsRef<[u8]>>(&self, frames: &[F]) -> Vec<Value> {
        let (out, result) = self.run(&self.capture(frames), &["--json", "--config", &self.config()]);
        result.unwrap_or_else(|error| panic!("{error}\n{out}"));
        lines(&out)
    }

    /// The lines of JSON for frames, without.
    fn alone<F: AsRef<[u8]>>(&self, frames: &[F]) -> Vec<Value> {
        let (out, result) = self.run(&self.capture(frames), &["--json"]);
        result.unwrap_or_else(|error| panic!("{error}\n{out}"));
        lines(&out)
    }

    fn text<F: AsRef<[u8]>>(&self, frames: &[F]) -> String {
        let (out, result) = self.run(&self.capture(frames), &["--packets", "--config", &self.config()]);
        result.unwrap_or_else(|error| panic!("{error}\n{out}"));
        out
    }
}

fn lines(out: &str) -> Vec<Value> {
    out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// `1 syn_answered, made replayed`.
fn steps(line: &Value) -> String {
    let steps = line["packets"].as_array().expect("packets").iter().map(|step| {
        let number = step["number"].as_u64().map_or_else(|| "made".to_owned(), |number| number.to_string());
        format!("{number} {}", step["reason"].as_str().expect("a reason"))
    });
    steps.collect::<Vec<_>>().join(", ")
}

fn notes(line: &Value) -> String {
    line["notes"].as_array().expect("notes").iter().map(|note| note.as_str().expect("text")).collect()
}

#[test]
fn a_session_id_is_missed_learned_and_found_again() {
    let id = [0x5c; 32];
    let visit = |port| {
        let hello = hello::client_hello(&id, 0);
        scene(port).open().says(&hello).answers(&hello::server_hello(&id, false)).close()
    };
    let frames = [visit(4001).frames(), visit(4002).frames()].concat();
    let found = Desk::new().json(&frames);
    let [first, second] = &found[..] else { panic!("{found:#?}") };
    let backend = first["backend"].as_str().expect("a backend");
    let session = json!({"kind": "tls-session-id", "id": hexed(&id), "backends": [backend]});
    let nobodys = json!({"kind": "tls-session-id", "id": hexed(&id), "backends": []});
    let wanted = json!({
        "flow": "203.0.113.7:4001 -> 192.0.2.10:443/tcp",
        "service": "web",
        "protocol": "tls",
        "secure": true,
        "complete": true,
        "tls_version": "1.2",
        "session_id": hexed(&id),
        "ticket_len": 0,
        "psk_identity_len": 0,
        "key_name": null,
        "sni": HOST,
        "cookie": null,
        "quic_version": null,
        "dcid": null,
        "scid": null,
        "accepted_version": "1.2",
        "resumed": true,
        "looked_up": session,
        "tried": [nobodys],
        "learned": [session],
        "verdict": "forward",
        "backend": backend,
        "reason": "bound_miss",
        "notes": [],
        "packets": [
            {"number": 1, "reason": "syn_answered"},
            {"number": 3, "reason": "cookie_ack"},
            {"number": 4, "reason": "bound_miss"},
            {"number": 2, "reason": "replayed"},
            {"number": 5, "reason": "to_client"},
            {"number": 6, "reason": "control"},
            {"number": 7, "reason": "control"},
            {"number": 8, "reason": "to_backend"},
        ],
    });
    assert_eq!(*first, wanted);
    assert_eq!((&second["reason"], &second["backend"]), (&json!("bound_hit"), &json!(backend)), "{second:#}");
    assert_eq!((&second["looked_up"], &second["tried"]), (&session, &json!([session])), "{second:#}");
}

#[test]
fn the_identifier_that_decides_is_told_after_those_before_it() {
    let desk = Desk::with("affinity = [\"tls-ticket\", \"tls-session-id\", \"client-address\"]");
    // A server whose tickets carry no name of a key, and a client that comes back with its ticket, then
    // with a session ID that nobody knows, then with nothing.
    let ticket = [0xaa; 100];
    let offer = hello::server_hello_with(&[], &[(35, &[])]);
    let given = [offer, hello::new_session_ticket(&ticket)].concat();
    let first = scene(4001).open().says(&hello::resuming_hello(&[], Some(&[]), &[], 0)).answers(&given);
    let returns = scene(4002).open().says(&hello::resuming_hello(&[], Some(&ticket), &[], 0));
    let unknown = scene(4003).open().says(&hello::client_hello(&[7; 32], 0));
    let bare = scene(4004).open().says(&hello::client_hello(&[], 0));
    let frames = [first.frames(), returns.frames(), unknown.frames(), bare.frames()].concat();
    let found = desk.json(&frames);
    let backend = &found[0]["backend"];
    let client = hexed(&Addr::from(client(1).ip()).octets());
    let one = |kind: &str, id: &[u8], whose: Value| json!({"kind": kind, "id": hexed(id), "backends": whose});
    let address = |whose: Value| json!({"kind": "client-address", "id": client, "backends": whose});
    let a = json!([backend]);
    assert_eq!(found[0]["tried"], json!([address(json!([]))]));
    assert_eq!(found[0]["looked_up"], address(a.clone()));
    let [key, whole] = [&ticket[..16], &ticket[..32]];
    let known = one("tls-ticket", whole, a.clone());
    assert_eq!((&found[1]["reason"], &found[1]["looked_up"]), (&json!("bound_hit"), &known), "{found:#?}");
    assert_eq!(found[1]["tried"], json!([one("tls-ticket-key", key, json!([])), known]));
    // Its own entry is made when the address has decided already.
    assert_eq!(found[2]["tried"], json!([one("tls-session-id", &[7; 32], json!([])), address(a.clone())]));
    assert_eq!((&found[2]["reason"], &found[2]["looked_up"]), (&json!("bound_hit"), &address(a.clone())));
    assert_eq!((&found[3]["looked_up"], &found[3]["tried"]), (&address(a.clone()), &json!([address(a)])));
    let text = desk.text(&frames);
    let (key, whole, backend) = (hexed(key), hexed(whole), backend.as_str().expect("a name"));
    let told = format!(
        "  looked up  tls-ticket-key {key}: nobody's\n             then tls-ticket {whole}: {backend}, which decides\n"
    );
    assert!(text.contains(&told), "{text}");
}

#[test]
fn a_cut_request_or_hello_claims_nothing_of_what_may_follow() {
    // A flow for each beginning; its line of JSON, and its row in text.
    let said = |desk: &Desk, beginnings: &[&[u8]]| {
        let scenes = (4001..).zip(beginnings).map(|(port, bytes)| scene(port).open().says(bytes));
        let frames: Vec<Vec<u8>> = scenes.flat_map(|scene| scene.frames()).collect();
        let text = desk.text(&frames);
        let rows = text.lines().filter_map(|line| Some(line.strip_prefix("  secure     ")?.to_owned()));
        desk.json(&frames).into_iter().zip(rows).collect::<Vec<_>>()
    };
    let head = b"GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b; sid=very-secret; c=d\r\nAccept: */*\r\n\r\n";
    let before_value = 45;
    assert!(head[..before_value].ends_with(b"sid=ver"));
    let hello = hello::resuming_hello(&[1; 32], None, &[5; 64], 300);
    let few = "not known: the capture has too little of what the client says";
    let wanted: [(&[u8], Value, bool, Value, &str); 7] = [
        (head, json!(true), true, json!("http"), "HTTP, declared secure by its session cookie, whole head"),
        (
            &head[..before_value + 10],
            json!(true),
            false,
            json!("http"),
            "HTTP, declared secure by its session cookie, head not whole",
        ),
        (
            &head[..before_value],
            Value::Null,
            false,
            json!("http"),
            "not known yet: HTTP, head not whole, and a session cookie may follow",
        ),
        (&head[..3], Value::Null, false, Value::Null, few),
        (b"", Value::Null, false, Value::Null, few),
        (
            b"GET / HTTP/1.1\r\nCookie: a=b\r\n\r\n",
            json!(false),
            true,
            json!("http"),
            "no: HTTP in clear, whole head",
        ),
        (
            &hello[..100],
            json!(true),
            false,
            json!("tls"),
            "TLS, offers a version that is not known yet, hello not whole",
        ),
    ];
    let found = said(&Desk::with("affinity = \"http-cookie:sid\""), &wanted.each_ref().map(|one| one.0));
    assert_eq!(found.len(), wanted.len());
    for ((line, text), (_, secure, complete, protocol, row)) in found.iter().zip(wanted) {
        assert_eq!((&line["secure"], &line["complete"]), (&secure, &json!(complete)), "{line:#}");
        assert_eq!((&line["protocol"], text.as_str()), (&protocol, row), "{line:#}");
    }
    let (cut, _) = found.last().expect("the hello");
    for field in ["tls_version", "ticket_len", "psk_identity_len", "key_name", "sni"] {
        assert_eq!(cut[field], Value::Null, "{field}: {cut:#}");
    }
    assert_eq!(cut["session_id"], hexed(&[1; 32]));
    // Nor where the program has waited long enough.
    let desk = Desk::with("affinity = \"http-cookie:sid\"");
    let long = (0..32).fold(scene(4001).open().says(&head[..before_value]), |scene, _| scene.says(b"y"));
    let [line] = &desk.json(&long.frames())[..] else { panic!("a flow") };
    assert_eq!((&line["reason"], &line["secure"]), (&json!("bound_nonsecure"), &json!(false)), "{line:#}");
    // Where no service looks for a cookie there is nothing to wait for.
    let found = said(&Desk::new(), &[&head[..before_value]]);
    let [(line, text)] = &found[..] else { panic!("{found:#?}") };
    assert_eq!((&line["secure"], &line["complete"]), (&json!(false), &json!(false)), "{line:#}");
    assert_eq!(text, "no: HTTP in clear, head not whole");
}

#[test]
fn empty_lines_before_a_request_are_passed_over() {
    let request = b"\r\n\r\nGET / HTTP/1.1\r\nCookie: id=very-secret\r\n\r\n";
    let found = Desk::new().json(&scene(4001).open().says(request).frames());
    assert_eq!((&found[0]["protocol"], &found[0]["complete"]), (&json!("http"), &json!(true)));
    assert_eq!(found[0]["cookie"], json!({"len": 14}));
}

#[test]
fn what_concerns_the_whole_capture_is_said_once() {
    let desk = Desk::new();
    let empty = desk.capture::<Vec<u8>>(&[]);
    for arguments in [&["--json"][..], &[], &["--config", &desk.config()]] {
        let (out, result) = desk.run(&empty, arguments);
        let error = result.expect_err("nothing to explain");
        assert_eq!((out.as_str(), error.exit()), ("", ctl::Exit::Refused));
        assert!(error.to_string().starts_with(&format!("no packets in {}", empty.display())), "{error}");
    }
    // Nothing of a VIP.
    let strangers = Scene::new(client(4002), address("198.51.100.99:443")).open().frames();
    assert_eq!(desk.json(&strangers).len(), 1);
    assert_eq!(
        desk.hints().lines().collect::<Vec<_>>(),
        [format!(
            "{}: no TCP or UDP packet of a VIP in it; the VIPs are 192.0.2.10:443/tcp (web), [2001:db8::10]:443/tcp (web), 192.0.2.10:25/tcp (mail), 192.0.2.10:8443/udp (quic)",
            desk.path("file.pcap").display()
        )]
    );
    desk.alone(&[[&[0xff; 12][..], &[8, 6], &[0; 46]].concat()]);
    assert!(desk.hints().contains("no TCP or UDP packet in it"), "{}", desk.hints());
    // A session that a running daemon might know, twice; and none.
    let visit = |port, id: &[u8]| scene(port).open().says(&hello::client_hello(id, 0)).frames();
    desk.json(&[visit(4001, &[1; 32]), visit(4002, &[2; 32])].concat());
    assert_eq!(desk.hints().matches("--live").count(), 1, "{}", desk.hints());
    desk.json(&visit(4001, &[]));
    assert_eq!(desk.hints(), "");
}

#[test]
fn tickets_and_psks_are_shown_and_learned() {
    let (ticket, psk): (Vec<u8>, Vec<u8>) = ((1..=180).collect(), (20..=219).collect());
    let old = hello::resuming_hello(&[], Some(&ticket), &[], 0);
    let issued = hello::new_session_ticket(&[0xaa; 100]);
    let offer = hello::server_hello_with(&[], &[(35, &[])]);
    let tls12 = scene(4001).open().says(&old).answers(&[offer, issued].concat());
    // The PSK comes in the second segment.
    let new = hello::resuming_hello(&[7; 32], None, &psk, 1400);
    let (one, two) = new.split_at(1400);
    let accepted = hello::server_hello_with(&[7; 32], &[(43, &[3, 4]), (41, &[0, 0])]);
    let tls13 = scene(4002).open().says(one).says(two).answers(&accepted);
    let found = Desk::new().json(&[tls12.frames(), tls13.frames()].concat());
    let [tls12, tls13] = &found[..] else { panic!("{found:#?}") };

    assert_eq!(tls12["tls_version"], "1.2");
    assert_eq!((&tls12["ticket_len"], &tls12["psk_identity_len"]), (&json!(180), &json!(0)));
    assert_eq!(tls12["key_name"], hexed(&ticket[..16]));
    assert_eq!(tls12["looked_up"]["kind"], "tls-ticket-key");
    assert_eq!(tls12["looked_up"]["backends"], json!([]), "nobody has asked the servers for their keys");
    assert_eq!((&tls12["session_id"], &tls12["resumed"]), (&json!(""), &json!(false)));
    assert_eq!(tls12["learned"][0]["kind"], "tls-ticket");
    assert_eq!(tls12["learned"][0]["id"], hexed(&[0xaa; 32]));
    assert_eq!(tls12["learned"][0]["backends"], json!([tls12["backend"]]));

    assert_eq!((&tls13["tls_version"], &tls13["accepted_version"]), (&json!("1.3"), &json!("1.3")));
    assert_eq!((&tls13["ticket_len"], &tls13["psk_identity_len"]), (&json!(0), &json!(200)));
    assert_eq!(tls13["key_name"], hexed(&psk[..16]));
    assert_eq!((&tls13["resumed"], &tls13["complete"]), (&json!(true), &json!(true)));
    assert_eq!(
        steps(tls13),
        "6 syn_answered, 8 cookie_ack, 9 acked_part, 10 bound_miss, 7 replayed, 11 to_client"
    );
}

#[test]
fn what_is_not_tls_goes_by_the_table() {
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nCookie: id=very-secret\r\n\r\n";
    let scene = scene(4001).open().says(request).answers(b"HTTP/1.1 200 OK\r\n\r\n");
    let desk = Desk::new();
    let found = desk.json(&scene.frames());
    assert_eq!(found[0]["reason"], "bound_nonsecure");
    assert_eq!((&found[0]["secure"], &found[0]["complete"]), (&json!(false), &json!(true)));
    assert_eq!(found[0]["cookie"], json!({"len": 14}));
    for field in ["tls_version", "session_id", "ticket_len", "psk_identity_len", "key_name", "sni", "resumed"]
    {
        assert_eq!(found[0][field], Value::Null, "{field}");
    }
    let text = desk.text(&scene.frames());
    assert!(!text.contains("very-secret"), "{text}");
    assert!(text.contains("cookie     yes (14 bytes)"), "{text}");
}

#[test]
fn a_cookie_is_followed_from_the_response_that_sets_it() {
    let sets = b"HTTP/1.1 200 OK\r\nSet-Cookie: sid=very-secret; Path=/\r\n\r\n";
    let first = scene(4001).open().says(b"GET /login HTTP/1.1\r\n\r\n").answers(sets);
    let request = b"GET / HTTP/1.1\r\nHost: x\r\nCookie: a=b; sid=very-secret\r\n\r\n";
    let second = scene(4002).open().says(request);
    let desk = Desk::with("affinity = \"http-cookie:sid\"");
    let frames = [first.frames(), second.frames()].concat();
    let found = desk.json(&frames);
    let known = json!({
        "kind": "http-cookie",
        "id": hexed(&dispatcher_common::http::cookie_id(b"very-secret")),
        "backends": [found[0]["backend"]],
    });
    assert_eq!(found[0]["learned"], json!([known]));
    assert_eq!(found[1]["looked_up"], known);
    assert_eq!((&found[1]["reason"], &found[1]["backend"]), (&json!("bound_hit"), &found[0]["backend"]));
    assert_eq!((&found[0]["secure"], &found[1]["secure"]), (&json!(false), &json!(true)));
    assert_eq!(found[1]["cookie"], json!({"len": 20}));
    assert!(!desk.text(&frames).contains("very-secret"));
}

#[test]
fn hellos_that_are_not_whole() {
    let hello = hello::client_hello(&[1; 32], 300);
    // The client says no more.
    let stalled = scene(4001).open().says(&hello[..200]);
    let desk = Desk::new();
    let found = desk.json(&stalled.frames());
    assert_eq!((&found[0]["reason"], &found[0]["verdict"]), (&json!("acked_part"), &json!("forward")));
    assert_eq!((&found[0]["secure"], &found[0]["complete"]), (&json!(true), &json!(false)));
    assert_eq!(found[0]["session_id"], hexed(&[1; 32]));
    assert_eq!(found[0]["backend"], Value::Null);
    // The capture holds 128 bytes of each packet.
    let whole = scene(4002).open().says(&hello).answers(&hello::server_hello(&[1; 32], false));
    let mut file = capture::pcap::<Vec<u8>>(capture::ETHERNET, &[]);
    for frame in whole.frames() {
        let kept = &frame[..frame.len().min(128)];
        for word in [0, 0, kept.len() as u32, frame.len() as u32] {
            file.extend(word.to_le_bytes());
        }
        file.extend(kept);
    }
    let path = desk.path("cut.pcap");
    std::fs::write(&path, file).expect("writing a capture");
    let (out, result) = desk.run(&path, &["--json"]);
    result.expect("explained");
    let found = lines(&out);
    assert_eq!((&found[0]["reason"], &found[0]["verdict"]), (&json!("cut_in_capture"), &json!("unknown")));
    assert_eq!((&found[0]["secure"], &found[0]["complete"]), (&json!(true), &json!(false)));
    assert!(notes(&found[0]).contains("tcpdump -s 0"), "{found:#?}");
    assert_eq!(
        steps(&found[0]),
        "1 syn_answered, 3 cookie_ack, 4 cut_in_capture, 5 cut_in_capture, 2 not_run"
    );
}

#[test]
fn what_a_capture_lacks_is_made() {
    let id = [9; 32];
    let hello = hello::client_hello(&id, 0);
    let whole = |port| scene(port).open().says(&hello).answers(&hello::server_hello(&id, false)).frames();
    // From the hello on; from the answer to it on; the server's SYN-ACK went another way.
    let mut one_way = whole(4003);
    one_way.remove(1);
    let frames = [&whole(4001)[3..], &whole(4002)[4..], &one_way].concat();
    let found = Desk::new().json(&frames);
    let [hello, answer, one_way] = &found[..] else { panic!("{found:#?}") };
    assert_eq!(steps(hello), "made syn_answered, 1 bound_miss, made replayed, 2 to_client", "{hello:#}");
    assert_eq!((&hello["complete"], &hello["sni"]), (&json!(true), &json!(HOST)));
    assert_eq!(hello["learned"][0]["id"], hexed(&id));
    assert!(notes(hello).contains("no SYN in the capture"));
    assert_eq!((&answer["reason"], &answer["verdict"]), (&json!("not_run"), &json!("unknown")));
    assert!(notes(answer).contains("was not bound"));
    assert_eq!(
        steps(one_way),
        "4 syn_answered, 5 cookie_ack, 6 bound_hit, made replayed, 7 to_client",
        "{one_way:#}"
    );
}

#[test]
fn segments_of_offload_are_cut_and_checksums_finished() {
    /// Offset of the TCP checksum.
    const SUM: usize = 14 + 20 + 16;
    // A hello longer than a segment, and 20 kB of data, as captured where they were sent: in one piece,
    // with checksums that the network card would write.
    let hello = hello::client_hello(&[2; 32], 2000);
    let answer = hello::server_hello(&[2; 32], false);
    let large = |host| {
        let client = SocketAddr::new([203, 0, 113, host].into(), 4001);
        Scene::new(client, address(VIP)).open().says(&hello).answers(&answer).says(&[23; 20_000])
    };
    let mut frames = large(1).frames();
    frames.extend(large(2).packets.iter().map(|packet| {
        let mut frame = packet.frame();
        frame[SUM] ^= if packet.src == address(VIP).ip() { 0 } else { 0x55 };
        frame
    }));
    // One wrong checksum of many is no offload: it is what the program sees.
    let short = hello::client_hello(&[2; 32], 0);
    let client = SocketAddr::new([203, 0, 113, 3].into(), 4001);
    frames.extend(Scene::new(client, address(VIP)).open().says(&short).frames());
    let last = frames.last_mut().expect("a frame");
    last[SUM] ^= 0x55;
    let found = Desk::new().json(&frames);
    let [right, wrong, one] = &found[..] else { panic!("{found:#?}") };
    for (line, from, bound) in [(right, 0, "bound_miss"), (wrong, 6, "bound_hit")] {
        let [syn, syn_ack, ack, hello, answer, data] = [1, 2, 3, 4, 5, 6].map(|number| from + number);
        let all = steps(line);
        let start = format!(
            "{syn} syn_answered, {ack} cookie_ack, {hello} acked_part, {hello} {bound}, {syn_ack} replayed, {answer} to_client, "
        );
        assert!(all.starts_with(&start), "{all}");
        let pieces = all.matches(&format!("{data} to_backend")).count();
        assert_eq!(pieces, 14, "20,000 bytes at 1448 a segment: {all}");
        assert!(notes(line).contains("cut to the MSS"), "{line:#}");
        assert_eq!(notes(line).contains("unfinished checksums"), from > 0, "{line:#}");
    }
    assert_eq!((&one["reason"], &one["verdict"]), (&json!("bad_checksum"), &json!("drop")));
}

#[test]
fn both_families_tags_and_other_link_types() {
    let hello = hello::client_hello(&[], 0);
    let answer = hello::server_hello(&[3; 32], false);
    let mut scenes = Vec::new();
    for tags in [vec![], vec![[0x81, 0, 0, 7]], vec![[0x88, 0xa8, 0, 9], [0x81, 0, 0, 7]]] {
        let port = 4001 + tags.len() as u16;
        let v6 =
            Scene::new(SocketAddr::new(address("[2001:db8::7]:1").ip(), port), address("[2001:db8::10]:443"));
        for scene in [scene(port), v6] {
            let scene = Scene { tags: tags.clone(), ..scene };
            scenes.push(scene.open().says(&hello).answers(&answer));
        }
    }
    let mut frames: Vec<Vec<u8>> = scenes.iter().flat_map(Scene::frames).collect();
    let tags = vec![[0x81, 0, 0, 7]; 3];
    frames.extend(Scene { tags, ..scene(5000) }.open().frames());
    let desk = Desk::new();
    let found = desk.json(&frames);
    let check = |line: &Value, number: usize, scene: &Scene| {
        let [syn, syn_ack, ack, hello, answer] = [1, 2, 3, 4, 5].map(|packet| number * 5 + packet);
        let wanted = format!(
            "{syn} syn_answered, {ack} cookie_ack, {hello} bound_fresh, {syn_ack} replayed, {answer} to_client"
        );
        assert_eq!(steps(line), wanted, "{line:#}");
        assert_eq!(line["flow"], format!("{} -> {}/tcp", scene.client, scene.server));
    };
    for (number, scene) in scenes.iter().enumerate() {
        check(&found[number], number, scene);
    }
    let last = found.last().expect("a line");
    assert_eq!((&last["reason"], &last["verdict"]), (&json!("too_many_tags"), &json!("drop")));
    // The same without tags, captured as IP packets.
    let raw: Vec<Vec<u8>> = scenes[..2].iter().flat_map(|scene| &scene.packets).map(Packet::ip).collect();
    let path = desk.path("raw.pcap");
    std::fs::write(&path, capture::pcap(101, &raw)).expect("writing a capture");
    let (out, result) = desk.run(&path, &["--json", "--config", &desk.config()]);
    result.expect("explained");
    for (number, line) in lines(&out).iter().enumerate() {
        check(line, number, &scenes[number]);
    }
}

#[test]
fn services_of_all_kinds() {
    let hello = hello::client_hello(&[4; 32], 0);
    let visit =
        || scene(4001).open().says(&hello).answers(&hello::server_hello(&[4; 32], false)).says(b"more");
    for (extra, note) in [
        ("miss = \"daemon\"", "the daemon would pick"),
        ("timestamps = false\nsack = false", ""),
        (
            "source = \"dispatcher\"\nsource_addresses = [\"10.0.0.9\", \"fd00::9\"]\nproxy_protocol = \"v2\"",
            "",
        ),
        ("balance = \"weighted-round-robin\"\naffinity = [\"client-address\"]", ""),
    ] {
        let found = Desk::with(extra).json(&visit().frames());
        let all = steps(&found[0]);
        assert_eq!(
            all.replace("miss", "x"),
            "1 syn_answered, 3 cookie_ack, 4 bound_x, 2 replayed, 5 to_client, 6 to_backend",
            "{extra}: {found:#?}"
        );
        assert!(notes(&found[0]).contains(note), "{extra}: {found:#?}");
    }
}

/// What the daemon serves itself is told as a service's, too: the data path lets it pass.
#[test]
fn services_that_the_daemon_serves() {
    const TERMINATE: &str = "mode = \"terminate\"\n[service.terminate]\n\
        certificates = [{ certificate = \"/x.pem\", key = \"/x.key\" }]\n[service.clear]\nvip = \"192.0.2.10:80\"\nport = 8080\n\
        [service.tunnels]\nserver_name = \"inside.example\"";
    let hello = hello::client_hello(&[4; 32], 0);
    let visit = |server| {
        Scene::new(client(4001), address(server))
            .open()
            .says(&hello)
            .answers(&hello::server_hello(&[4; 32], false))
    };
    for extra in [TERMINATE, "mode = \"relay\"\n[service.tunnels]\nserver_name = \"inside.example\""] {
        let desk = Desk::with(extra);
        let found = desk.json(&visit(VIP).frames());
        let [line] = &found[..] else { panic!("{extra}: {found:#?}") };
        assert_eq!(
            (&line["service"], &line["reason"], &line["verdict"], &line["backend"]),
            (&json!("web"), &json!("to_daemon"), &json!("pass"), &Value::Null),
            "{extra}: {line:#}"
        );
        assert_eq!(steps(line), "1 to_daemon, 2 not_run, 3 to_daemon, 4 to_daemon, 5 not_run", "{extra}");
        assert_eq!((&line["protocol"], &line["secure"]), (&json!("tls"), &json!(true)), "{extra}");
        assert!(notes(line).contains("dispatcherctl sessions"), "{extra}: {line:#}");
        assert_eq!(desk.hints(), "", "{extra}");
        let text = desk.text(&visit(VIP).frames());
        assert!(text.contains("web") && text.contains("pass: to_daemon"), "{extra}: {text}");
    }
    // In clear, on the address for that.
    let desk = Desk::with(TERMINATE);
    let asks = |server| Scene::new(client(4001), address(server)).open().says(b"GET / HTTP/1.1\r\n\r\n");
    let found = desk.json(&asks("192.0.2.10:80").frames());
    assert_eq!((&found[0]["service"], &found[0]["secure"]), (&json!("web"), &json!(false)), "{found:#?}");
    desk.json(&asks("192.0.2.10:8080").frames());
    assert!(desk.hints().contains("192.0.2.10:80/tcp (web)"), "{}", desk.hints());
}

#[test]
fn a_server_that_speaks_first_is_lost_on_passthrough_and_served_by_l4() {
    let speaks = |server: &str| {
        Scene::new(client(4001), address(server)).open().answers(b"220 mail\r\n").says(b"EHLO x\r\n")
    };
    let found = Desk::new().json(&[speaks(VIP).frames(), speaks("192.0.2.10:25").frames()].concat());
    let [passthrough, l4] = &found[..] else { panic!("{found:#?}") };
    assert_eq!(steps(passthrough), "1 syn_answered, 3 cookie_ack, 5 not_run, 2 not_run, 4 not_run");
    assert!(notes(passthrough).contains("mode = \"l4\""), "{passthrough:#}");
    assert_eq!((&l4["reason"], &l4["backend"]), (&json!("bound_l4"), &json!("m")), "{l4:#}");
    assert_eq!(steps(l4), "6 bound_l4, 7 control, 8 to_backend, 9 to_client, 10 to_backend");
}

#[test]
fn ports_that_are_used_again() {
    let hello = hello::client_hello(&[4; 32], 0);
    let visit = |port, isn: u32| {
        let scene = Scene { isns: [isn, isn ^ 0x5555], ..scene(port) };
        scene.open().says(&hello).answers(&hello::server_hello(&[4; 32], false))
    };
    // The end of the second client's first connection is not in the capture.
    let mut frames = [visit(4001, 1000).close().frames(), visit(4001, 2000).frames()].concat();
    frames.extend([visit(4002, 1000).frames(), visit(4002, 2000).frames()].concat());
    // A SYN and a hello that are sent again are one connection's.
    let mut again = visit(4003, 1000).frames();
    again.insert(4, again[3].clone());
    again.insert(1, again[0].clone());
    frames.extend(again);
    let found = Desk::new().json(&frames);
    let reasons: Vec<&Value> = found.iter().map(|line| &line["reason"]).collect();
    assert_eq!(reasons, ["bound_miss", "bound_hit", "bound_hit", "bound_hit", "bound_hit"], "{found:#?}");
    let told: Vec<bool> =
        found.iter().map(|line| notes(line).contains("does not end in the capture")).collect();
    assert_eq!(told, [false, false, false, true, false], "{found:#?}");
    let all = steps(&found[4]);
    assert_eq!(all.matches("syn_answered").count(), 2, "{all}");
}

#[test]
fn what_is_nobodys_is_summed_up() {
    let mut frames = scene(4001).open().says(&hello::client_hello(&[4; 32], 0)).frames();
    let other = address("198.51.100.99:443");
    frames.extend(Scene::new(client(4002), other).open().frames());
    frames.extend(Scene::new(client(4003), address("192.0.2.10:8080")).open().frames());
    let icmp = Icmp { kind: 8, code: 0, rest: [0; 4], payload: vec![1; 8] };
    frames.push(Packet::new(client(1).ip(), other.ip(), Body::Icmp(icmp)).frame());
    frames.push([&[0xff; 12][..], &[8, 6], &[0; 46]].concat());
    let desk = Desk::new();
    let found = desk.json(&frames);
    let told: Vec<(&str, &str, &str)> = found
        .iter()
        .map(|line| {
            let text = |field: &str| line[field].as_str().expect("text");
            (text("flow"), text("reason"), text("verdict"))
        })
        .collect();
    assert_eq!(
        told[1..],
        [
            ("203.0.113.7:4002 -> 198.51.100.99:443/tcp", "not_ours", "pass"),
            ("203.0.113.7:4003 -> 192.0.2.10:8080/tcp", "no_service", "pass"),
            ("203.0.113.7 -> 198.51.100.99/icmp", "icmp_other", "pass"),
            ("not IP", "not_ip", "pass"),
        ]
    );
    let text = desk.text(&frames);
    assert!(text.starts_with("203.0.113.7:4001 -> 192.0.2.10:443/tcp\n  service    web\n"), "{text}");
    assert!(text.contains("  secure     TLS, offers 1.2, whole hello\n"), "{text}");
    assert!(text.contains(": bound_miss\n             First data with an unknown identifier"), "{text}");
    assert!(text.contains("  packets    1 syn_answered, 3 cookie_ack, 4 bound_miss, 2 replayed\n"), "{text}");
    let last = text.lines().last().expect("a line");
    assert_eq!(
        last,
        "to the kernel: 4 more flows (1 backend_other, 1 icmp_other, 2 no_service, 1 not_ip, 3 not_ours)"
    );
}

fn datagram(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let udp = Udp { src: src.port(), dst: dst.port(), unchecked: false, payload: payload.to_vec() };
    Packet::new(src.ip(), dst.ip(), Body::Udp(udp)).frame()
}

#[test]
fn a_quic_connection_is_followed_to_another_port() {
    let long = |dcid: &[u8], scid: &[u8]| {
        let (d, s) = ([dcid.len() as u8], [scid.len() as u8]);
        [&[0xc3, 0, 0, 0, 1], &d[..], dcid, &s, scid, &[0; 1180]].concat()
    };
    let short = |dcid: &[u8]| [&[0x43], dcid, &[9; 40]].concat();
    let (vip, given) = (address("192.0.2.10:8443"), [0x5e; 8]);
    let mut frames = Vec::new();
    for port in [5001, 5002, 5003, 5004] {
        let (near, moved) = (client(port), client(port + 1000));
        let id = [port as u8; 8];
        frames.push(datagram(near, vip, &long(&[port as u8; 10], &[1; 4])));
        frames.push(datagram(vip, near, &long(&[1; 4], &id)));
        frames.push(datagram(near, vip, &long(&id, &[1; 4])));
        frames.push(datagram(moved, vip, &short(&id)));
    }
    frames.push(datagram(client(7000), vip, &short(&given)));
    // One that comes from a port of another connection goes its own way, and the flow is told as it began.
    for port in [5002, 5003, 5004] {
        frames.push(datagram(client(5001), vip, &short(&[port as u8; 8])));
    }
    let found = Desk::new().json(&frames);
    let again = steps(&found[0]).matches("bound_hit").count();
    assert!(again > 0, "all at one server proves nothing: {found:#?}");
    let made_up = json!({"kind": "quic-cid", "id": hexed(&[5001_u16 as u8; 10]), "backends": []});
    assert_eq!((&found[0]["tried"], &found[0]["looked_up"]), (&json!([made_up]), &made_up));
    for pair in found[..8].chunks(2) {
        let [first, moved] = pair else { panic!("{found:#?}") };
        assert_eq!((&first["reason"], &moved["reason"]), (&json!("bound_l4"), &json!("bound_hit")));
        assert_eq!(first["backend"], moved["backend"]);
        assert_eq!(first["learned"][0]["kind"], "quic-cid");
        assert_eq!(first["learned"][0]["backends"], json!([first["backend"]]));
        assert_eq!(moved["looked_up"], first["learned"][0]);
        assert_eq!(moved["tried"], json!([first["learned"][0]]));
    }
    let backends: BTreeSet<String> = found.iter().map(|line| line["backend"].to_string()).collect();
    assert_eq!(backends.len(), 2, "all at one server proves nothing: {backends:?}");
    assert_eq!(found[8]["reason"], "bound_l4", "an ID that no server gave");
}

#[test]
fn without_a_configuration_every_server_is_a_service() {
    let hello = hello::client_hello(&[4; 32], 0);
    let mut frames = Vec::new();
    // One client port, two servers.
    for server in ["192.0.2.10:443", "192.0.2.11:443"] {
        frames.extend(Scene::new(client(4001), address(server)).open().says(&hello).frames());
    }
    let quic = [&[0xc3, 0, 0, 0, 1, 8][..], &[0xd1; 8], &[4], &[0x5c; 4], &[0; 1190]].concat();
    let (near, far) = (address("[2001:db8::7]:50000"), address("[2001:db8::10]:443"));
    frames.push(datagram(near, far, &quic));
    frames.push(datagram(far, near, b"answer"));
    frames.push(datagram(client(5000), address("192.0.2.53:53"), b"question"));
    let found = Desk::new().alone(&frames);
    let reasons: Vec<&str> = found.iter().map(|line| line["reason"].as_str().expect("a reason")).collect();
    assert_eq!(reasons, ["bound_miss", "bound_miss", "bound_l4", "bound_l4"], "{found:#?}");
    assert!(found.iter().all(|line| line["backend"] == "backend"), "{found:#?}");
    assert_eq!(found[0]["service"], "192.0.2.10:443/tcp");
    let quic = &found[2];
    assert_eq!(quic["flow"], "[2001:db8::7]:50000 -> [2001:db8::10]:443/udp");
    assert_eq!((&quic["secure"], &quic["complete"]), (&json!(true), &json!(true)));
    assert_eq!(quic["quic_version"], "00000001");
    assert_eq!((&quic["dcid"], &quic["scid"]), (&json!("d1".repeat(8)), &json!("5c".repeat(4))));
    assert_eq!(steps(quic), "9 bound_l4, 10 to_client");
    assert_eq!(found[3]["secure"], false);
}

#[test]
fn bad_files_are_said_and_lies_are_counted() {
    let desk = Desk::new();
    let frames = scene(4001).open().says(&hello::client_hello(&[4; 32], 0)).frames();
    let file = std::fs::read(desk.capture(&frames)).expect("a capture");
    // Cut in the last packet.
    let path = desk.path("short.pcap");
    std::fs::write(&path, &file[..file.len() - 5]).expect("writing a capture");
    let (out, result) = desk.run(&path, &["--json"]);
    let error = result.expect_err("cut short");
    assert_eq!(error.exit(), ctl::Exit::Refused);
    assert!(error.to_string().contains("short.pcap: after packet 3, at byte"), "{error}");
    assert_eq!(steps(&lines(&out)[0]), "1 syn_answered, 3 cookie_ack, 2 not_run");
    for (name, content, says) in [
        ("text", b"#!/bin/sh\n".to_vec(), "neither pcap nor pcapng"),
        ("empty", Vec::new(), "it is empty, not even a header; give a pcap or pcapng file"),
        ("head", file[..20].to_vec(), "cut short"),
        ("first", file[..60].to_vec(), "after packet 0, at byte 24"),
        ("radio", capture::pcap(127, &frames), "link type is 127;"),
    ] {
        let path = desk.path(name);
        std::fs::write(&path, content).expect("writing a file");
        let (out, result) = desk.run(&path, &[]);
        let error = result.expect_err(name).to_string();
        assert!(error.contains(name) && error.contains(says) && out.is_empty(), "{error}");
    }
    let (_, result) = desk.run(&desk.path("nowhere"), &[]);
    assert!(result.expect_err("no file").to_string().contains("nowhere: No such file"));
    let (_, result) = desk.run(&desk.capture(&frames), &["--config", "/no/such.toml"]);
    assert!(result.expect_err("no configuration").to_string().contains("/no/such.toml"));

    // A length that lies, another version of IP, and any changed byte: a reason for every packet.
    let mut lie = frames[3].clone();
    lie[14 + 2] = 0x3f;
    let mut other = frames[3].clone();
    other[14] = 0x55;
    let found = desk.json(&[lie, other]);
    let told = found.iter().map(|line| (&line["flow"], &line["reason"], &line["secure"]));
    assert_eq!(
        told.collect::<Vec<_>>(),
        [
            (&json!("203.0.113.7 -> 192.0.2.10/tcp without ports"), &json!("reset_client"), &json!(false)),
            (&json!("not IP"), &json!("bad_ip"), &json!(false)),
        ]
    );
    let mut changed = vec![vec![], vec![0; 13], vec![0; 5000]];
    for frame in &frames {
        for at in 12..frame.len() {
            for value in [0, 0x7f, 0xff] {
                let mut frame = frame.clone();
                frame[at] = value;
                changed.push(frame.clone());
                changed.push(frame[..at].to_vec());
            }
        }
    }
    let found = desk.json(&changed);
    let mut told: Vec<u64> = found
        .iter()
        .flat_map(|line| line["packets"].as_array().expect("packets"))
        .filter_map(|step| step["number"].as_u64())
        .collect();
    told.sort_unstable();
    told.dedup();
    assert_eq!(told, (1..=changed.len() as u64).collect::<Vec<_>>(), "each packet has a reason");
}

#[test]
fn a_real_exchange_with_unfinished_checksums_and_large_segments() {
    let authority = Authority::new().expect("certificates");
    let (near, far) = (Netns::new("near").expect("a namespace"), Netns::new("far").expect("a namespace"));
    cable(&near, "eth0", &far, "eth0").expect("a link");
    near.ip("addr add 10.9.0.1/24 dev eth0\nlink set eth0 up").expect("an address");
    far.ip("addr add 10.9.0.2/24 dev eth0\nlink set eth0 up").expect("an address");
    for end in [&near, &far] {
        end.execute("ethtool", &["-K", "eth0", "tx", "on", "gso", "on", "tso", "on"]).expect("offload");
    }
    let manners = Manners { tickets: true, ..Manners::default() };
    let _server = Server::start(&far, "s", 443, &authority, manners).expect("a server");
    let sniffer = near.run(|| Sniffer::new("eth0")).expect("a packet socket");
    let to = address("10.9.0.2:443");
    let from: IpAddr = [10, 9, 0, 1].into();
    for version in Version::BOTH {
        let user = User::new(&authority, version).expect("a user").with_tickets().with_long_hello(1300);
        for _ in 0..2 {
            user.visit(&near, from, to).expect("an answer");
        }
    }
    let frames: Vec<Vec<u8>> = std::iter::from_fn(|| sniffer.frame()).collect();
    let found: Vec<Value> = Desk::new()
        .alone(&frames)
        .into_iter()
        .filter(|line| line["flow"].as_str().is_some_and(|flow| flow.ends_with("10.9.0.2:443/tcp")))
        .collect();
    assert_eq!(found.len(), 4, "{found:#?}");
    for (number, line) in found.iter().enumerate() {
        assert_eq!(line["backend"], "backend", "{line:#}");
        assert_eq!((&line["sni"], &line["complete"]), (&json!(HOST), &json!(true)), "{line:#}");
        assert_eq!(line["resumed"], number % 2 == 1, "{line:#}");
        assert!(notes(line).contains("unfinished checksums"), "{line:#}");
        assert!(notes(line).contains("cut to the MSS"), "{line:#}");
        let all = steps(line);
        assert!(all.contains("replayed") && all.contains("to_client") && all.contains("to_backend"), "{all}");
        for bad in ["bad_", "reset_", "before_first", "not_run", "cut_in"] {
            assert!(!all.contains(bad), "{all}");
        }
    }
    let versions: Vec<&Value> = found.iter().map(|line| &line["accepted_version"]).collect();
    let [first, second] = Version::BOTH.map(|version| if version == Version::Tls13 { "1.3" } else { "1.2" });
    assert_eq!(versions, [first, first, second, second]);
}

#[test]
fn what_the_daemon_knows_decides_with_live() {
    let (near, far) = (Netns::new("near").expect("a namespace"), Netns::new("far").expect("a namespace"));
    cable(&near, "eth0", &far, "eth0").expect("a link");
    let daemon = Daemon::start_with(&near, &CONFIG.replace("EXTRA", "")).expect("the daemon");
    let desk = Desk::new();
    let (file, config) = (desk.path("file.pcap"), desk.config());
    // Whichever the table would pick for the one, it is not the pinned one for both.
    let ids = [[6; 32], [7; 32]];
    let mut frames = Vec::new();
    for ((id, backend), port) in ids.iter().zip(["a", "b"]).zip(4001..) {
        let pin = ["sessions", "pin", &hexed(id), "--service", "web", "--backend", backend];
        daemon.ask::<Value>(&pin).expect("pinned");
        frames.extend(scene(port).open().says(&hello::client_hello(id, 0)).frames());
    }
    capture::write(&file, &frames).expect("writing a capture");
    let socket = daemon.socket().to_str().expect("a name");
    let arguments = ["--json", "--config", &config, "--live", "--socket", socket];
    let (out, result) = desk.run(&file, &arguments);
    result.expect("explained");
    assert_eq!(desk.hints(), "");
    let told: Vec<(Value, Value, Value)> = lines(&out)
        .iter()
        .map(|line| (line["reason"].clone(), line["backend"].clone(), line["looked_up"]["backends"].clone()))
        .collect();
    let wanted = |backend: &str| (json!("bound_hit"), json!(backend), json!([backend]));
    assert_eq!(told, [wanted("a"), wanted("b")]);
    let (_, result) = desk.run(&file, &["--config", &config, "--live", "--socket", "/no/such/socket"]);
    assert_eq!(result.expect_err("no daemon").exit(), ctl::Exit::Unreachable);
}
