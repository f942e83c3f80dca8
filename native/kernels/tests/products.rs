//! Products: plain against double precision, and every set of kernels against plain, to the last bit.

mod common;

use common::{Random, Weights, bits};
use phimoe_kernels::{Expert, Kernels, Layout, Matrix, Output, QuantizedRows, Row, default_superblock_size};

const BITS: [u32; 4] = [2, 3, 4, 8];

fn multiply(kernels: &Kernels, matrix: &Matrix, rows: &[Row]) -> Vec<f32> {
    let outputs = matrix.layout().out_features();
    let mut y = vec![f32::NAN; rows.len() * outputs];
    let mut output = Output::new(&mut y, rows.len(), outputs, outputs).unwrap();
    kernels.multiply(matrix, 0..matrix.layout().strips(), rows, None, &mut output.whole()).unwrap();
    y
}

fn all_rows(quantized: &QuantizedRows) -> Vec<Row<'_>> {
    quantized.iter().collect()
}

fn quantize(x: &[f32], rows: usize, layout: Layout) -> QuantizedRows {
    Kernels::plain().quantize(x, rows, layout.in_features(), layout.superblock_size()).unwrap()
}

/// Rows of common sizes, one of zeros, one with outliers, one tiny.
fn rows(random: &mut Random, rows: usize, in_features: usize) -> Vec<f32> {
    let mut x = random.floats(rows * in_features);
    for (index, row) in x.chunks_mut(in_features).enumerate() {
        match index % 5 {
            1 => row.iter_mut().step_by(17).for_each(|x| *x *= 50.0),
            2 => row.fill(0.0),
            3 => row.iter_mut().for_each(|x| *x *= 1e-20),
            _ => {}
        }
    }
    x
}

#[test]
fn plain_agrees_with_double_precision() {
    let mut random = Random(1);
    for width in BITS {
        for (k, n) in [(32, 16), (96, 20), (160, 33), (448, 16), (960, 20), (4096, 16), (6400, 16)] {
            let weights = Weights::random(&mut random, width, k, n);
            let x = rows(&mut random, 5, k);
            let quantized = quantize(&x, 5, weights.layout);
            let y = multiply(Kernels::plain(), &weights.matrix(), &all_rows(&quantized));
            for (r, row) in quantized.iter().enumerate() {
                for output in 0..n {
                    let (mut sum, mut magnitude) = (0.0, 0.0);
                    for input in 0..k {
                        let weight = f64::from(weights.scale(output, input) * weights.integer(output, input) as f32);
                        let a = f64::from(row.scales()[input / weights.layout.superblock_size()]);
                        let q = a * f64::from(row.values()[input]);
                        let exact = f64::from(x[r * k + input]);
                        sum += weight * q;
                        magnitude += (weight * q).abs();
                        // Half a step, and what float32 loses in 127 / m and m / 127.
                        assert!((q - exact).abs() <= a * 0.501, "{width} bits, {k} inputs: {exact} became {q}");
                    }
                    let found = f64::from(y[r * n + output]);
                    assert!((found - sum).abs() <= 1e-6 * magnitude, "{width} bits, {k} inputs: {found} for {sum}");
                }
            }
        }
    }
}

#[test]
fn every_kernel_gives_the_bits_of_plain() {
    let mut random = Random(2);
    for width in BITS {
        for (k, n, many) in [
            (1, 1, 2),
            (32, 16, 5),
            (96, 20, 3),
            (160, 33, 64),
            (192, 20, 7),
            (448, 20, 513),
            (960, 48, 5),
            (4096, 40, 6),
            (6400, 16, 3),
        ] {
            let weights = Weights::random(&mut random, width, k, n);
            let matrix = weights.matrix();
            let quantized = quantize(&rows(&mut random, many, k), many, weights.layout);
            let rows = all_rows(&quantized);
            let expected = multiply(Kernels::plain(), &matrix, &rows);
            for kernels in Kernels::all() {
                for count in [1, 2, 3, 4, 5, 11, many].into_iter().filter(|count| *count <= many) {
                    let found = multiply(kernels, &matrix, &rows[..count]);
                    let name = kernels.name();
                    assert!(bits(&found) == bits(&expected[..count * n]), "{name}, {width} bits, [{n}, {k}], {count}");
                }
                for (index, row) in rows.iter().enumerate().take(20) {
                    let alone = multiply(kernels, &matrix, &[*row]);
                    assert_eq!(bits(&alone), bits(&expected[index * n..][..n]), "{} row {index}", kernels.name());
                }
            }
        }
    }
}

