//! Work that is done for several at once.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

/// The same future, which lets all tasks that are ready run before each of its turns: a connection that several
/// requests have something for writes it all at once.
pub async fn gather<F: Future>(future: F) -> F::Output {
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

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use tokio::sync::mpsc;

    use super::*;

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
