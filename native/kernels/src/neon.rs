//! NEON, with `sdot` where the processor has it: four products of signed bytes are added to each of four 32-bit sums. And
//! with `smmla`, which multiplies two rows of eight bytes with two columns: four sums, eight products added to each.
//!
//! Codes become levels by a table look-up. A block's sums are multiplied with its scales in 32 bits. One row reads codes
//! where they lie. Several rows share a panel: a superblock of one strip as levels, in the order in which 8-bit codes lie
//! anyway. Two of the panel's rows, each four inputs of four outputs, are zipped to eight inputs of two outputs for `smmla`.

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;

use crate::activations::{Row, RowMut};
use crate::elementwise;
use crate::format::{BLOCK, LARGEST_SUPERBLOCK, LEVELS_2, LEVELS_3, Layout, STRIP, Strip, TILE};
use crate::round::{self, Rounded, Weights};
use crate::tiling::{PANEL_TILE, in_quartets, values};

pub(crate) fn available() -> bool {
    is_aarch64_feature_detected!("neon")
}

pub(crate) fn dotprod_available() -> bool {
    available() && is_aarch64_feature_detected!("dotprod")
}

pub(crate) fn i8mm_available() -> bool {
    dotprod_available() && is_aarch64_feature_detected!("i8mm")
}

/// By what bytes are multiplied: NEON's own products, `sdot`, or `smmla` for four rows and `sdot` for fewer.
const PLAIN: u8 = 0;
const DOT: u8 = 1;
const MATRIX: u8 = 2;

/// The products of a strip with rows: out [rows][16].
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(crate) fn products_i8mm(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    any_bits::<MATRIX>(strip, rows, out);
}

/// As `products_i8mm`.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn products_dotprod(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    any_bits::<DOT>(strip, rows, out);
}

/// As `products_i8mm`.
#[target_feature(enable = "neon")]
pub(crate) fn products(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    any_bits::<PLAIN>(strip, rows, out);
}

#[target_feature(enable = "neon")]
pub(crate) fn quantize(x: &[f32], row: RowMut<'_>) {
    elementwise::quantize(x, row);
}

#[target_feature(enable = "neon")]
pub(crate) fn swiglu(gate: &mut [[f32; STRIP]], up: &[[f32; STRIP]]) {
    elementwise::swiglu(gate, up);
}

#[target_feature(enable = "neon")]
pub(crate) fn router_scores(x: &[f32], weights: &[f32], scores: &mut [f32]) {
    elementwise::router_scores(x, weights, scores);
}

#[target_feature(enable = "neon")]
pub(crate) fn weighted_sum(first: &[f32], p1: f32, second: &[f32], p2: f32, y: &mut [f32]) {
    elementwise::weighted_sum(first, p1, second, p2, y);
}

#[target_feature(enable = "neon")]
pub(crate) fn round(weights: &Weights, layout: Layout, strip: usize, out: &mut Rounded) -> bool {
    round::strip(weights, layout, strip, out)
}

/// Sixteen outputs, four each.
type Bytes = [int8x16_t; 4];
type Sums = [int32x4_t; 4];

#[inline]
#[target_feature(enable = "neon")]
fn any_bits<const KIND: u8>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    out.fill([0.0; STRIP]);
    match strip.layout().bits() {
        2 => codes::<KIND, 256>(strip, rows, out),
        3 => codes::<KIND, 384>(strip, rows, out),
        4 => codes::<KIND, 512>(strip, rows, out),
        _ => bytes::<KIND>(strip, rows, out),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8], at: usize) -> uint8x16_t {
    let bytes = &bytes[at..at + 16];
    // SAFETY: 16 bytes, at any address.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_row(tile: &[u8], r: usize) -> [uint8x16_t; 4] {
    [load(tile, 64 * r), load(tile, 64 * r + 16), load(tile, 64 * r + 32), load(tile, 64 * r + 48)]
}

/// Four activations, for each output.
#[inline]
#[target_feature(enable = "neon")]
fn broadcast(q: &[i8; TILE], at: usize) -> int8x16_t {
    let four = i32::from_ne_bytes([q[at] as u8, q[at + 1] as u8, q[at + 2] as u8, q[at + 3] as u8]);
    vreinterpretq_s8_s32(vdupq_n_s32(four))
}