/// However rows are cut into parts.
#[test]
fn any_number_of_rows_gives_the_bits_of_plain() {
    let mut random = Random(7);
    for width in BITS {
        let weights = Weights::random(&mut random, width, 128, 16);
        let quantized = quantize(&rows(&mut random, 33, 128), 33, weights.layout);
        let rows = all_rows(&quantized);
        let expected = multiply(Kernels::plain(), &weights.matrix(), &rows);
        for kernels in Kernels::all() {
            for count in 1..=33 {
                let found = multiply(kernels, &weights.matrix(), &rows[..count]);
                assert_eq!(bits(&found), bits(&expected[..count * 16]), "{}, {width} bits, {count}", kernels.name());
            }
        }
    }
}

#[test]
fn a_large_matrix_gives_the_bits_of_plain() {
    let mut random = Random(3);
    let weights = Weights::random(&mut random, 4, 4096, 2048);
    let quantized = quantize(&rows(&mut random, 2, 4096), 2, weights.layout);
    let rows = all_rows(&quantized);
    let expected = multiply(Kernels::plain(), &weights.matrix(), &rows);
    for kernels in Kernels::all() {
        assert_eq!(bits(&multiply(kernels, &weights.matrix(), &rows)), bits(&expected), "{}", kernels.name());
        assert_eq!(bits(&multiply(kernels, &weights.matrix(), &rows[..1])), bits(&expected[..2048]));
    }
}

