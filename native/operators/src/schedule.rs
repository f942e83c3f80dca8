//! How the tasks of a region are dealt to threads.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use phimoe_kernels::{Kernels, QuantizedRows};

use crate::ort::{Context, Result};

/// A task reads about so much, some ten microseconds: long enough for memory to run at its full speed, and short enough
/// that a thread which the system has put aside in the middle of one holds the others up for little.
const TASK_BYTES: usize = 128 << 10;
/// Rows that are brought into bytes by one task.
const ROWS: usize = 8;

/// Runs `work(scratch, task)` for every task below `tasks`, on the session's threads.
///
/// A worker takes its own run of neighbours in order, so that it reads memory in long stretches, and then what is left
/// of the others' runs. `scratch` is made once for each worker.
pub fn share<S>(
    context: &Context,
    tasks: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<()> {
    let workers = workers().min(tasks);
    let claims = Claims::new(tasks, workers);
    context.parallel(workers, &|worker| {
        let mut own = None;
        while let Some(task) = claims.next(worker) {
            work(own.get_or_insert_with(&scratch), task)?;
        }
        Ok(())
    })
}

/// Cuts `count` pieces of `bytes` each into tasks, some for every worker.
pub fn cut(count: usize, bytes: usize) -> Vec<Range<usize>> {
    let most = count.div_ceil(4 * workers()).max(1);
    let size = (TASK_BYTES / bytes).clamp(1, most);
    (0..count).step_by(size).map(|start| start..(start + size).min(count)).collect()
}

/// Rows x [R, K] as bytes, in groups of `ROWS`, each with what `also` makes of its rows.
pub fn quantize<T: Send + Sync>(
    context: &Context,
    kernels: &Kernels,
    x: &[f32],
    in_features: usize,
    superblock_size: usize,
    also: impl Fn(&[f32]) -> Result<T> + Sync,
) -> Result<Vec<(QuantizedRows, T)>> {
    let groups: Vec<&[f32]> = x.chunks(ROWS * in_features).collect();
    let made: Vec<OnceLock<(QuantizedRows, T)>> = groups.iter().map(|_| OnceLock::new()).collect();
    share(
        context,
        groups.len(),
        || (),
        |(), group| {
            let x = groups[group];
            let rows = kernels.quantize(x, x.len() / in_features, in_features, superblock_size)?;
            let _ = made[group].set((rows, also(x)?));
            Ok(())
        },
    )?;
    Ok(made.into_iter().filter_map(OnceLock::into_inner).collect())
}

/// How many threads a region can use: the processors of this process. Where a session has fewer threads, the workers
/// that are too many run when nothing is left to do.
pub fn workers() -> usize {
    static WORKERS: OnceLock<usize> = OnceLock::new();
    *WORKERS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Apart from its neighbours in the caches.
#[repr(align(128))]
struct Run {
    next: AtomicUsize,
    end: usize,
}

struct Claims(Vec<Run>);

impl Claims {
    fn new(tasks: usize, workers: usize) -> Self {
        let start = |worker: usize| worker * tasks / workers;
        Self((0..workers).map(|w| Run { next: AtomicUsize::new(start(w)), end: start(w + 1) }).collect())
    }

    fn next(&self, worker: usize) -> Option<usize> {
        let runs = self.0[worker..].iter().chain(&self.0[..worker]);
        runs.filter(|run| run.next.load(Ordering::Relaxed) < run.end)
            .map(|run| (run.next.fetch_add(1, Ordering::Relaxed), run.end))
            .find_map(|(task, end)| (task < end).then_some(task))
    }
}

#[cfg(test)]
mod tests {
    use super::{Claims, cut};

    #[test]
    fn every_task_is_taken_once_whoever_asks() {
        for (tasks, workers) in [(0, 1), (1, 1), (7, 3), (64, 2), (5, 5)] {
            let claims = Claims::new(tasks, workers);
            let mut taken: Vec<usize> = (0..).map_while(|turn| claims.next(turn * turn % workers)).collect();
            taken.sort_unstable();
            assert_eq!(taken, (0..tasks).collect::<Vec<_>>());
            assert!((0..workers).all(|worker| claims.next(worker).is_none()));
        }
    }

    #[test]
    fn a_worker_begins_with_its_own_run() {
        let claims = Claims::new(10, 2);
        assert_eq!((0..10).map(|_| claims.next(1).unwrap()).collect::<Vec<_>>(), [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]);
    }

    #[test]
    fn cuts_are_neighbours_and_miss_nothing() {
        for (count, bytes) in [(0, 10), (1, 1 << 20), (2004, 35_000), (60, 70_000), (1000, 1)] {
            let ends = cut(count, bytes);
            assert_eq!(ends.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
        }
    }
}
