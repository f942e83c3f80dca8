/// e ** x for sixteen floats, the same bits on every processor: off by less than 2 units in the last place, infinite
/// from 88.73 on, 0 below -104, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, and e ** r by its series up to r ** 7, whose rest is below 2 ** -27.
#[inline(always)]
pub fn exp(mut x: [f32; 16]) -> [f32; 16] {
    // a loop: `map` is compiled by itself, without the caller's instruction set
    for x in &mut x {
        *x = exp_one(*x);
    }
    x
}

// Adding and taking away 1.5 * 2 ** 23 rounds to an integer, which then is in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;
const LN_2_HIGH: f32 = 0.693_359_4; // 355 / 512, so that n times it is exact
const LN_2_LOW: f32 = -2.121_944_4e-4;

#[inline(always)]
fn exp_one(x: f32) -> f32 {
    // Comparisons, not min and max, which lose a NaN.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut sum: f32 = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = sum.mul_add(r, coefficient);
    }
    // 2 ** n in two factors, as it may lie outside the floats.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    sum * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}