#[test]
fn the_largest_sums_are_exact() {
    for width in BITS {
        let k = 1024;
        let layout = Layout::new(width, k, 16, 1024).unwrap();
        let (lowest, highest) = if width == 8 { (0x81, 0x7f) } else { (0, (1 << width) - 1) };
        let blocks = if width == 8 { 0 } else { 16 * k / 32 };
        for code in [lowest, highest] {
            let weights = Weights::new(layout, vec![code; 16 * k], vec![15; blocks], vec![0x3f80; 16]);
            for pattern in [[1.0; 4], [-1.0; 4], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]] {
                let x: Vec<f32> = (0..k).map(|input| 127.0 * pattern[input % 4]).collect();
                let quantized = quantize(&x, 1, layout);
                let sum: i32 = (0..k).map(|i| weights.integer(0, i) * i32::from(quantized.row(0).values()[i])).sum();
                for kernels in Kernels::all() {
                    let y = multiply(kernels, &weights.matrix(), &[quantized.row(0)]);
                    assert_eq!(y, [sum as f32; 16], "{} with {width} bits", kernels.name());
                    let y = multiply(kernels, &weights.matrix(), &[quantized.row(0); 11]);
                    assert_eq!(y, [sum as f32; 176], "{} with {width} bits", kernels.name());
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_reaches_its_row_alone() {
    let mut random = Random(4);
    for width in BITS {
        let mut weights = Weights::random(&mut random, width, 1024, 32);
        let mut x = random.floats(4 * 1024);
        x[5] = f32::NAN;
        x[1024 + 700] = f32::INFINITY;
        x[3 * 1024 + 1023] = f32::NEG_INFINITY;
        let quantized = quantize(&x, 4, weights.layout);
        let expected = multiply(Kernels::plain(), &weights.matrix(), &all_rows(&quantized));
        for (row, y) in expected.chunks(32).enumerate() {
            assert!(y.iter().all(|y| y.is_nan() == (row != 2)), "row {row}");
        }
        // Mutated bytes: any scale and any code is a number or NaN, everywhere the same.
        for byte in &mut weights.bytes {
            *byte = random.next() as u8;
        }
        let mutated = multiply(Kernels::plain(), &weights.matrix(), &all_rows(&quantized));
        for kernels in Kernels::all() {
            assert_eq!(bits(&multiply(kernels, &weights.matrix(), &all_rows(&quantized))), bits(&mutated));
        }
    }
}

#[test]
fn parts_and_bias() {
    let mut random = Random(5);
    let weights = Weights::random(&mut random, 4, 96, 40);
    let quantized = quantize(&rows(&mut random, 7, 96), 7, weights.layout);
    let rows = all_rows(&quantized);
    let bias = random.floats(40);
    let mut expected = multiply(Kernels::plain(), &weights.matrix(), &rows);
    for y in expected.chunks_mut(40) {
        y.iter_mut().zip(&bias).for_each(|(y, bias)| *y += bias);
    }
    for kernels in Kernels::all() {
        let mut y = vec![7.0; 9 * 50];
        let output = Output::new(&mut y, 9, 40, 50).unwrap();
        std::thread::scope(|scope| {
            for (strips, columns) in [(0..1, 0..16), (1..3, 16..40)] {
                let (output, rows, weights, bias) = (&output, &rows, &weights, &bias);
                scope.spawn(move || {
                    // SAFETY: the two parts have no column in common.
                    let mut part = unsafe { output.part(1..8, columns) };
                    kernels.multiply(&weights.matrix(), strips, rows, Some(bias), &mut part).unwrap();
                });
            }
        });
        for (row, y) in y.chunks(50).enumerate() {
            let inside = (1..8).contains(&row);
            let expected = if inside { bits(&expected[(row - 1) * 40..][..40]) } else { bits(&[7.0; 40]) };
            assert_eq!(bits(&y[..40]), expected, "{} row {row}", kernels.name());
            assert_eq!(y[40..], [7.0; 10], "{} row {row}", kernels.name());
        }
    }
}

#[test]
fn gate_up_is_silu_of_gate_times_up() {
    let mut random = Random(6);
    for (hidden, intermediate) in [(96, 20), (160, 48), (4096, 32)] {
        let gate = Weights::random(&mut random, 4, hidden, intermediate);
        let up = Weights::random(&mut random, 4, hidden, intermediate);
        let down = Weights::random(&mut random, 4, intermediate, hidden);
        let mut bytes = Vec::new();
        for (gate, up) in gate.bytes.chunks(gate.layout.strip_bytes()).zip(up.bytes.chunks(gate.layout.strip_bytes())) {
            bytes.extend_from_slice(gate);
            bytes.extend_from_slice(up);
        }
        bytes.extend_from_slice(&down.bytes);
        let expert = Expert::new(gate.layout, down.layout, &bytes).unwrap();
        let quantized = quantize(&rows(&mut random, 131, hidden), 131, gate.layout);
        let rows = all_rows(&quantized);
        let run = |kernels: &Kernels, rows: &[Row]| {
            let mut h = vec![f32::NAN; rows.len() * intermediate];
            let mut output = Output::new(&mut h, rows.len(), intermediate, intermediate).unwrap();
            let strips = 0..intermediate.div_ceil(16);
            kernels.gate_up(&expert, strips, rows, &mut output.whole()).unwrap();
            h
        };
        let expected = run(Kernels::plain(), &rows);
        let gates = multiply(Kernels::plain(), &gate.matrix(), &rows);
        let ups = multiply(Kernels::plain(), &up.matrix(), &rows);
        for ((h, gate), up) in expected.iter().zip(gates).zip(ups) {
            let exact = f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up);
            // Below -88.7 the exponential is infinite and silu 0 instead of 1e-36 and less.
            let tolerance = 5e-7 * exact.abs() + 1e-36 * f64::from(up.abs()) + f64::from(f32::from_bits(2));
            assert!((f64::from(*h) - exact).abs() <= tolerance, "{h} for {exact}");
        }
        for kernels in Kernels::all() {
            assert_eq!(bits(&run(kernels, &rows)), bits(&expected), "{}", kernels.name());
            assert_eq!(bits(&run(kernels, &rows[..1])), bits(&expected[..intermediate]), "{}", kernels.name());
        }
        assert_eq!(expert.down().layout(), down.layout);
        let one = quantize(&vec![0.5; intermediate], 1, down.layout);
        let found = multiply(Kernels::plain(), &expert.down(), &[one.row(0)]);
        assert_eq!(found, multiply(Kernels::plain(), &down.matrix(), &[one.row(0)]));
    }
}

#[test]
fn shapes_that_disagree_are_errors() {
    let kernels = Kernels::detect().unwrap();
    let layout = Layout::new(4, 128, 20, 64).unwrap();
    let bytes = vec![0; layout.bytes()];
    let matrix = Matrix::new(layout, &bytes).unwrap();
    let mut y = [0.0; 40];
    let mut output = Output::new(&mut y, 2, 20, 20).unwrap();
    let good = kernels.quantize(&[0.0; 256], 2, 128, 64).unwrap();
    let other = kernels.quantize(&[0.0; 128], 1, 128, 128).unwrap();
    let part = &mut output.whole();
    let text = |result: Result<(), phimoe_kernels::Error>| result.unwrap_err().to_string();
    assert!(text(kernels.multiply(&matrix, 0..2, &[other.row(0)], None, part)).contains("superblocks of 128"));
    assert!(text(kernels.multiply(&matrix, 0..3, &[good.row(0)], None, part)).contains("strips 0..3 of 2"));
    assert!(text(kernels.multiply(&matrix, 0..2, &[good.row(0); 3], None, part)).contains("3 rows"));
    assert!(text(kernels.multiply(&matrix, 0..2, &[good.row(0)], Some(&[0.0; 19]), part)).contains("19"));
    assert!(kernels.quantize(&[0.0; 127], 1, 128, 64).is_err());
    assert!(kernels.router_scores(&[0.0; 4], &[0.0; 9], &mut [0.0; 2]).is_err());
    assert!(Output::new(&mut [0.0; 39], 2, 20, 20).is_err());
    assert!(Output::new(&mut [0.0; 39], 2, 20, 19).is_err());
    assert!(Output::new(&mut [0.0; 39], usize::MAX, 20, usize::MAX).is_err());
    assert_eq!(default_superblock_size(6400), 320);
}
