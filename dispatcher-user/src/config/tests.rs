use super::*;

const GOOD: &str = r#"
interfaces = ["eth0", "eth1"]

[[service]]
name = "web"
vip = ["192.0.2.10:443", "[2001:db8::10]:443"]

[[service.backend]]
name = "a"
address = ["10.0.0.1:443", "[fd00::1]:443"]

[[service.backend]]
name = "b"
address = "10.0.0.2:443"
weight = 3
state = "drain"
"#;

fn invalid(text: &str) -> (usize, String, String) {
    match Config::parse(text, &[]) {
        Err(Error::Invalid { line, key, problem, .. }) => (line, key, problem),
        other => panic!("not refused: {other:?}\n{text}"),
    }
}

#[test]
fn defaults_are_filled_in() {
    let config = Config::parse(GOOD, &[]).expect("good");
    assert_eq!(config.control, Path::new(DEFAULT_CONTROL));
    assert_eq!(config.pin.as_deref(), Some(Path::new(DEFAULT_PIN)));
    assert_eq!(config.state.as_deref(), Some(Path::new(DEFAULT_STATE)));
    assert_eq!(config.interfaces.len(), 2);
    let [service] = config.services.as_slice() else { panic!("one service") };
    assert_eq!(service.id, stable_id("web"));
    assert_eq!(
        (service.protocol, service.mode, service.miss),
        (Protocol::Tcp, Mode::Passthrough, Miss::Table)
    );
    assert_eq!((service.session_ttl, service.provisional_ttl, service.table_size), (3600, 10, 4093));
    assert_eq!((service.wscale, service.mss, service.sack, service.timestamps), (7, 1460, true, true));
    assert_eq!(service.backends[0].id, stable_id("web/a"));
    assert_eq!(service.backends[0].v6, Some("[fd00::1]:443".parse().expect("address")));
    assert_eq!((service.backends[1].weight, service.backends[1].state), (3, AdminState::Drain));
}

#[test]
fn pins_have_a_folder_or_there_are_none() {
    for (text, expected) in [("/sys/fs/bpf/other", Some("/sys/fs/bpf/other")), ("none", None)] {
        let config = Config::parse(&format!("pin = \"{text}\"\n{GOOD}"), &[]).expect("good");
        assert_eq!(config.pin.as_deref(), expected.map(Path::new));
    }
    assert_eq!(Config::default().pin, None, "without a file nothing is pinned");
}

#[test]
fn state_has_a_file_or_there_is_none() {
    for (text, expected) in [("/srv/dispatcher.d/s.redb", Some("/srv/dispatcher.d/s.redb")), ("none", None)] {
        let config = Config::parse(&format!("state = \"{text}\"\n{GOOD}"), &[]).expect("good");
        assert_eq!(config.state.as_deref(), expected.map(Path::new));
    }
    assert_eq!(Config::default().state, None, "without a file nothing is kept");
}

#[test]
fn interfaces_of_the_command_line_are_added() {
    let more = [
        Interface { name: "eth1".into(), attach: AttachMode::Generic },
        Interface { name: "eth2".into(), attach: AttachMode::Generic },
    ];
    let config = Config::parse(GOOD, &more).expect("good");
    let names: Vec<_> = config.interfaces.iter().map(|one| (one.name.as_str(), one.attach)).collect();
    assert_eq!(
        names,
        [("eth0", AttachMode::Auto), ("eth1", AttachMode::Auto), ("eth2", AttachMode::Generic)]
    );
}

