//! Two CPUs at one connection: whichever is first, what follows must be right.

use std::{
    hint::spin_loop,
    os::fd::AsFd as _,
    sync::atomic::{AtomicUsize, Ordering},
};

use dispatcher_common::{abi, reason::Reason};
use dispatcher_tests::{
    harness::{Far, Machine, Service, Talk},
    packet::{
        Packet,
        flags::{ACK, PSH},
    },
    topology::Family,
};
use dispatcher_user::dataplane::test_run;

use crate::machine;

const HTTP: &[u8] = b"GET / HTTP/1.1\r\nHost: service.test\r\n\r\n";
/// Pairs of packets at one time. A race that is there shows itself in some hundreds.
const ROUNDS: u16 = 6000;

/// Runs the program on both packets at once. The second begins `late` turns of a loop after the first.
fn at_once(machine: &Machine, packets: &[Packet; 2], late: usize) {
    let ready = AtomicUsize::new(0);
    let run = |number: usize| {
        let program = machine.dataplane().program_fd(abi::PROGRAM).expect("a program");
        let frame = packets[number].frame();
        ready.fetch_add(1, Ordering::SeqCst);
        while ready.load(Ordering::SeqCst) < 2 {
            spin_loop();
        }
        for _ in 0..late * number {
            spin_loop();
        }
        test_run(program.as_fd(), &frame, None, 1, 0).expect("runs").data_out
    };
    let frames = std::thread::scope(|scope| {
        let other = scope.spawn(|| run(1));
        [run(0), other.join().expect("no panic")]
    });
    for frame in frames {
        machine.dataplane().let_clones_leave(&frame).expect("writable");
    }
}

/// Lets two packets of a bound connection race, and then goes on with it: both directions must be right.
fn race(packets: impl Fn(&Talk, &Far) -> [Packet; 2]) {
    let machine = machine();
    for round in 0..ROUNDS {
        let family = Family::BOTH[usize::from(round % 2)];
        let mut talk = Talk::new(Service::Plain, family, 10_000 + round);
        let far = Far::new(&talk.bind(&machine, HTTP, Reason::BoundNonsecure));
        at_once(&machine, &packets(&talk, &far), usize::from(round) % 512);
        // A backend that was asked twice answers twice.
        let _ = machine.expect("its answer again", &far.syn_ack(), Reason::Replayed);
        let answer = far.segment(ACK | PSH, 0, HTTP.len() as u32, b"hello");
        let answer = machine.expect("its data", &answer, Reason::ToClient).tcp();
        assert_eq!(answer.seq, talk.cookie.wrapping_add(1), "round {round}");
        let sent = machine.expect("and on", &talk.segment(ACK, 60, 5, b"x"), Reason::ToBackend).tcp();
        assert_eq!(sent.ack, far.own_isn.wrapping_add(6), "round {round}");
    }
}

#[test]
fn data_again_and_the_backends_answer() {
    race(|talk, far| [talk.data(0, HTTP), far.syn_ack()]);
}

#[test]
fn more_data_and_the_backends_answer() {
    race(|talk, far| [talk.data(HTTP.len() as u32, b"more"), far.syn_ack()]);
}

#[test]
fn two_answers_of_the_backend() {
    race(|_, far| [far.syn_ack(), far.syn_ack()]);
}