/// sums + the products of levels and activations, four for each output.
#[inline]
#[target_feature(enable = "neon")]
fn dot<const KIND: u8>(sums: int32x4_t, levels: int8x16_t, a: int8x16_t) -> int32x4_t {
    if KIND != PLAIN {
        let mut sums = sums;
        // SAFETY: registers alone; the others are taken where the processor has `sdot`.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {levels:v}.16b, {a:v}.16b",
                sums = inout(vreg) sums,
                levels = in(vreg) levels,
                a = in(vreg) a,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        return sums;
    }
    let low = vpaddlq_s16(vmull_s8(vget_low_s8(levels), vget_low_s8(a)));
    let high = vpaddlq_s16(vmull_high_s8(levels, a));
    vaddq_s32(sums, vpaddq_s32(low, high))
}

/// sums [row][column] + the products of two rows' activations and two columns' levels, eight for each.
#[inline]
#[target_feature(enable = "neon")]
fn dots(mut sums: int32x4_t, a: int8x16_t, levels: int8x16_t) -> int32x4_t {
    // SAFETY: registers alone; `MATRIX` is taken where the processor has `smmla`.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {a:v}.16b, {levels:v}.16b",
            sums = inout(vreg) sums,
            a = in(vreg) a,
            levels = in(vreg) levels,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

#[inline]
#[target_feature(enable = "neon")]
fn table(level: impl Fn(usize) -> i8) -> int8x16_t {
    let mut bytes = [0; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = level(i);
    }
    // SAFETY: 16 bytes, at any address.
    unsafe { vld1q_s8(bytes.as_ptr()) }
}

/// Calls `each(block, r, levels)` for a tile, with the levels of the inputs 32 block + 4 r + j of each output.
#[inline]
#[target_feature(enable = "neon")]
fn groups<const SIZE: usize>(tile: &[u8; SIZE], mut each: impl FnMut(usize, usize, Bytes)) {
    let three = vdupq_n_u8(3);
    match SIZE {
        256 => {
            let table = table(|i| LEVELS_2[i & 3]);
            for r in 0..4 {
                let codes = load_row(tile, r);
                for i in 0..4 {
                    let mut levels = [table; 4];
                    for quad in 0..4 {
                        levels[quad] = vqtbl1q_s8(table, vandq_u8(shifted_right(codes[quad], 2 * i as i8), three));
                    }
                    each(i / 2, 4 * (i % 2) + r, levels);
                }
            }
        }
        384 => {
            let table = table(|i| LEVELS_3[i & 7]);
            for r in 0..4 {
                let codes = load_row(tile, r);
                let highest = load_row(tile, 4 + r % 2);
                for i in 0..4 {
                    let mut levels = [table; 4];
                    for quad in 0..4 {
                        let lows = vandq_u8(shifted_right(codes[quad], 2 * i as i8), three);
                        let highs = shifted_right(highest[quad], (2 * i + r / 2) as i8 - 2);
                        levels[quad] = vqtbl1q_s8(table, vorrq_u8(lows, vandq_u8(highs, vdupq_n_u8(4))));
                    }
                    each(i / 2, 4 * (i % 2) + r, levels);
                }
            }
        }
        _ => {
            let table = table(|i| i as i8 - 8);
            for r in 0..8 {
                let codes = load_row(tile, r);
                let (mut low, mut high) = ([table; 4], [table; 4]);
                for quad in 0..4 {
                    low[quad] = vqtbl1q_s8(table, vandq_u8(codes[quad], vdupq_n_u8(15)));
                    high[quad] = vqtbl1q_s8(table, vshrq_n_u8::<4>(codes[quad]));
                }
                each(0, r, low);
                each(1, r, high);
            }
        }
    }
}

/// Bits moved to the right, or to the left where `by` is negative.
#[inline]
#[target_feature(enable = "neon")]
fn shifted_right(bytes: uint8x16_t, by: i8) -> uint8x16_t {
    vshlq_u8(bytes, vdupq_n_s8(-by))
}

/// A tile's scales of blocks, [block].
#[inline]
#[target_feature(enable = "neon")]
fn block_scales(scales: &[u8; STRIP]) -> [Sums; 2] {
    let both = load(scales, 0);
    let mut wide = [[vdupq_n_s32(0); 4]; 2];
    for (block, s) in [vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8::<4>(both)].into_iter().enumerate() {
        let (low, high) = (vmovl_u8(vget_low_u8(s)), vmovl_high_u8(s));
        wide[block] = [
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
            vreinterpretq_s32_u32(vmovl_high_u16(low)),
            vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
            vreinterpretq_s32_u32(vmovl_high_u16(high)),
        ];
    }
    wide
}

/// y = fma(sum, S * a, y)
#[inline]
#[target_feature(enable = "neon")]
fn add_superblock(y: &mut [f32; STRIP], sums: Sums, scales: &[u8; 2 * STRIP], a: f32) {
    for quad in 0..4 {
        let bits = &scales[8 * quad..][..8];
        // SAFETY: 8 bytes, at any address.
        let bits = vreinterpret_u16_u8(unsafe { vld1_u8(bits.as_ptr()) });
        let scales = vreinterpretq_f32_u32(vshll_n_u16::<16>(bits));
        let y = &mut y[4 * quad..][..4];
        // SAFETY: 4 floats.
        let old = unsafe { vld1q_f32(y.as_ptr()) };
        let new = vfmaq_f32(old, vcvtq_f32_s32(sums[quad]), vmulq_n_f32(scales, a));
        // SAFETY: 4 floats.
        unsafe { vst1q_f32(y.as_mut_ptr(), new) };
    }
}

/// 2, 3 and 4 bits: SIZE bytes a tile.
#[inline]
#[target_feature(enable = "neon")]
fn codes<const KIND: u8, const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<SIZE>().0.chunks_exact(tiles);
    let superblocks = codes.zip(strip.block_scales().chunks_exact(tiles)).zip(strip.superblock_scales());
    let mut panel = [[0; PANEL_TILE]; LARGEST_SUPERBLOCK / TILE];
    for (g, ((codes, s), scales)) in superblocks.enumerate() {
        if let [row] = rows {
            let sums = in_place::<KIND, SIZE>(codes, s, values(row, g, tiles));
            add_superblock(&mut out[0], sums, scales, row.scales[g]);
            continue;
        }
        for (tile, bytes) in codes.iter().zip(&mut panel) {
            groups(tile, |block, r, levels| {
                for quad in 0..4 {
                    let bytes = &mut bytes[64 * (8 * block + r) + 16 * quad..][..16];
                    // SAFETY: 16 bytes, at any address.
                    unsafe { vst1q_u8(bytes.as_mut_ptr(), vreinterpretq_u8_s8(levels[quad])) };
                }
            });
        }
        Superblock { g, panel: &panel[..tiles], s, scales }.add_all::<KIND>(rows, out);
    }
}

