//! Rows of activations as signed bytes: `../../FORMAT.md`, "Activations".

use crate::Error;
use crate::format::{BLOCK, check_superblock, padded};

/// Rows [rows, K] as signed bytes [rows, K'] with a float32 scale for each superblock.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedRows {
    inputs: usize,
    in_features: usize,
    superblock_size: usize,
    values: Vec<i8>,
    scales: Vec<f32>,
    corrections: Vec<[i16; 2]>,
    starts: Vec<i32>,
}

/// One row of `QuantizedRows`.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub(crate) in_features: usize,
    pub(crate) superblock_size: usize,
    /// q [K'].
    pub(crate) values: &'a [i8],
    /// a [K' / G].
    pub(crate) scales: &'a [f32],
    /// As `Row::corrections` says.
    pub(crate) corrections: &'a [[i16; 2]],
    /// As `Row::starts` says.
    pub(crate) starts: &'a [i32],
}

/// A row to be written.
pub(crate) struct RowMut<'a> {
    pub(crate) superblock_size: usize,
    pub(crate) values: &'a mut [i8],
    pub(crate) scales: &'a mut [f32],
    pub(crate) corrections: &'a mut [[i16; 2]],
    pub(crate) starts: &'a mut [i32],
}

impl QuantizedRows {
    /// Rows of zeros, to be filled by `Kernels::quantize_into`.
    pub fn zeros(rows: usize, in_features: usize, superblock_size: usize) -> Result<Self, Error> {
        check_superblock(in_features, superblock_size)?;
        let inputs = padded(in_features);
        Ok(Self {
            inputs,
            in_features,
            superblock_size,
            values: vec![0; rows * inputs],
            scales: vec![0.0; rows * (inputs / superblock_size)],
            corrections: vec![[0; 2]; rows * (inputs / BLOCK)],
            starts: vec![0; rows * (inputs / superblock_size)],
        })
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.values.len() / self.inputs
    }

    /// K.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// One row; rows may be multiplied in any choice and order.
    pub fn row(&self, index: usize) -> Row<'_> {
        let (superblocks, blocks) = (self.inputs / self.superblock_size, self.inputs / BLOCK);
        Row {
            in_features: self.in_features,
            superblock_size: self.superblock_size,
            values: &self.values[index * self.inputs..][..self.inputs],
            scales: &self.scales[index * superblocks..][..superblocks],
            corrections: &self.corrections[index * blocks..][..blocks],
            starts: &self.starts[index * superblocks..][..superblocks],
        }
    }

    /// All rows in order.
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        (0..self.rows()).map(|index| self.row(index))
    }

    pub(crate) fn row_mut(&mut self, index: usize) -> RowMut<'_> {
        let (superblocks, blocks) = (self.inputs / self.superblock_size, self.inputs / BLOCK);
        RowMut {
            superblock_size: self.superblock_size,
            values: &mut self.values[index * self.inputs..][..self.inputs],
            scales: &mut self.scales[index * superblocks..][..superblocks],
            corrections: &mut self.corrections[index * blocks..][..blocks],
            starts: &mut self.starts[index * superblocks..][..superblocks],
        }
    }
}

impl Row<'_> {
    /// The signed bytes q [K'].
    pub fn values(&self) -> &[i8] {
        self.values
    }

    /// The scales a [K' / G].
    pub fn scales(&self) -> &[f32] {
        self.scales
    }

    /// [K' / 32]: -8 times the sum of the block's q at k % 4 of 0 and 1, and of 2 and 3. Kernels that multiply with
    /// level + 8, which has no sign, start from here.
    pub fn corrections(&self) -> &[[i16; 2]] {
        self.corrections
    }

    /// [K' / G]: -128 times the sum of the superblock's q, where kernels start that multiply with weights + 128.
    pub fn starts(&self) -> &[i32] {
        self.starts
    }
}