/// Each change to the good text, and where and how it is refused.
#[test]
fn mistakes_name_line_key_and_remedy() {
    let vip = "vip = [\"192.0.2.10:443\", \"[2001:db8::10]:443\"]";
    for (from, to, line, key, remedy) in [
        ("name = \"web\"", "name = \"web\"\ncolour = \"red\"", 6, "colour", "expected one of"),
        ("name = \"web\"", "name = \"web\"\nsack = \"yes\"", 6, "sack", "expected a boolean"),
        ("name = \"web\"", "name = \"web\"\nmss = \"x\"", 6, "mss", "expected a whole number"),
        ("name = \"web\"", "name = \"web\"\nmss = 1.5", 6, "mss", "without quotes and fraction"),
        (
            "name = \"web\"",
            "name = \"web\"\nmss = 18446744073709551615",
            6,
            "mss",
            "is beyond all bounds; write a smaller",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nmss = 18446744073709551616",
            6,
            "mss",
            "is beyond all bounds; write a smaller",
        ),
        (vip, "vip = \"192.0.2.10:443\"\nlimits = { bandwidth = 100 }", 7, "limits", "such as \"800Mbit/s\""),
        (vip, "vip = \"192.0.2.10:443\"\nlimits.bandwidth = 100", 7, "limits.bandwidth", "\"800Mbit/s\""),
        (vip, "vip = \"192.0.2.10:443\"\nprovisional_ttl = 10", 7, "provisional_ttl", "such as \"10s\""),
        ("name = \"web\"", "", 4, "[[service]]", "missing field `name`; add it"),
        ("name = \"web\"", "name = \"we b\"", 5, "service.name", "letters, digits"),
        ("name = \"web\"", "name = \"web", 5, "name", "invalid basic string"),
        ("interfaces = [\"eth0\", \"eth1\"]", "", 1, "interfaces", "add `interfaces"),
        ("\"eth1\"", "\"eth0\"", 2, "interfaces", "remove one"),
        ("\"eth1\"", "\"an interface\"", 2, "interfaces", "ip link"),
        (
            "[[service]]",
            "attach = \"fast\"\n[[service]]",
            4,
            "attach",
            "\"auto\" or \"native\" or \"generic\"",
        ),
        ("[[service]]", "control = \"run/x\"\n[[service]]", 4, "control", "absolute path"),
        ("[[service]]", "pin = \"run/x\"\n[[service]]", 4, "pin", "absolute path without dots"),
        ("[[service]]", "pin = \"/sys/fs/bpf/a.b\"\n[[service]]", 4, "pin", "or \"none\""),
        ("[[service]]", "pin = \"/sys/fs/bpf\"\n[[service]]", 4, "pin", "give a folder in it, such as"),
        ("[[service]]", "pin = \"/sys/fs/bpf/\"\n[[service]]", 4, "pin", "which others use too"),
        ("[[service]]", "pin = false\n[[service]]", 4, "pin", "in quotes"),
        ("[[service]]", "state = \"state.redb\"\n[[service]]", 4, "state", "absolute path"),
        ("[[service]]", "state = \"/var/lib/\"\n[[service]]", 4, "state", "or \"none\""),
        ("[[service]]", "state = 1\n[[service]]", 4, "state", "in quotes"),
        ("[[service]]", "metrics = 9100\n[[service]]", 4, "metrics", "write it in quotes"),
        ("[[service]]", "metrics = \"9100\"\n[[service]]", 4, "metrics", "such as \"127.0.0.1:9100\""),
        ("[[service]]", "metrics = \"127.0.0.1:0\"\n[[service]]", 4, "metrics", "give a port"),
        ("[[service]]", "metrics = \"0.0.0.0:9100\"\n[[service]]", 4, "metrics", "metrics_public = true"),
        ("[[service]]", "metrics = \"[::]:9100\"\n[[service]]", 4, "metrics", "\"127.0.0.1:9100\""),
        (
            "[[service]]",
            "metrics = \"0.0.0.0:9100\"\nmetrics_public = false\n[[service]]",
            4,
            "metrics",
            "no loopback",
        ),
        (
            "[[service]]",
            "[capacity]\nstash_slots = 1000\n[[service]]",
            5,
            "capacity.stash_slots",
            "power of two",
        ),
        ("[[service]]", "[capacity]\nflows = 0\n[[service]]", 5, "capacity.flows", "use 1 to"),
        ("[[service]]", "[capacity]\nbackends = 1\n[[service]]", 5, "capacity.backends", "set it to 2"),
        ("[[service]]", "[capacity]\nfrontends = 1\n[[service]]", 5, "capacity.frontends", "set it to 2"),
        (
            "[[service]]",
            "[capacity]\nlb_table = 9000\n[[service]]",
            5,
            "capacity.lb_table",
            "set it to 16372",
        ),
        ("[[service]]", "[capacity]\nstash = 1\n[[service]]", 5, "stash", "expected one of"),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = [\"tls\"]",
            6,
            "service.affinity",
            "use \"tls-ticket\" or",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = [\"tls-ticket\", \"http-cookie:a b\"]",
            6,
            "service.affinity",
            "does not name a cookie; write \"http-cookie:NAME\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = [\"http-cookie:a\", \"http-cookie:b\"]",
            6,
            "service.affinity",
            "is a second cookie; a service has one",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = [\"tls-ticket\", \"tls-ticket\"]",
            6,
            "service.affinity",
            "given twice",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nmode = \"l4\"\naffinity = \"tls-ticket\"",
            7,
            "service.affinity",
            "looks for no session; remove it",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = [\"client-address\", \"tls-ticket\"]",
            6,
            "service.affinity",
            "put \"client-address\" last",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = [\"HTTP-Cookie:sid\"]",
            6,
            "service.affinity",
            "write \"http-cookie:NAME\"",
        ),
        (
            "name = \"a\"",
            "name = \"a\"\nquic_server_id = \"0a\"",
            10,
            "service.backend.quic_server_id",
            "affinity = \"quic-cid\" only",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\naffinity = \"tls-session-id\"\ntickets = {}",
            5,
            "service.tickets",
            "does not have \"tls-ticket\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\ntickets = { key_name = \"8-bytes\" }",
            6,
            "service.tickets.key_name",
            "use \"auto\" or \"16-bytes\" or \"4-bytes\" or \"none\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\ntickets = { server_names = \"10.0.0.1\" }",
            6,
            "service.tickets.server_names",
            "no host name",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\ntickets = { server_names = [\"a.test\", \"a.test\"] }",
            6,
            "service.tickets.server_names",
            "given twice",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\ntickets = { interval = \"0s\" }",
            6,
            "service.tickets.interval",
            "no duration",
        ),
        ("name = \"web\"", "name = \"web\"\ntickets = { keys = 1 }", 6, "tickets", "unknown field"),
        ("name = \"web\"", "name = \"web\"\nslow_start = \"0s\"", 6, "service.slow_start", "no duration"),
        ("name = \"web\"", "name = \"web\"\nhealth = {}", 6, "health", "missing field `check`"),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tcp\", raise = 2 }",
            6,
            "health",
            "unknown field",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"ping\" }",
            6,
            "service.health.check",
            "use \"tcp\" or \"tls\" or \"http\" or \"https\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tcp\", interval = \"0s\" }",
            6,
            "service.health.interval",
            "no duration",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tcp\", timeout = \"2\" }",
            6,
            "service.health.timeout",
            "no duration",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tcp\", rise = 0 }",
            6,
            "service.health.rise",
            "use 1 to 100",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tcp\", fall = 101 }",
            6,
            "service.health.fall",
            "use 1 to 100",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tls\", path = \"/\" }",
            6,
            "service.health.path",
            "is for check = \"http\" or \"https\", not for \"tls\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"tcp\", expect = \"200\" }",
            6,
            "service.health.expect",
            "remove it",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", server_name = \"a.test\" }",
            6,
            "service.health.server_name",
            "is for check = \"tls\" or \"https\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"https\", server_name = \"10.0.0.1\" }",
            6,
            "service.health.server_name",
            "no host name",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", path = \"health\" }",
            6,
            "service.health.path",
            "such as \"/health\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", path = \"/a b\" }",
            6,
            "service.health.path",
            "no path of a URL",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", host = \"a b\" }",
            6,
            "service.health.host",
            "no value of a Host header",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", expect = \"399-200\" }",
            6,
            "service.health.expect",
            "\"200-399\"",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", expect = [\"200\", \"OK\"] }",
            6,
            "service.health.expect",
            "no status code",
        ),
        (
            "name = \"web\"",
            "name = \"web\"\nhealth = { check = \"http\", expect = [] }",
            6,
            "service.health.expect",
            "list is empty",
        ),
        (vip, "vip = \"2001:db8::10:443\"", 6, "service.vip", "write \"[2001:db8::10]:443\""),
        (vip, "vip = []", 6, "service.vip", "at least one"),
        (vip, "vip = \"192.0.2.10\"", 6, "service.vip", "192.0.2.10:443"),
        (vip, "vip = \"2001:db8::10\"", 6, "service.vip", "[2001:db8::10]:443"),
        (vip, "vip = \"www.example.com:443\"", 6, "service.vip", "names are not looked up"),
        (vip, "vip = [\n  \"192.0.2.10:443\",\n  \"192.0.2.11:0\"]", 8, "service.vip", "port 0"),
        (vip, "vip = [\"192.0.2.10:443\",\n \"192.0.2.10:443\"]", 6, "service.vip", "given twice"),
        (vip, "vip = \"0.0.0.0:443\"", 6, "service.vip", "one host"),
        (vip, "vip = \"127.0.0.1:443\"", 6, "service.vip", "loopback"),
        (vip, "vip = \"[fe80::1]:443\"", 6, "service.vip", "link-local"),
        (vip, "vip = \"[::ffff:192.0.2.1]:443\"", 6, "service.vip", "IPv4 address in IPv6 form"),
        (vip, "vip = \"10.0.0.1:80\"", 10, "service.backend.address", "server's own address"),
        (
            "[\"10.0.0.1:443\", \"[fd00::1]:443\"]",
            "\"10.0.0.1:443\"",
            6,
            "service.vip",
            "no backend of service web has an IPv6 address",
        ),
        (
            "\"[fd00::1]:443\"]",
            "\"10.0.0.9:443\"]",
            10,
            "service.backend.address",
            "two addresses of one family",
        ),
        ("[\"10.0.0.1:443\", \"[fd00::1]:443\"]", "[]", 10, "service.backend.address", "has no address"),
        ("\"10.0.0.2:443\"", "\"10.0.0.1:443\"", 14, "service.backend.address", "is backend a already"),
        ("\"10.0.0.2:443\"", "\"10.0.0.2:https\"", 14, "service.backend.address", "192.0.2.10:443"),
        ("\"10.0.0.2:443\"", "7", 14, "address", "a string or a list of strings"),
        ("name = \"b\"", "name = \"a\"", 13, "service.backend.name", "given twice; rename one"),
        ("weight = 3", "weight = -1", 15, "service.backend.weight", "use 0 to 65535"),
        (
            "state = \"drain\"",
            "state = \"off\"",
            16,
            "service.backend.state",
            "\"enabled\" or \"drain\" or \"disabled\"",
        ),
        (vip, "vip = \"192.0.2.10:443\"\nprotocol = \"udp\"", 7, "service.protocol", "mode = \"l4\""),
        (vip, "vip = \"192.0.2.10:443\"\nprotocol = \"sctp\"", 7, "service.protocol", "\"tcp\" or \"udp\""),
        (vip, "vip = \"192.0.2.10:443\"\nmode = \"l4\"\nmiss = \"daemon\"", 8, "service.miss", "remove it"),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nmode = \"l4\"\nproxy_protocol = \"v2\"",
            8,
            "service.proxy_protocol",
            "set \"off\"",
        ),
        (vip, "vip = \"192.0.2.10:443\"\nbalance = \"random\"", 7, "service.balance", "\"maglev\""),
        (vip, "vip = \"192.0.2.10:443\"\ntable_size = 4096", 7, "service.table_size", "use 4099"),
        (vip, "vip = \"192.0.2.10:443\"\nsession_ttl = \"1 hour\"", 7, "service.session_ttl", "\"1h\""),
        (vip, "vip = \"192.0.2.10:443\"\nprovisional_ttl = \"0s\"", 7, "service.provisional_ttl", "\"10s\""),
        (vip, "vip = \"192.0.2.10:443\"\nwscale = 15", 7, "service.wscale", "use 0 to 14"),
        (vip, "vip = \"192.0.2.10:443\"\nmss = 9000", 7, "service.mss", "use 536 to 1460"),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nsource = \"dispatcher\"",
            7,
            "service.source_addresses",
            "add source_addresses",
        ),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nsource_ports = \"1-2\"",
            7,
            "service.source_ports",
            "source = \"dispatcher\" only",
        ),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nsource = \"dispatcher\"\nsource_addresses = [\"10.0.0.2\"]",
            8,
            "service.source_addresses",
            "nothing else uses",
        ),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nsource = \"dispatcher\"\nsource_addresses = [\"fd00::9\"]",
            8,
            "service.source_addresses",
            "no IPv4 address",
        ),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nsource = \"dispatcher\"\nsource_addresses = \"10.0.0.9:1\"",
            8,
            "service.source_addresses",
            "without port",
        ),
        (
            vip,
            "vip = \"192.0.2.10:443\"\nsource = \"dispatcher\"\nsource_addresses = \"10.0.0.9\"\nsource_ports = \"9-1\"",
            9,
            "service.source_ports",
            "1024-65535",
        ),
    ] {
        assert!(GOOD.contains(from), "{from}");
        let text = GOOD.replacen(from, to, 1);
        let (at, what, problem) = invalid(&text);
        assert_eq!((at, what.as_str()), (line, key), "{problem}\n{text}");
        assert!(problem.contains(remedy), "{key}: {problem:?} lacks {remedy:?}");
    }
}

