namespace PhiMoEOnnx;

/// <summary>Text to token ids and back, from a bundle's tokenizer.json.</summary>
public sealed class Tokenizer
{
    internal const string File = "tokenizer.json";

    private readonly Bpe _bpe;
    private readonly IReadOnlyList<int> _anchor;
    private readonly int _anchorLength;

    internal Tokenizer(string folder, IEnumerable<int> hidden, bool cleanUp = false)
    {
        _bpe = Bpe.Read(Path.Combine(folder, File));
        Hidden = hidden.ToHashSet();
        CleansUp = cleanUp;
        _anchor = Encode("a", special: false);
        _anchorLength = DecodeAll(_anchor).Length;
    }

    /// <summary>The special tokens that are no text.</summary>
    public IReadOnlySet<int> Hidden { get; }

    /// <summary>Whether decoded text loses spaces before punctuation.</summary>
    internal bool CleansUp { get; }

    /// <summary>The text's token ids.</summary>
    /// <param name="text">The text.</param>
    /// <param name="special">
    /// Whether to add the tokens that tokenizer.json puts around a text, such as the first &lt;s&gt;.
    /// </param>
    /// <exception cref="GenerationException">The text is null or holds half of a surrogate pair.</exception>
    public IReadOnlyList<int> Encode(string text, bool special = true)
    {
        CheckCharacters("the text", NotNull(text, nameof(text)));
        return _bpe.Encode(text, special);
    }

    /// <summary>The text of the ids, without the hidden tokens; an id that the tokenizer lacks has none.</summary>
    /// <exception cref="GenerationException">They are null.</exception>
    public string Decode(IEnumerable<int> tokenIds)
    {
        string text = DecodeAll(NotNull(tokenIds, nameof(tokenIds)));
        return CleansUp ? CleanUp.Of(text) : text;
    }

    /// <summary>The id of a token by its own text; null where there is no such token.</summary>
    /// <exception cref="GenerationException">The text is null.</exception>
    public int? TokenId(string token) => _bpe.TokenId(NotNull(token, nameof(token)));

    /// <summary>Refuses half characters, which no encoding has: surrogates without their other one.</summary>
    /// <exception cref="GenerationException"><c>name</c> holds one.</exception>
    internal static void CheckCharacters(string name, string text)
    {
        for (int place = 0; place < text.Length; place++)
        {
            if (char.IsSurrogatePair(text, place))
            {
                place++;
            }
            else if (char.IsSurrogate(text[place]))
            {
                throw new GenerationException(
                    $"{name} holds \\u{(int)text[place]:x4} at place {place}, which is half a character; "
                    + "expected Unicode");
            }
        }
    }

    /// <summary>How many tokens the text has at the least; to encode ten million characters takes seconds.</summary>
    internal int LeastTokens(string text) => _bpe.LeastTokens(text);

    /// <summary>
    /// The text of the ids where they follow other text: a decoder strips the space before a text's first word only.
    /// </summary>
    internal string Continue(IEnumerable<int> tokenIds) =>
        DecodeAll(_anchor.Concat(tokenIds)).Substring(_anchorLength);

    /// <summary>The text of the ids with all of its spaces.</summary>
    internal string DecodeAll(IEnumerable<int> tokenIds) => _bpe.Decode(tokenIds.Where(id => !Hidden.Contains(id)));

    private static T NotNull<T>(T? value, string name)
        where T : class => value ?? throw new GenerationException($"{name} is null, expected a value");
}

/// <summary>Token ids in, text out: each character once, and only when it is whole.</summary>
/// <remarks>
/// A character may be spread over several byte tokens, so ids wait until they decode without a replacement character.
/// Only those that wait are decoded, so a token costs the same however long the text is. Where spaces are cleaned up,
/// text waits, too, while the next may still change it.
/// </remarks>
internal sealed class TextStream
{
    private const string Incomplete = "\uFFFD"; // what a decoder makes of half a character

    private readonly Tokenizer _tokenizer;
    private readonly List<int> _waiting = new List<int>();
    private readonly CleanUp? _spaces;
    private bool _follows;

    /// <summary>A stream of the text that continues <c>prompt</c>.</summary>
    public TextStream(Tokenizer tokenizer, IReadOnlyList<int> prompt)
    {
        _tokenizer = tokenizer;
        _spaces = tokenizer.CleansUp ? new CleanUp() : null;
        _follows = prompt.Count > 0 && !tokenizer.Hidden.Contains(prompt[prompt.Count - 1]);
        // a prompt may end inside a character: its bytes wait for the rest
        int start = prompt.Count;
        while (start > 0 && tokenizer.DecodeAll(new[] { prompt[start - 1] }) == Incomplete)
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
        string text = _follows ? _tokenizer.Continue(_waiting) : _tokenizer.DecodeAll(_waiting);
        if (text.EndsWith(Incomplete, StringComparison.Ordinal))
        {
            return "";
        }
        _waiting.Clear();
        _follows = true;
        return _spaces == null ? text : _spaces.Add(text);
    }

    /// <summary>
    /// The text that waits for what may follow it, now that nothing does; half a character is left out.
    /// </summary>
    public string Finish() => _spaces == null ? "" : _spaces.Finish();
}
