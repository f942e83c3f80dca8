//! The kernels of one instruction set, chosen at run time.

use std::ops::Range;
use std::sync::OnceLock;

use crate::activations::{QuantizedRows, Row, RowMut};
use crate::format::{Expert, Matrix, STRIP, Strip};
use crate::output::Part;
use crate::round::{self, Rounded, Weights};
use crate::{Error, Layout, elementwise, plain};

/// Names one of `Kernels::all` to be taken by `Kernels::detect`.
const VARIABLE: &str = "PHIMOE_KERNELS";
/// Rows for which sums of a strip lie on the stack.
const ROWS_AT_ONCE: usize = 128;

/// One set of kernels. All sets give the same bits.
pub struct Kernels {
    name: &'static str,
    available: fn() -> bool,
    /// Whether it is taken by its name alone.
    on_request: bool,
    // SAFETY of all of these: the processor must have the instructions that `available` asks for.
    products: unsafe fn(&Strip, &[Row], &mut [[f32; STRIP]]),
    quantize: unsafe fn(&[f32], RowMut<'_>),
    swiglu: unsafe fn(&mut [[f32; STRIP]], &[[f32; STRIP]]),
    router_scores: unsafe fn(&[f32], &[f32], &mut [f32]),
    weighted_sum: unsafe fn(&[f32], f32, &[f32], f32, &mut [f32]),
    round: unsafe fn(&Weights, Layout, usize, &mut Rounded) -> bool,
}

/// Best first. On request: what ran nowhere yet, or only in an emulator that was corrected for it.
static ALL: &[Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "amx",
        available: crate::amx::available,
        on_request: true,
        products: crate::amx::products,
        quantize: crate::avx512vnni::quantize,
        swiglu: crate::avx512vnni::swiglu,
        router_scores: crate::avx512vnni::router_scores,
        weighted_sum: crate::avx512vnni::weighted_sum,
        round: crate::avx2::round, // every processor with AVX-512 has AVX2
    },
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avx512vnni",
        available: crate::avx512vnni::available,
        on_request: false,
        products: crate::avx512vnni::products,
        quantize: crate::avx512vnni::quantize,
        swiglu: crate::avx512vnni::swiglu,
        router_scores: crate::avx512vnni::router_scores,
        weighted_sum: crate::avx512vnni::weighted_sum,
        round: crate::avx2::round, // every processor with AVX-512 has AVX2
    },
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avxvnni",
        available: crate::avxvnni::available,
        on_request: false,
        products: crate::avxvnni::products,
        quantize: crate::avx2::quantize,
        swiglu: crate::avx2::swiglu,
        router_scores: crate::avx2::router_scores,
        weighted_sum: crate::avx2::weighted_sum,
        round: crate::avx2::round,
    },
    #[cfg(target_arch = "x86_64")]
    Kernels {
        name: "avx2",
        available: crate::avx2::available,
        on_request: false,
        products: crate::avx2::products,
        quantize: crate::avx2::quantize,
        swiglu: crate::avx2::swiglu,
        router_scores: crate::avx2::router_scores,
        weighted_sum: crate::avx2::weighted_sum,
        round: crate::avx2::round,
    },
    #[cfg(target_arch = "aarch64")]
    Kernels {
        name: "i8mm",
        available: crate::neon::i8mm_available,
        on_request: false,
        products: crate::neon::products_i8mm,
        quantize: crate::neon::quantize,
        swiglu: crate::neon::swiglu,
        router_scores: crate::neon::router_scores,
        weighted_sum: crate::neon::weighted_sum,
        round: crate::neon::round,
    },
    #[cfg(target_arch = "aarch64")]
    Kernels {
        name: "dotprod",
        available: crate::neon::dotprod_available,
        on_request: false,
        products: crate::neon::products_dotprod,
        quantize: crate::neon::quantize,
        swiglu: crate::neon::swiglu,
        router_scores: crate::neon::router_scores,
        weighted_sum: crate::neon::weighted_sum,
        round: crate::neon::round,
    },
    #[cfg(target_arch = "aarch64")]
    Kernels {
        name: "neon",
        available: crate::neon::available,
        on_request: false,
        products: crate::neon::products,
        quantize: crate::neon::quantize,
        swiglu: crate::neon::swiglu,
        router_scores: crate::neon::router_scores,
        weighted_sum: crate::neon::weighted_sum,
        round: crate::neon::round,
    },
    Kernels {
        name: "plain",
        available: || true,
        on_request: false,
        products: plain::products,
        quantize: elementwise::quantize,
        swiglu: elementwise::swiglu,
        router_scores: elementwise::router_scores,
        weighted_sum: elementwise::weighted_sum,
        round: round::strip,
    },
];

