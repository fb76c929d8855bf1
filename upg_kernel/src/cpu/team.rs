//! Thread pool for the many short parallel loops of a forward pass.
//!
//! One token of a small model takes a few hundred parallel loops of some microseconds. A general
//! pool wakes its threads for each of them, which takes longer than the loops. The threads of a
//! team spin for a while before they sleep, and take tasks one by one. A thread that the system has
//! descheduled takes no task, so nobody waits for it.

mod handover;
mod sync;
mod turns;

use handover::Handover;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use turns::{Turn, Turns};

/// Time for which an idle thread spins before it sleeps.
///
/// It is longer than the gap between two loops of a token and between two tokens, so that waking up
/// is paid once per generation.
const AWAKE: Duration = Duration::from_millis(2);

/// Polls for work between two looks at the clock, about a microsecond.
const SPINS: u32 = 32;

/// Polls for the end of the other threads' tasks between two looks at the clock,
/// about ten microseconds.
const SPINS_AT_THE_END: u32 = 256;

/// Waiting time beyond two task durations that counts as a stall.
///
/// The only explanation for it is that the system runs something else in place of a thread that has
/// a task.
const STALL: Duration = Duration::from_micros(300);

/// Factor between the duration of a stall and the time during
/// which the caller then works alone.
///
/// With one other busy process on the machine a thread loses its processor for milliseconds every
/// few milliseconds. Waiting for it each time would be slower than working without it.
const ALONE_AFTER_STALL: u32 = 16;

/// Threads that work on the loops of one caller at a time.
pub(crate) struct Team {
    shared: Arc<Handover>,
    /// Lock held by the caller whose loop runs. The value is the time until which it works alone.
    caller: Mutex<Option<Instant>>,
    turns: Turns,
    threads: Vec<JoinHandle<()>>,
}

/// Body of thread `own`: waits for work and does it until the team ends.
fn serve(shared: &Handover, own: usize) {
    let mut seen = 0;
    while !shared.ends() {
        let idle_since = Instant::now();
        loop {
            let is_new = (0..SPINS).any(|_| {
                std::hint::spin_loop();
                shared.number() != seen
            });
            if is_new {
                seen = shared.number();
                while shared.work(own) {}
                break;
            }
            if idle_since.elapsed() >= AWAKE {
                shared.sleep(seen);
                break;
            }
        }
    }
}

/// Waits until every task is finished; after a stall,
/// returns the time until which to work alone.
fn wait(shared: &Handover, stall: Duration) -> Option<Instant> {
    if (0..SPINS_AT_THE_END).any(|_| shared.is_finished()) {
        return None;
    }
    let started = Instant::now();
    while !(0..SPINS_AT_THE_END).any(|_| shared.is_finished()) {
        if started.elapsed() > stall {
            // The thread that this processor is yielded to may be the one that is waited for.
            std::thread::yield_now();
        }
    }
    let waited = started.elapsed();
    (waited > stall).then(|| started + waited * (1 + ALONE_AFTER_STALL))
}

