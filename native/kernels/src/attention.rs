//! Attention of some queries over the keys and values of one head, in float32; these may be stored as float16 or
//! int8.
//!
//! For a query over its span of keys, in this order:
//!
//! 1. score = scale * dot(query, key), the dot product in eight lanes: lane l takes l, l + 8, ... by fma from 0; then
//!    lane l takes lane l + 4, l + 2, l + 1;
//! 2. m = the largest score; weight = exp(score - m); their sum in sixteen lanes from the span's first key on, then as
//!    above from l + 8 on;
//! 3. out = (the sum over keys, in order, of weight * value by fma from 0) / sum.
//!
//! Nothing here depends on how many queries there are: a query alone and among others gives the same bits.

use std::ops::Range;

use crate::memory::ask;
use crate::{Error, Half, Kernels, exp};

/// Head sizes are multiples of this: two vectors of `Lanes`.
const WIDTH: usize = 16;
/// Queries whose sums lie in registers together.
const QUERIES: usize = 4;
/// Keys that such queries meet together.
const KEYS: usize = 3;
/// Keys or values that stay in the first cache while all queries pass. Those of the next tile are asked for meanwhile.
const TILE: usize = 24;
/// Bytes of a cache's line.
const LINE: usize = 64;

/// What the queries of one head look at: keys and values [T, D], float32, float16 or int8.
#[derive(Clone, Copy)]
pub struct Head<'a, E = f32> {
    size: usize,
    scale: f32,
    keys: &'a [E],
    values: &'a [E],
}

impl<'a, E> Head<'a, E> {
    /// An error unless keys and values are both [T, `size`], and the size is a multiple of 16.
    pub fn new(size: usize, scale: f32, keys: &'a [E], values: &'a [E]) -> Result<Self, Error> {
        check_size(size)?;
        if keys.len() != values.len() || !keys.len().is_multiple_of(size) {
            return Err(Error::new(format!("{} numbers of keys and {} of values", keys.len(), values.len())));
        }
        Ok(Self { size, scale, keys, values })
    }
}

/// An error unless heads may have this size.
pub fn check_size(size: usize) -> Result<(), Error> {
    if size == 0 || !size.is_multiple_of(WIDTH) {
        return Err(Error::new(format!("heads of {size} floats; expected a multiple of {WIDTH}")));
    }
    Ok(())
}

impl Kernels {
    /// Rotary position embedding of one head x [D], in halves: `cos` and `sin` are [D / 2], of the position.
    ///
    /// # Panics
    /// Unless the lengths agree.
    pub fn rotate(&self, x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
        let half = x.len() / 2;
        assert!(cos.len() == half && sin.len() == half && out.len() == 2 * half, "a head of {} floats", x.len());
        let (low, high) = out.split_at_mut(half);
        for i in 0..half {
            low[i] = x[i] * cos[i] - x[half + i] * sin[i];
            high[i] = x[half + i] * cos[i] + x[i] * sin[i];
        }
    }

    /// `x` as float16, to nearest and to even, as `Half::from_f32` says.
    ///
    /// # Panics
    /// Unless the lengths agree.
    pub fn to_half(&self, x: &[f32], out: &mut [Half]) {
        assert!(x.len() == out.len(), "{} floats into {}", x.len(), out.len());
        #[cfg(target_arch = "x86_64")]
        if self.name() != "plain" && crate::avx2::available() {
            // SAFETY: the processor has what the function is compiled for.
            unsafe { to_half_avx2(x, out) };
            return;
        }
        #[cfg(target_arch = "aarch64")]
        if self.name() != "plain" {
            return to_half::<Quads>(x, out);
        }
        to_half::<[f32; 8]>(x, out);
    }

