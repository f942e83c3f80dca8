//! AVX-512 with VNNI. `vpdpbusd` multiplies unsigned with signed bytes and adds four products to each of sixteen sums of
//! 32 bits: a strip is one register. Nothing in it saturates.
//!
//! The weights are the unsigned bytes, the activations q the signed ones. What makes the weights unsigned is taken off
//! where a sum starts:
//!
//! - Few rows read codes where they lie, as level + 8, at most 16. A block of 32 inputs starts at -8 times the sum of its
//!   q (`Row::corrections`) and ends at most at 32 * 8 * 127, which fits 16 bits. So `vpdpwssd`, which multiplies 16 bits,
//!   takes it times the block's scale.
//! - More rows share a panel: a superblock of one strip as 128 + s * level, from 8 to 248. A superblock starts at -128
//!   times the sum of its q. With 8 bits that is the code with its highest bit turned, from 0 to 255, and needs no panel.
//!   On the way a sum is at most 1024 * 255 * 127 and fits 32 bits.

use std::arch::x86_64::*;

use crate::activations::{Row, RowMut};
use crate::elementwise;
use crate::format::{BLOCK, LARGEST_SUPERBLOCK, LEVELS_2, LEVELS_3, STRIP, Strip, TILE};
use crate::tiling::{PANEL_TILE, corrections, in_even_parts, in_quartets, values};

/// From so many rows on a panel is made.
const PANEL_ROWS: usize = 8;

pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vnni")
}

/// The products of a strip with rows: out [rows][16].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn products(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    out.fill([0.0; STRIP]);
    match strip.layout().bits() {
        2 => codes::<256>(strip, rows, out),
        3 => codes::<384>(strip, rows, out),
        4 => codes::<512>(strip, rows, out),
        _ => bytes(strip, rows, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn quantize(x: &[f32], row: RowMut<'_>) {
    elementwise::quantize(x, row);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn swiglu(gate: &mut [[f32; STRIP]], up: &[[f32; STRIP]]) {
    elementwise::swiglu(gate, up);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn router_scores(x: &[f32], weights: &[f32], scores: &mut [f32]) {
    elementwise::router_scores(x, weights, scores);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn weighted_sum(first: &[f32], p1: f32, second: &[f32], p2: f32, y: &mut [f32]) {
    elementwise::weighted_sum(first, p1, second, p2, y);
}

/// Row r of a tile: four bytes for each of sixteen outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn load<const N: usize>(tile: &[u8; N], r: usize) -> __m512i {
    let bytes = &tile[64 * r..64 * r + 64];
    // SAFETY: 64 bytes, at any address.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// Four activations, for each output.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn broadcast(q: &[i8; TILE], at: usize) -> __m512i {
    let four = &q[at..at + 4];
    // SAFETY: 4 bytes, at any address.
    _mm512_set1_epi32(unsafe { four.as_ptr().cast::<i32>().read_unaligned() })
}

/// A table for `shuffle_epi8`, of level + 8 by the low four bits of a byte.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn table(level: impl Fn(usize) -> i8) -> __m512i {
    let mut bytes = [0; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = level(i) + 8;
    }
    // SAFETY: 16 bytes, at any address.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// Calls `each(block, r, codes)` for a tile, with level + 8 of the inputs 32 block + 4 r + j of each output.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn groups<const SIZE: usize>(tile: &[u8; SIZE], mut each: impl FnMut(usize, usize, __m512i)) {
    match SIZE {
        256 => {
            // A nibble holds the codes of two inputs.
            let tables = [table(|i| LEVELS_2[i & 3]), table(|i| LEVELS_2[i >> 2])];
            for r in 0..4 {
                for (block, codes) in nibbles(tile, r).into_iter().enumerate() {
                    for pair in 0..2 {
                        each(block, 4 * pair + r, _mm512_shuffle_epi8(tables[pair], codes));
                    }
                }
            }
        }
        384 => {
            // A table's index is three bits; the fourth may be anything.
            let table = table(|i| LEVELS_3[i & 7]);
            let (low, high) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4));
            for r in 0..4 {
                let codes = load(tile, r);
                let highest = load(tile, 4 + r % 2);
                for i in 0..4 {
                    let lows = _mm512_and_si512(shifted_right(codes, 2 * i as i32), low);
                    let highs = _mm512_and_si512(shifted_right(highest, (2 * i + r / 2) as i32 - 2), high);
                    let levels = _mm512_shuffle_epi8(table, _mm512_or_si512(lows, highs));
                    each(i / 2, 4 * (i % 2) + r, levels);
                }
            }
        }
        _ => {
            for r in 0..8 {
                for (block, codes) in nibbles(tile, r).into_iter().enumerate() {
                    each(block, r, codes);
                }
            }
        }
    }
}

/// Row r of a tile as [low nibbles, high nibbles].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn nibbles<const SIZE: usize>(tile: &[u8; SIZE], r: usize) -> [__m512i; 2] {
    let (bytes, low) = (load(tile, r), _mm512_set1_epi8(15));
    [_mm512_and_si512(bytes, low), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low)]
}

