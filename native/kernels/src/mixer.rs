//! Which two experts a token takes: `../../FORMAT.md`, "The mixture of experts", 2.

use crate::exp;

/// SparseMixer at inference, GRIN-MoE (arXiv 2409.12136): the two chosen experts with their weights, each in (0, 1].
///
/// NaN among the scores gives weights of NaN, and experts that differ and exist all the same.
///
/// # Panics
/// With fewer than two scores.
pub fn sparse_mixer(scores: &[f32], jitter: f32) -> [(usize, f32); 2] {
    assert!(scores.len() >= 2, "a mixture of {} experts; expected at least 2", scores.len());
    let first = largest(scores, None);
    let second = largest(scores, Some(first));
    [(first, weight(scores, first, None, jitter)), (second, weight(scores, second, Some(first), jitter))]
}

/// The lowest index of the largest score, without the one that is `taken`.
fn largest(scores: &[f32], taken: Option<usize>) -> usize {
    let mut best = usize::from(taken == Some(0));
    for (j, score) in scores.iter().enumerate() {
        if Some(j) != taken && *score > scores[best] {
            best = j;
        }
    }
    best
}

fn weight(scores: &[f32], chosen: usize, taken: Option<usize>, jitter: f32) -> f32 {
    let m = scores[chosen];
    let mut sum = 0.0;
    for (j, score) in scores.iter().enumerate() {
        let gap = score - m;
        let far = gap / score.abs().max(m) < -2.0 * jitter;
        if Some(j) != taken && !far {
            sum += exp([gap; 16])[0];
        }
    }
    1.0 / sum
}
