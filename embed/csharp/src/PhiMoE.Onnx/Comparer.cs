namespace PhiMoEOnnx;

/// <summary>
/// Compares logits with those that a golden file keeps, token by token; the formulas are those of spec/golden.md.
/// </summary>
internal sealed class Comparer
{
    private readonly int[] _ids; // top_ids of all tokens
    private readonly int[] _best;
    private readonly double[] _top;
    private readonly double[] _sampled;
    private readonly double[] _sums; // logsumexp
    private readonly bool[] _isTop;
    private int _tokens;
    private int _same;
    private double _difference;
    private double _largest;
    private double _kl;

    /// <summary><c>kind</c> is "" for the reference, "stored_" for PyTorch over stored weights.</summary>
    public Comparer(Golden golden, string kind)
    {
        _ids = golden["top_ids"].Integers();
        _top = golden[$"{kind}top_logits"].Numbers();
        _sampled = golden[$"{kind}sampled_logits"].Numbers();
        _sums = golden[$"{kind}logsumexp"].Numbers();
        _isTop = new bool[golden.VocabSize];
        int count = _ids.Length / _sums.Length;
        _best = kind.Length == 0
            ? Enumerable.Range(0, _sums.Length).Select(token => _ids[token * count]).ToArray()
            : golden["stored_best"].Integers();
    }

    /// <summary>
    /// Takes in the logits [V] after the next token of the file; <c>sum</c> is their logsumexp, <c>scale</c> the
    /// window's.
    /// </summary>
    public void Add(ReadOnlySpan<float> logits, double sum, double scale)
    {
        int token = _tokens++;
        int count = _ids.Length / _sums.Length;
        double kept = 0;
        double terms = 0;
        for (int index = token * count; index < (token + 1) * count; index++)
        {
            int id = _ids[index];
            _isTop[id] = true;
            double logP = _top[index] - _sums[token];
            kept += Math.Exp(logP);
            terms += Math.Exp(logP) * (logP - logits[id] + sum);
            _largest = Math.Max(_largest, Math.Abs(logits[id] - _top[index]) / scale);
        }
        double others = 0;
        for (int id = 0; id < logits.Length; id++)
        {
            others += _isTop[id] ? 0 : Math.Exp(logits[id] - sum);
        }
        _kl += terms + 1 - kept - others + AddSampled(token, logits, sum, scale);
        Array.Clear(_isTop);
        _same += Best(logits) == _best[token] ? 1 : 0;
    }

    /// <summary>Of all that was taken in.</summary>
    public Comparison Result() =>
        new Comparison(_tokens, _difference / _tokens, _largest, _kl / _tokens, (double)_same / _tokens);

    /// <summary>The first of the largest logits.</summary>
    public static int Best(ReadOnlySpan<float> logits)
    {
        int best = 0;
        for (int id = 1; id < logits.Length; id++)
        {
            best = logits[id] > logits[best] ? id : best;
        }
        return best;
    }

    /// <summary>The logarithm of the sum of the logits' exponentials.</summary>
    public static double LogSumExp(ReadOnlySpan<float> logits)
    {
        double largest = logits[Best(logits)];
        double sum = 0;
        foreach (float logit in logits)
        {
            sum += Math.Exp(logit - largest);
        }
        return largest + Math.Log(sum);
    }

    /// <summary>The estimate of what is not among the top ones.</summary>
    private double AddSampled(int token, ReadOnlySpan<float> logits, double sum, double scale)
    {
        int count = _sampled.Length / _sums.Length;
        double terms = 0;
        double apart = 0;
        for (int place = 0; place < count; place++)
        {
            int id = (int)((token + ((long)place * (logits.Length / count))) % logits.Length);
            double expected = _sampled[(token * count) + place];
            double difference = Math.Abs(logits[id] - expected) / scale;
            apart += difference;
            _largest = Math.Max(_largest, difference);
            if (!_isTop[id])
            {
                double logP = expected - _sums[token];
                double logQ = logits[id] - sum;
                terms += (Math.Exp(logP) * (logP - logQ - 1)) + Math.Exp(logQ);
            }
        }
        _difference += apart / count;
        return terms * logits.Length / count;
    }
}
