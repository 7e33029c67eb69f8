use std::{collections::BTreeMap, future::Future, pin::Pin, task::Poll};

use futures_util::poll;
use tokio::{
    task::JoinSet,
    time::{advance, sleep},
};

use super::*;

fn class(id: u16, weight: u32) -> Class {
    Class { id, name: format!("c{id}"), weight, ..Class::default() }
}

fn limits(max_inflight: u32, queue: u32) -> Limits {
    Limits { max_inflight, queue, ..Limits::default() }
}

fn client(number: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, number])
}

type Entering<'g> = Pin<Box<dyn Future<Output = Result<Permit, Refused>> + Send + 'g>>;

fn entering(gate: &Arc<Gate>, class: u16, from: u8) -> Entering<'_> {
    Box::pin(gate.enter(class, client(from)))
}

async fn waits(entering: &mut Entering<'_>) {
    assert!(poll!(entering).is_pending(), "it waits");
}

async fn is_in(entering: &mut Entering<'_>) -> Permit {
    match poll!(entering) {
        Poll::Ready(Ok(permit)) => permit,
        Poll::Ready(Err(refused)) => panic!("refused: {refused}"),
        Poll::Pending => panic!("it waits"),
    }
}

fn of(gate: &Gate, class: u16) -> ClassStatus {
    gate.read().3.into_iter().find(|one| one.id == class).expect("the class")
}