impl Kernels {
    /// The best kernels for this processor, or those that the environment variable PHIMOE_KERNELS names. The choice is
    /// made once. An error says that the variable names none, or some that this processor cannot run.
    pub fn detect() -> Result<&'static Self, Error> {
        static CHOICE: OnceLock<Result<&'static Kernels, Error>> = OnceLock::new();
        CHOICE
            .get_or_init(|| {
                Self::choose(std::env::var_os(VARIABLE).as_ref().map(|name| name.to_string_lossy()).as_deref())
            })
            .clone()
    }

    /// The best kernels for this processor, or those of that name.
    pub fn choose(name: Option<&str>) -> Result<&'static Self, Error> {
        let Some(name) = name else {
            // Others are not even asked for: asking for AMX changes what the system demands of this process.
            let best = ALL.iter().find(|kernels| !kernels.on_request && (kernels.available)());
            return Ok(best.unwrap_or(Self::plain()));
        };
        ALL.iter().find(|kernels| kernels.name == name && (kernels.available)()).ok_or_else(|| {
            let names: Vec<_> = Self::all().map(|kernels| kernels.name).collect();
            let what = if ALL.iter().any(|kernels| kernels.name == name) {
                "which this processor cannot run"
            } else {
                "which this library does not have"
            };
            Error::new(format!("{VARIABLE} is {name:?}, {what}; expected one of {}, or unset it", names.join(", ")))
        })
    }

    /// All kernels that this processor can run, best first.
    pub fn all() -> impl Iterator<Item = &'static Self> {
        ALL.iter().filter(|kernels| (kernels.available)())
    }

    /// The plain kernels, the oracle of all others.
    pub fn plain() -> &'static Self {
        &ALL[ALL.len() - 1]
    }

    /// The instruction set, in lower case.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// x [rows, K], row after row, as signed bytes.
    pub fn quantize(
        &self,
        x: &[f32],
        rows: usize,
        in_features: usize,
        superblock_size: usize,
    ) -> Result<QuantizedRows, Error> {
        let mut quantized = QuantizedRows::zeros(rows, in_features, superblock_size)?;
        self.quantize_into(x, &mut quantized)?;
        Ok(quantized)
    }

    /// As `quantize`, over what `rows` held.
    pub fn quantize_into(&self, x: &[f32], rows: &mut QuantizedRows) -> Result<(), Error> {
        let size = rows.in_features();
        if x.len() != rows.rows() * size {
            return Err(Error::new(format!("{} floats for {} rows of {size}", x.len(), rows.rows())));
        }
        for (index, x) in x.chunks_exact(size).enumerate() {
            self.quantize_row(x, rows.row_mut(index));
        }
        Ok(())
    }

    pub(crate) fn quantize_row(&self, x: &[f32], row: RowMut<'_>) {
        // SAFETY: `all` gives only what this processor can run.
        unsafe { (self.quantize)(x, row) };
    }

    /// The products of a strip with rows, whose shapes agree: out [rows][16].
    pub(crate) fn strip(&self, strip: &Strip, rows: &[Row], out: &mut [[f32; STRIP]]) {
        // SAFETY: `all` gives only what this processor can run.
        unsafe { (self.products)(strip, rows, out) };
    }

    /// The products of `rows` with strips of a matrix, plus the bias [N] if there is one. Row i of `rows` goes to the
    /// part's row i, output n to its column n.
    ///
    /// Calls for disjoint parts may run at once, on any threads. An error, before anything is written, says which shapes
    /// disagree.
    pub fn multiply(
        &self,
        matrix: &Matrix,
        strips: Range<usize>,
        rows: &[Row],
        bias: Option<&[f32]>,
        out: &mut Part,
    ) -> Result<(), Error> {
        let outputs = matrix.layout().out_features();
        if let Some(bias) = bias
            && bias.len() != outputs
        {
            return Err(Error::new(format!("a bias of {} floats for {outputs} outputs", bias.len())));
        }
        check(matrix, rows)?;
        check_part(&strips, outputs, rows, out)?;
        let mut sums = [[0.0; STRIP]; ROWS_AT_ONCE];
        for (chunk, rows) in rows.chunks(ROWS_AT_ONCE).enumerate() {
            let sums = &mut sums[..rows.len()];
            for index in strips.clone() {
                self.strip(&matrix.strip(index), rows, sums);
                let columns = index * STRIP..((index + 1) * STRIP).min(outputs);
                if let Some(bias) = bias {
                    for sums in &mut *sums {
                        for (sum, bias) in sums.iter_mut().zip(&bias[columns.clone()]) {
                            *sum += bias;
                        }
                    }
                }
                write(sums, chunk * ROWS_AT_ONCE, columns, out);
            }
        }
        Ok(())
    }

    /// silu(gate) * up of an expert, of its strips `strips` of gate and of up: as `multiply`, with I columns.
    pub fn gate_up(&self, expert: &Expert, strips: Range<usize>, rows: &[Row], out: &mut Part) -> Result<(), Error> {
        let (matrix, outputs) = (expert.gate_up(), expert.intermediate_size());
        check(&matrix, rows)?;
        check_part(&strips, outputs, rows, out)?;
        let (mut gate, mut up) = ([[0.0; STRIP]; ROWS_AT_ONCE], [[0.0; STRIP]; ROWS_AT_ONCE]);
        for (chunk, rows) in rows.chunks(ROWS_AT_ONCE).enumerate() {
            let (gate, up) = (&mut gate[..rows.len()], &mut up[..rows.len()]);
            for index in strips.clone() {
                self.strip(&matrix.strip(2 * index), rows, gate);
                self.strip(&matrix.strip(2 * index + 1), rows, up);
                // SAFETY: `all` gives only what this processor can run.
                unsafe { (self.swiglu)(gate, up) };
                let columns = index * STRIP..((index + 1) * STRIP).min(outputs);
                write(gate, chunk * ROWS_AT_ONCE, columns, out);
            }
        }
        Ok(())
    }

    /// A matrix of 4 or 8 bits from its weights, in superblocks of the layout's size. False where a weight is not finite;
    /// what was written by then is of no use. An error says which sizes disagree.
    pub fn round(&self, weights: Weights, layout: Layout, mut out: Rounded) -> Result<bool, Error> {
        round::check(&weights, layout, &out)?;
        // SAFETY: `all` gives only what this processor can run.
        Ok((0..layout.strips()).all(|strip| unsafe { (self.round)(&weights, layout, strip, &mut out) }))
    }

    /// The scores [E] of one token x [K] against router weights [E, K]. `sparse_mixer` then chooses.
    pub fn router_scores(&self, x: &[f32], weights: &[f32], scores: &mut [f32]) -> Result<(), Error> {
        if x.is_empty() || weights.len() != x.len() * scores.len() {
            return Err(Error::new(format!(
                "{} router weights for {} experts and {} inputs",
                weights.len(),
                scores.len(),
                x.len()
            )));
        }
        // SAFETY: `all` gives only what this processor can run.
        unsafe { (self.router_scores)(x, weights, scores) };
        Ok(())
    }

    /// y = fma(p2, second, p1 * first): the two experts' outputs, weighted.
    pub fn weighted_sum(&self, first: &[f32], p1: f32, second: &[f32], p2: f32, y: &mut [f32]) -> Result<(), Error> {
        if first.len() != y.len() || second.len() != y.len() {
            return Err(Error::new(format!("{} and {} floats into {}", first.len(), second.len(), y.len())));
        }
        // SAFETY: `all` gives only what this processor can run.
        unsafe { (self.weighted_sum)(first, p1, second, p2, y) };
        Ok(())
    }
}

