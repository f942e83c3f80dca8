package phimoe;

/**
 * How far one model's logits are from another's, over all tokens that were run.
 *
 * @param tokens how many
 * @param meanDifference the mean of the differences, without their signs, in standard deviations of the logits
 * @param maxDifference the largest of them
 * @param kl the mean divergence of a token, in nats
 * @param top1Agreement the share of tokens after which both find the same one most likely
 */
public record Comparison(int tokens, double meanDifference, double maxDifference, double kl, double top1Agreement) {}