#[tokio::test(start_paused = true)]
async fn the_rest_waits_for_its_turn() {
    let gate = Gate::new(&[class(0, 1)], limits(2, 10));
    let first = gate.enter(0, client(1)).await.expect("room");
    let second = gate.enter(7, client(1)).await.expect("room");
    let (mut third, mut fourth) = (entering(&gate, 0, 1), entering(&gate, 0, 1));
    waits(&mut third).await;
    waits(&mut fourth).await;
    assert_eq!((gate.read().1, gate.waiting()), (2, 2));
    advance(Duration::from_millis(20)).await;
    drop(second);
    let third = is_in(&mut third).await;
    waits(&mut fourth).await;
    drop(first);
    let fourth = is_in(&mut fourth).await;
    let counted = of(&gate, 0);
    assert_eq!((counted.admitted, counted.waited, counted.in_flight, counted.queued), (4, 2, 2, 0));
    assert_eq!((counted.waits.count(), counted.waits.sum), (2, 40_000_000));
    drop((third, fourth));
    assert_eq!((gate.read().1, of(&gate, 0).in_flight), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_leaves_takes_no_place() {
    let gate = Gate::new(&[class(0, 1)], limits(1, 10));
    let first = gate.enter(0, client(1)).await.expect("room");
    let (mut second, mut third) = (entering(&gate, 0, 1), entering(&gate, 0, 1));
    let mut fourth = entering(&gate, 0, 1);
    waits(&mut second).await;
    waits(&mut third).await;
    waits(&mut fourth).await;
    drop(second);
    assert_eq!((of(&gate, 0).cancelled, gate.waiting()), (1, 2));
    // The permit is the third's by now; it goes without taking it.
    drop(first);
    assert_eq!((gate.read().1, gate.waiting()), (1, 1));
    drop(third);
    let fourth = is_in(&mut fourth).await;
    assert_eq!(gate.read().1, 1);
    drop(fourth);
    assert_eq!((gate.read().1, of(&gate, 0).admitted), (0, 3));
    // One that was never polled never waited.
    drop(entering(&gate, 0, 1));
    assert_eq!(of(&gate, 0).cancelled, 1);
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_the_deadline() {
    let timeout = Duration::from_millis(300);
    let gate = Gate::new(&[class(0, 1)], Limits { queue_timeout: timeout, ..limits(1, 10) });
    let first = gate.enter(0, client(1)).await.expect("room");
    let began = Instant::now();
    assert_eq!(gate.enter(0, client(1)).await.expect_err("too late"), Refused::Late);
    assert_eq!(began.elapsed().as_millis() / 10, 30);
    assert_eq!((of(&gate, 0).late, of(&gate, 0).cancelled, gate.waiting()), (1, 0, 0));
    // At the deadline the permit may be there already: then it counts.
    let mut second = entering(&gate, 0, 1);
    waits(&mut second).await;
    advance(timeout * 2).await;
    drop(first);
    let second = is_in(&mut second).await;
    drop(second);
    assert_eq!((of(&gate, 0).late, gate.read().1), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_sheds_from_who_is_above_its_share() {
    let gate = Gate::new(&[class(0, 1), class(1, 3)], limits(1, 2));
    let first = gate.enter(0, client(1)).await.expect("room");
    let (mut light, mut newer) = (entering(&gate, 0, 1), entering(&gate, 0, 1));
    waits(&mut light).await;
    waits(&mut newer).await;
    assert_eq!(gate.enter(0, client(1)).await.expect_err("no room"), Refused::Shed);
    let mut heavy = entering(&gate, 1, 2);
    waits(&mut heavy).await;
    assert!(matches!(poll!(&mut newer), Poll::Ready(Err(Refused::Shed))), "the newest of the light class");
    waits(&mut light).await;
    assert_eq!((of(&gate, 0).shed, of(&gate, 1).shed, gate.waiting()), (2, 0, 2));
    drop(first);
    drop(is_in(&mut heavy).await);
    drop(is_in(&mut light).await);
    // Without a queue, whoever does not get in is refused.
    gate.set(&[class(0, 1), class(1, 3)], limits(1, 0));
    let _first = gate.enter(0, client(1)).await.expect("room");
    assert_eq!(gate.enter(1, client(1)).await.expect_err("no queue"), Refused::Shed);
}

#[tokio::test(start_paused = true)]
async fn settings_change_while_some_wait() {
    let gate = Gate::new(&[class(0, 1), class(5, 1)], limits(1, 10));
    let _first = gate.enter(0, client(1)).await.expect("room");
    let (mut second, mut third, mut fourth) =
        (entering(&gate, 5, 1), entering(&gate, 5, 1), entering(&gate, 5, 1));
    waits(&mut second).await;
    waits(&mut third).await;
    waits(&mut fourth).await;
    gate.set(&[class(0, 1)], limits(2, 10));
    let second = is_in(&mut second).await;
    assert_eq!((second.class, of(&gate, 0).queued), (0, 2), "its class is gone");
    gate.set(&[class(0, 1)], limits(0, 10));
    let _others = (is_in(&mut third).await, is_in(&mut fourth).await);
    assert_eq!((gate.read().1, gate.waiting()), (4, 0));
    // With less room than there is under way, they end first.
    gate.set(&[class(0, 1)], limits(1, 10));
    let mut fifth = entering(&gate, 0, 1);
    waits(&mut fifth).await;
    drop(second);
    waits(&mut fifth).await;
}

#[tokio::test(start_paused = true)]
async fn shares_under_saturation_are_those_of_the_weights() {
    let classes = [class(0, 1), class(1, 3), class(2, 6)];
    let gate = Gate::new(&classes, limits(4, 1000));
    let mut users = JoinSet::new();
    for number in 0..60_u8 {
        let gate = Arc::clone(&gate);
        users.spawn(async move {
            loop {
                let Ok(permit) = gate.enter(u16::from(number % 3), client(number)).await else { continue };
                sleep(Duration::from_millis(10)).await;
                drop(permit);
            }
        });
    }
    sleep(Duration::from_secs(10)).await;
    let counted: BTreeMap<u16, u64> = gate.read().3.iter().map(|one| (one.id, one.admitted)).collect();
    let all: u64 = counted.values().sum();
    assert!((3900..=4100).contains(&all), "all of the backend is used: {counted:?}");
    for class in &classes {
        let due = all * u64::from(class.weight) / 10;
        assert!(counted[&class.id].abs_diff(due) <= due / 100 + 2, "{class:?} {counted:?}");
    }
    for one in gate.read().3 {
        assert!((one.share - one.due).abs() < 0.01 && one.borrowed == 0, "{one:?}");
    }
}

/// Whoever comes and goes at whatever moment, no place is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_place_is_lost() {
    let gate = Gate::new(
        &[class(0, 1), class(1, 2)],
        Limits { queue_timeout: Duration::from_millis(2), ..limits(3, 20) },
    );
    let mut users = JoinSet::new();
    for number in 0..40_u64 {
        let gate = Arc::clone(&gate);
        users.spawn(async move {
            for turn in 0..200 {
                let entering = gate.enter((number % 2) as u16, client(number as u8));
                let patience = Duration::from_micros((number * 37 + turn * 113) % 2500);
                if let Ok(Ok(permit)) = timeout(patience, entering).await {
                    permit.answered();
                    tokio::task::yield_now().await;
                }
            }
        });
    }
    while let Some(user) = users.join_next().await {
        user.expect("a user");
    }
    let (_, in_flight, queued, _) = gate.read();
    assert_eq!((in_flight, queued), (0, 0));
    let _all =
        [gate.enter(0, client(1)).await, gate.enter(0, client(1)).await, gate.enter(0, client(1)).await]
            .map(|entered| entered.expect("all places are free"));
    assert_eq!(gate.read().1, 3);
}

#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_follows_the_answers() {
    let gate = Gate::new(&[class(0, 1)], Limits { adaptive: true, ..limits(100, 1000) });
    let server = Arc::new(tokio::sync::Semaphore::new(5));
    let mut users = JoinSet::new();
    for number in 0..200_u8 {
        let (gate, server) = (Arc::clone(&gate), Arc::clone(&server));
        users.spawn(async move {
            loop {
                let Ok(permit) = gate.enter(0, client(number)).await else { continue };
                let place = server.acquire().await;
                sleep(Duration::from_millis(10)).await;
                drop(place);
                permit.answered();
            }
        });
    }
    sleep(Duration::from_secs(120)).await;
    let (limit, in_flight, ..) = gate.read();
    assert!((5..=30).contains(&limit), "{limit}");
    assert!(in_flight <= 30, "{in_flight}");
    let mut admitted = gate.read().3[0].admitted;
    sleep(Duration::from_secs(10)).await;
    admitted = gate.read().3[0].admitted - admitted;
    assert!(admitted >= 4500, "the server is not idle: {admitted} of 5000");
}

#[tokio::test(start_paused = true)]
async fn a_class_at_its_ceiling_waits_while_others_get_in() {
    let bronze = Class { ceil: 50, ..class(1, 1) };
    let gate = Gate::new(&[class(0, 1), bronze], limits(2, 10));
    let first = gate.enter(1, client(1)).await.expect("room");
    let (mut second, mut third) = (entering(&gate, 1, 1), entering(&gate, 1, 1));
    waits(&mut second).await;
    waits(&mut third).await;
    let other = gate.enter(0, client(2)).await.expect("it overtakes those who may not");
    assert_eq!((of(&gate, 1).queued, of(&gate, 0).waited), (2, 0));
    drop(other);
    waits(&mut second).await;
    drop(first);
    let _second = is_in(&mut second).await;
    waits(&mut third).await;
    // Without the ceiling there is room.
    gate.set(&[class(0, 1), class(1, 1)], limits(2, 10));
    is_in(&mut third).await;
}

#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_that_comes_later_begins_as_any() {
    let adaptive = |most| Limits { adaptive: true, ..limits(most, 100) };
    let gate = Gate::new(&[class(0, 1)], adaptive(0));
    for _ in 0..50 {
        drop(gate.enter(0, client(1)).await.expect("there is no limit"));
    }
    gate.set(&[class(0, 1)], adaptive(100));
    assert_eq!(gate.read().0, 20);
}
