using System.Buffers;

namespace PhiMoEOnnx;

/// <summary>
/// From logits to the next token: penalty, temperature, truncation and a draw that any language can reproduce.
/// </summary>
/// <remarks>spec/sampling.md says the same without code. Ties go to the lower token id throughout.</remarks>
internal static class Sampler
{
    private static readonly double Coldest = Math.Pow(2, -126); // of temperatures that are no 0

    /// <summary>The next token.</summary>
    /// <param name="logits">float32 [vocab_size]; the repetition penalty changes them.</param>
    /// <param name="options">How to choose.</param>
    /// <param name="seed">Of the draw.</param>
    /// <param name="step">
    /// How many tokens were generated before this one; with the seed it fixes the random number.
    /// </param>
    /// <param name="seen">The distinct tokens of the prompt and of what was generated.</param>
    /// <exception cref="GenerationException">The logits are not finite, so the graph computed nonsense.</exception>
    public static int Sample(
        Span<float> logits, GenerationOptions options, long seed, int step, IReadOnlyCollection<int> seen)
    {
        foreach (float logit in logits)
        {
            if (float.IsNaN(logit))
            {
                throw NotFinite();
            }
        }
        if (!float.IsFinite(logits[Largest(logits)]))
        {
            throw NotFinite();
        }
        if (options.RepetitionPenalty != 1)
        {
            Penalize(logits, seen, (float)options.RepetitionPenalty);
        }
        return options.Temperature < Coldest ? Largest(logits) : Draw(logits, options, Uniform(seed, step));
    }

    /// <summary>
    /// A number in [0, 1): the top 53 bits of the output number <c>step</c> of SplitMix64 started at <c>seed</c>.
    /// </summary>
    public static double Uniform(long seed, int step)
    {
        unchecked
        {
            ulong z = (ulong)seed + ((ulong)step + 1) * 0x9E3779B97F4A7C15UL;
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9UL;
            z = (z ^ (z >> 27)) * 0x94D049BB133111EBUL;
            z = z ^ (z >> 31);
            return (z >> 11) / 9007199254740992.0; // 2^53
        }
    }

    private static void Penalize(Span<float> logits, IReadOnlyCollection<int> seen, float penalty)
    {
        foreach (int id in seen)
        {
            logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
        }
    }

    private static int Largest(ReadOnlySpan<float> logits)
    {
        int largest = 0;
        for (int id = 1; id < logits.Length; id++)
        {
            if (logits[id] > logits[largest])
            {
                largest = id;
            }
        }
        return largest;
    }

    /// <summary>The token at <c>u</c> of the cumulative probabilities of the kept tokens, most likely first.</summary>
    private static int Draw(ReadOnlySpan<float> logits, GenerationOptions options, double u)
    {
        ulong[] order = ArrayPool<ulong>.Shared.Rent(logits.Length);
        double[] cumulative = ArrayPool<double>.Shared.Rent(logits.Length);
        try
        {
            SortFalling(logits, order);
            int count = options.TopK == 0 ? logits.Length : Math.Min(options.TopK, logits.Length);
            double first = logits[Id(order[0])] / options.Temperature;
            double sum = 0;
            int likely = 0; // those that min-p keeps
            for (int i = 0; i < count; i++)
            {
                double weight = Math.Exp(logits[Id(order[i])] / options.Temperature - first);
                sum += weight;
                cumulative[i] = sum;
                likely += weight >= options.MinP ? 1 : 0;
            }
            int kept = count;
            if (options.TopP < 1)
            {
                kept = 1;
                while (cumulative[kept - 1] < options.TopP * sum)
                {
                    kept++;
                }
            }
            if (options.MinP > 0)
            {
                kept = Math.Min(kept, likely);
            }
            int chosen = 0;
            while (chosen < kept - 1 && cumulative[chosen] <= u * cumulative[kept - 1])
            {
                chosen++;
            }
            return Id(order[chosen]);
        }
        finally
        {
            ArrayPool<ulong>.Shared.Return(order);
            ArrayPool<double>.Shared.Return(cumulative);
        }
    }

    /// <summary>
    /// Orders the tokens by logit, largest first, and then by id; see <c>Id</c> for what <c>order</c> holds.
    /// </summary>
    private static void SortFalling(ReadOnlySpan<float> logits, ulong[] order)
    {
        for (int id = 0; id < logits.Length; id++)
        {
            // a logit's bits made to sort downwards, above its id; + 0 makes -0 equal to 0
            uint bits = BitConverter.SingleToUInt32Bits(logits[id] + 0f);
            uint falling = bits >> 31 == 1 ? bits : bits ^ 0x7FFFFFFFu;
            order[id] = ((ulong)falling << 32) | (uint)id;
        }
        Array.Sort(order, 0, logits.Length);
    }

    private static int Id(ulong key) => (int)(uint)key;

    private static GenerationException NotFinite() =>
        new GenerationException("the graph's logits are not finite; check the bundle with phimoe-verify");
}
