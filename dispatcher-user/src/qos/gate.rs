//! The way to one backend: so many requests at a time; the rest waits in fair order, for a while.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use super::{
    Class, ClassStatus, Limits,
    book::{Book, Loss},
    fair::{Queue, Ticket},
    limit::Adaptive,
    most::Most,
};

/// Why a request is not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// Too many wait already, and others are less above their share.
    #[error("too many requests wait for the backend")]
    Shed,
    /// It has waited for too long.
    #[error("the backend took no more requests in time")]
    Late,
}

/// One of those that a backend serves at the same time. Dropped, it makes room for the next.
#[derive(Debug)]
pub(crate) struct Permit {
    /// None once it is given back.
    gate: Option<Arc<Gate>>,
    class: u16,
    began: Instant,
}

impl Permit {
    /// Tells how long the backend took to begin its answer, for a limit that follows it.
    pub(crate) fn answered(&self) {
        let Some(gate) = &self.gate else { return };
        let mut inner = gate.lock();
        let (now, under_way) = (gate.began.elapsed(), inner.in_flight);
        let Some(adaptive) = &mut inner.adaptive else { return };
        adaptive.answered(now, self.began.elapsed(), under_way);
        // It may have grown.
        gate.let_in(&mut inner);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(gate) = self.gate.take() else { return };
        let mut inner = gate.lock();
        inner.in_flight = inner.in_flight.saturating_sub(1);
        inner.book.end(self.class);
        gate.let_in(&mut inner);
    }
}

/// The way to one backend.
pub(crate) struct Gate {
    began: Instant,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

struct Inner {
    limits: Limits,
    adaptive: Option<Adaptive>,
    in_flight: u32,
    most: Most,
    queue: Queue<Waiter>,
    book: Book,
}

/// One that waits.
struct Waiter {
    since: Instant,
    tell: oneshot::Sender<Result<Permit, Refused>>,
}

impl Inner {
    /// Requests at a time.
    fn limit(&self) -> u32 {
        match &self.adaptive {
            _ if self.limits.max_inflight == 0 => u32::MAX,
            None => self.limits.max_inflight,
            Some(adaptive) => adaptive.limit(),
        }
    }

    /// Whether one more request of a class may be under way.
    fn has_room(&self, class: u16) -> bool {
        let Self { in_flight, most, book, .. } = self;
        most.allows(class, *in_flight, self.limit(), |class| book.in_flight(class))
    }

    /// Whose turn it is, if there is room.
    fn next(&mut self) -> Option<(u16, Waiter)> {
        let limit = self.limit();
        let Self { in_flight, most, queue, book, .. } = self;
        queue.pop(|class| most.allows(class, *in_flight, limit, |class| book.in_flight(class)))
    }
}

impl Gate {
    pub(super) fn new(classes: &[Class], limits: Limits) -> Arc<Self> {
        let inner = Inner {
            limits: Limits::default(),
            adaptive: None,
            in_flight: 0,
            most: Most::default(),
            queue: Queue::new(classes),
            book: Book::default(),
        };
        let gate = Arc::new(Self { began: Instant::now(), inner: Mutex::new(inner) });
        gate.set(classes, limits);
        gate
    }

    /// Sets what holds from now on. Who waits goes on waiting, or is let in.
    pub(super) fn set(self: &Arc<Self>, classes: &[Class], limits: Limits) {
        let mut inner = self.lock();
        inner.queue.set(classes);
        inner.most.set(classes);
        inner.book.set(classes);
        let most = limits.max_inflight;
        let follows = limits.adaptive && most > 0;
        match &mut inner.adaptive {
            Some(adaptive) if follows => adaptive.set(most),
            adaptive => *adaptive = follows.then(|| Adaptive::new(most, self.began.elapsed())),
        }
        inner.limits = limits;
        self.let_in(&mut inner);
    }

    /// Whether there is a limit.
    pub(super) fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.lock().queue.len()
    }