    /// `out` [R, D]: each of the queries [R, D] attends to its span of the head's keys, which is not empty.
    ///
    /// float16 becomes float32 as it is read. int8 is taken as it stands: where channels have scales, those of the keys
    /// belong into the queries, and those of
    /// the values into `out`.
    ///
    /// `scratch` is memory that the caller may keep for the next call: R times as many floats as the spans reach over.
    pub fn attend<E: Cached>(
        &self,
        head: &Head<E>,
        queries: &[f32],
        spans: &[Range<usize>],
        scratch: &mut Vec<f32>,
        out: &mut [f32],
    ) -> Result<(), Error> {
        let (rows, length) = (spans.len(), head.keys.len() / head.size);
        if queries.len() != rows * head.size || out.len() != queries.len() {
            return Err(Error::new(format!("{} floats of {rows} queries into {}", queries.len(), out.len())));
        }
        if let Some(span) = spans.iter().find(|span| span.is_empty() || span.end > length) {
            return Err(Error::new(format!("a query over {span:?} of {length} keys")));
        }
        if rows == 0 {
            return Ok(());
        }
        #[cfg(target_arch = "x86_64")]
        if self.name() != "plain" && crate::avx2::available() {
            // SAFETY: the processor has what the function is compiled for.
            unsafe { attend_avx2(head, queries, spans, scratch, out) };
            return Ok(());
        }
        #[cfg(target_arch = "aarch64")]
        if self.name() != "plain" {
            attend::<Quads, E>(head, queries, spans, scratch, out);
            return Ok(());
        }
        attend::<[f32; 8], E>(head, queries, spans, scratch, out);
        Ok(())
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn to_half_avx2(x: &[f32], out: &mut [Half]) {
    to_half::<std::arch::x86_64::__m256>(x, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn attend_avx2<E: Cached>(
    head: &Head<E>,
    queries: &[f32],
    spans: &[Range<usize>],
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    attend::<std::arch::x86_64::__m256, E>(head, queries, spans, scratch, out);
}

/// What a key or a value is stored as.
pub trait Cached: Copy {
    /// Eight of them as floats.
    fn lanes<L: Lanes>(from: &[Self; 8]) -> L;
}

impl Cached for f32 {
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[f32; 8]) -> L {
        L::load(from)
    }
}

impl Cached for Half {
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[Half; 8]) -> L {
        L::from_half(from)
    }
}

impl Cached for i8 {
    #[inline(always)]
    fn lanes<L: Lanes>(from: &[i8; 8]) -> L {
        L::widen(from)
    }
}

/// Eight floats.
pub trait Lanes: Copy {
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; 8]) -> Self;
    fn widen(from: &[i8; 8]) -> Self;
    fn from_half(from: &[Half; 8]) -> Self;
    fn store(self, to: &mut [f32; 8]);
    fn to_half(self, to: &mut [Half; 8]);
    /// self * b + c.
    fn mul_add(self, b: Self, c: Self) -> Self;
}

impl Lanes for [f32; 8] {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; 8]
    }

    #[inline(always)]
    fn load(from: &[f32; 8]) -> Self {
        *from
    }

    #[inline(always)]
    fn widen(from: &[i8; 8]) -> Self {
        from.map(f32::from)
    }

    #[inline(always)]
    fn from_half(from: &[Half; 8]) -> Self {
        from.map(Half::to_f32)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; 8]) {
        *to = self;
    }

    #[inline(always)]
    fn to_half(self, to: &mut [Half; 8]) {
        *to = self.map(Half::from_f32);
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        std::array::from_fn(|l| self[l].mul_add(b[l], c[l]))
    }
}

// SAFETY of all of these: inlined into functions that run where there are AVX2, FMA and F16C; the addresses are of eight
// numbers.
#[cfg(target_arch = "x86_64")]
impl Lanes for std::arch::x86_64::__m256 {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: as above.
        unsafe { std::arch::x86_64::_mm256_set1_ps(value) }
    }

    #[inline(always)]
    fn load(from: &[f32; 8]) -> Self {
        // SAFETY: as above.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline(always)]
    fn widen(from: &[i8; 8]) -> Self {
        // SAFETY: as above; the eight bytes are those that are read.
        unsafe {
            let bytes = std::arch::x86_64::_mm_loadl_epi64(from.as_ptr().cast());
            std::arch::x86_64::_mm256_cvtepi32_ps(std::arch::x86_64::_mm256_cvtepi8_epi32(bytes))
        }
    }

    #[inline(always)]
    fn from_half(from: &[Half; 8]) -> Self {
        // SAFETY: as above.
        unsafe { std::arch::x86_64::_mm256_cvtph_ps(std::arch::x86_64::_mm_loadu_si128(from.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; 8]) {
        // SAFETY: as above.
        unsafe { std::arch::x86_64::_mm256_storeu_ps(to.as_mut_ptr(), self) }
    }

    #[inline(always)]
    fn to_half(self, to: &mut [Half; 8]) {
        use std::arch::x86_64::{_MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph};
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self)) }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: as above.
        unsafe { std::arch::x86_64::_mm256_fmadd_ps(self, b, c) }
    }
}

#[cfg(target_arch = "aarch64")]
#[derive(Clone, Copy)]
struct Quads([std::arch::aarch64::float32x4_t; 2]);

