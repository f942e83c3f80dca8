using System.Diagnostics;
using System.Text;

namespace PhiMoEOnnx;

/// <summary>A request of a batch on its way to its end.</summary>
internal sealed class Row
{
    private readonly int _number;
    private readonly Request _request;
    private readonly GenerationOptions _options;
    private readonly long _seed;
    private readonly IReadOnlySet<int> _eos;
    private readonly HashSet<int> _seen;
    // a hidden token has no text that a stop string could be found in
    private readonly HashSet<int> _stopIds = new HashSet<int>();
    private readonly List<int> _tokenIds = new List<int>();
    private readonly TextStream _characters;
    private readonly StopStrings _strings;
    private readonly StringBuilder _text = new StringBuilder();
    private readonly Stopwatch _clock = Stopwatch.StartNew();
    private double _first;

    public Row(int number, Request request, Decoding decoding, Tokenizer tokenizer)
    {
        _number = number;
        _request = request;
        _options = request.Options;
        _seed = _options.Seed ?? Random.Shared.NextInt64(long.MinValue, long.MaxValue);
        _eos = decoding.EosTokenIds;
        _seen = request.Prompt.ToHashSet();
        _characters = new TextStream(tokenizer, request.Prompt);
        IReadOnlyList<string> stops = _options.Stop ?? Array.Empty<string>();
        _strings = new StopStrings(stops);
        foreach (string stop in stops)
        {
            if (decoding.HiddenTokens.TryGetValue(stop, out int id))
            {
                _stopIds.Add(id);
            }
        }
    }

    public bool Finished { get; private set; }

    public int Last => _tokenIds[_tokenIds.Count - 1];

    /// <summary>Chooses the next token from logits [vocab_size], which may be changed.</summary>
    public Piece Next(Span<float> logits)
    {
        int token = Sampler.Sample(logits, _options, _seed, _tokenIds.Count, _seen);
        double now = _clock.Elapsed.TotalSeconds;
        _first = _tokenIds.Count == 0 ? now : _first;
        _tokenIds.Add(token);
        _seen.Add(token);
        (string text, bool stopped) = _strings.Add(_eos.Contains(token) ? "" : _characters.Add(token));
        FinishReason? reason = _eos.Contains(token) ? FinishReason.Eos
            : stopped || _stopIds.Contains(token) ? FinishReason.Stop
            : _tokenIds.Count == _request.MaxNewTokens ? FinishReason.Length
            : null;
        Finished = reason != null;
        if (Finished && !stopped)
        {
            (string last, bool met) = _strings.Add(_characters.Finish()); // what waited for what might follow it
            text += last + _strings.Finish();
            reason = met ? FinishReason.Stop : reason;
        }
        _text.Append(text);
        Generation? result = reason is FinishReason why
            ? new Generation(_text.ToString(), _tokenIds, why, _request.Prompt.Count, _first, now)
            : null;
        return new Piece(_number, token, text, result);
    }
}
