//! Time of attention by one thread: `cargo run --release --example attention`. Sizes of Phi-mini-MoE: four queries share
//! the keys of a head of 128.

use std::time::Instant;

use phimoe_kernels::{Cached, Half, Head, Kernels};

fn main() -> Result<(), phimoe_kernels::Error> {
    let kernels = Kernels::detect()?;
    for (past, tokens) in [(511, 1), (2047, 1), (504, 8)] {
        time("float32", kernels, past, tokens, |x| x)?;
        time("float16", kernels, past, tokens, Half::from_f32)?;
        time("int8", kernels, past, tokens, |x| (127.0 * x) as i8)?;
    }
    Ok(())
}

fn time<E: Cached>(
    name: &str,
    kernels: &Kernels,
    past: usize,
    tokens: usize,
    cached: impl Fn(f32) -> E,
) -> Result<(), phimoe_kernels::Error> {
    let (size, group) = (128, 4);
    let length = past + tokens;
    let numbers = |count: usize| (0..count).map(|i| (i % 97) as f32 / 97.0);
    let (keys, values): (Vec<E>, Vec<E>) = numbers(length * size).map(|x| (cached(x), cached(x))).unzip();
    let queries: Vec<f32> = numbers(tokens * group * size).collect();
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
    let bytes = (2 * size * length * size_of::<E>()) as f64;
    println!(
        "{past} + {tokens} tokens over {name}: {:.1} us, {:.1} G operations/s, {:.1} GB/s",
        best * 1e6,
        operations / best / 1e9,
        bytes / best / 1e9
    );
    Ok(())
}