// SAFETY of all of these: every processor of this architecture has NEON; the addresses are of eight numbers.
#[cfg(target_arch = "aarch64")]
impl Lanes for Quads {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: as above.
        unsafe { Self([std::arch::aarch64::vdupq_n_f32(value); 2]) }
    }

    #[inline(always)]
    fn load(from: &[f32; 8]) -> Self {
        use std::arch::aarch64::vld1q_f32;
        // SAFETY: as above.
        unsafe { Self([vld1q_f32(from.as_ptr()), vld1q_f32(from[4..].as_ptr())]) }
    }

    #[inline(always)]
    fn widen(from: &[i8; 8]) -> Self {
        use std::arch::aarch64::*;
        // SAFETY: as above.
        unsafe {
            let words = vmovl_s8(vld1_s8(from.as_ptr()));
            Self([vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))])
        }
    }

    #[inline(always)]
    fn from_half(from: &[Half; 8]) -> Self {
        use std::arch::aarch64::*;
        // SAFETY: as above.
        unsafe {
            let halves = vreinterpretq_f16_u16(vld1q_u16(from.as_ptr().cast()));
            Self([vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)])
        }
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; 8]) {
        use std::arch::aarch64::vst1q_f32;
        // SAFETY: as above.
        unsafe {
            vst1q_f32(to.as_mut_ptr(), self.0[0]);
            vst1q_f32(to[4..].as_mut_ptr(), self.0[1]);
        }
    }

    #[inline(always)]
    fn to_half(self, to: &mut [Half; 8]) {
        use std::arch::aarch64::*;
        // SAFETY: as above.
        unsafe {
            let halves = vcvt_high_f16_f32(vcvt_f16_f32(self.0[0]), self.0[1]);
            vst1q_u16(to.as_mut_ptr().cast(), vreinterpretq_u16_f16(halves));
        }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        use std::arch::aarch64::vfmaq_f32;
        // SAFETY: as above.
        unsafe { Self([vfmaq_f32(c.0[0], self.0[0], b.0[0]), vfmaq_f32(c.0[1], self.0[1], b.0[1])]) }
    }
}

#[inline(always)]
fn to_half<L: Lanes>(x: &[f32], out: &mut [Half]) {
    let ((eights, rest), (out_eights, out_rest)) = (x.as_chunks::<8>(), out.as_chunks_mut::<8>());
    for (eight, out) in eights.iter().zip(out_eights) {
        L::load(eight).to_half(out);
    }
    for (x, out) in rest.iter().zip(out_rest) {
        *out = Half::from_f32(*x);
    }
}

#[inline(always)]
fn attend<L: Lanes, E: Cached>(
    head: &Head<E>,
    queries: &[f32],
    spans: &[Range<usize>],
    scratch: &mut Vec<f32>,
    out: &mut [f32],
) {
    let first = spans.iter().map(|span| span.start).min().unwrap_or(0);
    let all = first..spans.iter().map(|span| span.end).max().unwrap_or(0);
    let width = all.len();
    scratch.clear();
    scratch.resize(spans.len() * width, 0.0);
    for tile in all.clone().step_by(TILE) {
        let tile = tile..(tile + TILE).min(all.end);
        for (quartet, scores) in queries.chunks(QUERIES * head.size).zip(scratch.chunks_mut(QUERIES * width)) {
            score::<L, E>(head, quartet, tile.clone(), first, width, scores);
        }
    }
    let mut sums = vec![0.0; spans.len()];
    for ((scores, span), sum) in scratch.chunks_exact_mut(width).zip(spans).zip(&mut sums) {
        *sum = soften(&mut scores[span.start - first..span.end - first]);
    }
    out.fill(0.0);
    for tile in all.clone().step_by(TILE) {
        let tile = tile..(tile + TILE).min(all.end);
        let quartets = scratch.chunks(QUERIES * width).zip(spans.chunks(QUERIES));
        for ((weights, spans), out) in quartets.zip(out.chunks_mut(QUERIES * head.size)) {
            add_values::<L, E>(head, weights, spans, tile.clone(), first, width, out);
        }
    }
    for (out, sum) in out.chunks_exact_mut(head.size).zip(sums) {
        for out in out {
            *out /= sum;
        }
    }
}

