//! The hand-over of `upg_kernel`, with the primitives of loom.

mod sync {
    pub(super) use loom::cell::UnsafeCell;
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(super) use std::sync::PoisonError;

    /// Yields to another thread, without which the awaited event could not happen.
    pub(super) fn spin_loop() {
        loom::thread::yield_now();
    }
}

#[path = "../../../upg_kernel/src/cpu/team/handover.rs"]
mod handover;

use handover::Handover;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

/// Runs a loop as `Team::run` does, without a clock.
fn run(shared: &Handover, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
    // SAFETY: only the lifetime changes, and all tasks are finished before this function returns.
    let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
    // SAFETY: the test has one caller, which waits for the previous loop.
    unsafe { shared.open(tasks, task) };
    while shared.work(0) {}
    while !shared.is_finished() {}
}

/// Body of a thread that never spins: it sleeps as soon as there is no new loop.
fn serve(shared: &Handover, own: usize) {
    let mut seen = 0;
    while !shared.ends() {
        match shared.number() {
            now if now != seen => {
                seen = now;
                while shared.work(own) {}
            }
            _ => shared.sleep(seen),
        }
    }
}

fn team(threads: usize) -> (Arc<Handover>, Vec<thread::JoinHandle<()>>) {
    let shared = Arc::new(Handover::new(threads));
    let spawn = |own| {
        let shared = Arc::clone(&shared);
        thread::spawn(move || serve(&shared, own))
    };
    let threads = (1..threads).map(spawn).collect();
    (shared, threads)
}

fn end(shared: &Handover, threads: Vec<thread::JoinHandle<()>>) {
    shared.end();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn check(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(test);
}

/// Runs loops with these numbers of tasks in turn; every task must run once.
fn each_task_once(threads: usize, loops: &'static [usize], preemptions: usize) {
    check(preemptions, move || {
        let (shared, others) = team(threads);
        for &tasks in loops {
            let done: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            run(&shared, tasks, &|i| {
                done[i].fetch_add(1, Ordering::Relaxed);
            });
            for done in &done {
                assert_eq!(done.load(Ordering::Relaxed), 1);
            }
        }
        end(&shared, others);
    });
}

#[test]
fn two_threads_do_each_task_of_two_loops_once() {
    each_task_once(2, &[2, 2], 3);
}

#[test]
fn three_threads_do_each_task_of_a_loop_once() {
    each_task_once(3, &[3], 2);
}

#[test]
fn more_loops_than_a_thread_sees() {
    each_task_once(2, &[1, 1, 2], 2);
}

#[test]
fn writes_of_tasks_are_seen_after_the_loop() {
    check(3, || {
        let (shared, others) = team(2);
        let cells = [0, 0].map(loom::cell::UnsafeCell::new);
        struct Cells<'a>(&'a [loom::cell::UnsafeCell<usize>; 2]);
        // SAFETY: each task has its own cell.
        unsafe impl Sync for Cells<'_> {}
        let shared_cells = Cells(&cells);
        run(&shared, 2, &|i| {
            let cells = &shared_cells;
            // SAFETY: as above.
            cells.0[i].with_mut(|cell| unsafe { *cell = i + 1 });
        });
        for (i, cell) in cells.iter().enumerate() {
            // SAFETY: all tasks are finished: loom checks that their writes happened before.
            cell.with(|cell| assert_eq!(unsafe { *cell }, i + 1));
        }
        end(&shared, others);
    });
}

#[test]
fn a_panic_reaches_the_caller_and_leaves_no_task_open() {
    check(2, || {
        let (shared, others) = team(2);
        let done = AtomicUsize::new(0);
        run(&shared, 2, &|i| {
            done.fetch_add(1, Ordering::Relaxed);
            // Bypasses the panic hook, which would write a line for every schedule.
            std::panic::resume_unwind(Box::new(i));
        });
        assert_eq!(done.load(Ordering::Relaxed), 2);
        assert!(shared.take_panic().is_some_and(|panic| panic.is::<usize>()));
        assert!(shared.take_panic().is_none());
        end(&shared, others);
    });
}
