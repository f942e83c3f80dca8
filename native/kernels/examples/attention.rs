//! Time of attention by one thread: `cargo run --release --example attention`. Sizes of Phi-mini-MoE: four queries share
//! the keys of a head of 128.

use std::time::Instant;

use phimoe_kernels::{Head, Kernels};

fn main() -> Result<(), phimoe_kernels::Error> {
    let (size, group) = (128, 4);
    let kernels = Kernels::detect()?;
    for (past, tokens) in [(511, 1), (2047, 1), (504, 8)] {
        let length = past + tokens;
        let numbers = |count: usize| (0..count).map(|i| (i % 97) as f32 / 97.0).collect::<Vec<_>>();
        let (keys, values, queries) = (numbers(length * size), numbers(length * size), numbers(tokens * group * size));
        let spans: Vec<_> = (0..tokens * group).map(|row| 0..past + row / group + 1).collect();
        let (mut scratch, mut out) = (Vec::new(), vec![0.0; queries.len()]);
        let head = Head::new(size, 0.1, &keys, &values)?;
        let mut best = f64::INFINITY;
        for _ in 0..300 {
            let start = Instant::now();
            kernels.attend(&head, &queries, &spans, &mut scratch, &mut out)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        let operations = 4.0 * (size * length * tokens * group) as f64;
        let bytes = 8.0 * (size * length) as f64;
        println!(
            "{past} + {tokens} tokens: {:.1} us, {:.1} G operations/s, {:.1} GB/s",
            best * 1e6,
            operations / best / 1e9,
            bytes / best / 1e9
        );
    }
    Ok(())
}
