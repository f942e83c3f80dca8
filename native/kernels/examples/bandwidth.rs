//! How near the products of a decode step come to a plain read of the same bytes, and how fast those of a prefill are.
//!
//!     cargo run --release --example bandwidth -- WEIGHTS_FILE [BITS]
//!
//! The shape is Phi-mini's, cut to 8 layers: hidden size 4096, 16 experts of 960. The file is written once, with seeded
//! bytes, and mapped. Rounds alternate between reading and computing; printed are medians of 9 rounds.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Barrier;
use std::time::Instant;

use phimoe_kernels::{Expert, Kernels, Layout, Matrix, Output, QuantizedRows, default_superblock_size};

const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 960;
const LAYERS: usize = 8;
const EXPERTS: usize = 16;
const VOCABULARY: usize = 32064;
const TOKENS: usize = 12;
const ROUNDS: usize = 9;

/// One product of a step: where its bytes are, and the share of one thread of two.
enum Work {
    Matrix(Layout, usize),
    Expert(usize),
}

fn layout(bits: u32, inputs: usize, outputs: usize) -> Layout {
    Layout::new(bits, inputs, outputs, default_superblock_size(inputs)).unwrap()
}

struct Model {
    qkv: Layout,
    o: Layout,
    gate: Layout,
    down: Layout,
    head: Layout,
    bytes: &'static [u8],
}

impl Model {
    fn expert_bytes(&self) -> usize {
        Expert::bytes(self.gate, self.down).unwrap()
    }

    fn layer_bytes(&self) -> usize {
        self.qkv.bytes() + self.o.bytes() + EXPERTS * self.expert_bytes()
    }

    fn size(&self) -> usize {
        LAYERS * self.layer_bytes() + self.head.bytes()
    }

    /// The products of one token, which takes experts at random.
    fn step(&self, token: usize) -> Vec<Work> {
        let mut work = Vec::new();
        for layer in 0..LAYERS {
            let at = layer * self.layer_bytes();
            work.push(Work::Matrix(self.qkv, at));
            work.push(Work::Matrix(self.o, at + self.qkv.bytes()));
            let first = (token * 7 + layer * 5) % EXPERTS;
            for expert in [first, (first + 1 + (token * 3 + layer) % (EXPERTS - 1)) % EXPERTS] {
                work.push(Work::Expert(at + self.qkv.bytes() + self.o.bytes() + expert * self.expert_bytes()));
            }
        }
        work.push(Work::Matrix(self.head, LAYERS * self.layer_bytes()));
        work
    }

    fn expert(&self, at: usize) -> Expert<'static> {
        Expert::new(self.gate, self.down, &self.bytes[at..][..self.expert_bytes()]).unwrap()
    }

    fn work_bytes(&self, work: &Work) -> (usize, usize) {
        match work {
            Work::Matrix(layout, at) => (*at, layout.bytes()),
            Work::Expert(at) => (*at, self.expert_bytes()),
        }
    }
}

fn map(path: &str, size: usize) -> &'static [u8] {
    if std::fs::metadata(path).map_or(0, |data| data.len()) < size as u64 {
        eprintln!("writing {:.1} GB to {path}", size as f64 / 1e9);
        let mut file = File::create(path).unwrap();
        let mut state = 1_u64;
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..size.div_ceil(chunk.len()) {
            for byte in &mut chunk {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (state >> 56) as u8 & 0x37; // as a scale: a number
            }
            file.write_all(&chunk).unwrap();
        }
        file.sync_all().unwrap();
    }
    let file = File::open(path).unwrap();
    // SAFETY: a new mapping of a file that nobody changes; it is never unmapped.
    unsafe {
        let map = libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(map, libc::MAP_FAILED);
        std::slice::from_raw_parts(map.cast(), size)
    }
}