/// Bits moved to the right, or to the left where `by` is negative.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn shifted_right(bytes: __m512i, by: i32) -> __m512i {
    if by < 0 {
        _mm512_sll_epi16(bytes, _mm_cvtsi32_si128(-by))
    } else {
        _mm512_srl_epi16(bytes, _mm_cvtsi32_si128(by))
    }
}

/// A tile's scales of blocks, [block], in 32 bits for each output.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn block_scales(scales: &[u8; STRIP]) -> [__m512i; 2] {
    // SAFETY: 16 bytes, at any address.
    let both = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(scales.as_ptr().cast()) });
    [_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(both)]
}

/// y = fma(sum, S * a, y)
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn add_superblock(y: &mut [f32; STRIP], sums: __m512i, scales: &[u8; 2 * STRIP], a: f32) {
    // SAFETY: 32 bytes, at any address.
    let scales = unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) };
    let scales = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(scales)));
    // SAFETY: 16 floats.
    let old = unsafe { _mm512_loadu_ps(y.as_ptr()) };
    let new = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(scales, _mm512_set1_ps(a)), old);
    // SAFETY: 16 floats.
    unsafe { _mm512_storeu_ps(y.as_mut_ptr(), new) };
}

/// 2, 3 and 4 bits: SIZE bytes a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn codes<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    if rows.len() >= PANEL_ROWS {
        return panel::<SIZE>(strip, rows, out);
    }
    in_quartets(
        rows,
        out,
        |rows, out| in_place::<SIZE, 4>(strip, rows, out),
        |rows, out| match rows.len() {
            3 => in_place::<SIZE, 3>(strip, rows, out),
            2 => in_place::<SIZE, 2>(strip, rows, out),
            _ => in_place::<SIZE, 1>(strip, rows, out),
        },
    );
}

/// Adds the products with N rows, whose codes are unpacked in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn in_place<const SIZE: usize, const N: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<SIZE>().0.chunks_exact(tiles);
    let superblocks = codes.zip(strip.block_scales().chunks_exact(tiles)).zip(strip.superblock_scales());
    for (g, ((codes, s), scales)) in superblocks.enumerate() {
        let (mut q, mut starts): ([&[_]; N], [&[_]; N]) = ([&[]; N], [&[]; N]);
        for n in 0..N {
            q[n] = values(&rows[n], g, tiles);
            starts[n] = corrections(&rows[n], g, tiles);
        }
        let mut sums = [_mm512_setzero_si512(); N];
        for (t, (tile, s)) in codes.iter().zip(s).enumerate() {
            let mut block_sums = [[_mm512_setzero_si512(); 2]; N];
            for n in 0..N {
                for block in 0..2 {
                    let [first, second] = starts[n][t][block];
                    block_sums[n][block] = _mm512_set1_epi32(i32::from(first) + i32::from(second));
                }
            }
            groups(tile, |block, r, codes| {
                for n in 0..N {
                    let a = broadcast(&q[n][t], BLOCK * block + 4 * r);
                    block_sums[n][block] = _mm512_dpbusd_epi32(block_sums[n][block], codes, a);
                }
            });
            let s = block_scales(s);
            for n in 0..N {
                for block in 0..2 {
                    // the low 16 bits are the whole sum, the high ones meet the scale's zeros
                    sums[n] = _mm512_dpwssd_epi32(sums[n], block_sums[n][block], s[block]);
                }
            }
        }
        for n in 0..N {
            add_superblock(&mut out[n], sums[n], scales, rows[n].scales[g]);
        }
    }
}