/// A QUIC service, each change of it, and where and how it is refused.
#[test]
fn mistakes_about_connection_ids() {
    const QUIC: &str = r#"
interfaces = ["eth0"]
[[service]]
name = "quic"
vip = "192.0.2.10:443"
protocol = "udp"
mode = "l4"
affinity = ["quic-cid"]
[[service.quic_lb]]
config_id = 0
server_id_length = 3
[[service.quic_lb]]
config_id = 6
server_id_length = 15
[[service.backend]]
name = "a"
address = "10.0.0.1:443"
quic_server_id = ["0a0b0c", "000102030405060708090a0b0c0d0e"]
[[service.backend]]
name = "b"
address = "10.0.0.2:443"
quic_server_id = "0A0B0D"
"#;
    let config = Config::parse(QUIC, &[]).expect("good");
    let [service] = config.services.as_slice() else { panic!("one service") };
    assert_eq!(service.affinity, [Affinity::QuicCid]);
    assert_eq!(service.quic_lb, [3, 0, 0, 0, 0, 0, 15, 0]);
    assert_eq!(service.backends[1].quic_server_ids, [[10, 11, 13]]);
    for (from, to, line, key, remedy) in [
        ("config_id = 0", "config_id = 7", 10, "service.quic_lb.config_id", "use 0 to 6"),
        ("config_id = 0", "config_id = -1", 10, "service.quic_lb.config_id", "use 0 to 6"),
        ("config_id = 6", "config_id = 0", 13, "service.quic_lb.config_id", "0 is given twice; remove one"),
        ("config_id = 0", "", 9, "[[service.quic_lb]]", "missing field `config_id`; add it"),
        ("config_id = 0", "config_id = 0\nnonce = 4", 11, "nonce", "unknown field"),
        ("= 15", "= 16", 14, "service.quic_lb.server_id_length", "use 1 to 15"),
        ("= 15", "= 0", 14, "service.quic_lb.server_id_length", "use 1 to 15"),
        ("= 15", "= 14", 18, "service.backend.quic_server_id", "has 15 bytes, but no [[service.quic_lb]]"),
        ("\"0A0B0D\"", "\"0a0b\"", 22, "service.backend.quic_server_id", "has 2 bytes"),
        ("\"0A0B0D\"", "\"0a0b0c\"", 22, "service.backend.quic_server_id", "backend a already; give each"),
        ("\"0A0B0D\"", "\"0a0b0\"", 22, "service.backend.quic_server_id", "in hexadecimal"),
        ("\"0A0B0D\"", "\"\"", 22, "service.backend.quic_server_id", "1 to 15 bytes"),
        ("\"0A0B0D\"", "\"0x0a0b\"", 22, "service.backend.quic_server_id", "in hexadecimal"),
        (
            ", \"000102030405060708090a0b0c0d0e\"",
            "",
            14,
            "service.quic_lb.server_id_length",
            "no backend has an ID of 15 bytes; give each",
        ),
        ("affinity = [\"quic-cid\"]", "", 10, "service.quic_lb", "add that, or remove the table"),
        ("[\"quic-cid\"]", "\"tls-ticket\"", 8, "service.affinity", "does not go with protocol = \"udp\""),
        (
            "[\"quic-cid\"]",
            "[\"quic-cid\", \"client-address\"]",
            8,
            "service.affinity",
            "\"client-address\" does not go with",
        ),
        ("[\"quic-cid\"]", "[\"quic-cid\", \"quic-cid\"]", 8, "service.affinity", "given twice"),
        ("protocol = \"udp\"", "", 8, "service.affinity", "looks for no session; remove it"),
        (
            "protocol = \"udp\"\nmode = \"l4\"",
            "protocol = \"tcp\"\n",
            8,
            "service.affinity",
            "\"quic-cid\" is for \"udp\"",
        ),
    ] {
        assert!(QUIC.contains(from), "{from}");
        let text = QUIC.replacen(from, to, 1);
        let (at, what, problem) = invalid(&text);
        assert_eq!((at, what.as_str()), (line, key), "{problem}\n{text}");
        assert!(problem.contains(remedy), "{key}: {problem:?} lacks {remedy:?}");
    }
}

