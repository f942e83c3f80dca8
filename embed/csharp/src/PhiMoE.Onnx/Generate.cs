using System.Diagnostics;
using System.Globalization;

namespace PhiMoEOnnx;

/// <summary>The options of a generation; what is not set has its default.</summary>
public sealed record GenerationOptions
{
    /// <summary>Where to end at the latest; null, the default, is 1024 or what the context leaves.</summary>
    public int? MaxNewTokens { get; init; }

    /// <summary>Divides the logits; 0, the default, takes the most likely token.</summary>
    public double Temperature { get; init; }

    /// <summary>Keeps the k most likely tokens; 0, the default, keeps all.</summary>
    public int TopK { get; init; }

    /// <summary>Keeps the fewest most likely tokens whose probabilities reach this (nucleus sampling); 1, the default, keeps all.</summary>
    public double TopP { get; init; } = 1;

    /// <summary>Keeps tokens at least this times as likely as the most likely one; 0, the default, keeps all.</summary>
    public double MinP { get; init; }

    /// <summary>Divides the positive logits of seen tokens and multiplies the others; 1, the default, changes nothing.</summary>
    public double RepetitionPenalty { get; init; } = 1;

    /// <summary>The same seed gives the same tokens, in every language; null, the default, is a fresh one for each row.</summary>
    public long? Seed { get; init; }

    /// <summary>Strings at which the text ends, themselves left out.</summary>
    public IReadOnlyList<string> Stop { get; init; } = Array.Empty<string>();

    /// <exception cref="GenerationException">A value is out of its range.</exception>
    internal void Check()
    {
        Expect(nameof(Temperature), Temperature, Temperature >= 0 && double.IsFinite(Temperature), "0 (greedy) or more");
        Expect(nameof(TopK), TopK, TopK >= 0, "0 (off) or more");
        Expect(nameof(TopP), TopP, TopP > 0 && TopP <= 1, "more than 0 and at most 1 (off)");
        Expect(nameof(MinP), MinP, MinP >= 0 && MinP <= 1, "between 0 (off) and 1");
        bool isPenalty = RepetitionPenalty > 0 && double.IsFinite(RepetitionPenalty);
        Expect(nameof(RepetitionPenalty), RepetitionPenalty, isPenalty, "more than 0; 1 is off");
        if (Stop.Contains(""))
        {
            throw new GenerationException("Stop holds an empty string, which would end the text before it began");
        }
    }

    private static void Expect(string name, IFormattable value, bool holds, string expected)
    {
        if (!holds)
        {
            throw new GenerationException($"{name} is {value.ToString(null, CultureInfo.InvariantCulture)}, expected {expected}");
        }
    }
}

/// <summary>Why a text ended.</summary>
public enum FinishReason
{
    /// <summary>An end token of the model.</summary>
    Eos,

    /// <summary>A stop string.</summary>
    Stop,

    /// <summary>The most tokens that were asked for.</summary>
    Length,
}

/// <summary>What one prompt led to.</summary>
/// <param name="Text">The new text, without special tokens and without the stop string.</param>
/// <param name="TokenIds">The new tokens, with the one that ended the text.</param>
/// <param name="FinishReason">Why it ended.</param>
/// <param name="PromptTokens">The length of the prompt.</param>
/// <param name="FirstTokenSeconds">From the call to the row's first token.</param>
/// <param name="Seconds">From the call to the row's last token.</param>
public sealed record Generation(
    string Text,
    IReadOnlyList<int> TokenIds,
    FinishReason FinishReason,
    int PromptTokens,
    double FirstTokenSeconds,
    double Seconds)
{
    /// <summary>The speed after the first token; 0 where there is no second one.</summary>
    public double TokensPerSecond => (TokenIds.Count - 1) / Math.Max(Seconds - FirstTokenSeconds, 1e-9);
}

/// <summary>One new token of a stream.</summary>
/// <param name="Row">Which prompt of the batch; 0 for a single one.</param>
/// <param name="TokenId">The token.</param>
/// <param name="Text">The text that became certain with it; empty while a character is incomplete or a stop string may have begun.</param>
/// <param name="Result">On the row's last piece, all of it; else null.</param>
public sealed record Piece(int Row, int TokenId, string Text, Generation? Result);

/// <summary>One prompt, how many tokens may follow it, and how they are chosen and ended.</summary>
internal sealed record Request(IReadOnlyList<int> Prompt, int MaxNewTokens, GenerationOptions Options, long Seed)
{
    private const int DefaultNewTokens = 1024; // where MaxNewTokens is not given

