//! Turns of callers that compute forward passes at once.
#![forbid(unsafe_code)]

use super::handover::lock;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Minimum time that a caller computes before it lets another one continue, at the end of a layer.
/// It is long compared with the wake-up of a thread.
const SLICE: Duration = Duration::from_millis(2);

/// A queue for the team: callers compute one after the other, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Turns {
    tickets: Mutex<Tickets>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Tickets {
    /// Number of the caller that computes, or of the next one that comes.
    now: u64,
    /// Number of the next caller that comes.
    next: u64,
}

/// The team is the caller's until this is dropped or passed on.
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    since: Instant,
}

impl Turns {
    /// Waits until it is the caller's turn. A thread must not ask for a turn while it has one.
    pub(super) fn wait(&self) -> Turn<'_> {
        self.take();
        Turn {
            turns: self,
            since: Instant::now(),
        }
    }

    fn take(&self) {
        let mut tickets = lock(&self.tickets);
        let own = tickets.next;
        tickets.next += 1;
        while tickets.now != own {
            let woken = self.changed.wait(tickets);
            tickets = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn end(&self) {
        lock(&self.tickets).now += 1;
        self.changed.notify_all();
    }

    /// Returns the number of callers that wait.
    fn waiting(&self) -> u64 {
        let tickets = lock(&self.tickets);
        (tickets.next - tickets.now).saturating_sub(1)
    }
}

impl Turn<'_> {
    /// Lets the callers that wait compute first, if this one has computed for a while.
    pub(crate) fn pass_on(&mut self) {
        if self.since.elapsed() < SLICE {
            return;
        }
        if self.turns.waiting() > 0 {
            self.turns.end();
            self.turns.take();
        }
        self.since = Instant::now();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Callers append their numbers; the first one has the turn until all others wait.
    #[test]
    fn callers_compute_in_the_order_in_which_they_came() {
        let (turns, order) = (Turns::default(), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            let mut turn = turns.wait();
            for caller in 0..3 {
                scope.spawn({
                    let (turns, order) = (&turns, &order);
                    move || {
                        let _turn = turns.wait();
                        lock(order).push(caller);
                    }
                });
                while turns.waiting() <= caller {
                    std::thread::yield_now();
                }
            }
            turn.since = Instant::now() + 1000 * SLICE;
            turn.pass_on();
            assert!(lock(&order).is_empty(), "a turn that is not over");
            turn.since = Instant::now() - SLICE;
            turn.pass_on();
            assert_eq!(*lock(&order), [0, 1, 2]);
            lock(&order).push(3);
        });
        assert_eq!(*lock(&order), [0, 1, 2, 3]);
        assert_eq!(turns.waiting(), 0);
    }

    #[test]
    fn a_panic_ends_a_turn() {
        let turns = Turns::default();
        let panic = std::panic::catch_unwind(|| {
            let _turn = turns.wait();
            panic!("in a turn");
        });
        assert!(panic.is_err());
        drop(turns.wait());
    }
}