/// A superblock's sums with one row, whose codes are unpacked in registers.
#[inline]
#[target_feature(enable = "neon")]
fn in_place<const KIND: u8, const SIZE: usize>(codes: &[[u8; SIZE]], s: &[[u8; STRIP]], q: &[[i8; TILE]]) -> Sums {
    let mut sums = [vdupq_n_s32(0); 4];
    for ((tile, s), q) in codes.iter().zip(s).zip(q) {
        let mut block_sums = [[vdupq_n_s32(0); 4]; 2];
        groups(tile, |block, r, levels| {
            let a = broadcast(q, BLOCK * block + 4 * r);
            for quad in 0..4 {
                block_sums[block][quad] = dot::<KIND>(block_sums[block][quad], levels[quad], a);
            }
        });
        let s = block_scales(s);
        for block in 0..2 {
            for quad in 0..4 {
                sums[quad] = vmlaq_s32(sums[quad], block_sums[block][quad], s[block][quad]);
            }
        }
    }
    sums
}

/// A superblock of a strip, its levels a byte each; `s` is empty with 8 bits.
struct Superblock<'a> {
    g: usize,
    panel: &'a [[u8; PANEL_TILE]],
    s: &'a [[u8; STRIP]],
    scales: &'a [u8; 2 * STRIP],
}

