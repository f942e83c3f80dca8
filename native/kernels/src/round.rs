//! Weights to codes with two levels of scales: `../../FORMAT.md`, "Rounding". Written once, in lanes of sixteen outputs,
//! and compiled for each instruction set by being inlined there. No product is fused with a sum, so that all give the
//! same bytes, and so does whoever else follows the contract.

use crate::Error;
use crate::format::{BLOCK, LARGEST_SUPERBLOCK, Layout, STRIP, TILE};
use crate::half::Half;

const LOWEST: f32 = -8.0;
const HIGHEST: f32 = 7.0;
const HIGHEST_8: f32 = 127.0;
const LARGEST_SCALE: f32 = 15.0;
/// Tried for a block's scale, of the one that clips nothing.
const SHARES: [f32; 3] = [0.8, 0.9, 1.0];
/// Tried for a block's integer, beside the nearest.
const STEPS: [f32; 5] = [-2.0, -1.0, 0.0, 1.0, 2.0];
/// A smaller step counts as none: its inverse could be infinite.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23); // 2 ** -100
const INFINITE: u32 = 0x7f80_0000;
// Adding 1.5 * 2 ** 23 rounds to an integer, to even, which then is in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;
const LARGEST_BLOCKS: usize = LARGEST_SUPERBLOCK / BLOCK;

/// A number of each of sixteen outputs.
type Lanes = [f32; STRIP];

/// A matrix [N, K] as a checkpoint stores it, row after row; float16 and bfloat16 as bits.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// float32
    F32(&'a [f32]),
    /// float16
    F16(&'a [u16]),
    /// bfloat16
    Bf16(&'a [u16]),
}

/// Where a rounded matrix goes.
#[derive(Debug)]
pub enum Rounded<'a> {
    /// Its strips, `Layout::bytes` of them.
    Strips(&'a mut [u8]),
    /// As ONNX Runtime's operators read it; K must be a multiple of 16.
    Rows {
        /// [N][K * bits / 8], level + 2 ** (bits - 1), of two in a byte the first in the low half.
        codes: &'a mut [u8],
        /// [N][K / 32, rounded up], S * s.
        scales: &'a mut [f32],
    },
}

impl Weights<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(weights) => weights.len(),
            Self::F16(weights) | Self::Bf16(weights) => weights.len(),
        }
    }
}

/// Whether sizes agree.
pub(crate) fn check(weights: &Weights, layout: Layout, out: &Rounded) -> Result<(), Error> {
    let (k, n, bits) = (layout.in_features(), layout.out_features(), layout.bits() as usize);
    if ![4, 8].contains(&bits) {
        return Err(Error::new(format!("rounding to {bits} bits; expected 4 or 8")));
    }
    let mut sizes = vec![("weights", weights.len(), n * k)];
    match out {
        Rounded::Strips(bytes) => sizes.push(("bytes of strips", bytes.len(), layout.bytes())),
        Rounded::Rows { codes, scales } => {
            if !k.is_multiple_of(16) {
                return Err(Error::new(format!("rows of {k} codes; expected a multiple of 16")));
            }
            sizes.push(("bytes of codes", codes.len(), n * k * bits / 8));
            sizes.push(("scales", scales.len(), n * k.div_ceil(BLOCK)));
        }
    }
    for (what, found, expected) in sizes {
        if found != expected {
            return Err(Error::new(format!("{found} {what}; expected {expected}")));
        }
    }
    Ok(())
}

/// Rounds the outputs of one strip; false where one of their weights is not finite.
#[inline(always)]
pub(crate) fn strip(weights: &Weights, layout: Layout, index: usize, out: &mut Rounded) -> bool {
    let size = layout.superblock_size();
    let mut panel = [[0.0; STRIP]; LARGEST_SUPERBLOCK];
    let panel = &mut panel[..size];
    let mut s = [[0.0; STRIP]; LARGEST_BLOCKS];
    let s = &mut s[..size / BLOCK];
    for g in 0..layout.superblocks() {
        match weights {
            Weights::F32(weights) => load(weights, layout, index, g, |x| x, panel),
            Weights::F16(weights) => load(weights, layout, index, g, |x| Half(x).to_f32(), panel),
            Weights::Bf16(weights) => load(weights, layout, index, g, |x| f32::from_bits(u32::from(x) << 16), panel),
        }
        let Some(exponents) = normalize(panel) else { return false };
        let outer = if layout.bits() == 8 { fit_8(panel) } else { fit_4(panel, s) };
        if layout.bits() == 8 {
            s.fill([1.0; STRIP]);
        }
        let mut outer = rounded(each(|l| outer[l] * f32::from_bits(exponents[l] << 23)));
        if layout.bits() < 8 {
            for l in 0..STRIP {
                outer[l] = lowest_terms(outer[l], s, l);
            }
        }
        match out {
            Rounded::Strips(bytes) => {
                let bytes = &mut bytes[index * layout.strip_bytes()..][..layout.strip_bytes()];
                write_strip(bytes, layout, g, panel, s, &outer);
            }
            Rounded::Rows { codes, scales } => write_rows(codes, scales, layout, index, g, panel, s, &outer),
        }
    }
    true
}

