//! AVX2. `maddubs` multiplies unsigned with signed bytes and adds pairs, in 16 bits.
//!
//! With 2, 3 and 4 bits the unsigned ones are level + 8, at most 16. Eight results, a block of 32 inputs, are added up in
//! 16 bits, from -8 times the sum of the activations on (`Row::corrections`). On the way that sum may wrap around; its
//! end is at most 8 * 127 * 16 and fits. `madd` with the block's scale then gives 32 bits. With 8 bits the unsigned ones
//! are |level|, the activation takes the level's sign, and every result is widened at once.
//!
//! Few rows read codes where they lie. More rows share a panel: a superblock of one strip as unsigned bytes, in the
//! order in which 8-bit codes lie anyway.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::activations::{Row, RowMut};
use crate::elementwise;
use crate::format::{BLOCK, LARGEST_SUPERBLOCK, LEVELS_2, LEVELS_3, Layout, STRIP, Strip, TILE};
use crate::memory::ask;
use crate::round::{self, Rounded, Weights};
use crate::tiling::{PANEL_TILE, corrections, in_quartets, values};

/// From so many rows on a panel is made.
const PANEL_ROWS: usize = 9;
/// So many bytes before they are read, codes are asked for. The processor's own look-ahead lets a core wait: with this
/// the products of a step read 1.3 times as fast on the first Zen, from 1.5 to 4 KB alike.
const AHEAD: usize = 2048;

pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The products of a strip with rows: out [rows][16].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn products(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    out.fill([0.0; STRIP]);
    match strip.layout().bits() {
        2 => codes::<256>(strip, rows, out),
        3 => codes::<384>(strip, rows, out),
        4 => codes::<512>(strip, rows, out),
        _ => bytes(strip, rows, out),
    }
}