impl Team {
    /// Creates a team of this many threads, including the caller, or of fewer if the system
    /// provides no more.
    pub(crate) fn new(threads: usize) -> Self {
        let shared = Arc::new(Handover::new(threads));
        let spawn = |index| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("upg-{index}"))
                .spawn(move || serve(&shared, index))
        };
        let threads = (1..threads).map_while(|index| spawn(index).ok()).collect();
        Self {
            shared,
            caller: Mutex::new(None),
            turns: Turns::default(),
            threads,
        }
    }

    /// Returns the number of threads that work on a loop.
    pub(crate) fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Waits until no other caller has a turn, so that the loops of this one get all threads. A
    /// thread must not ask for a turn while it has one.
    ///
    /// `None` with up to two threads: callers side by side, each computing alone, get as much as
    /// each other then, and more in all (SmolLM2, two callers on two cores: 346 tokens/s, 305 in
    /// turns).
    pub(crate) fn turn(&self) -> Option<Turn<'_>> {
        (self.threads() > 2).then(|| self.turns.wait())
    }

    /// Calls `task` with every number below `tasks`, on any threads in any order, and waits.
    ///
    /// If another caller uses the team, or if this is called from within a task, the calling thread
    /// does all the work. Overhead: about a microsecond. A panic in a task is propagated after all
    /// tasks are finished. Panics for 2^32 tasks or more.
    pub(crate) fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks");
        let free = match self.caller.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let mut alone_until = match free {
            Some(guard) if tasks > 1 && !self.threads.is_empty() => guard,
            _ => return (0..tasks).for_each(task),
        };
        if alone_until.is_some_and(|until| Instant::now() < until) {
            return (0..tasks).for_each(task);
        }
        let started = Instant::now();
        let shared = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. The pointer is used only by threads that
        // have a task of this loop, and this function does not return, nor unwind, before
        // all tasks are finished.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: the guard of `caller` makes this the only caller, and it has waited for the
        // previous loop.
        unsafe { shared.open(tasks, task) };
        while shared.work(0) {}
        let a_task = started.elapsed() * self.threads() as u32 / tasks as u32;
        *alone_until = wait(shared, STALL + 2 * a_task);
        if let Some(panic) = shared.take_panic() {
            resume_unwind(panic);
        }
    }

    /// Runs [`Team::run`] over chunks of `size` elements of `out`; the last one may be shorter.
    pub(crate) fn chunks<T: Send>(
        &self,
        out: &mut [T],
        size: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let len = out.len();
        let out = Pieces::new(out);
        self.run(len.div_ceil(size), |index| {
            let range = index * size..len.min((index + 1) * size);
            // SAFETY: the ranges of different chunks are disjoint,
            // and `run` calls with each number once.
            task(index, unsafe { out.get(range) });
        });
    }

    /// Runs [`Team::run`] over pieces of `out`.
    ///
    /// Each piece ends at its number in `ends` and starts where the previous one ends. Panics if a
    /// piece ends before it starts, or beyond `out`.
    pub(crate) fn pieces<T: Send>(
        &self,
        out: &mut [T],
        ends: &[usize],
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(ends.is_sorted(), "pieces follow one another");
        let out = Pieces::new(out);
        self.run(ends.len(), |index| {
            let start = index.checked_sub(1).map_or(0, |before| ends[before]);
            // SAFETY: the ends are increasing, so the ranges are disjoint, and `run` calls with
            // each number once.
            task(index, unsafe { out.get(start..ends[index]) });
        });
    }

    /// Runs [`Team::run`] over tiles of `out [n, rows of all matrices]`.
    ///
    /// A task gets `height` rows of `out` (the last one may get fewer), and in them the columns of
    /// one tile.
    pub(crate) fn tiles(
        &self,
        out: &mut [f32],
        height: usize,
        tiles: &Tiles<'_>,
        task: impl Fn(Tile, Region<'_>) + Sync,
    ) {
        let width = tiles.width();
        let rows = out.len() / width.max(1);
        let bands = rows.div_ceil(height);
        let out = Pieces::new(out);
        self.run(tiles.count() * bands, |index| {
            let tile = tiles.get(index / bands);
            let first = index % bands * height;
            let region = Region {
                out: &out,
                width,
                rows: first..rows.min(first + height),
                columns: tile.at..tile.at + tile.rows,
            };
            task(tile, region);
        });
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.end();
        for thread in self.threads.drain(..) {
            // A thread of a team catches every panic of its tasks.
            thread.join().expect("threads of a team end by themselves");
        }
    }
}

/// Slice that tasks write at disjoint ranges.
struct Pieces<'a, T> {
    start: *mut T,
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: a piece is an exclusive borrow of some elements; it may go to another thread if the
// elements may.
unsafe impl<T: Send> Sync for Pieces<'_, T> {}