#[inline(always)]
fn each(mut number: impl FnMut(usize) -> f32) -> Lanes {
    let mut lanes = [0.0; STRIP];
    for l in 0..STRIP {
        lanes[l] = number(l);
    }
    lanes
}

/// A superblock's weights, an input after the other, with zeros where there are none.
#[inline(always)]
fn load<T: Copy>(
    weights: &[T],
    layout: Layout,
    index: usize,
    g: usize,
    number: impl Fn(T) -> f32,
    panel: &mut [Lanes],
) {
    let (k, size) = (layout.in_features(), layout.superblock_size());
    let rows = STRIP.min(layout.out_features() - index * STRIP);
    let inputs = size.min(k - (g * size).min(k));
    if rows < STRIP || inputs < size {
        panel.fill([0.0; STRIP]);
    }
    let first = index * STRIP * k + g * size;
    for (at, panel) in (0..inputs).step_by(16).zip(panel.chunks_mut(16)) {
        for row in 0..rows {
            let source = &weights[first + row * k + at..][..16.min(inputs - at)];
            for (weight, lanes) in source.iter().zip(&mut *panel) {
                lanes[row] = number(*weight);
            }
        }
    }
}

/// Multiplies each output by a power of two that brings its largest magnitude into 1 to 4, for squares to be float32;
/// the exponents, as float32 has them, say which. None where a number is not finite.
#[inline(always)]
fn normalize(panel: &mut [Lanes]) -> Option<[u32; STRIP]> {
    let mut largest = [0; STRIP];
    for weights in &*panel {
        for l in 0..STRIP {
            largest[l] = largest[l].max(weights[l].to_bits() & 0x7fff_ffff);
        }
    }
    if largest.iter().any(|bits| *bits >= INFINITE) {
        return None;
    }
    let exponents = largest.map(|bits| (bits >> 23).clamp(1, 253));
    let factors = each(|l| f32::from_bits((254 - exponents[l]) << 23));
    for weights in panel {
        for l in 0..STRIP {
            weights[l] *= factors[l];
        }
    }
    Some(exponents)
}

/// S; the panel's numbers become levels, in the low bits.
#[inline(always)]
fn fit_8(panel: &mut [Lanes]) -> Lanes {
    let mut largest = [0.0; STRIP];
    for weights in &*panel {
        for l in 0..STRIP {
            let magnitude = weights[l].abs();
            largest[l] = if magnitude > largest[l] { magnitude } else { largest[l] };
        }
    }
    let wanted = each(|l| largest[l] / HIGHEST_8);
    let mut outer = rounded(wanted);
    for l in 0..STRIP {
        if outer[l] < wanted[l] {
            outer[l] = f32::from_bits(outer[l].to_bits() + (1 << 16));
        }
    }
    to_levels(panel, &inverse(&outer), -HIGHEST_8, HIGHEST_8);
    outer
}

