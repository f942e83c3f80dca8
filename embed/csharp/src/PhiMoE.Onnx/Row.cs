using System.Diagnostics;
using System.Text;

namespace PhiMoEOnnx;

/// <summary>A prompt, how many tokens may follow it, and how they are chosen and ended.</summary>
internal sealed record Request(IReadOnlyList<int> Prompt, int MaxNewTokens, GenerationOptions Options);

/// <summary>A request of a batch on its way to its end.</summary>
internal sealed class Row
{
    private readonly int _number;
    private readonly Request _request;
    private readonly GenerationOptions _options;
    private readonly long _seed;
    private readonly IReadOnlySet<int> _eos;
    private readonly HashSet<int> _seen;
    private readonly HashSet<int> _stopIds = new HashSet<int>(); // a hidden token has no text that a stop string could be found in
    private readonly List<int> _tokenIds = new List<int>();
    private readonly TextStream _characters;
    private readonly StringBuilder _text = new StringBuilder();
    private readonly Stopwatch _clock = Stopwatch.StartNew();
    private string _heldBack = ""; // may be the beginning of a stop string
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
        foreach (string stop in request.Options.Stop)
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
        int token = Sampling.Sample(logits, _options, _seed, _tokenIds.Count, _seen);
        double now = _clock.Elapsed.TotalSeconds;
        _first = _tokenIds.Count == 0 ? now : _first;
        _tokenIds.Add(token);
        _seen.Add(token);
        _heldBack += _eos.Contains(token) ? "" : _characters.Add(token);
        int end = FirstStop();
        FinishReason? reason = _eos.Contains(token) ? FinishReason.Eos
            : end >= 0 || _stopIds.Contains(token) ? FinishReason.Stop
            : _tokenIds.Count == _request.MaxNewTokens ? FinishReason.Length
            : null;
        if (end < 0)
        {
            end = reason == null ? _heldBack.Length - Overlap() : _heldBack.Length;
        }
        string certain = _heldBack.Substring(0, end);
        _heldBack = _heldBack.Substring(end);
        _text.Append(certain);
        Finished = reason != null;
        Generation? result = reason is FinishReason why
            ? new Generation(_text.ToString(), _tokenIds, why, _request.Prompt.Count, _first, now)
            : null;
        return new Piece(_number, token, certain, result);
    }

    /// <summary>Where the first stop string begins in what is held back; -1 where there is none.</summary>
    private int FirstStop()
    {
        IEnumerable<int> places = _options.Stop.Select(stop => _heldBack.IndexOf(stop, StringComparison.Ordinal));
        return places.Where(place => place >= 0).DefaultIfEmpty(-1).Min();
    }

    /// <summary>The length of the longest end of what is held back that begins a stop string.</summary>
    private int Overlap()
    {
        int longest = 0;
        foreach (string stop in _options.Stop)
        {
            for (int size = longest + 1; size < stop.Length && size <= _heldBack.Length; size++)
            {
                longest = string.CompareOrdinal(_heldBack, _heldBack.Length - size, stop, 0, size) == 0 ? size : longest;
            }
        }
        return longest;
    }
}
