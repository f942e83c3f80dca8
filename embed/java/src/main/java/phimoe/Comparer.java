package phimoe;

import phimoe.Golden.Array;

/** Compares logits with those that a golden file keeps, token by token; the formulas are those of spec/golden.md. */
final class Comparer {
    private final int[] ids; // top_ids of all tokens
    private final int[] best;
    private final Array top;
    private final Array sampled;
    private final Array sums; // logsumexp
    private final boolean[] isTop;
    private int tokens;
    private int same;
    private double difference;
    private double largest;
    private double kl;

    /** `kind` is "" for the reference, "stored_" for PyTorch over stored weights. */
    Comparer(Golden golden, String kind) {
        ids = golden.array("top_ids").integers().stream().mapToInt(id -> id).toArray();
        top = golden.array(kind + "top_logits");
        sampled = golden.array(kind + "sampled_logits");
        sums = golden.array(kind + "logsumexp");
        isTop = new boolean[golden.vocabSize()];
        int count = top.shape().get(1);
        best = new int[sums.shape().get(0)];
        for (int token = 0; token < best.length; token++) {
            best[token] = kind.isEmpty() ? ids[token * count] : golden.array("stored_best").integer(token);
        }
    }

    /** Takes in the logits [V] after the next token of the file; `sum` is their logsumexp, `scale` the window's. */
    void add(float[] logits, double sum, double scale) {
        int token = tokens++;
        double kept = 0;
        double terms = 0;
        for (int place = 0; place < top.shape().get(1); place++) {
            int index = token * top.shape().get(1) + place;
            int id = ids[index];
            isTop[id] = true;
            double logP = top.number(index) - sums.number(token);
            kept += Math.exp(logP);
            terms += Math.exp(logP) * (logP - logits[id] + sum);
            largest = Math.max(largest, Math.abs(logits[id] - top.number(index)) / scale);
        }
        double others = 0;
        for (int id = 0; id < logits.length; id++) {
            others += isTop[id] ? 0 : Math.exp(logits[id] - sum);
        }
        kl += terms + 1 - kept - others + addSampled(token, logits, sum, scale);
        for (int place = 0; place < top.shape().get(1); place++) {
            isTop[ids[token * top.shape().get(1) + place]] = false;
        }
        same += best(logits) == best[token] ? 1 : 0;
    }

    /** The estimate of what is not among the top ones. */
    private double addSampled(int token, float[] logits, double sum, double scale) {
        int count = sampled.shape().get(1);
        double terms = 0;
        double apart = 0;
        for (int place = 0; place < count; place++) {
            int id = (int) ((token + (long) place * (logits.length / count)) % logits.length);
            double expected = sampled.number(token * count + place);
            apart += Math.abs(logits[id] - expected) / scale;
            largest = Math.max(largest, Math.abs(logits[id] - expected) / scale);
            if (!isTop[id]) {
                double logP = expected - sums.number(token);
                double logQ = logits[id] - sum;
                terms += Math.exp(logP) * (logP - logQ - 1) + Math.exp(logQ);
            }
        }
        difference += apart / count;
        return terms * logits.length / count;
    }

    /** Of all that was taken in. */
    Comparison result() {
        return new Comparison(tokens, difference / tokens, largest, kl / tokens, (double) same / tokens);
    }

    /** The first of the largest logits. */
    static int best(float[] logits) {
        int best = 0;
        for (int id = 1; id < logits.length; id++) {
            best = logits[id] > logits[best] ? id : best;
        }
        return best;
    }

    /** The logarithm of the sum of the logits' exponentials. */
    static double logSumExp(float[] logits) {
        double largest = logits[best(logits)];
        double sum = 0;
        for (float logit : logits) {
            sum += Math.exp(logit - largest);
        }
        return largest + Math.log(sum);
    }
}
