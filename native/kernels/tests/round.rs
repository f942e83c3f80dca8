//! Rounding: every set of kernels against the plain one, both layouts against each other, and by hand.

mod common;

use common::Random;
use phimoe_kernels::{Kernels, Layout, Matrix, Rounded, Weights, default_superblock_size};

fn layout(bits: u32, n: usize, k: usize) -> Layout {
    Layout::new(bits, k, n, default_superblock_size(k)).unwrap()
}

fn strips(kernels: &Kernels, weights: Weights, layout: Layout) -> Vec<u8> {
    let mut bytes = vec![0xa5; layout.bytes()];
    assert!(kernels.round(weights, layout, Rounded::Strips(&mut bytes)).unwrap());
    bytes
}

fn rows(kernels: &Kernels, weights: Weights, layout: Layout) -> (Vec<u8>, Vec<f32>) {
    let (n, k) = (layout.out_features(), layout.in_features());
    let mut codes = vec![0xa5; n * k * layout.bits() as usize / 8];
    let mut scales = vec![f32::NAN; n * k.div_ceil(32)];
    let out = Rounded::Rows { codes: &mut codes, scales: &mut scales };
    assert!(kernels.round(weights, layout, out).unwrap());
    (codes, scales)
}

/// Matrices that are not like each other.
fn matrices(n: usize, k: usize) -> Vec<Vec<f32>> {
    let mut random = Random((n * k) as u64);
    let usual = random.floats(n * k);
    let scaled = |factor: f32| usual.iter().map(|x| x * factor).collect::<Vec<_>>();
    let mut found = vec![vec![0.0; n * k], vec![0.3; n * k], scaled(1e-38), scaled(1e-42), scaled(1e38)];
    found.push(usual.iter().map(|x| (x * 5.0).round()).collect());
    found.push(usual.iter().enumerate().map(|(i, x)| if i % 37 == 0 { x * 100.0 } else { *x }).collect());
    found.push(usual.iter().enumerate().map(|(i, x)| if i % 23 == 0 { *x } else { 0.0 }).collect());
    found.push(usual.iter().enumerate().map(|(i, x)| x * 10.0_f32.powi((i * 7 % 70) as i32 - 38)).collect());
    found.push(usual);
    found
}

#[test]
fn all_kernels_and_both_layouts_hold_the_same_numbers() {
    for (n, k) in [(1, 64), (3, 96), (16, 160), (20, 448), (33, 48), (17, 1024), (16, 960)] {
        for weights in matrices(n, k) {
            let bfloat16: Vec<u16> = weights.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            for bits in [4, 8] {
                let layout = layout(bits, n, k);
                for weights in [Weights::F32(&weights), Weights::Bf16(&bfloat16)] {
                    let expected = strips(Kernels::plain(), weights, layout);
                    let (codes, scales) = rows(Kernels::plain(), weights, layout);
                    for kernels in Kernels::all() {
                        assert!(strips(kernels, weights, layout) == expected, "{} {n} {k} {bits}", kernels.name());
                        let found = rows(kernels, weights, layout);
                        assert!(found.0 == codes && found.1 == scales, "{} {n} {k} {bits}", kernels.name());
                    }
                    let matrix = Matrix::new(layout, &expected).unwrap();
                    for row in 0..n {
                        let strip = matrix.strip(row / 16);
                        for i in 0..k {
                            let outer = strip.superblock_scale(row % 16, i / layout.superblock_size());
                            let scale = outer * strip.block_scale(row % 16, i / 32) as f32;
                            let at = row * k + i;
                            let code = if bits == 8 { codes[at] } else { codes[at / 2] >> (4 * (at % 2)) & 15 };
                            assert_eq!(strip.level(row % 16, i), i32::from(code) - (1 << (bits - 1)));
                            assert_eq!(scale, scales[row * k.div_ceil(32) + i / 32]);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn float16_is_read_exactly() {
    // Bits, and what they stand for: 1, -1.5, the least, the largest below normal, the least normal, the largest.
    let known = [
        (0x3c00, 1.0),
        (0xbe00, -1.5),
        (0x0001, 2.0_f32.powi(-24)),
        (0x03ff, 1023.0 / 1024.0 * 2.0_f32.powi(-14)),
        (0x0400, 2.0_f32.powi(-14)),
        (0x7bff, 65504.0),
        (0x8000, -0.0),
    ];
    for (half, number) in known {
        let layout = layout(8, 1, 64);
        let (halves, floats) = ([half; 64], [number; 64]);
        let found = strips(Kernels::plain(), Weights::F16(&halves), layout);
        assert!(found == strips(Kernels::plain(), Weights::F32(&floats), layout), "{half:x}");
    }
}

#[test]
fn what_the_grid_holds_stays_as_it_is() {
    // S = 0.5, s = 15 and 3, levels that reach both ends.
    let level = |i: usize| (i % 16) as f32 - 8.0;
    let weights: Vec<f32> = (0..64).map(|i| 0.5 * if i < 32 { 15.0 } else { 3.0 } * level(i)).collect();
    for kernels in Kernels::all() {
        let (codes, scales) = rows(kernels, Weights::F32(&weights), layout(4, 1, 64));
        assert_eq!(scales, [7.5, 1.5], "{}", kernels.name());
        assert!(codes.iter().enumerate().all(|(i, byte)| usize::from(*byte) == (2 * i % 16) | (2 * i % 16 + 1) << 4));
    }
}

#[test]
fn a_number_that_is_none_is_found() {
    for kernels in Kernels::all() {
        let mut bytes = vec![0; layout(4, 17, 96).bytes()];
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weights = vec![1.0; 17 * 96];
            weights[17 * 96 - 1] = bad;
            let out = Rounded::Strips(&mut bytes);
            assert!(!kernels.round(Weights::F32(&weights), layout(4, 17, 96), out).unwrap());
        }
        let halves = [0x7c00; 64];
        let out = Rounded::Strips(&mut bytes[..layout(8, 1, 64).bytes()]);
        assert!(!kernels.round(Weights::F16(&halves), layout(8, 1, 64), out).unwrap());
    }
}

#[test]
fn sizes_that_disagree_are_named() {
    fn error(weights: &[f32], layout: Layout, out: Rounded) -> String {
        Kernels::plain().round(Weights::F32(weights), layout, out).err().unwrap().to_string()
    }
    let mut bytes = vec![0; layout(4, 1, 64).bytes()];
    assert_eq!(error(&[0.0; 63], layout(4, 1, 64), Rounded::Strips(&mut bytes)), "63 weights; expected 64");
    let short = Rounded::Strips(&mut bytes[1..]);
    assert!(error(&[0.0; 64], layout(4, 1, 64), short).contains("bytes of strips; expected"));
    let odd = Rounded::Rows { codes: &mut [], scales: &mut [] };
    assert!(error(&[0.0; 40], layout(4, 1, 40), odd).contains("rows of 40 codes; expected a multiple of 16"));
    let three = Layout::new(3, 64, 1, 64).unwrap();
    assert!(error(&[0.0; 64], three, Rounded::Strips(&mut [])).contains("3 bits; expected 4 or 8"));
}
