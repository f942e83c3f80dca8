//! The oracle: `../../FORMAT.md`, "A product", as it stands there.

use crate::Row;
use crate::format::{BLOCK, STRIP, Strip};

/// The products of a strip with rows: out [rows][16].
pub(crate) fn products(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let layout = strip.layout();
    let size = layout.superblock_size();
    for output in 0..STRIP {
        let weights: Vec<i32> = (0..layout.superblocks() * size)
            .map(|k| strip.block_scale(output, k / BLOCK) * strip.level(output, k))
            .collect();
        let scales: Vec<f32> = (0..layout.superblocks()).map(|g| strip.superblock_scale(output, g)).collect();
        for (row, out) in rows.iter().zip(&mut *out) {
            let mut y = 0.0;
            for (g, scale) in scales.iter().enumerate() {
                let superblock = g * size..(g + 1) * size;
                let products = weights[superblock.clone()].iter().zip(&row.values[superblock]);
                let sum: i32 = products.map(|(weight, q)| weight * i32::from(*q)).sum();
                y = (sum as f32).mul_add(scale * row.scales[g], y);
            }
            out[output] = y;
        }
    }
}