/// S, and s of each block; the panel's numbers become levels, in the low bits.
#[inline(always)]
fn fit_4(panel: &mut [Lanes], s: &mut [Lanes]) -> Lanes {
    let (blocks, _) = panel.as_chunks_mut::<BLOCK>();
    let mut outer = [0.0; STRIP];
    for (block, scale) in blocks.iter().zip(&mut *s) {
        *scale = best_scale(block);
        for l in 0..STRIP {
            outer[l] = if scale[l] > outer[l] { scale[l] } else { outer[l] };
        }
    }
    outer = rounded(each(|l| outer[l] / LARGEST_SCALE));
    let by_outer = inverse(&outer);
    let (mut product, mut square) = ([0.0; STRIP], [0.0; STRIP]);
    for (block, s) in blocks.iter().zip(&mut *s) {
        let nearest = each(|l| s[l] * by_outer[l] + ROUND - ROUND);
        let mut best = [f32::INFINITY; STRIP];
        let (mut chosen, mut products, mut squares) = ([0.0; STRIP], [0.0; STRIP], [0.0; STRIP]);
        for step in STEPS {
            let inner = each(|l| clamped(nearest[l] + step, 1.0, LARGEST_SCALE));
            let unit = each(|l| inner[l] * outer[l]);
            let (p, q) = moments(block, &inverse(&unit));
            for l in 0..STRIP {
                let error = unit[l] * (unit[l] * q[l] - 2.0 * p[l]); // less the weights' own square
                let better = error < best[l];
                best[l] = if better { error } else { best[l] };
                chosen[l] = if better { inner[l] } else { chosen[l] };
                products[l] = if better { p[l] } else { products[l] };
                squares[l] = if better { q[l] } else { squares[l] };
            }
        }
        for l in 0..STRIP {
            s[l] = if s[l] > 0.0 { chosen[l] } else { 0.0 };
            product[l] += products[l] * s[l];
            square[l] += squares[l] * s[l] * s[l];
        }
    }
    outer = rounded(each(|l| if square[l] > 0.0 { product[l] / square[l] } else { outer[l] }));
    for (block, s) in blocks.iter_mut().zip(&*s) {
        to_levels(block, &inverse(&each(|l| s[l] * outer[l])), LOWEST, HIGHEST);
    }
    outer
}

/// A block's scale by itself: of a few the one with the least error after its own refit, <w, q> / <q, q>.
#[inline(always)]
fn best_scale(block: &[Lanes; BLOCK]) -> Lanes {
    let (mut low, mut high) = (block[0], block[0]);
    for weights in &block[1..] {
        for l in 0..STRIP {
            low[l] = if weights[l] < low[l] { weights[l] } else { low[l] };
            high[l] = if weights[l] > high[l] { weights[l] } else { high[l] };
        }
    }
    let (low, high) = (each(|l| low[l] / LOWEST), each(|l| high[l] / HIGHEST));
    let whole = each(|l| if low[l] > high[l] { low[l] } else { high[l] });
    let (mut best, mut scale) = ([-1.0; STRIP], [0.0; STRIP]);
    for share in SHARES {
        let (product, square) = moments(block, &inverse(&each(|l| whole[l] * share)));
        for l in 0..STRIP {
            let refitted = product[l] / if square[l] > 1.0 { square[l] } else { 1.0 };
            let gain = product[l] * refitted; // by how much the block's squared error falls
            let better = gain > best[l];
            best[l] = if better { gain } else { best[l] };
            scale[l] = if better { refitted } else { scale[l] };
        }
    }
    scale
}

/// <w, q> and <q, q> of a block, in the order of inputs.
#[inline(always)]
fn moments(block: &[Lanes; BLOCK], inverse: &Lanes) -> (Lanes, Lanes) {
    let (mut product, mut square) = ([0.0; STRIP], [0.0; STRIP]);
    for weights in block {
        for l in 0..STRIP {
            let level = clamped(weights[l] * inverse[l], LOWEST, HIGHEST) + ROUND - ROUND;
            product[l] += weights[l] * level;
            square[l] += level * level;
        }
    }
    (product, square)
}

#[inline(always)]
fn to_levels(panel: &mut [Lanes], inverse: &Lanes, lowest: f32, highest: f32) {
    for weights in panel {
        for l in 0..STRIP {
            weights[l] = clamped(weights[l] * inverse[l], lowest, highest) + ROUND;
        }
    }
}

/// In two instructions: there is no NaN here.
#[inline(always)]
fn clamped(x: f32, lowest: f32, highest: f32) -> f32 {
    let x = if x > lowest { x } else { lowest };
    if x < highest { x } else { highest }
}

#[inline(always)]
fn inverse(unit: &Lanes) -> Lanes {
    each(|l| if unit[l] < SMALLEST { 0.0 } else { 1.0 / unit[l] })
}

/// To the nearest bfloat16, to even.
#[inline(always)]
fn rounded(numbers: Lanes) -> Lanes {
    each(|l| to_bfloat16(numbers[l]))
}

#[inline(always)]
fn to_bfloat16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}

