//! Products of few-bit matrices with signed bytes, and the small operations around them in a mixture of experts.
//!
//! `../FORMAT.md` says how weights lie in memory and which bits every kernel gives. This crate knows nothing of ONNX
//! Runtime, starts no threads and keeps no state: a caller cuts the work into strips and calls from any thread.
//!
//! ```
//! use phimoe_kernels::{Kernels, Layout, Matrix, Output, QuantizedRows};
//!
//! let layout = Layout::new(4, 64, 20, 64)?;
//! let bytes = vec![0; layout.bytes()]; // in a program: a mapped file
//! let matrix = Matrix::new(layout, &bytes)?;
//! let kernels = Kernels::detect()?;
//! let rows = kernels.quantize(&[1.0; 64], 1, 64, 64)?;
//! let mut y = vec![0.0; 20];
//! let mut output = Output::new(&mut y, 1, 20, 20)?;
//! kernels.multiply(&matrix, 0..layout.strips(), &[rows.row(0)], None, &mut output.whole())?;
//! # Ok::<(), phimoe_kernels::Error>(())
//! ```

mod activations;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
mod elementwise;
mod error;
mod exp;
mod format;
#[cfg(all(test, unix))]
mod guarded;
mod half;
mod kernels;
mod memory;
mod mixer;
#[cfg(target_arch = "aarch64")]
mod neon;
mod output;
mod pack;
mod plain;
mod round;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tiling;

pub use activations::{QuantizedRows, Row};
pub use attention::{Cached, Head, check_size};
pub use error::Error;
pub use exp::exp;
pub use format::{Expert, Layout, Matrix, STRIP, Strip, default_superblock_size};
pub use half::Half;
pub use kernels::Kernels;
pub use mixer::sparse_mixer;
pub use output::{Output, Part};
pub use pack::pack;
pub use round::{Rounded, Weights};
