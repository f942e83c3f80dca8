//! AVX-VNNI: the same instructions as in `avx512vnni.rs`, on eight outputs at a time, without AVX-512. Codes are unpacked
//! by `avx2.rs`.
//!
//! `vpdpbusd` multiplies unsigned with signed bytes and adds four products to each of eight sums of 32 bits. Which bytes
//! are unsigned, what a sum starts at and why nothing overflows: `avx512vnni.rs`.

use std::arch::x86_64::*;

use crate::activations::Row;
use crate::avx2::{Halves, add_superblock, block_scales, broadcast, groups, load_halves};
use crate::format::{BLOCK, LARGEST_SUPERBLOCK, STRIP, Strip, TILE};
use crate::tiling::{PANEL_TILE, corrections, in_even_parts, values};

/// From so many rows on a panel is made.
const PANEL_ROWS: usize = 9;

pub(crate) fn available() -> bool {
    crate::avx2::available() && is_x86_feature_detected!("avxvnni")
}

/// The products of a strip with rows: out [rows][16].
#[target_feature(enable = "avx2,fma,avxvnni")]
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
#[target_feature(enable = "avx2,fma,avxvnni")]
fn codes<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    if rows.len() >= PANEL_ROWS {
        return panel::<SIZE>(strip, rows, out);
    }
    in_even_parts::<2>(rows, out, |rows, out| match rows.len() {
        2 => in_place::<SIZE, 2>(strip, rows, out),
        _ => in_place::<SIZE, 1>(strip, rows, out),
    });
}

/// Adds the products with N rows, whose codes are unpacked in registers.
#[target_feature(enable = "avx2,fma,avxvnni")]
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
                    let [first, second] = starts[n][t][block];
                    block_sums[n][block] = [_mm256_set1_epi32(i32::from(first) + i32::from(second)); 2];
                }
            }
            groups(tile, |block, r, codes| {
                for n in 0..N {
                    let a = broadcast(&q[n][t], BLOCK * block + 4 * r);
                    for h in 0..2 {
                        block_sums[n][block][h] = _mm256_dpbusd_avx_epi32(block_sums[n][block][h], codes[h], a);
                    }
                }
            });
            // a scale is there twice, and meets the low 16 bits of a sum alone
            let s = block_scales(s).map(|s| s.map(|s| _mm256_and_si256(s, _mm256_set1_epi32(0xffff))));
            for n in 0..N {
                for block in 0..2 {
                    for h in 0..2 {
                        sums[n][h] = _mm256_dpwssd_avx_epi32(sums[n][h], block_sums[n][block][h], s[block][h]);
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
#[target_feature(enable = "avx2,fma,avxvnni")]
fn panel<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<SIZE>().0.chunks_exact(tiles);
    let superblocks = codes.zip(strip.block_scales().chunks_exact(tiles)).zip(strip.superblock_scales());
    let mut panel = [[0; PANEL_TILE]; LARGEST_SUPERBLOCK / TILE];
    for (g, ((codes, s), scales)) in superblocks.enumerate() {
        for ((tile, s), bytes) in codes.iter().zip(s).zip(&mut panel) {
            // (level + 8) * s is at most 240, so that two bytes are multiplied as one number of 16 bits
            let s = block_scales(s);
            let mut offsets = s;
            for offset in offsets.as_flattened_mut() {
                let eight = _mm256_slli_epi16::<3>(*offset);
                let eight = _mm256_or_si256(eight, _mm256_slli_epi16::<8>(eight));
                *offset = _mm256_sub_epi8(_mm256_set1_epi8(-128), eight);
            }
            groups(tile, |block, r, codes| {
                for h in 0..2 {
                    let weights = _mm256_add_epi8(_mm256_mullo_epi16(codes[h], s[block][h]), offsets[block][h]);
                    let bytes = &mut bytes[64 * (8 * block + r) + 32 * h..][..32];
                    // SAFETY: 32 bytes, at any address.
                    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), weights) };
                }
            });
        }
        Superblock { g, panel: &panel[..tiles], scales }.add_all::<false>(rows, out);
    }
}

/// 8 bits, whose codes are a panel as they lie, but for their sign.
#[target_feature(enable = "avx2,fma,avxvnni")]
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
    #[target_feature(enable = "avx2,fma,avxvnni")]
    fn add_all<const SIGNED: bool>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        in_even_parts::<6>(rows, out, |rows, out| match rows.len() {
            6 => self.add::<SIGNED, 6>(rows, out),
            5 => self.add::<SIGNED, 5>(rows, out),
            4 => self.add::<SIGNED, 4>(rows, out),
            3 => self.add::<SIGNED, 3>(rows, out),
            2 => self.add::<SIGNED, 2>(rows, out),
            _ => self.add::<SIGNED, 1>(rows, out),
        });
    }

    #[target_feature(enable = "avx2,fma,avxvnni")]
    fn add<const SIGNED: bool, const N: usize>(&self, rows: &[Row], out: &mut [[f32; STRIP]]) {
        let mut q: [&[_]; N] = [&[]; N];
        let mut sums: [[Halves; 2]; N] = [[[_mm256_setzero_si256(); 2]; 2]; N];
        for n in 0..N {
            q[n] = values(&rows[n], self.g, self.panel.len());
            sums[n][0] = [_mm256_set1_epi32(rows[n].starts[self.g]); 2];
        }
        for (t, tile) in self.panel.iter().enumerate() {
            for pair in 0..8 {
                for turn in 0..2 {
                    let r = 2 * pair + turn;
                    let mut weights = load_halves(tile, r);
                    if SIGNED {
                        weights = weights.map(|codes| _mm256_xor_si256(codes, _mm256_set1_epi8(-128)));
                    }
                    // few rows take two sums each: one would wait for itself
                    let turn = if N < 3 { turn } else { 0 };
                    for n in 0..N {
                        let a = broadcast(&q[n][t], 4 * r);
                        for h in 0..2 {
                            sums[n][turn][h] = _mm256_dpbusd_avx_epi32(sums[n][turn][h], weights[h], a);
                        }
                    }
                }
            }
        }
        for n in 0..N {
            let mut total = sums[n][0];
            for h in 0..2 {
                total[h] = _mm256_add_epi32(total[h], sums[n][1][h]);
            }
            add_superblock(&mut out[n], total, self.scales, rows[n].scales[self.g]);
        }
    }
}