/// 2, 3 and 4 bits: SIZE bytes a tile.
#[target_feature(enable = "avx2,fma")]
fn codes<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    if rows.len() >= PANEL_ROWS {
        return panel::<SIZE>(strip, rows, out);
    }
    let mut pairs = rows.chunks_exact(2);
    let mut outs = out.chunks_exact_mut(2);
    for (rows, out) in (&mut pairs).zip(&mut outs) {
        in_place::<SIZE, 2>(strip, rows, out);
    }
    if !pairs.remainder().is_empty() {
        in_place::<SIZE, 1>(strip, pairs.remainder(), outs.into_remainder());
    }
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn quantize(x: &[f32], row: RowMut<'_>) {
    elementwise::quantize(x, row);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn swiglu(gate: &mut [[f32; STRIP]], up: &[[f32; STRIP]]) {
    elementwise::swiglu(gate, up);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn router_scores(x: &[f32], weights: &[f32], scores: &mut [f32]) {
    elementwise::router_scores(x, weights, scores);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn weighted_sum(first: &[f32], p1: f32, second: &[f32], p2: f32, y: &mut [f32]) {
    elementwise::weighted_sum(first, p1, second, p2, y);
}

#[target_feature(enable = "avx2,fma")]
pub(crate) fn round(weights: &Weights, layout: Layout, strip: usize, out: &mut Rounded) -> bool {
    round::strip(weights, layout, strip, out)
}

/// Sixteen outputs: 0 to 7 and 8 to 15.
pub(crate) type Halves = [__m256i; 2];

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load<const N: usize>(bytes: &[u8; N], at: usize) -> __m256i {
    let bytes = &bytes[at..at + 32];
    // SAFETY: 32 bytes, at any address.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn load_halves<const N: usize>(bytes: &[u8; N], r: usize) -> Halves {
    [load(bytes, 64 * r), load(bytes, 64 * r + 32)]
}

/// Row r of a tile in memory. What lies `AHEAD` of it is asked for, be it there or not.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn load_ahead<const N: usize>(bytes: &[u8; N], r: usize) -> Halves {
    ask(bytes.as_ptr().wrapping_add(64 * r + AHEAD));
    load_halves(bytes, r)
}

/// sum + codes * activations, of pairs of bytes in 16 bits. LLVM would add up products in another order, first among each
/// other, and then has not enough registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_products(mut sum: __m256i, codes: __m256i, activations: __m256i) -> __m256i {
    // SAFETY: both instructions are AVX2's, and use registers alone.
    unsafe {
        asm!(
            "vpmaddubsw {products}, {codes}, {activations}",
            "vpaddw {sum}, {sum}, {products}",
            sum = inout(ymm_reg) sum,
            codes = in(ymm_reg) codes,
            activations = in(ymm_reg) activations,
            products = out(ymm_reg) _,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Four activations, for each output.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn broadcast(q: &[i8; TILE], at: usize) -> __m256i {
    let four = &q[at..at + 4];
    // SAFETY: 4 bytes, at any address.
    _mm256_set1_epi32(unsafe { four.as_ptr().cast::<i32>().read_unaligned() })
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn low_nibbles(bytes: __m256i) -> __m256i {
    _mm256_and_si256(bytes, _mm256_set1_epi8(15))
}

/// A table for `shuffle_epi8`, of level + 8 by the low four bits of a byte.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn table(level: impl Fn(usize) -> i8) -> __m256i {
    let mut bytes = [0; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = level(i) + 8;
    }
    // SAFETY: 16 bytes, at any address.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// Calls `each(block, r, codes)` for a tile, with level + 8 of the inputs 32 block + 4 r + j of each output.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn groups<const SIZE: usize>(tile: &[u8; SIZE], each: impl FnMut(usize, usize, Halves)) {
    match SIZE {
        256 => groups_2(tile, each),
        384 => groups_3(tile, each),
        _ => groups_4(tile, each),
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn groups_4<const SIZE: usize>(tile: &[u8; SIZE], mut each: impl FnMut(usize, usize, Halves)) {
    for r in 0..8 {
        for (block, codes) in nibbles(tile, r).into_iter().enumerate() {
            each(block, r, codes);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn groups_2<const SIZE: usize>(tile: &[u8; SIZE], mut each: impl FnMut(usize, usize, Halves)) {
    // A nibble holds the codes of two inputs.
    let tables = [table(|i| LEVELS_2[i & 3]), table(|i| LEVELS_2[i >> 2])];
    for r in 0..4 {
        for (block, [first, second]) in nibbles(tile, r).into_iter().enumerate() {
            for pair in 0..2 {
                let table = tables[pair];
                each(block, 4 * pair + r, [_mm256_shuffle_epi8(table, first), _mm256_shuffle_epi8(table, second)]);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn groups_3<const SIZE: usize>(tile: &[u8; SIZE], mut each: impl FnMut(usize, usize, Halves)) {
    // A nibble holds a code's low two bits, and beside them the high bits of two codes, one of which the table ignores:
    // those of row r and of row r + 2 lie side by side.
    let tables = [
        [table(|i| LEVELS_3[(i & 3) | (i & 4)]), table(|i| LEVELS_3[(i >> 2) | (i & 1) << 2])],
        [table(|i| LEVELS_3[(i & 3) | (i & 8) >> 1]), table(|i| LEVELS_3[(i >> 2) | (i & 2) << 1])],
    ];
    let (outer, inner) = (_mm256_set1_epi8(0x33), _mm256_set1_epi8(0xcc_u8 as i8));
    for odd in 0..2 {
        let highest = load_halves(tile, 4 + odd);
        let (mut to_outer, mut to_inner) = (highest, highest);
        for h in 0..2 {
            to_outer[h] = _mm256_and_si256(_mm256_slli_epi16::<2>(highest[h]), inner);
            to_inner[h] = _mm256_and_si256(_mm256_srli_epi16::<2>(highest[h]), outer);
        }
        for k in 0..2 {
            let r = odd + 2 * k;
            let codes = load_ahead(tile, r);
            let (mut first, mut second) = (codes, codes);
            for h in 0..2 {
                first[h] = _mm256_or_si256(_mm256_and_si256(codes[h], outer), to_outer[h]);
                second[h] = _mm256_or_si256(_mm256_and_si256(codes[h], inner), to_inner[h]);
            }
            let levels = |table, nibbles: Halves| {
                [_mm256_shuffle_epi8(table, nibbles[0]), _mm256_shuffle_epi8(table, nibbles[1])]
            };
            let [low, high] = split(first);
            each(0, r, levels(tables[k][0], low));
            each(1, r, levels(tables[k][0], high));
            let [low, high] = split(second);
            each(0, 4 + r, levels(tables[k][1], low));
            each(1, 4 + r, levels(tables[k][1], high));
        }
    }
}

/// Row r of a tile as [low nibbles, high nibbles].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn nibbles<const SIZE: usize>(tile: &[u8; SIZE], r: usize) -> [Halves; 2] {
    split(load_ahead(tile, r))
}

/// Bytes as [low nibbles, high nibbles].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn split([first, second]: Halves) -> [Halves; 2] {
    [
        [low_nibbles(first), low_nibbles(second)],
        [low_nibbles(_mm256_srli_epi16::<4>(first)), low_nibbles(_mm256_srli_epi16::<4>(second))],
    ]
}

/// A tile's scales of blocks, [block], twice in 16 bits for each output.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn block_scales(scales: &[u8; STRIP]) -> [Halves; 2] {
    // SAFETY: 16 bytes, at any address.
    let both = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(scales.as_ptr().cast()) });
    let spread = |first: i8| {
        let mut bytes = [-128; 32]; // which gives 0
        for output in 0..8 {
            bytes[4 * output] = first + output as i8;
            bytes[4 * output + 2] = first + output as i8;
        }
        // SAFETY: 32 bytes, at any address.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    };
    [low_nibbles(both), low_nibbles(_mm256_srli_epi16::<4>(both))]
        .map(|s| [_mm256_shuffle_epi8(s, spread(0)), _mm256_shuffle_epi8(s, spread(8))])
}

/// The activations' sums from which a block's sum of products starts.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn correction(correction: [i16; 2]) -> __m256i {
    let [first, second] = correction.map(|sum| u32::from(sum as u16));
    _mm256_set1_epi32((first | second << 16) as i32)
}

/// y = fma(sum, S * a, y)
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(crate) fn add_superblock(y: &mut [f32; STRIP], sums: Halves, scales: &[u8; 2 * STRIP], a: f32) {
    for h in 0..2 {
        // SAFETY: each half of the 32 bytes of scales is 16 bytes, at any address.
        let scales = unsafe { _mm_loadu_si128(scales[16 * h..][..16].as_ptr().cast()) };
        let scales = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(scales)));
        let y = &mut y[8 * h..][..8];
        // SAFETY: 8 floats.
        let old = unsafe { _mm256_loadu_ps(y.as_ptr()) };
        let new = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[h]), _mm256_mul_ps(scales, _mm256_set1_ps(a)), old);
        // SAFETY: 8 floats.
        unsafe { _mm256_storeu_ps(y.as_mut_ptr(), new) };
    }
}

/// Adds the products with N rows, whose codes are unpacked in registers.
#[target_feature(enable = "avx2,fma")]
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
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for (t, (tile, s)) in codes.iter().zip(s).enumerate() {
            let mut block_sums = [[[_mm256_setzero_si256(); 2]; 2]; N];
            for n in 0..N {
                for block in 0..2 {
                    block_sums[n][block] = [correction(starts[n][t][block]); 2];
                }
            }
            groups(tile, |block, r, codes| {
                for n in 0..N {
                    let a = broadcast(&q[n][t], BLOCK * block + 4 * r);
                    for h in 0..2 {
                        block_sums[n][block][h] = add_products(block_sums[n][block][h], codes[h], a);
                    }
                }
            });
            let s = block_scales(s);
            for n in 0..N {
                for block in 0..2 {
                    for h in 0..2 {
                        let products = _mm256_madd_epi16(block_sums[n][block][h], s[block][h]);
                        sums[n][h] = _mm256_add_epi32(sums[n][h], products);
                    }
                }
            }
        }
        for n in 0..N {
            add_superblock(&mut out[n], sums[n], scales, rows[n].scales[g]);
        }
    }
}

/// Adds the products with rows that share panels.
#[target_feature(enable = "avx2,fma")]
fn panel<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<SIZE>().0.chunks_exact(tiles);
    let superblocks = codes.zip(strip.block_scales().chunks_exact(tiles)).zip(strip.superblock_scales());
    let mut panel = [[0; PANEL_TILE]; LARGEST_SUPERBLOCK / TILE];
    for (g, ((codes, s), scales)) in superblocks.enumerate() {
        for (tile, bytes) in codes.iter().zip(&mut panel) {
            groups(tile, |block, r, codes| {
                for h in 0..2 {
                    let bytes = &mut bytes[64 * (8 * block + r) + 32 * h..][..32];
                    // SAFETY: 32 bytes, at any address.
                    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), codes[h]) };
                }
            });
        }
        let superblock = Superblock { g, panel: &panel[..tiles], s, scales };
        in_quartets(
            rows,
            out,
            |rows, out| superblock.add::<4>(rows, out),
            |rows, out| match rows.len() {
                3 => superblock.add::<3>(rows, out),
                2 => superblock.add::<2>(rows, out),
                _ => superblock.add::<1>(rows, out),
            },
        );
    }
}

