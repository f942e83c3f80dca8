//! float16: how a cache may hold keys and values, and a checkpoint its weights.

/// A float16 (IEEE 754's binary16), as its bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Half(pub u16);

const INFINITE: u32 = 0x7f80_0000;
/// Half of the last number's distance beyond it, 65520, and all above: infinite as a float16.
const TOO_LARGE: u32 = 0x477f_f000;
/// 2 ** -14: float16s below it are multiples of 2 ** -24, as float32s from 0.5 to 1 are.
const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
/// What a float32's exponent counts beside a float16's.
const BIAS: u32 = 127 - 15;

impl Half {
    /// The same number; a NaN stays one.
    #[inline(always)]
    pub fn to_f32(self) -> f32 {
        let magnitude = f32::from_bits(u32::from(self.0 & 0x7fff) << 13) * f32::from_bits((127 + BIAS) << 23);
        let bits = magnitude.to_bits();
        let bits = if magnitude < 65536.0 { bits } else { bits | INFINITE };
        f32::from_bits(bits | u32::from(self.0 & 0x8000) << 16)
    }

    /// The nearest float16, to even; from 65520 on it is infinite, and a NaN stays one.
    #[inline(always)]
    pub fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let sign = (bits >> 16) as u16 & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        let rounded = if magnitude > INFINITE {
            0x7e00 | (magnitude >> 13 & 0x3ff) as u16
        } else if magnitude >= TOO_LARGE {
            0x7c00
        } else if magnitude < SMALLEST_NORMAL {
            (f32::from_bits(magnitude) + 0.5).to_bits() as u16 // the sum rounds
        } else {
            let even = magnitude >> 13 & 1;
            ((magnitude - (BIAS << 23) + 0xfff + even) >> 13) as u16
        };
        Self(sign | rounded)
    }
}

#[cfg(test)]
mod tests {
    use super::Half;
    use crate::Kernels;

    /// The number that the bits of a finite float16 without sign are, by their definition.
    fn number(bits: u16) -> f64 {
        let (exponent, fraction) = (i32::from(bits >> 10), f64::from(bits & 0x3ff));
        if exponent == 0 { fraction * 2f64.powi(-24) } else { (1024.0 + fraction) * 2f64.powi(exponent - 25) }
    }

    /// The float16 that `x` becomes by `kernels`, among others of the same call.
    fn rounded(kernels: &Kernels, xs: &[f32]) -> Vec<u16> {
        let mut halves = vec![Half(0xffff); xs.len()];
        kernels.to_half(xs, &mut halves);
        halves.iter().map(|half| half.0).collect()
    }

    #[test]
    fn a_float16_becomes_the_float32_that_it_is_and_back() {
        let floats: Vec<f32> = (0..=0x7bff).map(|bits| Half(bits).to_f32()).collect();
        for (bits, float) in (0..=0x7bff).zip(&floats) {
            assert_eq!(f64::from(*float), number(bits));
            assert_eq!(Half(bits | 0x8000).to_f32().to_bits(), (-float).to_bits());
        }
        for kernels in Kernels::all() {
            assert!(rounded(kernels, &floats).into_iter().eq(0..=0x7bff), "{}", kernels.name());
        }
        assert_eq!(Half(0xfc00).to_f32(), f32::NEG_INFINITY);
        assert!((0x7c01..=0x7fff).all(|bits| Half(bits).to_f32().is_nan() && Half(bits | 0x8000).to_f32().is_nan()));
    }

    #[test]
    fn a_float32_becomes_the_nearest_float16_to_even() {
        // between two neighbours: the middle, and the float32s right below and above it
        let (mut xs, mut expected) = (Vec::new(), Vec::new());
        for below in 0..=0x7bffu16 {
            let middle = ((number(below) + number(below + 1)) / 2.0) as f32;
            xs.extend([middle.next_down(), middle, middle.next_up()]);
            expected.extend([below, below + (below & 1), below + 1]);
        }
        xs.extend([f32::INFINITY, f32::MAX, 0.0, f32::from_bits(1), f32::MIN_POSITIVE]);
        expected.extend([0x7c00, 0x7c00, 0, 0, 0]);
        let negative: Vec<f32> = xs.iter().map(|x| -x).collect();
        for kernels in Kernels::all() {
            assert_eq!(rounded(kernels, &xs), expected, "{}", kernels.name());
            assert!(rounded(kernels, &negative).into_iter().eq(expected.iter().map(|bits| bits | 0x8000)));
            let nans = [0x7f80_0001, 0x7fc0_0000, 0x7fff_ffff, 0xff80_0001].map(f32::from_bits).repeat(3);
            assert_eq!(rounded(kernels, &nans), [0x7e00, 0x7e00, 0x7fff, 0xfe00].repeat(3), "{}", kernels.name());
        }
    }
}
