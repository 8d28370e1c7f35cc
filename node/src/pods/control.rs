//! Asking control from a thread without a runtime.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use tokio::sync::{mpsc, oneshot};

use super::Ask;

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The receiver or the answer's sender is gone.
    #[error("the router is ending")]
    Ends,
    /// It takes too long.
    #[error("the router's control does not answer")]
    Silent,
}

/// Control, as the pod side sees it.
#[derive(Clone, Debug)]
pub struct Control {
    asks: mpsc::Sender<Ask>,
    /// Whether it did not answer in time when it was asked last.
    silent: Arc<AtomicBool>,
}

/// An answer that is still to come.
pub struct Pending<T> {
    answer: oneshot::Receiver<T>,
    silent: Arc<AtomicBool>,
}

impl Control {
    pub fn new(asks: mpsc::Sender<Ask>) -> Self {
        Self { asks, silent: Arc::default() }
    }

    /// Whether it still takes what it is asked.
    pub fn is_there(&self) -> bool {
        !self.asks.is_closed()
    }

    /// Whether it let somebody wait in vain, and has answered nobody since.
    pub fn was_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Asks something; the answer is to be waited for. Control's queue may be full for a while.
    pub fn ask<T>(
        &self,
        ask: impl FnOnce(oneshot::Sender<T>) -> Ask,
        limit: Duration,
    ) -> Result<Pending<T>, ControlError> {
        let (answer, pending) = oneshot::channel();
        match wait(self.asks.send(ask(answer)), limit) {
            Some(Ok(())) => Ok(Pending { answer: pending, silent: Arc::clone(&self.silent) }),
            Some(Err(_)) => Err(ControlError::Ends),
            None => {
                self.silent.store(true, Ordering::Relaxed);
                Err(ControlError::Silent)
            }
        }
    }
}

impl<T> Pending<T> {
    /// Waits for the answer.
    pub fn wait(self, limit: Duration) -> Result<T, ControlError> {
        let answer = wait(self.answer, limit);
        self.silent.store(answer.is_none(), Ordering::Relaxed);
        match answer {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(_)) => Err(ControlError::Ends),
            None => Err(ControlError::Silent),
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future on this thread, which has nothing else to do.
fn wait<F: Future>(future: F, limit: Duration) -> Option<F::Output> {
    let end = Instant::now() + limit;
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gone(answer: oneshot::Sender<()>) -> Ask {
        Ask::Gone { namespace: "n".into(), name: "p".into(), sandbox: "s".into(), answer }
    }

    #[test]
    fn answers_silence_and_the_end_are_told_apart() {
        let (asks, mut receiver) = mpsc::channel(1);
        let control = Control::new(asks);
        let short = Duration::from_millis(20);
        let pending = control.ask(gone, short).unwrap();
        // The queue holds one.
        assert_eq!(control.ask(gone, short).err(), Some(ControlError::Silent));
        let answering = thread::spawn(move || {
            let Some(Ask::Gone { answer, .. }) = receiver.blocking_recv() else { panic!("something else") };
            thread::sleep(short);
            answer.send(()).unwrap();
            receiver
        });
        assert_eq!(pending.wait(Duration::from_secs(10)), Ok(()));
        let mut receiver = answering.join().unwrap();
        let pending = control.ask(gone, short).unwrap();
        assert_eq!(pending.wait(short), Err(ControlError::Silent));
        let pending = control.ask(gone, short).err();
        assert_eq!(pending, Some(ControlError::Silent), "the one that nobody waits for any more is still in the queue");
        drop(receiver.try_recv().unwrap());
        let pending = control.ask(gone, short).unwrap();
        assert!(control.is_there());
        drop(receiver);
        assert_eq!(pending.wait(short), Err(ControlError::Ends));
        assert!(!control.is_there());
        assert_eq!(control.ask(gone, short).err(), Some(ControlError::Ends));
    }
}
