//! A small pool of worker threads for work that is split into ranges.
//!
//! A forward pass of a small model crosses about 150 barriers a token, so workers spin for some tens of
//! microseconds before they yield, and yield for a while before they park: sleeping at each barrier is too
//! slow, and endless spinning starves whoever shares the machine.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{JoinHandle, Thread};

use super::SharedValues;

// Miri interprets each of them.
const SPINS: u32 = if cfg!(miri) { 10 } else { 4_000 };
const YIELDS: u32 = 64;

thread_local! {
    /// Whether this thread is inside a body of some pool.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Marks the thread as inside a body, until dropped.
struct Mark(bool);

impl Mark {
    fn set() -> Self {
        Self(INSIDE.replace(true))
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

/// The work of one call: a type-erased closure.
#[derive(Clone, Copy)]
struct Work {
    call: unsafe fn(*const ()),
    data: *const (),
}

/// Who may work: the number of the call (from `CALL` on), whether it still takes workers, and how many are at work.
///
/// A worker that comes too late, because it slept or its core was taken, finds the call closed, and nobody waits for it.
struct Gate(AtomicU64);

const CALL: u64 = 1 << 32;
const CLOSED: u64 = 1 << 31;

impl Gate {
    /// Number of the latest call.
    fn call(&self) -> u64 {
        self.0.load(Ordering::Acquire) / CALL
    }

    /// Opens the next call to workers, who see what was written before.
    fn open(&self) {
        let next = (self.0.load(Ordering::Relaxed) / CALL).wrapping_add(1) % CALL;
        self.0.store(next * CALL, Ordering::Release);
    }

    /// Lets no more workers in.
    fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::Relaxed);
    }

    /// Whether all who came in have left; what they wrote is seen then.
    fn is_empty(&self) -> bool {
        self.0.load(Ordering::Acquire).is_multiple_of(CLOSED)
    }

    /// Comes in to a call, if it still takes workers.
    fn enter(&self, call: u64) -> bool {
        let more = |gate: u64| (gate / CALL == call && gate & CLOSED == 0).then_some(gate + 1);
        let order = (Ordering::Acquire, Ordering::Relaxed);
        self.0.fetch_update(order.0, order.1, more).is_ok()
    }

    fn leave(&self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

struct PoolState {
    gate: Gate,
    stop: AtomicBool,
    panicked: AtomicBool,
    work: std::cell::UnsafeCell<Work>,
}

// SAFETY: `work` is written only by the caller that holds `Pool::turn`, while the gate is closed and empty, and is read by
// workers only between coming in, with acquire ordering, and leaving.
unsafe impl Sync for PoolState {}
// SAFETY: the raw pointer in `work` is only followed while `Pool::run` keeps the closure alive on its stack.
unsafe impl Send for PoolState {}

/// A fixed number of threads, the caller included, that execute ranges of one loop together.
pub struct Pool {
    shared: Arc<PoolState>,
    wake: Vec<Thread>,
    workers: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads in all; 0 and 1 both mean that the caller works alone.
    pub fn new(threads: usize) -> Self {
        unsafe fn nothing(_: *const ()) {}
        let shared = Arc::new(PoolState {
            gate: Gate(AtomicU64::new(CLOSED)),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            work: std::cell::UnsafeCell::new(Work {
                call: nothing,
                data: std::ptr::null(),
            }),
        });
        let mut workers = Vec::new();
        for index in 1..threads.max(1) {
            let shared = Arc::clone(&shared);
            let spawned = std::thread::Builder::new()
                .name(format!("scylla-{index}"))
                .spawn(move || worker(&shared));
            // Fewer threads than asked for is slower, never wrong.
            match spawned {
                Ok(handle) => workers.push(handle),
                Err(_) => break,
            }
        }
        Self {
            shared,
            wake: workers.iter().map(|w| w.thread().clone()).collect(),
            workers,
            turn: Mutex::new(()),
        }
    }

    /// Threads that share the work, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` with disjoint ranges that cover `0..items`, at most `grain` items each, on all threads.
    ///
    /// The ranges are handed out in turn, so the split never decides a result, only who computes it. A body may use
    /// pools itself, this one included: where a pool is at work already, the body's thread works alone.
    pub fn ranges(&self, items: usize, grain: usize, body: impl Fn(Range<usize>) + Sync) {
        let grain = grain.max(1);
        self.hand_out(items, grain, |start| items.min(start + grain), body);
    }

    /// The same in shares that shrink as the end comes nearer, each but the last a multiple of `step`: few of them,
    /// and the threads end together.
    pub fn shares(&self, items: usize, step: usize, body: impl Fn(Range<usize>) + Sync) {
        let step = step.max(1);
        let portions = 2 * self.threads();
        let end_of = |start: usize| {
            let share = (items - start).div_ceil(portions).next_multiple_of(step);
            items.min(start + share)
        };
        self.hand_out(items, step, end_of, body);
    }

    /// Hands out rows of several outputs together, each row's of all of them to one call of `body`: output `i` has rows of
    /// `widths[i]` values, and all have the same number of rows. Shares begin at multiples of `grain`, whatever the number of
    /// threads.
    ///
    /// # Panics
    /// If the outputs have different numbers of rows.
    pub fn rows<const N: usize>(
        &self,
        outputs: [&mut [f32]; N],
        widths: [usize; N],
        grain: usize,
        body: impl Fn(Range<usize>, [&mut [f32]; N]) + Sync,
    ) {
        let count = outputs[0].len().checked_div(widths[0]).unwrap_or(0);
        for (output, width) in outputs.iter().zip(widths) {
            assert_eq!(output.len(), count * width, "{count} rows of {width}");
        }
        let outputs = outputs.map(SharedValues::new);
        self.ranges(count, grain, |range| {
            let part = |i: usize| {
                let (width, output): (usize, &SharedValues<'_, f32>) = (widths[i], &outputs[i]);
                // SAFETY: ranges are disjoint, and so are their rows.
                unsafe { output.part(range.start * width..range.end * width) }
            };
            body(range.clone(), std::array::from_fn(part));
        });
    }

    /// Calls `body` with ranges that each end where `end_of` says of their start; alone where there are no more than
    /// `least` items.
    fn hand_out(
        &self,
        items: usize,
        least: usize,
        end_of: impl Fn(usize) -> usize + Sync,
        body: impl Fn(Range<usize>) + Sync,
    ) {
        if self.workers.is_empty() || items <= least {
            if items > 0 {
                body(0..items);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(&|| {
            let advance = |start: usize| (start < items).then(|| end_of(start));
            while let Ok(start) = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, advance) {
                body(start..end_of(start));
            }
        });
    }

    fn run<F: Fn() + Sync>(&self, body: &F) {
        unsafe fn call<F: Fn()>(data: *const ()) {
            // SAFETY: `data` points at the `F` that `run` holds on its stack until every worker has left.
            unsafe { (*data.cast::<F>())() }
        }
        // Who is inside a body must not wait for a pool that may be waiting for that body: it works alone then.
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            // A poisoned lock only says that an earlier body panicked; the pool itself is at rest then.
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) if INSIDE.get() => return body(),
            Err(TryLockError::WouldBlock) => self.turn.lock().unwrap_or_else(|e| e.into_inner()),
        };
        let mark = Mark::set();
        let shared = &*self.shared;
        // SAFETY: the gate is closed and empty (the previous `run` waited for it), so no worker reads `work`.
        unsafe {
            *shared.work.get() = Work {
                call: call::<F>,
                data: std::ptr::from_ref(body).cast(),
            };
        }
        shared.gate.open();
        for thread in &self.wake {
            thread.unpark();
        }
        let own = catch_unwind(AssertUnwindSafe(body));
        // All ranges are handed out.
        shared.gate.close();
        wait_until(|| shared.gate.is_empty(), std::thread::yield_now);
        let worker_panicked = shared.panicked.swap(false, Ordering::Relaxed);
        drop((mark, turn));
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        assert!(!worker_panicked, "a worker thread of the pool panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in &self.wake {
            thread.unpark();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Spins, then yields, then calls `idle` until `ready`.
fn wait_until(ready: impl Fn() -> bool, idle: impl Fn()) {
    for _ in 0..SPINS {
        if ready() {
            return;
        }
        std::hint::spin_loop();
    }
    for _ in 0..YIELDS {
        if ready() {
            return;
        }
        std::thread::yield_now();
    }
    while !ready() {
        idle();
    }
}

fn worker(shared: &PoolState) {
    let _mark = Mark::set(); // all it ever runs are bodies
    let mut seen = 0;
    loop {
        wait_until(
            || shared.gate.call() != seen || shared.stop.load(Ordering::Acquire),
            std::thread::park,
        );
        let call = shared.gate.call();
        if call == seen {
            return; // only `stop` can have ended the wait
        }
        seen = call;
        if !shared.gate.enter(call) {
            continue;
        }
        // SAFETY: written before the gate was opened, and left alone until it is empty again.
        let work = unsafe { *shared.work.get() };
        // SAFETY: `Pool::run` keeps the closure behind `data` alive until the gate is empty.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe { (work.call)(work.data) }));
        if done.is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.gate.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_visited_once_for_any_thread_count() {
        for threads in [0, 1, 2, 3, 5] {
            let pool = Pool::new(threads);
            for items in [0, 1, 7, 64, if cfg!(miri) { 100 } else { 1000 }] {
                let seen: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                pool.ranges(items, 3, |range| {
                    for i in range {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1));
                pool.shares(items, 4, |range| {
                    assert!(range.start % 4 == 0);
                    for i in range {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 2));
            }
        }
    }

    #[test]
    fn a_worker_that_comes_late_finds_the_call_closed_and_is_not_waited_for() {
        let gate = Gate(AtomicU64::new(CLOSED));
        assert!(!gate.enter(gate.call()), "no call yet");
        gate.open();
        let call = gate.call();
        assert!(gate.enter(call) && gate.enter(call));
        gate.close();
        assert!(!gate.enter(call) && !gate.is_empty());
        gate.leave();
        gate.leave();
        assert!(gate.is_empty() && gate.call() == call);
        gate.open();
        assert!(!gate.enter(call), "of the call before");
        assert!(gate.enter(call + 1));
    }

    #[test]
    fn a_pool_used_inside_a_body_of_pools_does_not_hang() {
        let (a, b) = (Pool::new(3), Pool::new(2));
        let sum = AtomicUsize::new(0);
        let items = if cfg!(miri) { 4 } else { 40 };
        a.ranges(items, 1, |_| {
            b.ranges(items, 1, |_| {
                a.ranges(items, 1, |r| {
                    sum.fetch_add(r.len(), Ordering::Relaxed);
                });
            });
        });
        assert_eq!(sum.load(Ordering::Relaxed), items * items * items);
    }

    #[test]
    fn a_panic_in_the_body_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        let failed = catch_unwind(AssertUnwindSafe(|| {
            pool.ranges(100, 1, |r| assert!(r.start != 50, "item 50"));
        }));
        assert!(failed.is_err());
        let sum = AtomicUsize::new(0);
        pool.ranges(100, 1, |r| {
            sum.fetch_add(r.start, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    }
}