#[test]
fn zero_weights_everywhere_are_refused() {
    let text = GOOD.replace("weight = 3", "weight = 0").replace("name = \"a\"", "name = \"a\"\nweight = 0");
    let (line, key, problem) = invalid(&text);
    assert_eq!((line, key.as_str()), (10, "service.backend.weight"));
    assert!(problem.contains("a weight of 1 or more"), "{problem}");
}

#[test]
fn services_must_not_share_a_vip() {
    let second = GOOD[GOOD.find("[[service]]").expect("a service")..].replace("\"web\"", "\"other\"");
    let (line, key, problem) = invalid(&format!("{GOOD}\n{second}"));
    assert_eq!((line, key.as_str()), (20, "service.vip"));
    assert!(problem.contains("belongs to service web already"), "{problem}");
}

#[test]
fn names_with_one_id_are_refused() {
    // Two words with the same FNV-1a hash.
    assert_eq!(stable_id("costarring"), stable_id("liquid"));
    let second = GOOD[GOOD.find("[[service]]").expect("a service")..].replace("\"web\"", "\"liquid\"");
    let text = format!(
        "{}\n{}",
        GOOD.replace("\"web\"", "\"costarring\""),
        second.replace("192.0.2.10", "192.0.2.11").replace("db8::10", "db8::11")
    );
    let (line, key, problem) = invalid(&text);
    assert_eq!((line, key.as_str()), (19, "service.name"));
    assert!(problem.contains("have the same id; rename one"), "{problem}");
}

