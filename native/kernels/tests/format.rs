//! Where bytes lie, and what a wrong shape says.

mod common;

use common::{Random, Weights};
use phimoe_kernels::{Expert, Layout, Matrix, default_superblock_size};

/// A strip of one tile, every byte of it by hand: output 3 has s of 5 and 9 and S of 1.5, and at input 37 the code 2.
#[test]
fn a_strip_by_hand() {
    // 32 bytes of S, 16 of s (not with 8 bits), zeros up to 64.
    let head = |bits: u32| {
        let mut bytes = vec![0; 64];
        bytes[6..8].copy_from_slice(&0x3fc0_u16.to_le_bytes());
        if bits < 8 {
            bytes[32 + 3] = 9 << 4 | 5;
        }
        bytes
    };
    // Input 37 = 32 + 4 * 1 + 1 = 16 * 2 + 4 * 1 + 1 = 8 * 4 + 4 * 1 + 1 = 4 * 9 + 1.
    for (bits, size, byte, value, level, other) in [
        (4, 512, 64 + 4 * 3 + 1, 2 << 4, -6, -8),
        (8, 1024, 9 * 64 + 4 * 3 + 1, 2, 2, 0),
        (2, 256, 64 + 4 * 3 + 1, 2 << 4, 2, -7),
        (3, 384, 64 + 4 * 3 + 1, 2 << 4, -3, -8),
    ] {
        let layout = Layout::new(bits, 64, 16, 64).unwrap();
        assert_eq!(layout.strip_bytes(), 64 + size);
        let mut bytes = head(bits);
        bytes.resize(64 + size, 0);
        bytes[64 + byte] = value;
        let strip = Matrix::new(layout, &bytes).unwrap().strip(0);
        for output in 0..16 {
            for input in 0..64 {
                let expected = if (output, input) == (3, 37) { level } else { other };
                assert_eq!(strip.level(output, input), expected, "{bits} bits, {output}, {input}");
            }
            let (first, second) = if bits == 8 {
                (1, 1)
            } else if output == 3 {
                (5, 9)
            } else {
                (0, 0)
            };
            assert_eq!((strip.block_scale(output, 0), strip.block_scale(output, 1)), (first, second));
            assert_eq!(strip.superblock_scale(output, 0), if output == 3 { 1.5 } else { 0.0 });
        }
    }
    // The highest bit of 3: bit 4 of row 1 of what follows the four rows of two bits.
    let layout = Layout::new(3, 64, 16, 64).unwrap();
    let mut bytes = head(3);
    bytes.resize(64 + 384, 0);
    bytes[64 + 256 + 64 + 4 * 3 + 1] = 1 << 4;
    assert_eq!(Matrix::new(layout, &bytes).unwrap().strip(0).level(3, 37), 1);
    assert_eq!(Matrix::new(layout, &bytes).unwrap().strip(0).level(3, 36), -8);
}

#[test]
fn what_is_packed_is_read_back() {
    let mut random = Random(1);
    for bits in [2, 3, 4, 8] {
        for (k, n) in [(1, 1), (96, 20), (160, 16), (960, 33)] {
            let weights = Weights::random(&mut random, bits, k, n);
            let inputs = k.next_multiple_of(64);
            for output in 0..n.next_multiple_of(16) {
                let strip = weights.matrix().strip(output / 16);
                for input in 0..inputs {
                    let found = strip.block_scale(output % 16, input / 32) * strip.level(output % 16, input);
                    let scale = strip.superblock_scale(output % 16, input / weights.layout.superblock_size());
                    if output < n && input < k {
                        assert_eq!(found, weights.integer(output, input), "{bits} bits, {output}, {input}");
                        assert_eq!(scale, weights.scale(output, input));
                    } else if output >= n {
                        assert_eq!(found as f32 * scale, 0.0);
                    } else if bits >= 4 {
                        assert_eq!(found, 0, "{bits} bits, {output}, {input}");
                    }
                }
            }
        }
    }
}

#[test]
fn superblocks_by_default() {
    for (inputs, size) in
        [(4096, 512), (960, 320), (448, 448), (6400, 320), (96, 128), (160, 192), (1, 64), (64 * 11, 64)]
    {
        assert_eq!(default_superblock_size(inputs), size, "{inputs}");
    }
}

#[test]
fn wrong_shapes_are_errors() {
    for (shape, text) in [
        ((5, 64, 16, 64), "5 bits; expected 2, 3, 4 or 8"),
        ((4, 0, 16, 64), "0 inputs"),
        ((4, usize::MAX, 16, 64), "inputs; expected 1 to"),
        ((4, 64, 0, 64), "without outputs"),
        ((4, 64, usize::MAX, 64), "address space"),
        ((4, 64, 16, 0), "superblocks of 0"),
        ((4, 64, 16, 96), "superblocks of 96"),
        ((4, 4096, 16, 2048), "superblocks of 2048"),
        ((4, 960, 16, 256), "superblocks of 256 inputs; expected a multiple of 64 up to 1024 that divides 960"),
    ] {
        let error = Layout::new(shape.0, shape.1, shape.2, shape.3).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let layout = Layout::new(4, 96, 20, 64).unwrap();
    assert_eq!(layout.bytes(), 2 * (128 + 2 * 512));
    let bytes = vec![0; layout.bytes() + 1];
    for length in [0, 1, layout.bytes() - 1, layout.bytes() + 1] {
        let error = Matrix::new(layout, &bytes[..length]).unwrap_err().to_string();
        assert!(error.contains(&format!("{length} bytes of weights; expected 2304")), "{error}");
    }
    let down = Layout::new(4, 20, 96, 64).unwrap();
    let size = Expert::bytes(layout, down).unwrap();
    assert_eq!(size, 2 * layout.bytes() + down.bytes());
    assert!(Expert::new(layout, down, &vec![0; size]).is_ok());
    assert!(Expert::new(layout, down, &vec![0; size - 64]).is_err());
    assert!(Expert::new(layout, layout, &vec![0; size]).is_err());
}