fn read(bytes: &[u8]) -> u64 {
    bytes.as_chunks::<64>().0.iter().fold([0_u64; 8], |mut sums, chunk| {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
        sums
    })[0]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds that `threads` threads take for `work(thread)`.
fn time(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let start = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
    start.elapsed().as_secs_f64()
}

fn share(count: usize, thread: usize, threads: usize) -> std::ops::Range<usize> {
    count * thread / threads..count * (thread + 1) / threads
}

fn decode(model: &Model, kernels: &Kernels, threads: usize) {
    let steps: Vec<_> = (0..TOKENS).map(|token| model.step(token)).collect();
    let bytes: usize = steps.iter().flatten().map(|work| model.work_bytes(work).1).sum();
    let x = kernels.quantize(&vec![0.5; HIDDEN], 1, HIDDEN, model.qkv.superblock_size()).unwrap();
    let h = kernels.quantize(&vec![0.5; INTERMEDIATE], 1, INTERMEDIATE, model.down.superblock_size()).unwrap();
    let barrier = Barrier::new(threads);
    let reading = || {
        time(threads, |thread| {
            for work in steps.iter().flatten() {
                let (at, size) = model.work_bytes(work);
                let share = share(size / 64, thread, threads);
                std::hint::black_box(read(&model.bytes[at + share.start * 64..at + share.end * 64]));
            }
        })
    };
    let computing = || {
        let mut y = vec![0.0; VOCABULARY];
        let output = Output::new(&mut y, 1, VOCABULARY, VOCABULARY).unwrap();
        time(threads, |thread| {
            let multiply = |matrix: &Matrix, row| {
                let strips = share(matrix.layout().strips(), thread, threads);
                // SAFETY: the threads' shares have no column in common.
                let mut part = unsafe { output.part(0..1, strips.start * 16..strips.end * 16) };
                kernels.multiply(matrix, strips, &[row], None, &mut part).unwrap();
                barrier.wait();
            };
            for work in steps.iter().flatten() {
                match work {
                    Work::Matrix(layout, at) => {
                        let matrix = Matrix::new(*layout, &model.bytes[*at..][..layout.bytes()]).unwrap();
                        multiply(&matrix, x.row(0));
                    }
                    Work::Expert(at) => {
                        let expert = model.expert(*at);
                        let strips = share(INTERMEDIATE / 16, thread, threads);
                        // SAFETY: the threads' shares have no column in common.
                        let mut part = unsafe { output.part(0..1, strips.start * 16..strips.end * 16) };
                        kernels.gate_up(&expert, strips, &[x.row(0)], &mut part).unwrap();
                        barrier.wait();
                        multiply(&expert.down(), h.row(0));
                    }
                }
            }
        })
    };
    let (mut read, mut computed, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (before, products, after) = (reading(), computing(), reading());
        let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
        read.push(rate((before + after) / 2.0));
        computed.push(rate(products));
        ratio.push((before + after) / 2.0 / products);
    }
    let tokens = median(computed.clone()) * 1e9 / (bytes as f64 / TOKENS as f64);
    println!(
        "decode, {threads} threads: read {:.1} GB/s, products {:.1} GB/s ({tokens:.1} tokens/s), {:.0} % of reading",
        median(read),
        median(computed),
        100.0 * median(ratio)
    );
}

fn prefill(model: &Model, kernels: &Kernels, rows: usize, threads: usize) {
    let expert = model.expert(model.qkv.bytes() + model.o.bytes());
    let matrix = expert.gate_up();
    let mut x: Vec<f32> = (0..rows * HIDDEN).map(|i| (i % 251) as f32 - 125.0).collect();
    x[0] = 3.0;
    let quantized: QuantizedRows = kernels.quantize(&x, rows, HIDDEN, matrix.layout().superblock_size()).unwrap();
    let rows: Vec<_> = quantized.iter().collect();
    let outputs = matrix.layout().out_features();
    let mut y = vec![0.0; rows.len() * outputs];
    let output = Output::new(&mut y, rows.len(), outputs, outputs).unwrap();
    let operations = 2.0 * (rows.len() * outputs * HIDDEN) as f64;
    let rates = (0..ROUNDS).map(|_| {
        let seconds = time(threads, |thread| {
            let strips = share(matrix.layout().strips(), thread, threads);
            // SAFETY: the threads' shares have no column in common.
            let mut part = unsafe { output.part(0..rows.len(), strips.start * 16..strips.end * 16) };
            kernels.multiply(&matrix, strips, &rows, None, &mut part).unwrap();
        });
        operations / seconds / 1e9
    });
    println!("prefill, {threads} threads, {} rows: {:.0} G operations/s", rows.len(), median(rates.collect()));
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().expect("a file for the weights, 0.7 GB for each bit");
    let bits = arguments.next().map_or(4, |bits| bits.parse().expect("2, 3, 4 or 8 bits"));
    let kernels = Kernels::detect().unwrap_or_else(|error| panic!("{error}"));
    let mut model = Model {
        qkv: layout(bits, HIDDEN, 6144),
        o: layout(bits, HIDDEN, HIDDEN),
        gate: layout(bits, HIDDEN, INTERMEDIATE),
        down: layout(bits, INTERMEDIATE, HIDDEN),
        head: layout(bits, HIDDEN, VOCABULARY),
        bytes: &[],
    };
    model.bytes = map(&path, model.size());
    std::hint::black_box(read(model.bytes));
    println!("{} kernels, {bits} bits", kernels.name());
    for threads in [1, 2] {
        decode(&model, kernels, threads);
    }
    for threads in [1, 2] {
        for rows in [1, 2, 4, 8, 32, 64, 512] {
            prefill(&model, kernels, rows, threads);
        }
    }
}
