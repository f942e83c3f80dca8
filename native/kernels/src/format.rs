//! Where each number of a matrix lies: `../../FORMAT.md`, "Strips".

use crate::Error;

/// Outputs of a strip.
pub const STRIP: usize = 16;
/// Inputs of a tile.
pub(crate) const TILE: usize = 64;
/// Inputs that share one integer scale.
pub(crate) const BLOCK: usize = 32;
/// The largest superblock: its sum of products stays below 2 ** 24.
pub(crate) const LARGEST_SUPERBLOCK: usize = 1024;
const LARGEST_IN_FEATURES: usize = 1 << 24;

pub(crate) const LEVELS_2: [i8; 4] = [-7, -2, 2, 7];
pub(crate) const LEVELS_3: [i8; 8] = [-8, -5, -3, -1, 1, 3, 5, 8];

/// K', the inputs rounded up to whole tiles.
pub(crate) fn padded(in_features: usize) -> usize {
    in_features.next_multiple_of(TILE)
}

/// The superblock that an exporter takes where nobody says another: the largest multiple of 64 up to 512 that divides
/// the inputs, which are first rounded up to a multiple of 64.
pub fn default_superblock_size(in_features: usize) -> usize {
    let tiles = padded(in_features) / TILE;
    (1..=8).rev().find(|n| tiles.is_multiple_of(*n)).unwrap_or(1) * TILE
}

/// An error unless superblocks of `size` inputs are whole tiles and divide `in_features`, rounded up to whole tiles.
pub(crate) fn check_superblock(in_features: usize, size: usize) -> Result<(), Error> {
    if in_features == 0 || in_features > LARGEST_IN_FEATURES {
        return Err(Error::new(format!("{in_features} inputs; expected 1 to {LARGEST_IN_FEATURES}")));
    }
    let inputs = padded(in_features);
    if size == 0 || size > LARGEST_SUPERBLOCK || !size.is_multiple_of(TILE) || !inputs.is_multiple_of(size) {
        return Err(Error::new(format!(
            "superblocks of {size} inputs; expected a multiple of {TILE} up to {LARGEST_SUPERBLOCK} that divides {inputs}"
        )));
    }
    Ok(())
}

/// The shape of a matrix and so the place of all its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    bits: u32,
    in_features: usize,
    out_features: usize,
    superblock_size: usize,
    strip_bytes: usize,
    bytes: usize,
}

impl Layout {
    /// A matrix of `out_features` x `in_features` codes of `bits` bits, with a float scale for each `superblock_size`
    /// inputs of an output. An error names the number that the format does not allow.
    pub fn new(bits: u32, in_features: usize, out_features: usize, superblock_size: usize) -> Result<Self, Error> {
        if ![2, 3, 4, 8].contains(&bits) {
            return Err(Error::new(format!("codes of {bits} bits; expected 2, 3, 4 or 8")));
        }
        check_superblock(in_features, superblock_size)?;
        if out_features == 0 {
            return Err(Error::new("a matrix without outputs; expected at least 1"));
        }
        let mut layout = Self { bits, in_features, out_features, superblock_size, strip_bytes: 0, bytes: 0 };
        layout.strip_bytes = layout.codes_at() + layout.tiles() * layout.tile_bytes();
        layout.bytes = layout.strips().checked_mul(layout.strip_bytes).ok_or_else(|| {
            Error::new(format!("{out_features} outputs of {in_features} inputs do not fit the address space"))
        })?;
        Ok(layout)
    }

    /// Bits of a code: 2, 3, 4 or 8.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// K.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// N.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// G, the inputs that share one float scale.
    pub fn superblock_size(&self) -> usize {
        self.superblock_size
    }

    /// Strips of 16 outputs, the last one perhaps in part.
    pub fn strips(&self) -> usize {
        self.out_features.div_ceil(STRIP)
    }

    /// Bytes of one strip, a multiple of 64.
    pub fn strip_bytes(&self) -> usize {
        self.strip_bytes
    }

    /// Bytes of the whole matrix.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn tiles(&self) -> usize {
        padded(self.in_features) / TILE
    }

    pub(crate) fn superblocks(&self) -> usize {
        padded(self.in_features) / self.superblock_size
    }

    pub(crate) fn tile_bytes(&self) -> usize {
        TILE * STRIP / 8 * self.bits as usize
    }

    pub(crate) fn block_scales_at(&self) -> usize {
        self.superblocks() * 2 * STRIP
    }

    pub(crate) fn block_scales_bytes(&self) -> usize {
        if self.bits == 8 { 0 } else { self.tiles() * STRIP }
    }

    pub(crate) fn codes_at(&self) -> usize {
        (self.block_scales_at() + self.block_scales_bytes()).next_multiple_of(64)
    }
}

