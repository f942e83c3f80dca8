//! What kernels share of cutting rows and superblocks.

use crate::activations::Row;
use crate::format::{STRIP, TILE};

/// Bytes of a tile whose codes are a byte each.
pub(crate) const PANEL_TILE: usize = TILE * STRIP;

/// A superblock's values of a row, tile by tile.
#[inline(always)]
pub(crate) fn values<'a>(row: &Row<'a>, g: usize, tiles: usize) -> &'a [[i8; TILE]] {
    &row.values.as_chunks().0[g * tiles..][..tiles]
}

/// A superblock's corrections of a row, tile by tile.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn corrections<'a>(row: &Row<'a>, g: usize, tiles: usize) -> &'a [[[i16; 2]; 2]] {
    &row.corrections.as_chunks().0[g * tiles..][..tiles]
}

/// Rows four at a time, then the rest, if any.
#[inline(always)]
pub(crate) fn in_quartets(
    rows: &[Row],
    out: &mut [[f32; STRIP]],
    four: impl Fn(&[Row], &mut [[f32; STRIP]]),
    rest: impl Fn(&[Row], &mut [[f32; STRIP]]),
) {
    let mut quartets = rows.chunks_exact(4);
    let mut outs = out.chunks_exact_mut(4);
    for (rows, out) in (&mut quartets).zip(&mut outs) {
        four(rows, out);
    }
    if !quartets.remainder().is_empty() {
        rest(quartets.remainder(), outs.into_remainder());
    }
}

/// Rows in parts of up to MOST, as even as they can be: this many, and the last part perhaps fewer.
#[cfg(target_arch = "x86_64")]
pub(crate) fn even_size<const MOST: usize>(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(MOST).max(1)).max(1)
}

/// Rows in even parts.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn in_even_parts<const MOST: usize>(
    rows: &[Row],
    out: &mut [[f32; STRIP]],
    each: impl Fn(&[Row], &mut [[f32; STRIP]]),
) {
    let size = even_size::<MOST>(rows.len());
    for (rows, out) in rows.chunks(size).zip(out.chunks_mut(size)) {
        each(rows, out);
    }
}