impl<'a, T> Pieces<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            of: PhantomData,
        }
    }

    /// # Safety
    /// While the result lives, no other piece has an element in common with it.
    #[expect(clippy::mut_from_ref)]
    unsafe fn get(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range is in bounds by the assertion. The slice is borrowed exclusively for as
        // long as `self` lives, and the caller keeps pieces disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Some columns of some rows of a matrix `[n, width]`, exclusive to one task.
pub(crate) struct Region<'a> {
    out: &'a Pieces<'a, f32>,
    width: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Region<'_> {
    /// Returns the rows of the matrix that the region has a part of.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Returns the region's part of row `index` of the matrix.
    pub(crate) fn row(&mut self, index: usize) -> &mut [f32] {
        assert!(self.rows.contains(&index));
        let start = index * self.width;
        // SAFETY: different tasks have different tiles, whose columns are disjoint, or different
        // rows. The borrow of `self` gives this task one row at a time.
        unsafe {
            self.out
                .get(start + self.columns.start..start + self.columns.end)
        }
    }
}

/// Partition of several matrices into tiles.
///
/// The rows of the matrices are the columns of a common output, one matrix after the other. Each
/// tile lies within one matrix.
pub(crate) struct Tiles<'a> {
    /// Number of rows of each matrix.
    rows: &'a [usize],
    parts: Range<usize>,
    /// Rows of a tile, except at the end of a matrix.
    size: usize,
}

/// Tile of [`Tiles`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Index of the matrix.
    pub(crate) part: usize,
    /// First row in the matrix.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// Output column of the first row.
    pub(crate) at: usize,
}

impl<'a> Tiles<'a> {
    /// Creates the tiles of the matrices `parts`; `rows` has the number of rows of every matrix.
    pub(crate) fn new(rows: &'a [usize], parts: Range<usize>, size: usize) -> Self {
        Self { rows, parts, size }
    }

    fn width(&self) -> usize {
        self.rows.iter().sum()
    }

    pub(crate) fn count(&self) -> usize {
        let rows = &self.rows[self.parts.clone()];
        rows.iter().map(|rows| rows.div_ceil(self.size)).sum()
    }

    fn get(&self, mut index: usize) -> Tile {
        let mut at: usize = self.rows[..self.parts.start].iter().sum();
        for part in self.parts.clone() {
            let rows = self.rows[part];
            let count = rows.div_ceil(self.size);
            if index < count {
                let first = index * self.size;
                return Tile {
                    part,
                    first,
                    rows: self.size.min(rows - first),
                    at: at + first,
                };
            }
            index -= count;
            at += rows;
        }
        unreachable!("a tile below the count")
    }
}

#[cfg(test)]
mod tests {
    use super::handover::lock;
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn sum_of_squares(team: &Team, tasks: usize) -> usize {
        let sum = AtomicUsize::new(0);
        team.run(tasks, |i| {
            sum.fetch_add(i * i + 1, Ordering::Relaxed);
        });
        sum.into_inner()
    }

    #[test]
    fn every_task_is_done_once_by_teams_of_any_size() {
        for threads in [1, 2, 3, 7] {
            let team = Team::new(threads);
            assert_eq!(team.threads(), threads);
            for tasks in [0, 1, 2, 3, 64, 1000] {
                let expected: usize = (0..tasks).map(|i| i * i + 1).sum();
                for _ in 0..20 {
                    assert_eq!(sum_of_squares(&team, tasks), expected);
                }
            }
        }
    }

    #[test]
    fn threads_that_sleep_wake_up() {
        let team = Team::new(3);
        for _ in 0..3 {
            std::thread::sleep(2 * AWAKE);
            assert_eq!(sum_of_squares(&team, 10), 295);
        }
    }