/// A matrix where it lies, in a mapped file say. Kernels read it with unaligned loads: any address will do, one that is
/// a multiple of 64 is fastest.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// An error says how many bytes there are and how many the layout takes, when these differ.
    pub fn new(layout: Layout, bytes: &'a [u8]) -> Result<Self, Error> {
        if bytes.len() != layout.bytes {
            return Err(Error::new(format!(
                "{} bytes of weights; expected {} for {} outputs of {} inputs, {} bits, superblocks of {}",
                bytes.len(),
                layout.bytes,
                layout.out_features,
                layout.in_features,
                layout.bits,
                layout.superblock_size
            )));
        }
        Ok(Self { layout, bytes })
    }

    /// The matrix's shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Strip `index`, which must be below `layout().strips()`.
    pub fn strip(&self, index: usize) -> Strip<'a> {
        let size = self.layout.strip_bytes;
        Strip { layout: self.layout, bytes: &self.bytes[index * size..][..size] }
    }
}

/// Sixteen outputs of a matrix.
#[derive(Debug, Clone, Copy)]
pub struct Strip<'a> {
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> Strip<'a> {
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// [superblock] of 16 bfloat16.
    pub(crate) fn superblock_scales(&self) -> &'a [[u8; 2 * STRIP]] {
        self.bytes[..self.layout.block_scales_at()].as_chunks().0
    }

    /// [tile][output], two scales a byte; empty with 8 bits.
    pub(crate) fn block_scales(&self) -> &'a [[u8; STRIP]] {
        self.bytes[self.layout.block_scales_at()..][..self.layout.block_scales_bytes()].as_chunks().0
    }

    /// The tiles.
    pub(crate) fn codes(&self) -> &'a [u8] {
        &self.bytes[self.layout.codes_at()..]
    }

    /// S of an output of this strip and a superblock.
    pub fn superblock_scale(&self, output: usize, superblock: usize) -> f32 {
        let scales = &self.superblock_scales()[superblock];
        f32::from_bits(u32::from(u16::from_le_bytes([scales[2 * output], scales[2 * output + 1]])) << 16)
    }

    /// s of an output of this strip and a block.
    pub fn block_scale(&self, output: usize, block: usize) -> i32 {
        if self.layout.bits == 8 {
            return 1;
        }
        i32::from(self.block_scales()[block / 2][output] >> (4 * (block % 2)) & 15)
    }

    /// The level of an output of this strip and an input below K'.
    pub fn level(&self, output: usize, input: usize) -> i32 {
        let size = self.layout.tile_bytes();
        let tile = &self.codes()[input / TILE * size..][..size];
        let (k, j) = (input % TILE, input % 4);
        let byte = |r: usize| tile[r * 64 + output * 4 + j];
        let two_bits = || usize::from(byte(k % 16 / 4) >> (2 * (k / 16)) & 3);
        i32::from(match self.layout.bits {
            2 => LEVELS_2[two_bits()],
            3 => LEVELS_3[two_bits() | usize::from(byte(4 + k % 8 / 4) >> (k / 8) & 1) << 2],
            4 => (byte(k % BLOCK / 4) >> (4 * (k / BLOCK)) & 15) as i8 - 8,
            _ => byte(k / 4) as i8,
        })
    }
}

/// One expert's bytes: gate and up, strip by strip in turn, then down.
#[derive(Debug, Clone, Copy)]
pub struct Expert<'a> {
    intermediate_size: usize,
    gate_up: Matrix<'a>,
    down: Matrix<'a>,
}

impl<'a> Expert<'a> {
    /// The layouts of a gate (up has the same) and of the strips of gate and up together.
    fn gate_up_layout(gate: Layout) -> Result<Layout, Error> {
        let outputs = gate.strips().saturating_mul(2 * STRIP);
        Layout::new(gate.bits, gate.in_features, outputs, gate.superblock_size)
    }

    /// Bytes of an expert whose gate (and up) and down have these layouts.
    pub fn bytes(gate: Layout, down: Layout) -> Result<usize, Error> {
        let total = Self::gate_up_layout(gate)?.bytes.checked_add(down.bytes);
        total.ok_or_else(|| Error::new("an expert that does not fit the address space"))
    }

    /// `gate` is the layout of gate and of up, each [I, H]; `down` that of down [H, I].
    pub fn new(gate: Layout, down: Layout, bytes: &'a [u8]) -> Result<Self, Error> {
        if (gate.in_features, gate.out_features) != (down.out_features, down.in_features) {
            return Err(Error::new(format!(
                "gate and up [{}, {}] with down [{}, {}]; expected [I, H] and [H, I]",
                gate.out_features, gate.in_features, down.out_features, down.in_features
            )));
        }
        let expected = Self::bytes(gate, down)?;
        if bytes.len() != expected {
            return Err(Error::new(format!("{} bytes of an expert; expected {expected}", bytes.len())));
        }
        let layout = Self::gate_up_layout(gate)?;
        let (first, second) = bytes.split_at(layout.bytes);
        Ok(Self {
            intermediate_size: gate.out_features,
            gate_up: Matrix::new(layout, first)?,
            down: Matrix::new(down, second)?,
        })
    }

    /// I.
    pub fn intermediate_size(&self) -> usize {
        self.intermediate_size
    }

    /// Gate and up as one matrix: strip 2 i is gate's strip i, strip 2 i + 1 is up's.
    pub fn gate_up(&self) -> Matrix<'a> {
        self.gate_up
    }

    /// Down.
    pub fn down(&self) -> Matrix<'a> {
        self.down
    }
}
