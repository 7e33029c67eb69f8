//! A browser that comes back: a post-quantum hello in two segments, with a PSK at its very end.

use std::time::{Duration, Instant};

use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    daemon::{Daemon, Folder},
    netns::execute,
    stage::web,
    system::Nginx,
    tls::{Authority, HOST, Identity},
    topology::{Family, Plan, Topology},
};
use dispatcher_user::api;

const PORT: u16 = 443;

#[test]
#[ignore = "needs chromium (Debian: apt-get install chromium), then: cargo xtask test --full"]
fn claim_c2_chromium_resumes_at_its_server() {
    let authority = Authority::new().expect("certificates");
    let topology = Topology::new(Plan::default()).expect("namespaces");
    let _servers: Vec<Nginx> = (1..)
        .zip(&topology.backends)
        .map(|(n, place)| {
            Nginx::with_tickets(&place.netns, &format!("b{n}"), PORT, &authority, None).expect("nginx")
        })
        .collect();
    let service = web().with("tickets = { server_names = [\"service.test\"] }");
    let daemon = Daemon::start(&topology, "native", &[service]).expect("the daemon");
    let deadline = Instant::now() + Duration::from_secs(30);
    while daemon
        .ask::<Vec<api::Identity>>(&["identities"])
        .expect("identities")
        .iter()
        .any(|one| one.state != "routable")
    {
        assert!(Instant::now() < deadline, "ticket keys are not found out");
        std::thread::sleep(Duration::from_millis(100));
    }
    for family in Family::BOTH {
        let folder = Folder::new().expect("a folder");
        let vip = match family {
            Family::V4 => family.vip().to_string(),
            Family::V6 => format!("[{}]", family.vip()),
        };
        let mut command = topology.clients.command("timeout");
        command.args([
            "60",
            "chromium",
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
        ]);
        command.args([
            "--ignore-certificate-errors",
            "--disable-quic",
            "--virtual-time-budget=20000",
            "--dump-dom",
        ]);
        command.arg(format!("--host-resolver-rules=MAP {HOST} {vip}"));
        command.arg(format!("--user-data-dir={}", folder.path().display()));
        command.arg(format!("https://{HOST}/page"));
        let parts = daemon.counter(Reason::AckedPart).expect("a counter");
        let dom = execute(&mut command, None).expect("chromium");
        let text = dom.split_once("<pre id=\"seen\">").and_then(|(_, rest)| rest.split_once("</pre>"));
        let seen: Vec<Identity> =
            serde_json::from_str(text.expect("the page").0).unwrap_or_else(|error| panic!("{error}: {dom}"));
        assert_eq!(seen.len(), 8, "{seen:#?}");
        // It opens a connection or two ahead, before it has a ticket; those are balanced as new ones.
        let resumed: Vec<_> = seen.iter().filter(|one| one.reused == "r").collect();
        assert!(resumed.len() >= 6, "{seen:#?}");
        assert!(resumed.iter().all(|one| one.backend == resumed[0].backend), "{seen:#?}");
        assert!(seen.iter().all(|one| one.protocol == "TLSv1.3"), "{seen:#?}");
        let two = daemon.counter(Reason::AckedPart).expect("a counter") - parts;
        assert!(two >= 8, "its hellos need two segments: {two}");
    }
}
