//! Weights that are not in memory, as a mapped file may be larger: asked for in the order in which they are computed
//! with, so that the disk reads while the processor works.
//!
//! All of it is advice to the kernel, which may do otherwise: numbers and errors are the same without it. Linux alone, and
//! with `PHIMOE_READ_AHEAD=1` in the environment: on the disk that was measured it did not pay
//! (`../../../docs/larger-than-memory.md`).

use std::env;
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, Once, PoisonError};
use std::thread;

use crate::schedule::workers;

/// Its first page stands for the whole piece, as pages that came together go together. To ask the kernel about each
/// page would take a step's time.
const PIECE: usize = 2 << 20;
/// Asked for by one call: a kernel cuts a longer one off at what the disk takes at once.
const CALL: usize = 256 << 10;

/// A part of the weights, by its address, which the kernel may be told even when nothing is mapped there any more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    address: usize,
    bytes: usize,
}

/// Asks for what is not in memory of some matrices, and then of others, and gives it back; nothing unless the
/// environment wants it.
///
/// `first` are read one after the other, each worker beginning at its share of the whole; `then` all at once, each
/// worker at its share of each.
pub fn ask(first: &[&[u8]], then: &[&[u8]]) -> Vec<Piece> {
    static WANTED: LazyLock<bool> =
        LazyLock::new(|| env::var_os("PHIMOE_READ_AHEAD").is_some_and(|value| value == "1"));
    if *WANTED { ask_for(first, then) } else { Vec::new() }
}

fn ask_for(first: &[&[u8]], then: &[&[u8]]) -> Vec<Piece> {
    let pieces = |matrices: &[&[u8]]| matrices.iter().flat_map(|bytes| absent(bytes)).collect::<Vec<_>>();
    let mut wanted = in_turns(shares(&pieces(first)));
    wanted.extend(in_turns(then.iter().map(|bytes| in_turns(shares(&absent(bytes)))).collect()));
    if !wanted.is_empty() {
        static START: Once = Once::new();
        START.call_once(|| {
            // where there can be no thread, pages are read when they are touched
            let _ = thread::Builder::new().name("phimoe read ahead".into()).spawn(keep_asking);
        });
        *queue() = wanted.iter().rev().copied().collect(); // what is left of an older list was read by its own pass, or will be by another session's
        ASKED.notify_one();
    }
    wanted
}

/// Says that these pages are the first to be dropped, should memory be short.
pub fn let_go(pieces: &[Piece]) {
    for piece in pieces {
        system::advise(*piece, system::COLD);
    }
}

/// What the thread has still to ask for, the next one last.
static QUEUE: Mutex<Vec<Piece>> = Mutex::new(Vec::new());
static ASKED: Condvar = Condvar::new();

fn queue() -> MutexGuard<'static, Vec<Piece>> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn keep_asking() {
    loop {
        let mut queue = queue();
        while queue.is_empty() {
            queue = ASKED.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let piece = queue.pop();
        drop(queue);
        for piece in piece.iter().flat_map(|piece| cut(*piece, CALL)) {
            system::advise(piece, system::WILLNEED);
        }
    }
}

/// The pieces whose first page is not in memory.
fn absent(bytes: &[u8]) -> Vec<Piece> {
    let whole = Piece { address: bytes.as_ptr() as usize, bytes: bytes.len() };
    cut(whole, PIECE).filter(|piece| system::is_absent(*piece)).collect()
}

fn cut(piece: Piece, size: usize) -> impl Iterator<Item = Piece> {
    let end = piece.address + piece.bytes;
    (piece.address..end).step_by(size).map(move |address| Piece { address, bytes: size.min(end - address) })
}

/// One run of neighbours for each worker.
fn shares(pieces: &[Piece]) -> Vec<Vec<Piece>> {
    let (count, workers) = (pieces.len(), workers());
    (0..workers).map(|w| pieces[w * count / workers..(w + 1) * count / workers].to_vec()).collect()
}

/// The first of each list, the second of each, and so on.
fn in_turns(lists: Vec<Vec<Piece>>) -> Vec<Piece> {
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    (0..longest).flat_map(|place| lists.iter().filter_map(move |list| list.get(place)).copied()).collect()
}

