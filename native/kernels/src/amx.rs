//! AMX. `tdpbssd` multiplies a tile of sixteen rows of 64 signed bytes with a tile of weights, 64 inputs of sixteen
//! outputs, and adds to sixteen times sixteen sums of 32 bits.
//!
//! Sixteen rows at once meet a panel: a superblock of one strip as s * level, in the order in which 8-bit codes lie
//! anyway, and that is how AMX wants them. Fewer rows, unpacking and floats are those of `avx512vnni.rs`.
//!
//! The compiler knows no tiles yet, so that they are used within single blocks of assembly.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use crate::activations::Row;
use crate::avx512vnni::{self, add_superblock, unpack};
use crate::format::{LARGEST_SUPERBLOCK, STRIP, Strip, TILE};
use crate::tiling::{PANEL_TILE, even_size, values};

/// From so many rows on tiles are used.
const TILE_ROWS: usize = 8;
/// Rows of a tile.
const MOST: usize = 16;

/// Whether the processor has tiles of bytes, and the system lets this process use them. Linux wants to be asked, and
/// refuses where a thread's stack for signals is too small.
pub(crate) fn available() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    avx512vnni::available() && *GRANTED.get_or_init(|| has_tiles() && request())
}

fn has_tiles() -> bool {
    // Leaf 7: AMX-TILE and AMX-INT8. Leaf 1: XGETBV may be used, which says that the system keeps both states of tiles.
    let (tile_and_int8, osxsave) = (0b11 << 24, 1 << 27);
    if __cpuid_count(7, 0).edx & tile_and_int8 != tile_and_int8 || __cpuid(1).ecx & osxsave == 0 {
        return false;
    }
    let states: u32;
    // SAFETY: the processor has XGETBV.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") states, out("edx") _, options(nomem, nostack)) };
    states >> 17 & 3 == 3
}

#[cfg(target_os = "linux")]
fn request() -> bool {
    let (arch_prctl, request_permission, tile_data) = (158, 0x1023, 18);
    let result: i64;
    // SAFETY: a system call that reads and writes no memory of this process.
    unsafe {
        asm!("syscall", inout("rax") arch_prctl as i64 => result, in("rdi") request_permission as i64,
            in("rsi") tile_data as i64, out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false // how other systems are asked is not known here
}

/// The products of a strip with rows: out [rows][16].
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(crate) fn products(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    if rows.len() < TILE_ROWS {
        return avx512vnni::products(strip, rows, out);
    }
    out.fill([0.0; STRIP]);
    configure(even_size::<MOST>(rows.len()));
    match strip.layout().bits() {
        2 => codes::<256>(strip, rows, out),
        3 => codes::<384>(strip, rows, out),
        4 => codes::<512>(strip, rows, out),
        _ => bytes(strip, rows, out),
    }
    // SAFETY: the processor has tiles; nobody reads them any more.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// Tiles 0 and 1 are sums, 2 and 3 activations, of so many rows; 4 and 5 are weights.
fn configure(rows: usize) {
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut tiles = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    tiles.row_bytes[..6].fill(64);
    tiles.rows[..4].fill(rows as u8);
    tiles.rows[4..6].fill(16);
    // SAFETY: the processor has tiles, and this is the form of their configuration.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &tiles, options(readonly, nostack, preserves_flags)) };
}

/// 2, 3 and 4 bits: SIZE bytes a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn codes<const SIZE: usize>(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<SIZE>().0.chunks_exact(tiles);
    let superblocks = codes.zip(strip.block_scales().chunks_exact(tiles)).zip(strip.superblock_scales());
    let mut panel = [[0; PANEL_TILE]; LARGEST_SUPERBLOCK / TILE];
    let mut gathered = [[[0; TILE]; MOST]; LARGEST_SUPERBLOCK / TILE];
    for (g, ((codes, s), scales)) in superblocks.enumerate() {
        unpack(codes, s, 0, &mut panel);
        add(g, &panel[..tiles], scales, rows, &mut gathered[..tiles], out);
    }
}

/// 8 bits, whose codes are a panel as they lie.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn bytes(strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
    let tiles = strip.layout().superblock_size() / TILE;
    let codes = strip.codes().as_chunks::<PANEL_TILE>().0.chunks_exact(tiles);
    let mut gathered = [[[0; TILE]; MOST]; LARGEST_SUPERBLOCK / TILE];
    for (g, (panel, scales)) in codes.zip(strip.superblock_scales()).enumerate() {
        add(g, panel, scales, rows, &mut gathered[..tiles], out);
    }
}

/// Adds a superblock's products with rows. `gathered` [tile][row] is theirs to use: rows lie anywhere, and a tile is loaded
/// from one place.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn add(
    g: usize,
    panel: &[[u8; PANEL_TILE]],
    scales: &[u8; 2 * STRIP],
    rows: &[Row],
    gathered: &mut [[[i8; TILE]; MOST]],
    out: &mut [[f32; STRIP]],
) {
    let size = even_size::<MOST>(rows.len());
    let mut sums = [[[0; STRIP]; MOST]; 2];
    for (rows, out) in rows.chunks(size).zip(out.chunks_mut(size)) {
        for (index, row) in rows.iter().enumerate() {
            for (gathered, q) in gathered.iter_mut().zip(values(row, g, panel.len())) {
                gathered[index] = *q;
            }
        }
        multiply(gathered, panel, &mut sums);
        for (index, (row, out)) in rows.iter().zip(out).enumerate() {
            // SAFETY: each is 64 bytes, at any address.
            let halves = sums.each_ref().map(|sums| unsafe { _mm512_loadu_si512(sums[index].as_ptr().cast()) });
            add_superblock(out, _mm512_add_epi32(halves[0], halves[1]), scales, row.scales[g]);
        }
    }
}

/// Activations times weights, as two sums, of the even tiles and of the odd ones: one would wait for itself.
fn multiply(q: &[[[i8; TILE]; MOST]], panel: &[[u8; PANEL_TILE]], sums: &mut [[[i32; STRIP]; MOST]; 2]) {
    assert_eq!(q.len(), panel.len());
    // SAFETY: `configure` was called, so that each load and store is of up to 16 rows of 64 bytes. All tiles are within
    // both slices, which have the same length.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "sub {tiles}, 2",
            "jl 3f",
            "2:",
            "tileloadd tmm2, [{q} + {row}]",
            "tileloadd tmm4, [{panel} + {row}]",
            "tdpbssd tmm0, tmm2, tmm4",
            "tileloadd tmm3, [{q} + {row} + 1024]",
            "tileloadd tmm5, [{panel} + {row} + 1024]",
            "tdpbssd tmm1, tmm3, tmm5",
            "add {q}, 2048",
            "add {panel}, 2048",
            "sub {tiles}, 2",
            "jge 2b",
            "3:",
            "test {tiles}, 1",
            "jz 4f",
            "tileloadd tmm2, [{q} + {row}]",
            "tileloadd tmm4, [{panel} + {row}]",
            "tdpbssd tmm0, tmm2, tmm4",
            "4:",
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 1024], tmm1",
            q = inout(reg) q.as_ptr() => _,
            panel = inout(reg) panel.as_ptr() => _,
            tiles = inout(reg) panel.len() => _,
            sums = in(reg) sums,
            row = in(reg) 64_usize,
            options(nostack)
        );
    }
}