/// Scores of up to `QUERIES` queries with the keys of a tile.
#[inline(always)]
fn score<L: Lanes, E: Cached>(
    head: &Head<E>,
    queries: &[f32],
    tile: Range<usize>,
    first: usize,
    width: usize,
    scores: &mut [f32],
) {
    let size = head.size;
    let full = tile.start + tile.len() / KEYS * KEYS;
    if queries.len() == QUERIES * size {
        let queries: [&[f32]; QUERIES] = std::array::from_fn(|r| &queries[r * size..][..size]);
        for key in (tile.start..full).step_by(KEYS) {
            let keys = std::array::from_fn(|j| &head.keys[(key + j) * size..][..size]);
            write(dots::<L, E, QUERIES, KEYS>(queries, keys), head.scale, key - first, width, scores);
        }
        for key in full..tile.end {
            let keys = [&head.keys[key * size..][..size]];
            write(dots::<L, E, QUERIES, 1>(queries, keys), head.scale, key - first, width, scores);
        }
    } else {
        for (query, scores) in queries.chunks_exact(size).zip(scores.chunks_exact_mut(width)) {
            for key in (tile.start..full).step_by(KEYS) {
                let keys = std::array::from_fn(|j| &head.keys[(key + j) * size..][..size]);
                write(dots::<L, E, 1, KEYS>([query], keys), head.scale, key - first, width, scores);
            }
            for key in full..tile.end {
                let keys = [&head.keys[key * size..][..size]];
                write(dots::<L, E, 1, 1>([query], keys), head.scale, key - first, width, scores);
            }
        }
    }
}

#[inline(always)]
fn write<const Q: usize, const K: usize>(dots: [[f32; K]; Q], scale: f32, at: usize, width: usize, scores: &mut [f32]) {
    for (r, dots) in dots.iter().enumerate() {
        for (j, dot) in dots.iter().enumerate() {
            scores[r * width + at + j] = scale * dot;
        }
    }
}

#[inline(always)]
fn dots<L: Lanes, E: Cached, const Q: usize, const K: usize>(queries: [&[f32]; Q], keys: [&[E]; K]) -> [[f32; K]; Q] {
    // loops, not closures: those are compiled by themselves, without the caller's instruction set
    let mut sums = [[L::splat(0.0); K]; Q];
    let length = queries[0].len() / 8;
    for i in 0..length {
        let mut key = [L::splat(0.0); K];
        for j in 0..K {
            if (8 * i * size_of::<E>()).is_multiple_of(LINE) {
                // of the next tile
                ask(keys[j].as_ptr().wrapping_add(TILE * keys[j].len() + 8 * i).cast());
            }
            key[j] = E::lanes(eight(keys[j], i));
        }
        for r in 0..Q {
            let query = L::load(eight(queries[r], i));
            for j in 0..K {
                sums[r][j] = query.mul_add(key[j], sums[r][j]);
            }
        }
    }
    let mut dots = [[0.0; K]; Q];
    for r in 0..Q {
        for j in 0..K {
            let mut lanes = [0.0; 8];
            sums[r][j].store(&mut lanes);
            dots[r][j] = tree(lanes);
        }
    }
    dots
}

#[inline(always)]
fn eight<E>(x: &[E], index: usize) -> &[E; 8] {
    &x.as_chunks().0[index]
}