/// A superblock of a strip, its codes a byte each.
struct Superblock<'a> {
    g: usize,
    panel: &'a [[u8; PANEL_TILE]],
    s: &'a [[u8; STRIP]],
    scales: &'a [u8; 2 * STRIP],
}

impl Superblock<'_> {
    /// Adds the superblock's products with N rows, its panel being level + 8.
    #[target_feature(enable = "avx2,fma")]
    fn add<const N: usize>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        let (mut q, mut starts): ([&[_]; N], [&[_]; N]) = ([&[]; N], [&[]; N]);
        for n in 0..N {
            q[n] = values(&rows[n], self.g, self.panel.len());
            starts[n] = corrections(&rows[n], self.g, self.panel.len());
        }
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        for (t, (tile, s)) in self.panel.iter().zip(self.s).enumerate() {
            let s = block_scales(s);
            for block in 0..2 {
                let mut block_sums = [[_mm256_setzero_si256(); 2]; N];
                for n in 0..N {
                    block_sums[n] = [correction(starts[n][t][block]); 2];
                }
                for r in 0..8 {
                    let codes = load_halves(tile, 8 * block + r);
                    for n in 0..N {
                        let a = broadcast(&q[n][t], BLOCK * block + 4 * r);
                        for h in 0..2 {
                            block_sums[n][h] = add_products(block_sums[n][h], codes[h], a);
                        }
                    }
                }
                for n in 0..N {
                    for h in 0..2 {
                        let products = _mm256_madd_epi16(block_sums[n][h], s[block][h]);
                        sums[n][h] = _mm256_add_epi32(sums[n][h], products);
                    }
                }
            }
        }
        for n in 0..N {
            add_superblock(&mut out[n], sums[n], self.scales, rows[n].scales[self.g]);
        }
    }

    /// Adds the superblock's products with N rows, its panel being signed bytes.
    #[target_feature(enable = "avx2,fma")]
    fn add_bytes<const N: usize>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        let mut q: [&[_]; N] = [&[]; N];
        for n in 0..N {
            q[n] = values(&rows[n], self.g, self.panel.len());
        }
        let mut sums = [[_mm256_setzero_si256(); 2]; N];
        let ones = _mm256_set1_epi16(1);
        for (t, tile) in self.panel.iter().enumerate() {
            for r in 0..16 {
                let codes = load_ahead(tile, r);
                let magnitudes = codes.map(|codes| _mm256_abs_epi8(codes));
                for n in 0..N {
                    let a = broadcast(&q[n][t], 4 * r);
                    for h in 0..2 {
                        let products = _mm256_maddubs_epi16(magnitudes[h], _mm256_sign_epi8(a, codes[h]));
                        sums[n][h] = _mm256_add_epi32(sums[n][h], _mm256_madd_epi16(products, ones));
                    }
                }
            }
        }
        for n in 0..N {
            add_superblock(&mut out[n], sums[n], self.scales, rows[n].scales[self.g]);
        }
    }
}

/// 8 bits, whose codes are a panel as they lie.
#[target_feature(enable = "avx2,fma")]
fn bytes(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<PANEL_TILE>().0.chunks_exact(tiles);
    for (g, (panel, scales)) in codes.zip(strip.superblock_scales()).enumerate() {
        let superblock = Superblock { g, panel, s: &[], scales };
        in_quartets(
            rows,
            out,
            |rows, out| superblock.add_bytes::<4>(rows, out),
            |rows, out| match rows.len() {
                3 => superblock.add_bytes::<3>(rows, out),
                2 => superblock.add_bytes::<2>(rows, out),
                _ => superblock.add_bytes::<1>(rows, out),
            },
        );
    }
}
