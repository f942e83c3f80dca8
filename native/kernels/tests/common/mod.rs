//! Random matrices and rows, the same ones every time.
#![allow(dead_code, reason = "each test file takes what it needs")]

use phimoe_kernels::{Layout, Matrix, default_superblock_size, pack};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// From -1 to 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }
}

/// A matrix as numbers and as bytes.
pub struct Weights {
    pub layout: Layout,
    pub codes: Vec<u8>,
    pub block_scales: Vec<u8>,
    pub superblock_scales: Vec<u16>,
    pub bytes: Vec<u8>,
}

impl Weights {
    pub fn new(layout: Layout, codes: Vec<u8>, block_scales: Vec<u8>, superblock_scales: Vec<u16>) -> Self {
        let bytes = pack(layout, &codes, &block_scales, &superblock_scales).unwrap();
        Self { layout, codes, block_scales, superblock_scales, bytes }
    }

    pub fn random(random: &mut Random, bits: u32, in_features: usize, out_features: usize) -> Self {
        let size = default_superblock_size(in_features);
        Self::random_with(random, Layout::new(bits, in_features, out_features, size).unwrap())
    }

    pub fn random_with(random: &mut Random, layout: Layout) -> Self {
        let (k, n) = (layout.in_features(), layout.out_features());
        let codes = (0..n * k).map(|_| random.below(1 << layout.bits()) as u8);
        let codes = codes.map(|code| if layout.bits() == 8 && code == 0x80 { 0x81 } else { code }).collect();
        let blocks = if layout.bits() == 8 { 0 } else { k.div_ceil(32) };
        let block_scales = (0..n * blocks).map(|_| random.below(16) as u8).collect();
        let superblocks = k.next_multiple_of(64) / layout.superblock_size();
        let scales = (0..n * superblocks).map(|_| ((random.float() * 0.01).to_bits() >> 16) as u16).collect();
        Self::new(layout, codes, block_scales, scales)
    }

    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.layout, &self.bytes).unwrap()
    }

    /// s * level, from the numbers and not the bytes.
    pub fn integer(&self, output: usize, input: usize) -> i32 {
        let (k, bits) = (self.layout.in_features(), self.layout.bits());
        let code = self.codes[output * k + input];
        let level = match bits {
            2 => [-7, -2, 2, 7][usize::from(code)],
            3 => [-8, -5, -3, -1, 1, 3, 5, 8][usize::from(code)],
            4 => i32::from(code) - 8,
            _ => return i32::from(code as i8),
        };
        level * i32::from(self.block_scales[output * k.div_ceil(32) + input / 32])
    }

    /// S, for an input.
    pub fn scale(&self, output: usize, input: usize) -> f32 {
        let size = self.layout.superblock_size();
        let superblocks = self.layout.in_features().next_multiple_of(64) / size;
        let bits = self.superblock_scales[output * superblocks + input / size];
        f32::from_bits(u32::from(bits) << 16)
    }
}

/// Equal bits, all NaN being one.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
}