    /// <summary>A request whose options are in range and whose tokens fit the context; <c>name</c> is the prompt's in errors.</summary>
    /// <exception cref="GenerationException">They are not, or do not.</exception>
    public static Request Make(IReadOnlyList<int> prompt, int context, string name, GenerationOptions options)
    {
        if (prompt.Count >= context)
        {
            throw new GenerationException(
                $"{name} has {prompt.Count} tokens, which leaves no room in the context of {context}; shorten it");
        }
        int most = options.MaxNewTokens ?? Math.Min(DefaultNewTokens, context - prompt.Count);
        if (most < 1)
        {
            throw new GenerationException($"MaxNewTokens is {most}, expected 1 or more");
        }
        if (most > context - prompt.Count)
        {
            throw new GenerationException(
                $"{name} has {prompt.Count} tokens and MaxNewTokens is {most}, together more than the context of {context}; "
                + $"at most {context - prompt.Count} new tokens fit");
        }
        options.Check();
        return new Request(prompt, most, options, options.Seed ?? Random.Shared.NextInt64(long.MinValue, long.MaxValue));
    }
}

/// <summary>The generation loop: prefill each row, then step all rows until each has reached its end.</summary>
internal static class Loop
{
    /// <summary>Yields every new token of every request, the rows in turn, and disposes the decoder, which has a row for each.</summary>
    public static IEnumerable<Piece> Run(Func<Decoder> open, Tokenizer tokenizer, IReadOnlySet<int> eos, IReadOnlyList<Request> requests)
    {
        Stopwatch clock = Stopwatch.StartNew();
        using Decoder decoder = open();
        List<Row> active = requests.Select((request, number) => new Row(number, request, tokenizer, eos, clock)).ToList();
        for (int row = 0; row < requests.Count; row++)
        {
            decoder.Prefill(row, requests[row].Prompt);
        }
        while (true)
        {
            for (int place = 0; place < active.Count; place++)
            {
                yield return active[place].Next(decoder.Logits(place));
            }
            for (int place = active.Count - 1; place >= 0; place--)
            {
                if (active[place].Finished)
                {
                    if (active.Count == 1)
                    {
                        yield break;
                    }
                    decoder.Drop(place);
                    active[place] = active[active.Count - 1];
                    active.RemoveAt(active.Count - 1);
                }
            }
            decoder.Step(active.Select(row => row.Last).ToArray());
        }
    }

    /// <summary>A request on its way to its end.</summary>
    private sealed class Row
    {
        private readonly int _number;
        private readonly Request _request;
        private readonly IReadOnlySet<int> _eos;
        private readonly Stopwatch _clock;
        private readonly HashSet<int> _seen;
        private readonly List<int> _tokenIds = new List<int>();
        private readonly List<string> _texts = new List<string>();
        private readonly TextStream _characters;
        private readonly StopStrings _strings;
        private readonly HashSet<int> _stopIds = new HashSet<int>();
        private double _first;

        public Row(int number, Request request, Tokenizer tokenizer, IReadOnlySet<int> eos, Stopwatch clock)
        {
            _number = number;
            _request = request;
            _eos = eos;
            _clock = clock;
            _seen = request.Prompt.ToHashSet();
            _characters = new TextStream(tokenizer, request.Prompt);
            _strings = new StopStrings(request.Options.Stop);
            foreach (string stop in request.Options.Stop)
            {
                // a hidden token has no text that a stop string could be found in
                if (tokenizer.TokenId(stop) is int id && tokenizer.Hidden.Contains(id))
                {
                    _stopIds.Add(id);
                }
            }
        }

        public bool Finished { get; private set; }

        public int Last => _tokenIds[_tokenIds.Count - 1];

        /// <summary>Chooses the row's next token from its logits.</summary>
        public Piece Next(Span<float> logits)
        {
            int token = Sampling.Sample(logits, _request.Options, _request.Seed, _tokenIds.Count, _seen);
            double now = _clock.Elapsed.TotalSeconds;
            _first = _tokenIds.Count == 0 ? now : _first;
            _tokenIds.Add(token);
            _seen.Add(token);
            bool ends = _eos.Contains(token);
            (string text, bool stopped) = _strings.Add(ends ? "" : _characters.Add(token));
            FinishReason? reason = null;
            if (ends)
            {
                reason = FinishReason.Eos;
            }
            else if (stopped || _stopIds.Contains(token))
            {
                reason = FinishReason.Stop;
            }
            else if (_tokenIds.Count == _request.MaxNewTokens)
            {
                reason = FinishReason.Length;
            }
            Finished = reason != null;
            text += Finished ? _strings.Finish() : "";
            _texts.Add(text);
            Generation? result = reason == null
                ? null
                : new Generation(string.Concat(_texts), _tokenIds, reason.Value, _request.Prompt.Count, _first, now);
            return new Piece(_number, token, text, result);
        }
    }
}
