//! The namespaces themselves, without a dispatcher: plain routing must work in every shape.

use std::{io::ErrorKind, net::SocketAddr};

use dispatcher_tests::{
    sockets,
    topology::{Family, Plan, Shape, Topology},
};

/// Every client address reaches the VIP and every backend, by the kernel alone: nobody listens, so
/// the answer is a refusal.
fn reaches_everything(plan: Plan) {
    let topology = Topology::new(plan).expect("the namespaces can be made");
    for family in Family::BOTH {
        let targets = topology.backends.iter().map(|backend| backend.address(family)).chain([family.vip()]);
        for (number, target) in targets.enumerate() {
            let from = topology.client(family, number);
            let error = sockets::connect(&topology.clients, from, SocketAddr::new(target, 9))
                .expect_err("no server listens on this port");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{plan:?}: {from} to {target}: {error}");
        }
    }
}

#[test]
fn two_arms_with_a_bridge() {
    reaches_everything(Plan::default());
}

#[test]
fn two_arms_with_a_link_each() {
    reaches_everything(Plan { shape: Shape::Links, ..Plan::default() });
}

#[test]
fn one_arm() {
    reaches_everything(Plan { shape: Shape::OneArm, ..Plan::default() });
}

#[test]
fn nothing_is_left_after_a_panic() {
    let names = std::sync::Mutex::new(Vec::new());
    let result = std::panic::catch_unwind(|| {
        let topology = Topology::new(Plan::default()).expect("the namespaces can be made");
        names.lock().expect("not poisoned yet").push(topology.clients.name().to_owned());
        panic!("on purpose");
    });
    assert!(result.is_err());
    let names = names.lock().expect("the panic came after the lock was released");
    assert_eq!(names.len(), 1);
    for name in &*names {
        assert!(!std::path::Path::new("/run/netns").join(name).exists(), "{name} is still there");
    }
}
