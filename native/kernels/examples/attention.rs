//! Time of attention by one thread: `cargo run --release --example attention`. Sizes of Phi-mini-MoE: four queries share
//! the keys of a head of 128. Medians: of one head again and again, and of many that lie in memory.

use std::time::Instant;

use phimoe_kernels::{Cached, Half, Head, Kernels};

/// Bytes of all heads that are met once each: more than all caches hold.
const MEMORY: usize = 256 << 20;

fn main() -> Result<(), phimoe_kernels::Error> {
    let kernels = Kernels::detect()?;
    for (past, tokens) in [(31, 1), (511, 1), (2047, 1), (504, 8)] {
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
    let heads = (MEMORY / (2 * length * size * size_of::<E>())).max(1);
    let numbers = |count: usize| (0..count).map(|i| (i % 97) as f32 / 97.0);
    let (keys, values): (Vec<E>, Vec<E>) = numbers(heads * length * size).map(|x| (cached(x), cached(x))).unzip();
    let queries: Vec<f32> = numbers(tokens * group * size).collect();
    let spans: Vec<_> = (0..tokens * group).map(|row| 0..past + row / group + 1).collect();
    let (mut scratch, mut out) = (Vec::new(), vec![0.0; queries.len()]);
    let mut seconds = |heads: &mut dyn Iterator<Item = usize>| -> Result<f64, phimoe_kernels::Error> {
        let mut all = Vec::new();
        for head in heads {
            let own = head * length * size..(head + 1) * length * size;
            let head = Head::new(size, 0.1, &keys[own.clone()], &values[own])?;
            let start = Instant::now();
            kernels.attend(&head, &queries, &spans, &mut scratch, &mut out)?;
            all.push(start.elapsed().as_secs_f64());
        }
        all.sort_by(f64::total_cmp);
        Ok(all[all.len() / 2])
    };
    let (again, fresh) = (seconds(&mut std::iter::repeat_n(0, 300))?, seconds(&mut (0..heads))?);
    let operations = 4.0 * (size * length * tokens * group) as f64;
    let bytes = (2 * size * length * size_of::<E>()) as f64;
    for (where_, seconds) in [("caches", again), ("memory", fresh)] {
        println!(
            "{past} + {tokens} tokens over {name} from {where_}: {:.1} us, {:.1} G operations/s, {:.1} GB/s",
            seconds * 1e6,
            operations / seconds / 1e9,
            bytes / seconds / 1e9
        );
    }
    Ok(())
}