    /// Lets a request in when it is its turn. Dropped while it waits, it leaves the queue.
    pub(crate) async fn enter(self: &Arc<Self>, class: u16, client: IpAddr) -> Result<Permit, Refused> {
        let (mut waiting, limit) = match self.ask(class, client) {
            Ok(permit) => return Ok(permit),
            Err(Some(waiting)) => waiting,
            Err(None) => return Err(Refused::Shed),
        };
        let told = timeout(limit, &mut waiting.told).await;
        let answer = match told {
            Ok(answer) => answer.ok(),
            // It may have been let in at the last moment: what is told is told with the lock.
            Err(_) if waiting.leave(Loss::Late) => return Err(Refused::Late),
            Err(_) => waiting.told.try_recv().ok(),
        };
        waiting.ticket = None;
        // The gate tells all whom it forgets.
        answer.unwrap_or(Err(Refused::Shed))
    }

    /// A permit, or a place in the queue and how long to stay there, or neither.
    fn ask(self: &Arc<Self>, class: u16, client: IpAddr) -> Result<Permit, Option<(Waiting, Duration)>> {
        let mut inner = self.lock();
        let now = Instant::now();
        let class = inner.queue.class(class);
        // Who waits while there is room waits for room of his class.
        if inner.queue.waiting(class) == 0 && inner.has_room(class) {
            inner.queue.pass(class, client);
            return Ok(self.permit(&mut inner, class, None, now));
        }
        if inner.queue.len() >= inner.limits.queue as usize {
            let Some((loser, waiter)) = inner.queue.shed(class, client) else {
                inner.book.lose(class, Loss::Shed);
                return Err(None);
            };
            inner.book.lose(loser, Loss::Shed);
            drop(waiter.tell.send(Err(Refused::Shed)));
        }
        let (tell, told) = oneshot::channel();
        let ticket = inner.queue.push(class, client, Waiter { since: now, tell });
        let limit = inner.limits.queue_timeout;
        Err(Some((Waiting { gate: Arc::clone(self), ticket: Some(ticket), told }, limit)))
    }

    fn permit(
        self: &Arc<Self>,
        inner: &mut Inner,
        class: u16,
        waited: Option<Duration>,
        now: Instant,
    ) -> Permit {
        inner.in_flight += 1;
        inner.book.admit(class, waited, now.saturating_duration_since(self.began));
        Permit { gate: Some(Arc::clone(self)), class, began: now }
    }

    /// Lets in whose turn it is, as long as there is room.
    fn let_in(self: &Arc<Self>, inner: &mut Inner) {
        while let Some((class, waiter)) = inner.next() {
            let now = Instant::now();
            let waited = Some(now.saturating_duration_since(waiter.since));
            let permit = self.permit(inner, class, waited, now);
            if let Err(Ok(mut permit)) = waiter.tell.send(Ok(permit)) {
                // Whoever waits leaves the queue first, so this does not happen; and as we have the lock, it must
                // not be dropped here.
                permit.gate = None;
                inner.in_flight -= 1;
                inner.book.end(class);
            }
        }
    }

    /// What waits and what was counted.
    pub(super) fn read(&self) -> (u32, u32, u32, Vec<ClassStatus>) {
        let mut inner = self.lock();
        let limit = inner.adaptive.as_ref().map_or(inner.limits.max_inflight, Adaptive::limit);
        let (in_flight, queued) = (inner.in_flight, inner.queue.len() as u32);
        let Inner { queue, book, .. } = &mut *inner;
        (limit, in_flight, queued, book.read(self.began.elapsed(), |class| queue.waiting(class)))
    }

    /// All is whole between statements, so that a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue, which is left when this is dropped.
struct Waiting {
    gate: Arc<Gate>,
    /// None once it was answered.
    ticket: Option<Ticket>,
    told: oneshot::Receiver<Result<Permit, Refused>>,
}

impl Waiting {
    /// False if it was answered before.
    fn leave(&mut self, loss: Loss) -> bool {
        let Some(ticket) = self.ticket.take() else { return false };
        let mut inner = self.gate.lock();
        let Some((class, _)) = inner.queue.cancel(ticket) else { return false };
        inner.book.lose(class, loss);
        true
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // A permit that was told meanwhile is dropped with the receiver, and goes on to the next.
        self.leave(Loss::Cancelled);
    }
}

#[cfg(test)]
mod tests;
