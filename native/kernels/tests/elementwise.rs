//! What stands around the products, against double precision and against plain, to the last bit.

mod common;

use common::{Random, bits};
use phimoe_kernels::{Kernels, exp, sparse_mixer};

/// How many floats lie between.
fn ulps(found: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    let step = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
    (f64::from(found) - exact).abs() / step
}

#[test]
fn exp_is_off_by_less_than_two_units() {
    let mut worst = 0.0_f64;
    for step in (-1_040_000..887_200).step_by(16) {
        let x = std::array::from_fn(|lane| (step + lane as i32) as f32 * 1e-4);
        for (x, found) in x.into_iter().zip(exp(x)) {
            worst = worst.max(ulps(found, f64::from(x).exp()));
        }
    }
    assert!(worst < 2.0, "{worst}");
    let special =
        [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 88.73, 1e30, -1e30, -104.1, f32::MIN_POSITIVE];
    let mut x = [0.0; 16];
    x[..10].copy_from_slice(&special);
    let infinite = f32::INFINITY;
    assert_eq!(bits(&exp(x)[..10]), bits(&[1.0, 1.0, f32::NAN, infinite, 0.0, infinite, infinite, 0.0, 0.0, 1.0]));
}

#[test]
fn rows_are_rounded_as_the_format_says() {
    let mut random = Random(1);
    for (k, size) in [(1, 64), (31, 64), (96, 128), (160, 64), (960, 320), (1024, 1024), (4096, 512)] {
        let mut x = random.floats(9 * k);
        x[k..2 * k].fill(0.0);
        x[2 * k..3 * k].iter_mut().for_each(|x| *x *= 3e38);
        x[3 * k..4 * k].iter_mut().for_each(|x| *x *= 1e-36);
        x[4 * k..5 * k].iter_mut().for_each(|x| *x *= 1e-37);
        x[5 * k] = f32::NAN;
        x[7 * k - 1] = f32::INFINITY;
        x[8 * k - 1] = f32::NEG_INFINITY;
        x[8 * k..].iter_mut().for_each(|x| *x = (*x * 254.0).round() / 2.0); // halves, where m is 127
        x[8 * k] = 127.0;
        let inputs = k.next_multiple_of(64);
        for kernels in Kernels::all() {
            let quantized = kernels.quantize(&x, 9, k, size).unwrap();
            for (index, row) in quantized.iter().enumerate() {
                assert_eq!((row.values().len(), row.scales().len()), (inputs, inputs / size));
                assert!(row.values()[k..].iter().all(|q| *q == 0));
                for (q, correction) in row.values().chunks(32).zip(row.corrections()) {
                    let sum =
                        |pair: usize| -> i16 { (0..32).filter(|j| j % 4 / 2 == pair).map(|j| i16::from(q[j])).sum() };
                    assert_eq!(*correction, [-8 * sum(0), -8 * sum(1)]);
                }
                for (q, start) in row.values().chunks(size).zip(row.starts()) {
                    assert_eq!(*start, -128 * q.iter().map(|q| i32::from(*q)).sum::<i32>());
                }
                for (g, x) in x[index * k..][..k].chunks(size).enumerate() {
                    let q = &row.values()[g * size..][..x.len()];
                    let m = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                    if x.iter().any(|x| !x.is_finite()) {
                        assert!(row.scales()[g].is_nan() && q.iter().all(|q| *q == 0));
                    } else if m < 2.0_f32.powi(-120) {
                        assert!(row.scales()[g] == 0.0 && q.iter().all(|q| *q == 0));
                    } else {
                        assert_eq!(row.scales()[g], m / 127.0);
                        for (x, q) in x.iter().zip(q) {
                            assert_eq!((x * (127.0 / m)).round_ties_even(), f32::from(*q), "{} {x}", kernels.name());
                        }
                    }
                }
            }
            // Comparing by text, as NaN is not itself; corrections and starts are part of it.
            let plain = Kernels::plain().quantize(&x, 9, k, size).unwrap();
            assert!(format!("{quantized:?}") == format!("{plain:?}"), "{} {k}", kernels.name());
            // Over rows that held something else.
            let mut again = kernels.quantize(&vec![f32::NAN; 9 * k], 9, k, size).unwrap();
            kernels.quantize_into(&x, &mut again).unwrap();
            assert!(format!("{again:?}") == format!("{plain:?}"), "{} {k}", kernels.name());
        }
    }
}

#[test]
fn scores_of_the_router() {
    let mut random = Random(2);
    for (experts, k) in [(2, 1), (16, 4096), (5, 96), (7, 33), (4, 15)] {
        let (x, weights) = (random.floats(k), random.floats(experts * k));
        let run = |kernels: &Kernels| {
            let mut scores = vec![f32::NAN; experts];
            kernels.router_scores(&x, &weights, &mut scores).unwrap();
            scores
        };
        let expected = run(Kernels::plain());
        for (e, score) in expected.iter().enumerate() {
            let products = x.iter().zip(&weights[e * k..]).map(|(x, w)| f64::from(*x) * f64::from(*w));
            let (sum, magnitude) = products.fold((0.0, 0.0), |(sum, magnitude), p| (sum + p, magnitude + p.abs()));
            assert!((f64::from(*score) - sum).abs() <= 1e-6 * magnitude, "{score} for {sum}");
        }
        for kernels in Kernels::all() {
            assert_eq!(bits(&run(kernels)), bits(&expected), "{}", kernels.name());
        }
    }
    // The order of the sum by hand: lanes 0 and 8 meet first, so that 2 ** 24 takes 1 twice, and not 2 once.
    let mut x = vec![0.0; 48];
    (x[0], x[8], x[16], x[32]) = (16_777_216.0, -16_777_216.0, 1.0, 1.0);
    for kernels in Kernels::all() {
        let mut score = [f32::NAN];
        kernels.router_scores(&x, &[1.0; 48], &mut score).unwrap();
        assert_eq!(score, [0.0], "{}", kernels.name());
    }
}