    #[test]
    fn loops_in_loops_and_of_several_callers_are_done() {
        let team = Team::new(2);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        assert_eq!(sum_of_squares(&team, 10), 295);
                    }
                });
            }
        });
        let sum = AtomicUsize::new(0);
        team.run(4, |_| {
            sum.fetch_add(sum_of_squares(&team, 10), Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 4 * 295);
    }

    #[test]
    fn a_panic_comes_out_after_all_tasks_and_the_team_lives_on() {
        let team = Team::new(2);
        let done = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            team.run(50, |i| {
                assert!(i != 17, "task 17");
                done.fetch_add(1, Ordering::Relaxed);
            });
        }));
        let message = result.unwrap_err();
        assert!(
            message
                .downcast_ref::<&str>()
                .is_some_and(|m| m.contains("task 17"))
        );
        assert_eq!(done.into_inner(), 49);
        assert_eq!(sum_of_squares(&team, 10), 295);
    }

    /// Panic payload that panics again when dropped.
    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn payloads_that_panic_when_they_are_dropped_end_no_thread_and_leave_no_task_open() {
        let team = Team::new(2);
        for _ in 0..20 {
            let run = || team.run(50, |_| std::panic::panic_any(Bomb));
            let first = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
            assert!(first.is::<Bomb>());
            std::mem::forget(first);
            assert_eq!(sum_of_squares(&team, 10), 295);
        }
    }

    /// The only thread beside the caller is descheduled for a while during a task.
    #[test]
    fn a_thread_that_stalls_is_done_without_for_a_while() {
        let team = Team::new(2);
        let caller = std::thread::current().id();
        // Tasks started by each of them. There are many, so that an average task is short compared
        // with the stall.
        let [own, others] = [0, 0].map(AtomicUsize::new);
        let tasks = 1000;
        let before = Instant::now();
        team.run(tasks, |_| {
            if std::thread::current().id() == caller {
                own.fetch_add(1, Ordering::SeqCst);
                // Waits until the other thread has its task.
                while others.load(Ordering::SeqCst) == 0 {
                    std::thread::yield_now();
                }
            } else if others.fetch_add(1, Ordering::SeqCst) == 0 {
                // Continues until the caller can only wait.
                while own.load(Ordering::SeqCst) < tasks - 1 {
                    std::thread::yield_now();
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let until = lock(&team.caller).expect("a stall was seen");
        assert!(until > before);
        // As long as this test may take.
        *lock(&team.caller) = Some(until + Duration::from_secs(3600));
        others.store(0, Ordering::SeqCst);
        let count_others = || {
            let is_other = std::thread::current().id() != caller;
            others.fetch_add(usize::from(is_other), Ordering::SeqCst);
        };
        team.run(tasks, |_| count_others());
        assert_eq!(others.load(Ordering::SeqCst), 0);
        // Afterwards it takes part again.
        *lock(&team.caller) = None;
        team.run(tasks, |_| {
            count_others();
            while others.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
        });
        assert_ne!(others.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn chunks_pieces_and_tiles_cover_every_element_once() {
        let team = Team::new(2);
        let mut out = vec![0; 103];
        team.chunks(&mut out, 10, |index, chunk| {
            assert_eq!(chunk.len(), if index == 10 { 3 } else { 10 });
            chunk.iter_mut().for_each(|x| *x += index + 1);
        });
        assert!(out.iter().enumerate().all(|(i, &x)| x == i / 10 + 1));
        team.pieces(&mut out, &[5, 5, 90, 103], |index, piece| {
            assert_eq!(piece.len(), [5, 0, 85, 13][index]);
            piece.iter_mut().for_each(|x| *x = index);
        });
        let expected = |i: usize| [5, 5, 90].iter().filter(|&&end| end <= i).count();
        assert!(out.iter().enumerate().all(|(i, &x)| x == expected(i)));

        let rows = [70, 0, 64, 1];
        let mut out = vec![0.0; 3 * 135];
        for parts in [0..1, 1..4] {
            let tiles = Tiles::new(&rows, parts, 64);
            team.tiles(&mut out, 2, &tiles, |tile, mut region| {
                for i in region.rows() {
                    for (row, x) in region.row(i).iter_mut().enumerate() {
                        *x += (1000 * (i + 1) + 100 * tile.part + tile.first + row) as f32;
                    }
                }
            });
        }
        for i in 0..3 {
            for (column, &x) in out[135 * i..][..135].iter().enumerate() {
                let (part, row) = match column {
                    0..70 => (0, column),
                    70..134 => (2, column - 70),
                    _ => (3, 0),
                };
                assert_eq!(x, (1000 * (i + 1) + 100 * part + row) as f32);
            }
        }
    }
}