#[cfg(target_os = "linux")]
mod system {
    use std::ffi::c_int;
    use std::sync::LazyLock;

    use super::Piece;

    pub const WILLNEED: c_int = libc::MADV_WILLNEED;
    pub const COLD: c_int = libc::MADV_COLD;

    static PAGE: LazyLock<usize> = LazyLock::new(|| {
        // SAFETY: asks for a number.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
    });

    /// Advice about all pages of which the piece has a part; errors are of no account.
    pub fn advise(piece: Piece, advice: c_int) {
        let start = piece.address & !(*PAGE - 1);
        // SAFETY: neither advice changes what memory holds, whatever lies there.
        unsafe { libc::madvise(start as *mut _, piece.address + piece.bytes - start, advice) };
    }

    /// Whether the piece's first page is not in memory; no where the kernel does not say.
    pub fn is_absent(piece: Piece) -> bool {
        let mut there = 0;
        // SAFETY: the answer for one page is one byte.
        let status = unsafe { libc::mincore((piece.address & !(*PAGE - 1)) as *mut _, 1, &mut there) };
        status == 0 && there & 1 == 0
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use super::Piece;

    pub const WILLNEED: i32 = 0;
    pub const COLD: i32 = 0;

    pub fn advise(_: Piece, _: i32) {}

    pub fn is_absent(_: Piece) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::{Piece, cut, in_turns};

    fn piece(address: usize) -> Piece {
        Piece { address, bytes: 1 }
    }

    #[test]
    fn pieces_are_neighbours_and_miss_nothing() {
        for (address, bytes, size) in [(4096, 10, 3), (77, 1, 4), (100, 8, 4), (0, 0, 4)] {
            let pieces: Vec<Piece> = cut(Piece { address, bytes }, size).collect();
            assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<usize>(), bytes);
            assert!(pieces.windows(2).all(|pair| pair[0].address + size == pair[1].address));
            assert!(pieces.first().is_none_or(|piece| piece.address == address));
        }
    }

    #[test]
    fn lists_of_any_length_take_turns() {
        let lists = [vec![1, 2, 3], vec![], vec![10], vec![20, 21]];
        let lists = lists.map(|list| list.into_iter().map(piece).collect()).to_vec();
        assert_eq!(in_turns(lists), [1, 10, 20, 2, 21, 3].map(piece));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_was_dropped_is_asked_for_and_what_is_there_is_not() {
        use super::{PIECE, ask_for, let_go, system};
        use std::io::Write;
        use std::os::fd::AsRawFd;
        use std::ptr::null_mut;

        let path = std::env::temp_dir().join(format!("phimoe-ahead-{}", std::process::id()));
        let content: Vec<u8> = (0..5 * PIECE + 100).map(|i| (i / 4096 % 251) as u8).collect();
        let mut file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        // SAFETY: a new mapping of a file that nobody else has.
        let (map, bytes) = unsafe {
            let map = libc::mmap(null_mut(), content.len(), libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
            assert_ne!(map, libc::MAP_FAILED);
            libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
            (map, std::slice::from_raw_parts(map.cast::<u8>(), content.len()))
        };
        let (first, then) = bytes[64..].split_at(3 * PIECE); // pieces that begin inside a page
        if !system::is_absent(Piece { address: map as usize, bytes: 1 }) {
            return; // a file system in memory drops nothing
        }
        let asked = ask_for(&[first], &[then]);
        let mut addresses: Vec<usize> = asked.iter().map(|piece| piece.address - map as usize).collect();
        addresses.sort_unstable();
        assert_eq!(addresses, [0, 1, 2, 3, 4, 5].map(|number| 64 + number * PIECE)); // the last has 36 bytes
        assert_eq!(asked.iter().map(|piece| piece.bytes).sum::<usize>(), content.len() - 64);
        assert!(bytes == content);
        assert_eq!(ask_for(&[first], &[then]), []);
        let_go(&asked);
        assert!(bytes == content);
        // SAFETY: the mapping of above, and nobody reads it any more.
        unsafe { libc::munmap(map, content.len()) };
        let_go(&asked); // of no account, as nothing is there
        system::advise(asked[0], system::WILLNEED);
    }
}