impl Superblock<'_> {
    #[inline]
    #[target_feature(enable = "neon")]
    fn add_all<const KIND: u8>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        in_quartets(
            rows,
            out,
            |rows, out| if KIND == MATRIX { self.add_pairs(rows, out) } else { self.add::<KIND, 4>(rows, out) },
            |rows, out| match rows.len() {
                3 => self.add::<KIND, 3>(rows, out),
                2 => self.add::<KIND, 2>(rows, out),
                _ => self.add::<KIND, 1>(rows, out),
            },
        );
    }

    /// Adds the superblock's products with N rows.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add<const KIND: u8, const N: usize>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        let mut q: [&[_]; N] = [&[]; N];
        for n in 0..N {
            q[n] = values(&rows[n], self.g, self.panel.len());
        }
        let mut sums = [[vdupq_n_s32(0); 4]; N];
        for (t, tile) in self.panel.iter().enumerate() {
            let s = self.s.get(t).map_or([[vdupq_n_s32(1); 4]; 2], |s| block_scales(s));
            for block in 0..2 {
                let mut block_sums = [[vdupq_n_s32(0); 4]; N];
                for r in 0..8 {
                    let levels = load_row(tile, 8 * block + r);
                    for n in 0..N {
                        let a = broadcast(&q[n][t], BLOCK * block + 4 * r);
                        for quad in 0..4 {
                            let levels = vreinterpretq_s8_u8(levels[quad]);
                            block_sums[n][quad] = dot::<KIND>(block_sums[n][quad], levels, a);
                        }
                    }
                }
                for n in 0..N {
                    for quad in 0..4 {
                        sums[n][quad] = vmlaq_s32(sums[n][quad], block_sums[n][quad], s[block][quad]);
                    }
                }
            }
        }
        for n in 0..N {
            add_superblock(&mut out[n], sums[n], self.scales, rows[n].scales[self.g]);
        }
    }

    /// Adds the superblock's products with four rows, by `smmla`.
    #[inline]
    #[target_feature(enable = "neon")]
    fn add_pairs(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        const PAIRS: usize = 2;
        let mut q: [&[_]; 2 * PAIRS] = [&[]; 2 * PAIRS];
        for n in 0..2 * PAIRS {
            q[n] = values(&rows[n], self.g, self.panel.len());
        }
        // [pair of rows][pair of columns]
        let mut sums = [[vdupq_n_s32(0); STRIP / 2]; PAIRS];
        for (t, tile) in self.panel.iter().enumerate() {
            let s = self.s.get(t).map_or([[vdupq_n_s32(1); 4]; 2], |s| block_scales(s));
            for block in 0..2 {
                let mut block_sums = [[vdupq_n_s32(0); STRIP / 2]; PAIRS];
                for r in (0..8).step_by(2) {
                    let mut a = [vdupq_n_s8(0); PAIRS];
                    for pair in 0..PAIRS {
                        a[pair] = vcombine_s8(
                            eight(&q[2 * pair][t], BLOCK * block + 4 * r),
                            eight(&q[2 * pair + 1][t], BLOCK * block + 4 * r),
                        );
                    }
                    let (first, second) = (load_row(tile, 8 * block + r), load_row(tile, 8 * block + r + 1));
                    for quad in 0..4 {
                        let (first, second) = (vreinterpretq_s32_u8(first[quad]), vreinterpretq_s32_u8(second[quad]));
                        let columns = [vzip1q_s32(first, second), vzip2q_s32(first, second)];
                        for (half, levels) in columns.into_iter().enumerate() {
                            for pair in 0..PAIRS {
                                let sums = &mut block_sums[pair][2 * quad + half];
                                *sums = dots(*sums, a[pair], vreinterpretq_s8_s32(levels));
                            }
                        }
                    }
                }
                for quad in 0..4 {
                    let (low, high) = (vget_low_s32(s[block][quad]), vget_high_s32(s[block][quad]));
                    for (half, s) in [vcombine_s32(low, low), vcombine_s32(high, high)].into_iter().enumerate() {
                        for pair in 0..PAIRS {
                            let at = 2 * quad + half;
                            sums[pair][at] = vmlaq_s32(sums[pair][at], block_sums[pair][at], s);
                        }
                    }
                }
            }
        }
        for pair in 0..PAIRS {
            let (mut first, mut second) = ([vdupq_n_s32(0); 4], [vdupq_n_s32(0); 4]);
            for quad in 0..4 {
                let [left, right] = [sums[pair][2 * quad], sums[pair][2 * quad + 1]];
                first[quad] = vcombine_s32(vget_low_s32(left), vget_low_s32(right));
                second[quad] = vcombine_s32(vget_high_s32(left), vget_high_s32(right));
            }
            for (row, sums) in [(2 * pair, first), (2 * pair + 1, second)] {
                add_superblock(&mut out[row], sums, self.scales, rows[row].scales[self.g]);
            }
        }
    }
}

/// Eight activations of a row.
#[inline]
#[target_feature(enable = "neon")]
fn eight(q: &[i8; TILE], at: usize) -> int8x8_t {
    let bytes = &q[at..at + 8];
    // SAFETY: 8 bytes, at any address.
    unsafe { vld1_s8(bytes.as_ptr()) }
}

/// 8 bits, whose codes are a panel as they lie.
#[inline]
#[target_feature(enable = "neon")]
fn bytes<const KIND: u8>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<PANEL_TILE>().0.chunks_exact(tiles);
    for (g, (panel, scales)) in codes.zip(strip.superblock_scales()).enumerate() {
        Superblock { g, panel, s: &[], scales }.add_all::<KIND>(rows, out);
    }
}