#[test]
fn two_experts_are_chosen() {
    // The third is within 2 * 0.01 of the best, the last is not.
    let chosen = sparse_mixer(&[1.0, 2.0, 1.97, 0.5], 0.01);
    assert_eq!([chosen[0].0, chosen[1].0], [1, 2]);
    assert!((chosen[0].1 - 1.0 / (1.0 + (-0.03_f32).exp())).abs() < 1e-6);
    assert_eq!(chosen[1].1, 1.0);
    // Equals: the lowest index first, and each is the other's rival.
    let chosen = sparse_mixer(&[-1.0, 3.0, 3.0, 3.0], 0.0);
    assert_eq!([chosen[0].0, chosen[1].0], [1, 2]);
    assert!((chosen[0].1 - 1.0 / 3.0).abs() < 1e-7 && (chosen[1].1 - 0.5).abs() < 1e-7);
    // A large jitter lets everybody stay; nobody is left out but the first, in the second round.
    let scores = [0.3, -0.2, 0.1];
    let chosen = sparse_mixer(&scores, 10.0);
    let total: f32 = scores.iter().map(|s| (s - 0.3).exp()).sum();
    assert!((chosen[0].1 - 1.0 / total).abs() < 1e-6);
    assert!((chosen[1].1 - 1.0 / (1.0 + (-0.3_f32).exp())).abs() < 1e-6);
    // All zero: 0 / 0 counts as near.
    let chosen = sparse_mixer(&[0.0; 4], 0.01);
    assert_eq!([chosen[0].0, chosen[1].0], [0, 1]);
    assert!((chosen[0].1 - 0.25).abs() < 1e-7 && (chosen[1].1 - 1.0 / 3.0).abs() < 1e-7);
    // NaN gives experts that exist and differ.
    for scores in [[f32::NAN; 3], [1.0, f32::NAN, 2.0], [f32::NAN, 1.0, 2.0], [f32::NEG_INFINITY; 3]] {
        let chosen = sparse_mixer(&scores, 0.01);
        assert!(chosen[0].0 < 3 && chosen[1].0 < 3 && chosen[0].0 != chosen[1].0, "{scores:?}: {chosen:?}");
        assert!(chosen[0].1.is_nan(), "{scores:?}: {chosen:?}");
    }
}

#[test]
fn weighted_sums() {
    let mut random = Random(3);
    for count in [0, 1, 15, 16, 100] {
        let (first, second) = (random.floats(count), random.floats(count));
        for kernels in Kernels::all() {
            let mut y = vec![f32::NAN; count];
            kernels.weighted_sum(&first, 0.75, &second, 0.3, &mut y).unwrap();
            let expected: Vec<f32> = (0..count).map(|i| 0.3_f32.mul_add(second[i], 0.75 * first[i])).collect();
            assert_eq!(bits(&y), bits(&expected), "{}", kernels.name());
        }
    }
    assert!(Kernels::plain().weighted_sum(&[1.0], 1.0, &[], 1.0, &mut [0.0]).is_err());
}

#[test]
fn kernels_by_name() {
    assert_eq!(Kernels::choose(Some("plain")).unwrap().name(), "plain");
    // No processor has run AMX yet: by name alone.
    let best = Kernels::all().map(Kernels::name).find(|name| *name != "amx");
    assert_eq!(Kernels::choose(None).ok().map(Kernels::name), best);
    let error = Kernels::choose(Some("abacus")).err().unwrap().to_string();
    assert!(error.contains("PHIMOE_KERNELS is \"abacus\"") && error.contains("plain"), "{error}");
    for kernels in Kernels::all() {
        assert_eq!(Kernels::choose(Some(kernels.name())).unwrap().name(), kernels.name());
    }
    // What the processor has is not passed over.
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma");
        let vnni = has!("avx512f") && has!("avx512bw") && has!("avx512vnni");
        let amx =
            cfg!(target_os = "linux") && has!("avx2") && std::arch::x86_64::__cpuid_count(7, 0).edx >> 24 & 3 == 3;
        let expected = [
            ("amx", vnni && amx),
            ("avx512vnni", vnni),
            ("avxvnni", avx2 && has!("avxvnni")),
            ("avx2", avx2),
            ("plain", true),
        ];
        let expected: Vec<_> = expected.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
        assert_eq!(Kernels::all().map(Kernels::name).collect::<Vec<_>>(), expected);
        println!("{}", expected.join(", "));
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected as has;
        let dotprod = has!("dotprod");
        let expected = [("i8mm", dotprod && has!("i8mm")), ("dotprod", dotprod), ("neon", true), ("plain", true)];
        let expected: Vec<_> = expected.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
        assert_eq!(Kernels::all().map(Kernels::name).collect::<Vec<_>>(), expected);
        println!("{}", expected.join(", "));
    }
}
