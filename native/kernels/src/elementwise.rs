//! What is written once, in lanes of sixteen floats, and compiled for each instruction set by being inlined there.

use crate::activations::RowMut;
use crate::exp;
use crate::format::{BLOCK, STRIP};
use crate::memory::ask;

/// Below this largest magnitude 127 / m would be infinite; such a superblock counts as zeros.
const SMALLEST: f32 = f32::from_bits((127 - 120) << 23); // 2 ** -120
const INFINITE: u32 = 0x7f80_0000;
/// Bytes by which a router's weights are asked for ahead of what is read.
const AHEAD: usize = 2048;
// Adding 1.5 * 2 ** 23 rounds to an integer, to even, which then is in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// x [K] -> signed bytes, scales, corrections and starts. Bytes beyond K are zero already.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], row: RowMut<'_>) {
    let size = row.superblock_size;
    let blocks = row.corrections.chunks_mut(size / BLOCK);
    let superblocks = x.chunks(size).zip(row.values.chunks_mut(size)).zip(row.scales).zip(blocks).zip(row.starts);
    for ((((x, q), scale), corrections), start) in superblocks {
        let largest = largest_magnitude(x);
        let m = f32::from_bits(largest);
        if largest >= INFINITE || m < SMALLEST {
            *scale = if largest >= INFINITE { f32::NAN } else { 0.0 };
            q.fill(0);
            corrections.fill([0; 2]);
            *start = 0;
            continue;
        }
        *scale = m / 127.0;
        let factor = 127.0 / m;
        for (q, x) in q.iter_mut().zip(x) {
            *q = ((x * factor + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) as i8;
        }
        *start = 0;
        for (q, correction) in q.as_chunks::<BLOCK>().0.iter().zip(corrections) {
            let mut sums = [0; 4];
            for q in q.as_chunks::<4>().0 {
                for j in 0..4 {
                    sums[j] += i16::from(q[j]);
                }
            }
            *correction = [-8 * (sums[0] + sums[1]), -8 * (sums[2] + sums[3])];
            *start += 16 * (i32::from(correction[0]) + i32::from(correction[1]));
        }
    }
}

/// The bits of the largest |x|. Magnitudes are in the order of their bits, with infinity and NaN at the end.
#[inline(always)]
fn largest_magnitude(x: &[f32]) -> u32 {
    let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
    let mut lanes = [0; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = magnitude(x).max(*lane);
        }
    }
    rest.iter().map(magnitude).chain(lanes).max().unwrap_or(0)
}

/// gate = silu(gate) * up.
#[inline(always)]
pub(crate) fn swiglu(gate: &mut [[f32; STRIP]], up: &[[f32; STRIP]]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let mut negative = *gate;
        for g in &mut negative {
            *g = -*g;
        }
        let e = exp(negative);
        for i in 0..STRIP {
            gate[i] = gate[i] / (1.0 + e[i]) * up[i];
        }
    }
}

/// The scores of one token x [K] against router weights [E][K].
#[inline(always)]
pub(crate) fn router_scores(x: &[f32], weights: &[f32], scores: &mut [f32]) {
    let mut experts = weights.chunks_exact(x.len());
    let mut quartets = scores.chunks_exact_mut(4);
    for scores in &mut quartets {
        // Four experts at once: one alone waits for its additions.
        scores.copy_from_slice(&dot(x, [(); 4].map(|()| experts.next().unwrap_or(&[]))));
    }
    for (score, expert) in quartets.into_remainder().iter_mut().zip(experts) {
        *score = dot(x, [expert])[0];
    }
}

/// x with each row: sixteen lanes, then a tree.
#[inline(always)]
fn dot<const N: usize>(x: &[f32], rows: [&[f32]; N]) -> [f32; N] {
    let mut lanes = [[0.0; 16]; N];
    let (chunks, rest) = x.as_chunks::<16>();
    let tiled = rows.map(|row| row[..x.len()].as_chunks::<16>());
    for (c, chunk) in chunks.iter().enumerate() {
        for n in 0..N {
            let row = &tiled[n].0[c];
            ask(row.as_ptr().cast::<u8>().wrapping_add(AHEAD));
            for l in 0..16 {
                lanes[n][l] = chunk[l].mul_add(row[l], lanes[n][l]);
            }
        }
    }
    for n in 0..N {
        for (l, (x, weight)) in rest.iter().zip(tiled[n].1).enumerate() {
            lanes[n][l] = x.mul_add(*weight, lanes[n][l]);
        }
    }
    lanes.map(|mut lanes| {
        for width in [8, 4, 2, 1] {
            for l in 0..width {
                lanes[l] += lanes[l + width];
            }
        }
        lanes[0]
    })
}

/// y = fma(p2, second, p1 * first).
#[inline(always)]
pub(crate) fn weighted_sum(first: &[f32], p1: f32, second: &[f32], p2: f32, y: &mut [f32]) {
    for ((y, first), second) in y.iter_mut().zip(first).zip(second) {
        *y = p2.mul_add(*second, p1 * first);
    }
}