#[test]
fn more_backends_than_one_dispatcher_keeps_are_refused() {
    let mut text =
        "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:1\"\ntable_size = 65537\n"
            .to_owned();
    for n in 0..16_385_u32 {
        text.push_str(&format!(
            "[[service.backend]]\nname = \"b{n}\"\naddress = \"10.1.{}.{}:1\"\n",
            n >> 8,
            n & 255
        ));
    }
    let (line, key, problem) = invalid(&text);
    assert_eq!((line, key.as_str()), (3, "capacity.backends"));
    assert!(problem.contains("16384"), "{problem}");
}

#[test]
fn durations() {
    for (text, expected) in [
        ("10s", Some(10)),
        ("1h30m", Some(5400)),
        ("2d", Some(172_800)),
        ("", None),
        ("10", None),
        ("h", None),
        ("9999999d", None),
        ("1é", None),
    ] {
        assert_eq!(seconds(text), expected, "{text}");
    }
}

#[test]
fn checks_are_as_told_or_as_usual() {
    let with = |line: &str| {
        let text = GOOD.replace("name = \"web\"", &format!("name = \"web\"\n{line}"));
        Config::parse(&text, &[]).unwrap_or_else(|error| panic!("{line}: {error}")).services.remove(0)
    };
    assert_eq!((with("").health, with("").slow_start), (None, 0));
    assert_eq!(with("slow_start = \"30s\"").slow_start, 30);
    let usual =
        Health { interval: 5, timeout: 2, rise: 2, fall: 3, tls: false, server_name: None, http: None };
    assert_eq!(with("health = { check = \"tcp\" }").health, Some(usual.clone()));
    let http = HttpCheck { path: "/".into(), host: None, expect: vec![200..=399] };
    let plain = Health { http: Some(http), ..usual.clone() };
    assert_eq!(with("health = { check = \"http\" }").health, Some(plain));
    let told = with(
        "health = { check = \"https\", interval = \"1m\", timeout = \"10s\", rise = 1, fall = 5, server_name = \"a.test\", \
         path = \"/live?x=1\", host = \"b.test\", expect = [\"204\", \"300-302\"] }",
    );
    let http = HttpCheck {
        path: "/live?x=1".into(),
        host: Some("b.test".into()),
        expect: vec![204..=204, 300..=302],
    };
    let server_name = Some("a.test".into());
    let expected =
        Health { interval: 60, timeout: 10, rise: 1, fall: 5, tls: true, server_name, http: Some(http) };
    assert_eq!(told.health, Some(expected));
}

