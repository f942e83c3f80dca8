namespace PhiMoEOnnx;

/// <summary>
/// Spaces that a stream of text loses before punctuation, where the manifest asks for it; what the next text may still
/// change is held back.
/// </summary>
/// <remarks>The replacements are those of transformers' PreTrainedTokenizerBase.clean_up_tokenization.</remarks>
internal sealed class CleanUp
{
    // done one after the other, each over the whole text
    private static readonly (string Old, string New)[] Replacements =
        new[] { ".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re" }
            .Select(word => (" " + word, word.TrimEnd())).ToArray();

    // what may become more by the next text: the beginnings of what is replaced, and of what becomes that when " ' "
    // loses its spaces
    private static readonly HashSet<string> Starts = Replacements.Select(each => each.Old)
        .Concat(new[] { " n ' t", "  ' m", "  ' s", "  ' ve", "  ' re" })
        .SelectMany(span => Enumerable.Range(1, span.Length - 1).Select(size => span.Substring(0, size)))
        .ToHashSet();

    private static readonly int Longest = Starts.Max(start => start.Length);

    private string _held = "";

    /// <summary>A whole text without the spaces.</summary>
    public static string Of(string text) =>
        Replacements.Aggregate(text, (before, each) => before.Replace(each.Old, each.New, StringComparison.Ordinal));

    /// <summary>Takes more text; returns what is now certain.</summary>
    public string Add(string text)
    {
        _held += text;
        int end = _held.Length - Overlap();
        if (end < _held.Length)
        {
            // nor may the cut go through what is changed already: of those characters alone it may lie among
            while (end > 0 && (_held[end - 1] is ' ' or '\'' or 'n'))
            {
                end--;
            }
        }
        string certain = Of(_held.Substring(0, end));
        _held = _held.Substring(end);
        return certain;
    }

    /// <summary>What was held back, now that no more text comes.</summary>
    public string Finish()
    {
        string text = Of(_held);
        _held = "";
        return text;
    }

    /// <summary>The length of the longest end of what is held that begins a span.</summary>
    private int Overlap()
    {
        int size = Math.Min(Longest, _held.Length);
        while (size > 0 && !Starts.Contains(_held.Substring(_held.Length - size)))
        {
            size--;
        }
        return size;
    }
}
