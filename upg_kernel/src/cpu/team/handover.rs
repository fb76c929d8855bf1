//! Hand-over of a loop from the caller of a team to its threads.
//!
//! One caller opens a loop of tasks, every thread takes tasks one by one, and the caller learns
//! when all of them are finished. This file holds all shared state of a team and no clock, so that
//! a model checker can try every order of events.

use super::sync::{
    AtomicBool, AtomicU64, AtomicUsize, Condvar, Mutex, MutexGuard, Ordering, PoisonError,
    UnsafeCell, fence, spin_loop,
};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Payload of a panic.
pub(super) type Panic = Box<dyn Any + Send>;

/// Value on separate cache lines: data that all threads write must not slow down data they
/// only read.
#[repr(align(128))]
struct Padded<T>(T);

/// State shared by the caller and the threads of a team.
pub(super) struct Handover {
    /// Number of the loop, the only thing an idle thread polls.
    number: Padded<AtomicU64>,
    /// Open tasks in the share of each thread; shares are consecutive ranges of tasks.
    ///
    /// The upper half of an entry is the low half of the loop number, the lower half is the number
    /// of tasks not yet taken. Thus one thread reads neighbouring memory. A thread that has
    /// finished its share takes from the others.
    open: Box<[Padded<AtomicU64>]>,
    /// Number of unfinished tasks of the loop.
    unfinished: Padded<AtomicUsize>,
    job: UnsafeCell<Job>,
    /// Payload of the first task that panicked.
    panic: Mutex<Option<Panic>>,
    sleepers: AtomicUsize,
    asleep: Mutex<()>,
    wake: Condvar,
    ends: AtomicBool,
}

// SAFETY: `job` is the only part that is not `Sync` by itself. Only `open` writes it, while no task
// is unfinished. Only a thread that has taken a task and not finished it reads it. The closure that
// it points to is `Sync`.
unsafe impl Sync for Handover {}
// SAFETY: as above; the pointer in `job` is not used once all tasks of its loop are finished.
unsafe impl Send for Handover {}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

impl Handover {
    /// Creates the state for this many shares, without a loop.
    pub(super) fn new(shares: usize) -> Self {
        let nothing: &(dyn Fn(usize) + Sync) = &|_| {};
        Self {
            number: Padded(AtomicU64::new(0)),
            open: (0..shares.max(1))
                .map(|_| Padded(AtomicU64::new(0)))
                .collect(),
            unfinished: Padded(AtomicUsize::new(0)),
            job: UnsafeCell::new(Job {
                task: nothing,
                tasks: 0,
            }),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            asleep: Mutex::new(()),
            wake: Condvar::new(),
            ends: AtomicBool::new(false),
        }
    }

    /// Opens a loop of fewer than 2^32 tasks and wakes the sleeping threads.
    ///
    /// # Safety
    /// One caller at a time, after [`Handover::is_finished`] of the previous loop. `task` lives
    /// until [`Handover::is_finished`] of this loop.
    pub(super) unsafe fn open(&self, tasks: usize, task: *const (dyn Fn(usize) + Sync)) {
        self.unfinished.0.store(tasks, Ordering::Relaxed);
        self.job.with_mut(|job| {
            // SAFETY: the caller is the only writer, and no task of an earlier loop is unfinished,
            // so nobody reads.
            unsafe { *job = Job { task, tasks } }
        });
        let number = self.number.0.load(Ordering::Relaxed) + 1;
        let shares = self.open.len();
        let mut first = 0;
        for (share, open) in self.open.iter().enumerate() {
            let end = share_end(tasks, share, shares);
            let count = (end - first) as u64;
            open.0.store(number << 32 | count, Ordering::Release);
            first = end;
        }
        self.number.0.store(number, Ordering::Release);
        self.wake_sleepers();
    }

    /// Takes an open task of the current loop and runs it.
    /// Thread `own` looks at its own share first.
    ///
    /// Returns whether there was one. A panic of the task is stored for [`Handover::take_panic`].
    pub(super) fn work(&self, own: usize) -> bool {
        let shares = self.open.len();
        let taken = (own..own + shares).find_map(|share| {
            let share = share % shares;
            self.take(share).map(|left| (share, left))
        });
        let Some((share, left)) = taken else {
            return false;
        };
        // SAFETY: the task just taken is unfinished, so the job of its loop stays. It was written
        // before the share was opened, which the exchange in `take` has observed.
        let job = self.job.with(|job| unsafe { *job });
        // SAFETY: the closure lives until all tasks are finished, and this one is not.
        let task = unsafe { &*job.task };
        let done = catch_unwind(AssertUnwindSafe(|| {
            task(share_end(job.tasks, share, shares) - left);
        }));
        let second = done.err().and_then(|panic| self.keep_panic(panic));
        self.unfinished.0.fetch_sub(1, Ordering::Release);
        // Only now, because the destructor may do anything: the loop already has one task less to
        // wait for.
        if let Some(panic) = second {
            drop_panic(panic);
        }
        true
    }

    /// Stores the first payload of a loop and returns later ones.
    fn keep_panic(&self, panic: Panic) -> Option<Panic> {
        let mut first = lock(&self.panic);
        match *first {
            Some(_) => Some(panic),
            None => {
                *first = Some(panic);
                None
            }
        }
    }

    /// Takes the payload of the first task of the loop that panicked,
    /// once all tasks are finished.
    pub(super) fn take_panic(&self) -> Option<Panic> {
        lock(&self.panic).take()
    }

    /// Takes a task of a share; returns how many were left before.
    ///
    /// The exchange fails if the share belongs to another loop by now (the numbers repeat after
    /// 2^32 loops).
    fn take(&self, share: usize) -> Option<usize> {
        let mut open = self.open[share].0.load(Ordering::Acquire);
        loop {
            let left = open & u64::from(u32::MAX);
            if left == 0 {
                return None;
            }
            let taken = self.open[share].0.compare_exchange_weak(
                open,
                open - 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match taken {
                Ok(_) => return Some(left as usize),
                Err(now) => open = now,
            }
        }
    }

    /// Returns the number of the current loop.
    pub(super) fn number(&self) -> u64 {
        self.number.0.load(Ordering::Acquire)
    }

    /// Returns whether every task of the loop is finished, after a brief pause.
    pub(super) fn is_finished(&self) -> bool {
        spin_loop();
        self.unfinished.0.load(Ordering::Acquire) == 0
    }

    /// Sleeps until there is a loop other than `seen`, or until the team ends.
    pub(super) fn sleep(&self, seen: u64) {
        let mut guard = lock(&self.asleep);
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `wake_sleepers`: either this thread sees the new loop, or its
        // caller sees a sleeping thread.
        fence(Ordering::SeqCst);
        while self.number() == seen && !self.ends() {
            guard = self
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    fn wake_sleepers(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            drop(lock(&self.asleep));
            self.wake.notify_all();
        }
    }

    /// Ends the team: [`Handover::ends`] is true from now on.
    pub(super) fn end(&self) {
        self.ends.store(true, Ordering::Release);
        self.wake_sleepers();
    }

    /// Returns whether the threads of the team have to end.
    pub(super) fn ends(&self) -> bool {
        self.ends.load(Ordering::Acquire)
    }
}

/// Returns the end of the task range of a share.
fn share_end(tasks: usize, share: usize, shares: usize) -> usize {
    tasks * (share + 1) / shares
}

/// Drops a payload. If its destructor panics too, that second payload is leaked.
fn drop_panic(panic: Panic) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(panic);
    }
}

/// Locks a mutex whose content is consistent whenever it is unlocked, also after a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