fn check(matrix: &Matrix, rows: &[Row]) -> Result<(), Error> {
    let expected = (matrix.layout().in_features(), matrix.layout().superblock_size());
    for row in rows {
        let found = (row.in_features, row.superblock_size);
        if found != expected {
            return Err(Error::new(format!(
                "a row of {} inputs in superblocks of {}; the matrix has {} in superblocks of {}",
                found.0, found.1, expected.0, expected.1
            )));
        }
    }
    Ok(())
}

/// The part must hold the strips' columns of that many rows, from row 0 on.
fn check_part(strips: &Range<usize>, outputs: usize, rows: &[Row], out: &Part) -> Result<(), Error> {
    if strips.start > strips.end || strips.end > outputs.div_ceil(STRIP) {
        return Err(Error::new(format!("strips {strips:?} of {}", outputs.div_ceil(STRIP))));
    }
    let columns = strips.start * STRIP..(strips.end * STRIP).min(outputs);
    let (has, part) = (out.rows(), out.columns());
    if has.len() < rows.len() || part.start > columns.start || part.end < columns.end {
        return Err(Error::new(format!(
            "{} rows of columns {columns:?} do not fit a part of {} rows of columns {part:?}",
            rows.len(),
            has.len()
        )));
    }
    Ok(())
}

/// Writes a strip's sums from the part's row `first` on.
fn write(sums: &[[f32; STRIP]], first: usize, columns: Range<usize>, out: &mut Part) {
    let first = out.rows().start + first;
    for (index, sums) in sums.iter().enumerate() {
        out.row(first + index, columns.clone()).copy_from_slice(&sums[..columns.len()]);
    }
}
