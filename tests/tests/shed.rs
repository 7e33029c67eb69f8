//! Connections that wait in the daemon, and for which there is no room: their clients are told so.

use std::{io, thread};

use anyhow::Result;
use dispatcher_common::reason::Reason;
use dispatcher_tests::{
    hello::{Flight, ask, client_hello},
    stage::{Stage, web},
    tls::Manners,
    topology::{Family, Plan},
    town::until,
};
use dispatcher_user::api;

/// Clients at the same time.
const CROWD: u8 = 24;

/// What a new client with a session of its own is answered.
fn visit(stage: &Stage, number: u8) -> Result<Flight> {
    let mut stream = stage.connect(Family::BOTH[usize::from(number) % 2], usize::from(number) % 4)?;
    ask(&mut stream, &client_hello(&[number + 1; 32], 0))
}

#[test]
fn who_finds_no_room_among_those_that_wait_is_refused_at_once() {
    for attach in ["native", "generic"] {
        let service = web()
            .with("miss = \"daemon\"")
            .with("balance = \"weighted-round-robin\"")
            .with("limits = { connections_per_second = 1, over = \"hold\", queue = 1 }");
        let stage = Stage::new(Plan::default(), attach, &service, Manners::default());
        let answers: Vec<Result<Flight>> = thread::scope(|scope| {
            let all: Vec<_> = (0..CROWD)
                .map(|number| {
                    scope.spawn({
                        let stage = &stage;
                        move || visit(stage, number)
                    })
                })
                .collect();
            all.into_iter().map(|one| one.join().expect("a client")).collect()
        });
        let (served, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        // One for each backend at the least. Who was refused was told so, and did not wait for nothing.
        assert!(served.len() >= 3 && refused.len() >= 3, "{} of {CROWD} served, {attach}", served.len());
        for answer in &refused {
            let error = answer.as_ref().expect_err("refused");
            let kind = error.downcast_ref().map(io::Error::kind);
            assert_eq!(kind, Some(io::ErrorKind::ConnectionReset), "{error:#}, {attach}");
        }
        let counter = |reason| stage.daemon.counter(reason).expect("a counter");
        assert!(counter(Reason::ResetOverRate) >= refused.len() as u64, "{attach}");
        let shares: Vec<api::QosShare> = stage.daemon.ask(&["qos"]).expect("shares");
        let lost: u64 = shares.iter().map(|one| one.shed + one.late).sum();
        assert!(lost >= refused.len() as u64, "{shares:?}");
        until("those who come later are served", || visit(&stage, 100).is_ok());
    }
}