/// The files of docs/config, by name.
fn examples() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/config");
    let paths = std::fs::read_dir(folder).expect("docs/config").map(|entry| entry.expect("an entry").path());
    let files = paths.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
    let read = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, std::fs::read_to_string(path).expect("a text"))
    };
    files.map(read).collect()
}

fn parse(name: &str, text: &str) -> Config {
    Config::parse(text, &[]).unwrap_or_else(|error| panic!("{name}: {error}\n{text}"))
}

#[test]
fn the_example_files_are_valid() {
    let names: BTreeSet<String> =
        examples().into_iter().map(|(name, text)| (parse(&name, &text), name).1).collect();
    let wanted = ["cookie", "full", "l4", "minimal", "quic", "relay", "terminate", "tickets"]
        .map(|name| format!("{name}.toml"));
    assert_eq!(names, BTreeSet::from(wanted));
}

/// Services of all kinds.
const MANY: &str = r#"
control = "/run/x/y.sock"
control_group = "adm"
metrics = "192.0.2.7:9100"
metrics_public = true
interfaces = ["eth0"]
[[service]]
name = "pool"
vip = ["192.0.2.10:443", "[2001:db8::10]:443"]
source = "dispatcher"
source_addresses = ["10.0.0.254", "fd00::fe"]
source_ports = "2000-2999"
proxy_protocol = "v2"
miss = "daemon"
balance = "power-of-two-choices"
affinity = ["http-cookie:ID", "client-address"]
slow_start = "1h1s"
session_ttl = "1d2h3m4s"
sack = false
backend = [{ name = "a", address = ["10.0.0.1:443", "[fd00::1]:443"], weight = 0, state = "drain" }, { name = "b", address = ["10.0.0.2:443", "[fd00::2]:443"] }]
[[service]]
name = "blind"
vip = "192.0.2.11:443"
affinity = []
health = { check = "https", server_name = "a.test", host = "b.test", path = "/x", expect = ["200", "300-302"] }
backend = [{ name = "a", address = "10.0.0.1:443" }]
[[service]]
name = "named"
vip = "192.0.2.12:443"
tickets = { key_name = "none" }
health = { check = "tls" }
backend = [{ name = "a", address = "10.0.0.1:443" }]
[[service]]
name = "asked"
vip = "192.0.2.13:443"
affinity = "tls-ticket"
tickets = { key_name = "4-bytes", server_names = ["a.test", "b.test"], interval = "1m" }
backend = [{ name = "a", address = "10.0.0.1:443" }]
[[service]]
name = "quic"
vip = "192.0.2.13:443"
protocol = "udp"
mode = "l4"
affinity = "quic-cid"
quic_lb = [{ config_id = 6, server_id_length = 15 }, { config_id = 0, server_id_length = 1 }]
backend = [{ name = "a", address = "10.0.0.1:443", quic_server_id = ["0a", "000102030405060708090a0b0c0d0e"] }]
[[service]]
name = "l4"
vip = "192.0.2.14:443"
mode = "l4"
backend = [{ name = "a", address = "10.0.0.1:443" }]
"#;

/// The schema, and a file against it.
fn fits(text: &str) -> Result<(), String> {
    let validator = jsonschema::validator_for(&schema()).expect("a schema");
    let value: serde_json::Value = toml::from_str(text).map_err(|error| error.to_string())?;
    validator.validate(&value).map_err(|error| format!("{}: {error}", error.instance_path()))
}

#[test]
fn what_is_written_is_read_again() {
    let mut texts = examples();
    texts.push(("many".into(), MANY.into()));
    for (name, text) in texts {
        let config = parse(&name, &text);
        let again = toml::to_string_pretty(&written(&config)).expect("a text");
        assert_eq!(parse(&name, &again), config, "{name}\n{again}");
        fits(&again).unwrap_or_else(|error| panic!("{name}: {error}\n{again}"));
    }
    let none = toml::to_string_pretty(&written(&Config::default())).expect("a text");
    assert_eq!(
        Config::parse(&none, &[Interface { name: "lo".into(), attach: AttachMode::Auto }])
            .expect("good")
            .services,
        []
    );
}