#[inline(always)]
fn tree<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] += lanes[l + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Scores to weights; returns their sum.
#[inline(always)]
fn soften(scores: &mut [f32]) -> f32 {
    let mut largest = [f32::NEG_INFINITY; 16];
    let larger = |largest: &mut f32, score: f32| *largest = if score > *largest { score } else { *largest };
    let (chunks, rest) = scores.as_chunks_mut::<16>();
    for chunk in &*chunks {
        for l in 0..16 {
            larger(&mut largest[l], chunk[l]);
        }
    }
    for (largest, score) in largest.iter_mut().zip(&*rest) {
        larger(largest, *score);
    }
    let m = largest.into_iter().fold(f32::NEG_INFINITY, |m, score| if score > m { score } else { m });
    let mut sums = [0.0; 16];
    for chunk in chunks {
        for score in &mut *chunk {
            *score -= m;
        }
        *chunk = exp(*chunk);
        for l in 0..16 {
            sums[l] += chunk[l];
        }
    }
    let mut last = [0.0; 16];
    for (last, score) in last.iter_mut().zip(&*rest) {
        *last = score - m;
    }
    for ((weight, score), sum) in exp(last).iter().zip(rest).zip(&mut sums) {
        *score = *weight;
        *sum += weight;
    }
    tree(sums)
}

/// Adds the weighted values of a tile to the sums `out` of up to `QUERIES` queries.
#[inline(always)]
fn add_values<L: Lanes, E: Cached>(
    head: &Head<E>,
    weights: &[f32],
    spans: &[Range<usize>],
    tile: Range<usize>,
    first: usize,
    width: usize,
    out: &mut [f32],
) {
    let within = |span: &Range<usize>| span.start.max(tile.start)..span.end.min(tile.end);
    // What all see is added for all at once; what some see comes before and after it, one query at a time.
    let common = spans.iter().map(within).reduce(|a, b| a.start.max(b.start)..a.end.min(b.end)).unwrap_or(0..0);
    let together = spans.len() == QUERIES && !common.is_empty();
    let size = head.size;
    for (r, span) in spans.iter().enumerate() {
        let span = within(span);
        let before = if together { span.start..common.start } else { span };
        add::<L, E, 1>(head, [&weights[r * width..][..width]], before, first, &mut out[r * size..][..size]);
    }
    if together {
        add::<L, E, QUERIES>(head, std::array::from_fn(|r| &weights[r * width..][..width]), common.clone(), first, out);
        for (r, span) in spans.iter().enumerate() {
            let after = common.end..within(span).end;
            add::<L, E, 1>(head, [&weights[r * width..][..width]], after, first, &mut out[r * size..][..size]);
        }
    }
}

#[inline(always)]
fn add<L: Lanes, E: Cached, const Q: usize>(
    head: &Head<E>,
    weights: [&[f32]; Q],
    keys: Range<usize>,
    first: usize,
    out: &mut [f32],
) {
    if keys.is_empty() {
        return;
    }
    let size = head.size;
    let mut by_key = [[0.0; Q]; TILE];
    for r in 0..Q {
        for (own, weight) in by_key.iter_mut().zip(&weights[r][keys.start - first..keys.end - first]) {
            own[r] = *weight;
        }
    }
    let values = &head.values[keys.start * size..keys.end * size];
    for at in (0..size).step_by(WIDTH) {
        let mut sums = [[L::splat(0.0); 2]; Q];
        for r in 0..Q {
            let (halves, _) = out[r * size + at..][..WIDTH].as_chunks::<8>();
            sums[r] = [L::load(&halves[0]), L::load(&halves[1])];
        }
        for (value, weights) in values.chunks_exact(size).zip(&by_key) {
            let (halves, _) = value[at..at + WIDTH].as_chunks::<8>();
            if (at * size_of::<E>()).is_multiple_of(LINE) {
                ask(value.as_ptr().wrapping_add(TILE * size + at).cast());
            }
            let value: [L; 2] = [E::lanes(&halves[0]), E::lanes(&halves[1])];
            for r in 0..Q {
                let weight = L::splat(weights[r]);
                sums[r] = [weight.mul_add(value[0], sums[r][0]), weight.mul_add(value[1], sums[r][1])];
            }
        }
        for r in 0..Q {
            let (halves, _) = out[r * size + at..][..WIDTH].as_chunks_mut::<8>();
            sums[r][0].store(&mut halves[0]);
            sums[r][1].store(&mut halves[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::{Cached, Head};
    use crate::{Half, Kernels};

    /// Numbers from -1 to 1, the same each time.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn near_double_precision_and_the_same_alone_among_others_and_by_all_kernels() {
        for (size, length, rows) in [(16, 1, 1), (64, 100, 7), (128, 75, 32), (96, 200, 5)] {
            let (keys, values) = (numbers(length * size, 1), numbers(length * size, 2));
            let queries: Vec<f32> = numbers(rows * size, 3).iter().map(|q| 3.0 * q).collect();
            let spans: Vec<_> =
                (0..rows).map(|r| (r * 5 % length).min(length / 2)..length - r % length.div_ceil(3)).collect();
            let scale = 1.0 / (size as f32).sqrt();
            let head = Head::new(size, scale, &keys, &values).unwrap();
            let mut out = vec![f32::NAN; rows * size];
            Kernels::detect().unwrap().attend(&head, &queries, &spans, &mut Vec::new(), &mut out).unwrap();
            for (r, span) in spans.iter().enumerate() {
                let (query, out) = (&queries[r * size..][..size], &out[r * size..][..size]);
                for kernels in Kernels::all() {
                    let mut alone = vec![f32::NAN; size];
                    let span = std::slice::from_ref(span);
                    kernels.attend(&head, query, span, &mut vec![1.0; 7], &mut alone).unwrap();
                    assert_eq!(alone, out, "{} {size} {r}", kernels.name());
                }
                let dot = |key: usize| -> f64 {
                    let key = &keys[key * size..][..size];
                    query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * f64::from(scale)
                };
                let weights: Vec<f64> = span.clone().map(|key| dot(key).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (d, out) in out.iter().enumerate() {
                    let values = span.clone().map(|key| f64::from(values[key * size + d]));
                    let exact = weights.iter().zip(values).map(|(w, v)| w * v).sum::<f64>() / total;
                    assert!((f64::from(*out) - exact).abs() < 2e-6, "{out} {exact}");
                }
            }
        }
    }

    /// The same as over the floats that keys and values stand for, by all kernels.
    fn taken_as<E: Cached + Debug>(cached: impl Fn(f32) -> E, float: impl Fn(E) -> f32, scale: f32) {
        for (size, length, rows) in [(16, 1, 1), (64, 100, 7), (128, 75, 32)] {
            let stored = |seed| numbers(length * size, seed).into_iter().map(&cached).collect::<Vec<_>>();
            let (keys, values) = (stored(1), stored(2));
            let floats = |stored: &[E]| stored.iter().map(|number| float(*number)).collect::<Vec<_>>();
            let (key_floats, value_floats) = (floats(&keys), floats(&values));
            let queries = numbers(rows * size, 3);
            let spans: Vec<_> = (0..rows).map(|r| (r * 5 % length).min(length / 2)..length).collect();
            let mut expected = vec![f32::NAN; rows * size];
            let head = Head::new(size, scale, &key_floats, &value_floats).unwrap();
            Kernels::plain().attend(&head, &queries, &spans, &mut Vec::new(), &mut expected).unwrap();
            let head = Head::new(size, scale, &keys, &values).unwrap();
            for kernels in Kernels::all() {
                let mut out = vec![f32::NAN; rows * size];
                kernels.attend(&head, &queries, &spans, &mut Vec::new(), &mut out).unwrap();
                assert_eq!(out, expected, "{} {size}", kernels.name());
                for (r, span) in spans.iter().enumerate() {
                    let (query, mut alone) = (&queries[r * size..][..size], vec![f32::NAN; size]);
                    let span = std::slice::from_ref(span);
                    kernels.attend(&head, query, span, &mut Vec::new(), &mut alone).unwrap();
                    assert_eq!(alone, out[r * size..][..size], "{} {size} {r}", kernels.name());
                }
            }
        }
    }

    #[test]
    fn bytes_are_taken_as_the_floats_that_they_stand_for() {
        taken_as(|x| (128.0 * x) as i8, f32::from, 0.01);
    }

    #[test]
    fn float16_is_taken_as_the_floats_that_it_stands_for() {
        for factor in [1.0, 1e-5, 1e3] {
            // 1e-5: below the smallest normal one, too
            taken_as(|x| Half::from_f32(factor * x), Half::to_f32, 0.3 / factor);
        }
    }

    #[test]
    fn what_a_query_does_not_see_does_not_touch_it() {
        let size = 32;
        let (mut keys, mut values) = (numbers(10 * size, 4), numbers(10 * size, 5));
        keys[9 * size..].fill(f32::NAN);
        values[..size].fill(f32::NAN);
        let head = Head::new(size, 1.0, &keys, &values).unwrap();
        let mut out = vec![0.0; 5 * size];
        let spans = [0..9, 1..9, 1..9, 2..10, 1..9];
        Kernels::detect().unwrap().attend(&head, &numbers(5 * size, 6), &spans, &mut Vec::new(), &mut out).unwrap();
        for (r, out) in out.chunks_exact(size).enumerate() {
            assert_eq!(out.iter().all(|x| x.is_nan()), [0, 3].contains(&r));
            assert_eq!(out.iter().any(|x| x.is_nan()), [0, 3].contains(&r));
        }
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let keys = [0.0; 64];
        assert!(Head::new(24, 1.0, &keys, &keys).is_err_and(|error| error.to_string().contains("24 floats")));
        assert!(Head::new(16, 1.0, &keys, &keys[16..]).is_err());
        let head = Head::new(16, 1.0, &keys, &keys).unwrap();
        let attend =
            |queries: &[f32], span| Kernels::plain().attend(&head, queries, &[span], &mut Vec::new(), &mut [0.0; 16]);
        assert!(attend(&keys[..16], 0..4).is_ok());
        for (queries, span) in [(&keys[..16], 2..5), (&keys[..16], 2..2), (&keys[..32], 0..4)] {
            assert!(attend(queries, span).is_err());
        }
    }
}
