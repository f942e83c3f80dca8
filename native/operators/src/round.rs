//! Rounding of weights, for an exporter in any language that calls C.

use std::ffi::c_void;
use std::panic::catch_unwind;
use std::slice::{from_raw_parts, from_raw_parts_mut};

use phimoe_kernels::{Error, Kernels, Layout, Rounded, Weights, default_superblock_size};

const ROUNDED: i32 = 0;
const NOT_FINITE: i32 = 1;
const NO_KERNELS: i32 = 2;
const REFUSED: i32 = 3;

/// Rounds a matrix [rows, columns] to 4 or 8 bits with two levels of scales (FORMAT.md, "Rounding"), superblocks being
/// of the default size. May be called from any number of threads at once.
///
/// `dtype` is 0 for float32, 1 for float16, 2 for bfloat16. Without `scales`, a null pointer, `codes` gets the strips;
/// else the codes of ONNX Runtime's operators, [rows, columns * bits / 8], and `scales` gets [rows, columns / 32 rounded
/// up].
///
/// Returns 0; 1 where a weight is NaN or infinite; 2 where there are no kernels, and `phimoe_native_kernels` says why; 3
/// where the numbers are not of this contract. Except with 0, what was written is of no use.
///
/// # Safety
/// `weights` is readable, and `codes` and `scales` are writable, in these sizes, aligned as their numbers are, and nobody
/// else's while this runs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn phimoe_native_round(
    weights: *const c_void,
    dtype: u32,
    rows: usize,
    columns: usize,
    bits: u32,
    codes: *mut u8,
    scales: *mut f32,
) -> i32 {
    let run = || -> Result<i32, Error> {
        let layout = Layout::new(bits, columns, rows, default_superblock_size(columns))?;
        let count = rows * columns; // Layout has held this against the address space
        // SAFETY: the caller's promise.
        let weights = unsafe {
            match dtype {
                0 => Weights::F32(from_raw_parts(weights.cast(), count)),
                1 => Weights::F16(from_raw_parts(weights.cast(), count)),
                2 => Weights::Bf16(from_raw_parts(weights.cast(), count)),
                _ => return Ok(REFUSED),
            }
        };
        let Ok(kernels) = Kernels::detect() else { return Ok(NO_KERNELS) };
        // SAFETY: the caller's promise.
        let out = unsafe {
            if scales.is_null() {
                Rounded::Strips(from_raw_parts_mut(codes, layout.bytes()))
            } else {
                Rounded::Rows {
                    codes: from_raw_parts_mut(codes, count * bits as usize / 8),
                    scales: from_raw_parts_mut(scales, rows * columns.div_ceil(32)),
                }
            }
        };
        Ok(if kernels.round(weights, layout, out)? { ROUNDED } else { NOT_FINITE })
    };
    // A panic may not leave through C.
    catch_unwind(run).unwrap_or(Ok(REFUSED)).unwrap_or(REFUSED)
}
