//! Memory for weights: values that are filled once, then read again and again, a hundred megabytes a forward.
//!
//! In pages of 4 KiB such a read is a walk of the page tables every 64 lines, which costs a forward of one row 10 to
//! 20 %. So weights settle side by side in large mappings, for which the system is asked for pages of 2 MiB.

use std::ops::Deref;
use std::sync::{Arc, Mutex};

use memmap2::{MmapMut, MmapRaw};

/// Bytes of a huge page, and of a mapping that several buffers share.
const PAGE: usize = 2 << 20;
const CHUNK: usize = 16 * PAGE;
/// Buffers begin on a cache line.
const LINE: usize = 64;

/// A fixed number of values.
pub(super) struct Buffer<T> {
    place: Place<T>,
}

enum Place<T> {
    Own(Vec<T>),
    /// `len` values from byte `at` of a mapping on; written before this was made, and never after.
    Settled {
        map: Arc<MmapRaw>,
        at: usize,
        len: usize,
    },
}

impl<T: Copy> Buffer<T> {
    pub(super) fn new(values: Vec<T>) -> Self {
        Self {
            place: Place::Own(values),
        }
    }

    /// The values, to be changed; those that have settled leave again.
    pub(super) fn own(&mut self) -> &mut Vec<T> {
        if let Place::Settled { .. } = self.place {
            self.place = Place::Own(self.to_vec());
        }
        match &mut self.place {
            Place::Own(values) => values,
            Place::Settled { .. } => unreachable!("it has just become its own"),
        }
    }

    /// Moves the values to where they stay. Without memory to map they stay where they are.
    pub(super) fn settle(&mut self) {
        let Place::Own(values) = &self.place else {
            return;
        };
        let len = values.len();
        if let Some((map, at)) = place(values) {
            self.place = Place::Settled { map, at, len };
        }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &self.place {
            Place::Own(values) => values,
            // SAFETY: `place` wrote `len` values there, aligned and within the mapping, which `map` keeps; nobody
            // writes there again.
            Place::Settled { map, at, len } => unsafe {
                std::slice::from_raw_parts(map.as_ptr().add(*at).cast(), *len)
            },
        }
    }
}

/// A mapping that is filled from the front: those bytes of it that are free.
struct Free {
    map: Arc<MmapRaw>,
    at: usize,
    end: usize,
}

impl Free {
    /// At least `bytes` bytes, from the beginning of a huge page on.
    fn new(bytes: usize) -> Option<Self> {
        let map = MmapMut::map_anon(bytes.checked_add(PAGE)?).ok()?;
        // Where there are no huge pages, small ones serve too.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let map = MmapRaw::from(map);
        let at = map.as_ptr().align_offset(PAGE);
        (at <= PAGE).then(|| Self {
            at,
            end: at + bytes,
            map: Arc::new(map),
        })
    }

    /// Takes room for some bytes.
    fn take(&mut self, bytes: usize) -> Option<(Arc<MmapRaw>, usize)> {
        let next = self.at.checked_add(bytes)?;
        if next > self.end {
            return None;
        }
        let at = std::mem::replace(&mut self.at, next.next_multiple_of(LINE));
        Some((Arc::clone(&self.map), at))
    }
}

/// Copies values into a mapping; says into which, and where.
fn place<T: Copy>(values: &[T]) -> Option<(Arc<MmapRaw>, usize)> {
    static SHARED: Mutex<Option<Free>> = Mutex::new(None);
    let bytes = size_of_val(values);
    if bytes == 0 || align_of::<T>() > LINE || cfg!(miri) {
        return None;
    }
    let (map, at) = if bytes >= CHUNK {
        Free::new(bytes)?.take(bytes)?
    } else {
        // Whoever panicked before left the numbers as they were.
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        match shared.as_mut().and_then(|free| free.take(bytes)) {
            Some(taken) => taken,
            None => shared.insert(Free::new(CHUNK)?).take(bytes)?,
        }
    };
    // SAFETY: `take` gave these bytes, within the mapping and aligned to a line, to this call alone; no one else reads or
    // writes them before they are part of a `Buffer`.
    unsafe {
        let to = map.as_mut_ptr().add(at).cast::<T>();
        std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
    }
    Some((map, at))
}

/// `n` zeros, for which the system is asked for pages of 2 MiB: to fault in a hundred megabytes of small ones takes longer
/// than to compute what shall stand there.
pub fn zeros<T: super::softmax::Real>(n: usize) -> Vec<T> {
    let values = vec![T::NULL; n];
    #[cfg(target_os = "linux")]
    if size_of_val(&values[..]) >= CHUNK && !cfg!(miri) {
        let at = values.as_ptr().cast::<u8>();
        let bytes = size_of_val(&values[..]);
        let first = at.align_offset(PAGE).min(bytes);
        let whole = (bytes - first) / PAGE * PAGE;
        // SAFETY: an advice about whole pages within the allocation; what they hold stays.
        let _ =
            unsafe { libc::madvise(at.add(first).cast_mut().cast(), whole, libc::MADV_HUGEPAGE) };
    }
    values
}

/// Lets the process keep memory that is freed, for a program that takes and frees the same hundred megabytes again and again:
/// to fault pages in takes as long as to compute what stands there. Where the allocator is another, nothing changes.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
    // SAFETY: settings of the allocator, within their ranges: values up to 32 MiB come from the heap, whose end stays.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_settle_side_by_side_and_leave_again() {
        let values =
            |n: usize, from: u32| -> Vec<u32> { (0..n as u32).map(|i| i + from).collect() };
        // The last two do not fit one mapping together.
        let large = if cfg!(miri) { 100 } else { 1 << 20 };
        let sizes = [0, 1, 15, 16, 1000, 3 * large, 9 * large];
        let mut buffers: Vec<Buffer<u32>> = Vec::new();
        for (i, n) in sizes.into_iter().enumerate() {
            let mut buffer = Buffer::new(values(n, i as u32));
            buffer.settle();
            buffer.settle(); // stays
            buffers.push(buffer);
        }
        for (i, (buffer, n)) in buffers.iter().zip(sizes).enumerate() {
            assert!(buffer[..] == values(n, i as u32)[..], "{n} values");
            assert!(n == 0 || cfg!(miri) || buffer.as_ptr().align_offset(LINE) == 0);
        }
        let last = &mut buffers[4];
        last.own()[3] = 7;
        last.settle();
        assert_eq!(last[..5], [4, 5, 6, 7, 8]);
    }
}
