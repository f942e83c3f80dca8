//! Numbers to bytes, for tests and tools; an exporter has its own.

use crate::format::{BLOCK, STRIP, TILE};
use crate::{Error, Layout};

/// The bytes of a matrix.
///
/// `codes` is [N][K], each below 2 ** bits, with 8 bits the level's bits; `block_scales` is [N][K / 32, rounded up],
/// each up to 15 (empty with 8 bits); `superblock_scales` is [N][K' / G], bfloat16 as bits.
pub fn pack(layout: Layout, codes: &[u8], block_scales: &[u8], superblock_scales: &[u16]) -> Result<Vec<u8>, Error> {
    let (bits, inputs, outputs) = (layout.bits(), layout.in_features(), layout.out_features());
    let blocks = if bits == 8 { 0 } else { inputs.div_ceil(BLOCK) };
    for (name, found, expected) in [
        ("codes", codes.len(), outputs * inputs),
        ("scales of blocks", block_scales.len(), outputs * blocks),
        ("scales of superblocks", superblock_scales.len(), outputs * layout.superblocks()),
    ] {
        if found != expected {
            return Err(Error::new(format!("{found} {name}; expected {expected}")));
        }
    }
    if let Some(code) = codes.iter().find(|code| u32::from(**code) >> bits != 0) {
        return Err(Error::new(format!("a code of {code}; expected {bits} bits")));
    }
    if let Some(scale) = block_scales.iter().find(|scale| **scale > 15) {
        return Err(Error::new(format!("a block's scale of {scale}; expected at most 15")));
    }
    let padding = if bits == 4 { 8 } else { 0 };
    let mut bytes = vec![0; layout.bytes()];
    for output in 0..layout.strips() * STRIP {
        let (strip, column) = (output / STRIP, output % STRIP);
        let strip = &mut bytes[strip * layout.strip_bytes()..][..layout.strip_bytes()];
        let (head, tiles) = strip.split_at_mut(layout.codes_at());
        if output < outputs {
            for g in 0..layout.superblocks() {
                let scale = superblock_scales[output * layout.superblocks() + g].to_le_bytes();
                head[g * 2 * STRIP + 2 * column..][..2].copy_from_slice(&scale);
            }
            let scales = &mut head[layout.block_scales_at()..];
            for block in 0..blocks {
                scales[block / 2 * STRIP + column] |= block_scales[output * blocks + block] << (4 * (block % 2));
            }
        }
        for (t, tile) in tiles.chunks_mut(layout.tile_bytes()).enumerate() {
            for k in 0..TILE {
                let input = TILE * t + k;
                let inside = output < outputs && input < inputs;
                let code = if inside { codes[output * inputs + input] } else { padding };
                let byte = |r: usize| r * 64 + column * 4 + k % 4;
                match bits {
                    4 => tile[byte(k % 32 / 4)] |= code << (4 * (k / 32)),
                    8 => tile[byte(k / 4)] = code,
                    _ => {
                        tile[byte(k % 16 / 4)] |= (code & 3) << (2 * (k / 16));
                        if bits == 3 {
                            tile[byte(4 + k % 8 / 4)] |= (code >> 2) << (k / 8);
                        }
                    }
                }
            }
        }
    }
    Ok(bytes)
}
