//! Tests: inputs and outputs that begin or end at a page that may not be touched.

use crate::activations::{Row, RowMut};
use crate::format::{Layout, Matrix, STRIP};
use crate::kernels::Kernels;

/// A copy of some values, with a forbidden page right before it or right after it.
struct Guarded<T> {
    map: *mut u8,
    size: usize,
    values: *mut T,
    count: usize,
}

impl<T: Copy> Guarded<T> {
    fn new(values: &[T], flush_at_end: bool) -> Self {
        const PAGE: usize = 4096;
        let bytes = size_of_val(values);
        let size = bytes.next_multiple_of(PAGE) + 2 * PAGE;
        // SAFETY: a new mapping, whose inner pages hold the values.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            let map = map.cast::<u8>();
            let inner = map.add(PAGE);
            assert_eq!(libc::mprotect(inner.cast(), size - 2 * PAGE, libc::PROT_READ | libc::PROT_WRITE), 0);
            let at = if flush_at_end { size - 2 * PAGE - bytes } else { 0 };
            let copy = inner.add(at).cast::<T>();
            copy.copy_from_nonoverlapping(values.as_ptr(), values.len());
            Self { map, size, values: copy, count: values.len() }
        }
    }

    fn get(&self) -> &[T] {
        // SAFETY: the copy that `new` made.
        unsafe { std::slice::from_raw_parts(self.values, self.count) }
    }

    fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: the copy that `new` made.
        unsafe { std::slice::from_raw_parts_mut(self.values, self.count) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.map.cast(), self.size) };
    }
}

#[test]
fn nothing_around_inputs_and_outputs_is_touched() {
    for end in [false, true] {
        for bits in [2, 3, 4, 8] {
            for (k, size) in [(96, 64), (160, 192), (960, 320), (2048, 1024)] {
                let layout = Layout::new(bits, k, 16, size).unwrap();
                let bytes: Vec<u8> = (0..layout.bytes()).map(|i| (i * 37 % 251) as u8).collect();
                let bytes = Guarded::new(&bytes, end);
                let strip = Matrix::new(layout, bytes.get()).unwrap().strip(0);
                let x: Vec<f32> = (0..k).map(|i| (i * 31 % 255) as f32 - 127.0).collect();
                let x = Guarded::new(&x, end);
                for kernels in Kernels::all() {
                    let inputs = k.next_multiple_of(64);
                    let mut values = Guarded::new(&vec![0; inputs], end);
                    let mut scales = Guarded::new(&vec![0.0; inputs / size], end);
                    let mut corrections = Guarded::new(&vec![[0; 2]; inputs / 32], end);
                    let mut starts = Guarded::new(&vec![0; inputs / size], end);
                    let row = RowMut {
                        superblock_size: size,
                        values: values.get_mut(),
                        scales: scales.get_mut(),
                        corrections: corrections.get_mut(),
                        starts: starts.get_mut(),
                    };
                    kernels.quantize_row(x.get(), row);
                    let row = Row {
                        in_features: k,
                        superblock_size: size,
                        values: values.get(),
                        scales: scales.get(),
                        corrections: corrections.get(),
                        starts: starts.get(),
                    };
                    let mut expected = [[0.0; STRIP]];
                    Kernels::plain().strip(&strip, &[row], &mut expected);
                    for count in [1, 2, 3, 4, 5, 8, 11, 17] {
                        let mut out = Guarded::new(&vec![[0.0; STRIP]; count], end);
                        kernels.strip(&strip, &vec![row; count], out.get_mut());
                        for (found, expected) in out.get().as_flattened().iter().zip(expected[0].iter().cycle()) {
                            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                            assert!(same, "{} with {bits} bits: {found}, expected {expected}", kernels.name());
                        }
                    }
                    let weights = Guarded::new(&vec![1.0; 5 * k], end);
                    let mut scores = Guarded::new(&[0.0; 5], end);
                    kernels.router_scores(x.get(), weights.get(), scores.get_mut()).unwrap();
                    let mut y = Guarded::new(&vec![0.0; k], end);
                    kernels.weighted_sum(x.get(), 0.5, x.get(), 0.25, y.get_mut()).unwrap();
                    assert_eq!(y.get()[k - 1], 0.75 * x.get()[k - 1]);
                }
            }
        }
    }
}
