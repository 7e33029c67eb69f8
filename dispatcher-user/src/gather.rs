//! Work that is done for several at once: a connection's requests run in its own task, and what they have for it is
//! written at once. No task is made for a request, so that no other thread is woken for it.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use futures_util::stream::{FuturesUnordered, Stream as _};
use hyper::rt::Executor;

/// The same future, which lets all tasks that are ready run before each of its turns: a connection that several
/// requests have something for writes it all at once.
pub(crate) async fn gather<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut waited = true;
    poll_fn(|context| {
        waited = !waited;
        if waited {
            return future.as_mut().poll(context);
        }
        // To the end of the queue.
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

type Member = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Futures that run in the task that polls this.
#[derive(Default)]
pub(crate) struct Crew {
    recruits: Recruits,
    members: FuturesUnordered<Member>,
}

/// Lets futures join a [`Crew`], in the task that polls it.
#[derive(Clone, Default)]
pub(crate) struct Recruits(Arc<Mutex<Vec<Member>>>);

impl Recruits {
    /// All is whole between statements, so that a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Vec<Member>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Recruits {
    fn execute(&self, future: F) {
        self.lock().push(Box::pin(async move { drop(future.await) }));
    }
}

impl Crew {
    pub(crate) fn recruits(&self) -> Recruits {
        self.recruits.clone()
    }

    /// A turn of the members, then of what they work for, then of those who have joined.
    pub(crate) fn poll<T>(
        &mut self,
        context: &mut Context<'_>,
        main: impl FnOnce(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let _ = self.poll_members(context);
        let polled = main(context);
        let joined = std::mem::take(&mut *self.recruits.lock());
        if !joined.is_empty() {
            self.members.extend(joined);
            let _ = self.poll_members(context);
        }
        polled
    }

    /// Ready when all are done.
    fn poll_members(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Some(()) = std::task::ready!(Pin::new(&mut self.members).poll_next(context)) {}
        Poll::Ready(())
    }

    /// Does the work with its members, to the end of both.
    pub(crate) async fn work<F: Future>(mut self, main: F) -> F::Output {
        let mut main = pin!(main);
        let output = poll_fn(|context| self.poll(context, |context| main.as_mut().poll(context))).await;
        self.finish().await;
        output
    }

    /// Lets the members come to their ends.
    pub(crate) async fn finish(mut self) {
        poll_fn(|context| self.poll_members(context)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn members_run_in_one_task_to_their_ends() {
        let crew = Crew::default();
        let recruits = crew.recruits();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let (late, is_late) = tokio::sync::oneshot::channel::<()>();
        let task = tokio::spawn(crew.work(async move {
            let own = tokio::task::id();
            for number in 0..100 {
                let sender = sender.clone();
                recruits.execute(async move {
                    assert_eq!(tokio::task::id(), own);
                    tokio::task::yield_now().await;
                    sender.send(number).expect("it is read");
                });
            }
            recruits.execute(async move { drop((is_late.await, sender)) });
            "done"
        }));
        for _ in 0..100 {
            assert!(receiver.recv().await.is_some());
        }
        assert!(!task.is_finished(), "one has not ended");
        late.send(()).expect("it is waited for");
        assert_eq!(task.await.expect("ends"), "done");
        assert_eq!(receiver.recv().await, None);
    }

    #[tokio::test]
    async fn what_others_have_ready_is_there_at_a_turn() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let turns = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&turns);
        let reader = tokio::spawn(gather(async move {
            let mut all = Vec::new();
            while receiver.recv_many(&mut all, 100).await > 0 {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            all
        }));
        // It waits for the first.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        let senders = (0..8).map(|number| {
            let sender = sender.clone();
            tokio::spawn(async move { sender.send(number).expect("it is read") })
        });
        for task in senders.collect::<Vec<_>>() {
            task.await.expect("sent");
        }
        drop(sender);
        assert_eq!(reader.await.expect("ends"), (0..8).collect::<Vec<_>>());
        assert_eq!(turns.load(Ordering::Relaxed), 1);
    }
}