/// Adds the products with rows that share panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn panel<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<SIZE>().0.chunks_exact(tiles);
    let superblocks = codes.zip(strip.block_scales().chunks_exact(tiles)).zip(strip.superblock_scales());
    let mut panel = [[0; PANEL_TILE]; LARGEST_SUPERBLOCK / TILE];
    for (g, ((codes, s), scales)) in superblocks.enumerate() {
        unpack(codes, s, -128, &mut panel);
        Superblock { g, panel: &panel[..tiles], scales }.add_all::<false>(rows, out);
    }
}

/// A superblock's s * level + `plus`, one byte each, in the order in which 8-bit codes lie.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn unpack<const SIZE: usize>(
    codes: &[[u8; SIZE]],
    s: &[[u8; STRIP]],
    plus: i8,
    panel: &mut [[u8; PANEL_TILE]],
) {
    for ((tile, s), bytes) in codes.iter().zip(s).zip(panel) {
        // (level + 8) * s is at most 240, so that two bytes are multiplied as one number of 16 bits
        let s = block_scales(s).map(|s| _mm512_or_si512(s, _mm512_slli_epi32::<16>(s)));
        let offsets = s.map(|s| {
            let eight = _mm512_slli_epi16::<3>(s);
            _mm512_sub_epi8(_mm512_set1_epi8(plus), _mm512_or_si512(eight, _mm512_slli_epi16::<8>(eight)))
        });
        groups(tile, |block, r, codes| {
            let weights = _mm512_add_epi8(_mm512_mullo_epi16(codes, s[block]), offsets[block]);
            let bytes = &mut bytes[64 * (8 * block + r)..][..64];
            // SAFETY: 64 bytes, at any address.
            unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), weights) };
        });
    }
}

/// 8 bits, whose codes are a panel as they lie, but for their sign.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn bytes(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<PANEL_TILE>().0.chunks_exact(tiles);
    for (g, (panel, scales)) in codes.zip(strip.superblock_scales()).enumerate() {
        Superblock { g, panel, scales }.add_all::<true>(rows, out);
    }
}

/// A superblock of a strip, its weights a byte each.
struct Superblock<'a> {
    g: usize,
    panel: &'a [[u8; PANEL_TILE]],
    scales: &'a [u8; 2 * STRIP],
}

impl Superblock<'_> {
    /// Adds the superblock's products with rows. Its bytes are weights if SIGNED, otherwise weights + 128.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn add_all<const SIGNED: bool>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        in_even_parts::<8>(rows, out, |rows, out| match rows.len() {
            8 => self.add::<SIGNED, 8>(rows, out),
            7 => self.add::<SIGNED, 7>(rows, out),
            6 => self.add::<SIGNED, 6>(rows, out),
            5 => self.add::<SIGNED, 5>(rows, out),
            4 => self.add::<SIGNED, 4>(rows, out),
            3 => self.add::<SIGNED, 3>(rows, out),
            2 => self.add::<SIGNED, 2>(rows, out),
            _ => self.add::<SIGNED, 1>(rows, out),
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn add<const SIGNED: bool, const N: usize>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        let mut q: [&[_]; N] = [&[]; N];
        // two sums a row: one would wait for itself
        let mut sums = [[_mm512_setzero_si512(); 2]; N];
        for n in 0..N {
            q[n] = values(&rows[n], self.g, self.panel.len());
            sums[n][0] = _mm512_set1_epi32(rows[n].starts[self.g]);
        }
        for (t, tile) in self.panel.iter().enumerate() {
            for pair in 0..8 {
                for turn in 0..2 {
                    let r = 2 * pair + turn;
                    let mut weights = load(tile, r);
                    if SIGNED {
                        weights = _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
                    }
                    for n in 0..N {
                        let a = broadcast(&q[n][t], 4 * r);
                        sums[n][turn] = _mm512_dpbusd_epi32(sums[n][turn], weights, a);
                    }
                }
            }
        }
        for n in 0..N {
            let sums = _mm512_add_epi32(sums[n][0], sums[n][1]);
            add_superblock(&mut out[n], sums, self.scales, rows[n].scales[self.g]);
        }
    }
}