#[test]
fn the_schema_is_up_to_date_and_fits_the_examples() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/config/schema.json");
    let kept: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).expect("a text")).expect("json");
    assert_eq!(kept, schema(), "write it anew: dispatcherctl config schema > docs/config/schema.json");
    jsonschema::meta::validate(&kept).expect("a schema");
    for (name, text) in examples() {
        fits(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn the_schema_tells_mistakes_and_defaults() {
    fits(GOOD).expect("good");
    for (from, to) in [
        ("name = \"web\"", "name = \"web\"\ncolour = \"red\""),
        ("name = \"web\"", "name = \"we b\""),
        ("name = \"web\"", ""),
        ("name = \"web\"", "name = \"web\"\nbalance = \"dice\""),
        ("name = \"web\"", "name = \"web\"\nwscale = 15"),
        ("name = \"web\"", "name = \"web\"\nsack = \"yes\""),
        ("name = \"web\"", "name = \"web\"\nsession_ttl = \"10\""),
        ("name = \"web\"", "name = \"web\"\nhealth = { check = \"ping\" }"),
        ("weight = 3", "weight = -1"),
        ("state = \"drain\"", "state = \"off\""),
        ("state = \"drain\"", "quic_server_id = [\"0a0\"]"),
    ] {
        let text = GOOD.replacen(from, to, 1);
        let (fits, read) = (fits(&text), Config::parse(&text, &[]));
        // A list of several forms is refused by the reader alone.
        assert!(fits.is_err() || to.contains('['), "{to}");
        assert!(read.is_err(), "{to}");
    }
    let schema = schema();
    for (place, expected) in [
        ("/properties/control/default", serde_json::json!(DEFAULT_CONTROL)),
        ("/$defs/Service/properties/session_ttl/default", "1h".into()),
        ("/$defs/Service/properties/table_size/default", 4093.into()),
        ("/$defs/Service/properties/affinity/default", serde_json::json!(["tls-ticket", "tls-session-id"])),
        ("/$defs/Health/properties/fall/default", 3.into()),
        ("/$defs/Backend/properties/state/default", "enabled".into()),
        ("/$defs/Service/properties/wscale/maximum", 14.into()),
        ("/$defs/Service/properties/name/type", "string".into()),
        ("/$defs/Service/properties/mss/type", "integer".into()),
    ] {
        assert_eq!(schema.pointer(place), Some(&expected), "{place}");
    }
    for place in ["", "/$defs/Service", "/$defs/Health", "/$defs/Capacity", "/$defs/Backend"] {
        let properties = schema.pointer(&format!("{place}/properties")).and_then(|all| all.as_object());
        for (key, property) in properties.expect("properties") {
            assert!(property["description"].is_string(), "{place} {key} has no description");
        }
    }
}

#[test]
fn half_a_file_is_good_or_refused_with_its_line() {
    let (_, text) = examples().into_iter().find(|(name, _)| name == "full.toml").expect("full.toml");
    let mut refused = 0;
    for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
        let half = &text[..end];
        match Config::parse(half, &[]) {
            Ok(_) => {}
            Err(Error::Invalid { line, key, problem, .. }) => {
                assert!((1..=half.lines().count().max(1)).contains(&line), "line {line} of:\n{half}");
                assert!(!key.is_empty() && !problem.is_empty(), "{half}");
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(refused > 500, "{refused}");
}

#[test]
fn more_backends_than_table_entries_are_refused() {
    let file = |lines: &str, capacity: &str| {
        let mut text = format!(
            "interfaces = [\"eth0\"]\n[capacity]\n{capacity}\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:1\"\n{lines}\n"
        );
        for n in 0..10_000_u32 {
            text += &format!(
                "[[service.backend]]\nname = \"b{n}\"\naddress = \"10.1.{}.{}:1\"\n",
                n >> 8,
                n & 255
            );
        }
        text
    };
    let (line, key, problem) = invalid(&file("", ""));
    assert_eq!((line, key.as_str()), (5, "service.table_size"));
    assert_eq!(
        problem,
        "4093 entries are fewer than the 10000 backends; set it to 1000003, and capacity.backends to 10000, and \
         capacity.lb_table to 2000006"
    );
    let (line, key, problem) = invalid(&file("table_size = 1000003", ""));
    assert_eq!((line, key.as_str()), (5, "capacity.backends"));
    assert_eq!(
        problem,
        "4096 is too small, the services need 10000; set it to 10000 or more under [capacity], and \
         capacity.lb_table to 2000006"
    );
    let (line, key, problem) = invalid(&file("table_size = 1000003", "backends = 10000"));
    assert_eq!((line, key.as_str()), (5, "capacity.lb_table"));
    assert!(problem.contains("set it to 2000006"), "{problem}");
    let config = parse("large", &file("table_size = 1000003", "backends = 10000\nlb_table = 2000006"));
    assert_eq!(config.services[0].backends.len(), 10_000);
}

#[test]
fn services_that_end_tls() {
    let file = |lines: &str| {
        format!(
            "interfaces = [\"eth0\"]\n[[service]]\nname = \"web\"\nvip = \"192.0.2.1:443\"\n{lines}\n\
             [[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1:443\"\n"
        )
    };
    const ENDS: &str = "mode = \"terminate\"\nterminate.certificates = [{ certificate = \"/a.pem\" }]";
    let config = parse("terminate", &file(ENDS));
    let service = &config.services[0];
    let terminate = service.terminate.as_ref().expect("it ends TLS");
    assert_eq!((service.cookie(), terminate.assign_cookie), (Some(DEFAULT_COOKIE), true));
    assert_eq!(terminate.certificates[0].key, Path::new("/a.pem"));
    assert_eq!(service.frontends(), []);
    let named = parse("named", &file(&format!("{ENDS}\naffinity = \"http-cookie:sid\"")));
    let terminate = named.services[0].terminate.as_ref().expect("it ends TLS");
    assert!(!terminate.assign_cookie, "the backend sets it");
    let more = |line: &str| format!("{ENDS}\n{line}");
    let rule = |rule: &str| more(&format!("clear = {{ vip = \"192.0.2.1:80\", secure = [{rule}] }}"));
    let clear = parse("clear", &file(&rule("{ methods = \"POST\", paths = [\"/a/*\", \"/b\"] }")));
    assert_eq!(clear.services[0].listeners().count(), 2);
    let terminate = clear.services[0].terminate.as_ref().expect("it ends TLS");
    assert_eq!(terminate.clear.as_ref().map(|clear| (clear.port, clear.secure.len())), Some((80, 1)));
    let relay = parse("relay", &file("mode = \"relay\"\nproxy_protocol = \"v2\"\ntunnels.established = 8"));
    let relay = &relay.services[0];
    assert_eq!((relay.frontends(), relay.listeners().count(), relay.affinity.len()), (&[][..], 1, 2));
    assert_eq!(relay.tunnels.as_ref().map(|tunnels| tunnels.established), Some(8));
    for (lines, key, part) in [
        ("mode = \"terminate\"".to_owned(), "service.terminate", "needs a [service.terminate] table"),
        (
            "mode = \"terminate\"\nterminate = {}".to_owned(),
            "service.terminate.certificates",
            "there is none",
        ),
        ("tunnels.most = 3".to_owned(), "service.tunnels", "\"terminate\" or \"relay\""),
        ("clear.vip = \"192.0.2.1:80\"".to_owned(), "service.clear", "\"terminate\" only"),
        ("mode = \"relay\"\nclear.vip = \"192.0.2.1:80\"".to_owned(), "service.clear", "\"terminate\" only"),
        ("mode = \"relay\"\nmiss = \"daemon\"".to_owned(), "service.miss", "always decides"),
        ("mode = \"relay\"\nwscale = 3".to_owned(), "service.wscale", "remove it"),
        ("max_connections = 3".to_owned(), "service.max_connections", "\"terminate\" or \"relay\""),
        (more("max_connections = 0"), "service.max_connections", "use 1 to"),
        (more("terminate.access_log = \"log\""), "service.terminate.access_log", "an absolute path"),
        ("mode = \"relay\"\naffinity = \"http-cookie:a\"".to_owned(), "service.affinity", "does not end TLS"),
        (more("clear.vip = []"), "service.clear.vip", "\"192.0.2.10:80\""),
        (more("clear.vip = \"192.0.2.1:443\""), "service.vip", "belongs to service web already"),
        (more("clear = { vip = \"192.0.2.1:80\", port = 0 }"), "service.clear.port", "use 1 to 65535"),
        (rule("{}"), "service.clear.secure", "would be for all requests"),
        (rule("{ session = false }"), "service.clear.secure", "would be for all requests"),
        (rule("{ methods = \"post\" }"), "service.clear.secure.methods", "write it in capitals"),
        (rule("{ methods = [] }"), "service.clear.secure.methods", "the list is empty"),
        (rule("{ paths = \"account\" }"), "service.clear.secure.paths", "no plain path"),
        (rule("{ paths = \"/a/*/b\" }"), "service.clear.secure.paths", "no plain path"),
        (rule("{ paths = [\"/a\", \"/%61\"] }"), "service.clear.secure.paths", "\"/%61\" is no plain path"),
        (more("miss = \"daemon\""), "service.miss", "always decides"),
        (more("protocol = \"udp\""), "service.protocol", "l4"),
        (more("affinity = \"tls-ticket\""), "service.affinity", "by a cookie"),
        (more("proxy_protocol = \"v2\""), "service.proxy_protocol", "remove it"),
        (more("tunnels.roots = \"ca.pem\""), "service.tunnels.roots", "an absolute path"),
        (more("tunnels.server_name = \"10.0.0.1\""), "service.tunnels.server_name", "no host name"),
        (more("tunnels.certificate = \"/a.pem\""), "service.tunnels.certificate", "go together"),
        (more("tunnels = { established = 5, most = 4 }"), "service.tunnels.most", "fewer than the 5"),
        (more("tunnels.min_version = \"1.1\""), "service.tunnels.min_version", "\"1.2\" or \"1.3\""),
        (more("tunnels.http = \"2\""), "service.tunnels.http", "\"auto\" or \"1.1\""),
        (more("terminate.idle_timeout = \"0s\""), "service.terminate.idle_timeout", "no duration"),
    ] {
        let (_, found, problem) = invalid(&file(&lines));
        assert_eq!(found, key, "{lines}: {problem}");
        assert!(problem.contains(part), "{lines}: {problem}");
    }
}