/// Of all S and s that give a superblock of output `l` its blocks' scales S * s, those with the largest s.
#[inline(always)]
fn lowest_terms(outer: f32, s: &mut [Lanes], l: usize) -> f32 {
    let largest = s.iter().fold(0.0, |largest: f32, s| largest.max(s[l]));
    let top = outer * largest;
    if top == 0.0 {
        s.iter_mut().for_each(|s| s[l] = 0.0);
        return 0.0;
    }
    for inner in (largest as u32 + 1..=LARGEST_SCALE as u32).rev() {
        let other = to_bfloat16(top / inner as f32);
        let scaled = |s: &Lanes| (outer * s[l] / other).round_ties_even();
        if s.iter().all(|s| scaled(s) * other == outer * s[l]) {
            s.iter_mut().for_each(|s| s[l] = scaled(s));
            return other;
        }
    }
    outer
}

/// A superblock's part of a strip.
#[inline(always)]
fn write_strip(bytes: &mut [u8], layout: Layout, g: usize, panel: &[Lanes], s: &[Lanes], outer: &Lanes) {
    let (head, codes) = bytes.split_at_mut(layout.codes_at());
    if g == 0 {
        head.fill(0);
    }
    for l in 0..STRIP {
        let bits = (outer[l].to_bits() >> 16) as u16;
        head[g * 2 * STRIP + 2 * l..][..2].copy_from_slice(&bits.to_le_bytes());
    }
    let tiles = panel.len() / TILE;
    if layout.bits() < 8 {
        let scales = &mut head[layout.block_scales_at() + g * tiles * STRIP..][..tiles * STRIP];
        for (scales, s) in scales.as_chunks_mut::<STRIP>().0.iter_mut().zip(s.as_chunks::<2>().0) {
            for l in 0..STRIP {
                scales[l] = s[0][l] as u8 | (s[1][l] as u8) << 4;
            }
        }
    }
    let size = layout.tile_bytes();
    let codes = &mut codes[g * tiles * size..][..tiles * size];
    for (codes, levels) in codes.chunks_exact_mut(size).zip(panel.as_chunks::<TILE>().0) {
        let (rows, _) = codes.as_chunks_mut::<{ 4 * STRIP }>();
        for (r, row) in rows.iter_mut().enumerate() {
            let mut words = [0; STRIP];
            for j in 0..4 {
                let low = &levels[4 * r + j];
                for l in 0..STRIP {
                    words[l] |= if layout.bits() == 8 {
                        (low[l].to_bits() & 255) << (8 * j)
                    } else {
                        let high = levels[BLOCK + 4 * r + j][l].to_bits().wrapping_add(8) & 15;
                        (low[l].to_bits().wrapping_add(8) & 15 | high << 4) << (8 * j)
                    };
                }
            }
            for (bytes, word) in row.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                *bytes = word.to_le_bytes();
            }
        }
    }
}

/// A superblock's part of sixteen rows, or of as many as there are.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "a matrix's parts and the superblock's")]
fn write_rows(
    codes: &mut [u8],
    scales: &mut [f32],
    layout: Layout,
    index: usize,
    g: usize,
    panel: &[Lanes],
    s: &[Lanes],
    outer: &Lanes,
) {
    let (k, size, bits) = (layout.in_features(), layout.superblock_size(), layout.bits() as usize);
    let rows = STRIP.min(layout.out_features() - index * STRIP);
    let inputs = size.min(k - (g * size).min(k));
    let (each, blocks) = (32 / bits, k.div_ceil(BLOCK)); // codes of a word
    for (block, s) in s[..inputs.div_ceil(BLOCK)].iter().enumerate() {
        for row in 0..rows {
            scales[(index * STRIP + row) * blocks + g * (size / BLOCK) + block] = outer[row] * s[row];
        }
    }
    let mask = u32::MAX >> (32 - bits);
    for (at, levels) in (0..inputs).step_by(each).zip(panel.chunks_exact(each)) {
        let mut words = [0; STRIP];
        for (i, levels) in levels.iter().enumerate() {
            for l in 0..STRIP {
                let code = levels[l].to_bits().wrapping_add(1 << (bits - 1)) & mask;
                words[l] |= code << (bits * i);
            }
        }
        for (row, word) in words[..rows].iter().enumerate() {
            let at = ((index * STRIP + row) * k + g * size + at) * bits / 8;
            codes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}
