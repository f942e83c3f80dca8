namespace PhiMoEOnnx;

/// <summary>Text to token ids and back, from a bundle's tokenizer.json.</summary>
public sealed class Tokenizer
{
    internal const string File = "tokenizer.json";

    private readonly Bpe _bpe;
    private readonly IReadOnlyList<int> _anchor;
    private readonly int _anchorLength;

    internal Tokenizer(string folder, IEnumerable<int> hidden)
    {
        _bpe = Bpe.Read(Path.Combine(folder, File));
        Hidden = hidden.ToHashSet();
        _anchor = Encode("a", special: false);
        _anchorLength = Decode(_anchor).Length;
    }

    /// <summary>The special tokens that are no text.</summary>
    public IReadOnlySet<int> Hidden { get; }

    /// <summary>The text's token ids.</summary>
    /// <param name="text">The text.</param>
    /// <param name="special">
    /// Whether to add the tokens that tokenizer.json puts around a text, such as the first &lt;s&gt;.
    /// </param>
    /// <returns>The ids; half of a surrogate pair counts as U+FFFD.</returns>
    /// <exception cref="GenerationException">The text is null.</exception>
    public IReadOnlyList<int> Encode(string text, bool special = true) =>
        _bpe.Encode(NotNull(text, nameof(text)), special);

    /// <summary>The text of the ids, without the hidden tokens; an id that the tokenizer lacks has none.</summary>
    /// <exception cref="GenerationException">They are null.</exception>
    public string Decode(IEnumerable<int> tokenIds) =>
        _bpe.Decode(NotNull(tokenIds, nameof(tokenIds)).Where(id => !Hidden.Contains(id)));

    /// <summary>The id of a token by its own text; null where there is no such token.</summary>
    /// <exception cref="GenerationException">The text is null.</exception>
    public int? TokenId(string token) => _bpe.TokenId(NotNull(token, nameof(token)));

    /// <summary>How many tokens the text has at the least; to encode ten million characters takes seconds.</summary>
    internal int LeastTokens(string text) => _bpe.LeastTokens(text);

    /// <summary>
    /// The text of the ids where they follow other text: a decoder strips the space before a text's first word only.
    /// </summary>
    internal string Continue(IEnumerable<int> tokenIds) => Decode(_anchor.Concat(tokenIds)).Substring(_anchorLength);

    private static T NotNull<T>(T? value, string name)
        where T : class => value ?? throw new GenerationException($"{name} is null, expected a value");
}

/// <summary>Token ids in, text out: each character once, and only when it is whole.</summary>
/// <remarks>
/// A character may be spread over several byte tokens, so ids wait until they decode without a replacement character.
/// Only those that wait are decoded, so a token costs the same however long the text is.
/// </remarks>
internal sealed class TextStream
{
    private const string Incomplete = "\uFFFD"; // what a decoder makes of half a character

    private readonly Tokenizer _tokenizer;
    private readonly List<int> _waiting = new List<int>();
    private bool _follows;

    /// <summary>A stream of the text that continues <c>prompt</c>.</summary>
    public TextStream(Tokenizer tokenizer, IReadOnlyList<int> prompt)
    {
        _tokenizer = tokenizer;
        _follows = prompt.Count > 0 && !tokenizer.Hidden.Contains(prompt[prompt.Count - 1]);
        // a prompt may end inside a character: its bytes wait for the rest
        int start = prompt.Count;
        while (start > 0 && tokenizer.Decode(new[] { prompt[start - 1] }) == Incomplete)
        {
            start--;
        }
        foreach (int id in prompt.Skip(start))
        {
            Add(id);
        }
    }

    /// <summary>The text that this token completes; often none.</summary>
    public string Add(int id)
    {
        if (_tokenizer.Hidden.Contains(id))
        {
            return "";
        }
        _waiting.Add(id);
        string text = _follows ? _tokenizer.Continue(_waiting) : _tokenizer.Decode(_waiting);
        if (text.EndsWith(Incomplete, StringComparison.Ordinal))
        {
            return "";
        }
        _waiting.Clear();
        _follows = true;
        return text;
    }
}
