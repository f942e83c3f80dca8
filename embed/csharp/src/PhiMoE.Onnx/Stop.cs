namespace PhiMoEOnnx;

/// <summary>Passes text on up to the first stop string; what may be the beginning of one is held back until that is known.</summary>
internal sealed class StopStrings
{
    private readonly IReadOnlyList<string> _stops;
    private string _held = "";

    public StopStrings(IReadOnlyList<string> stops)
    {
        _stops = stops;
    }

    /// <summary>The text that is now certain, and whether a stop string was met; it and what follows it are dropped.</summary>
    public (string Text, bool Stopped) Add(string text)
    {
        _held += text;
        int end = -1;
        int hold = 0;
        foreach (string stop in _stops)
        {
            int place = _held.IndexOf(stop, StringComparison.Ordinal);
            if (place >= 0 && (end < 0 || place < end))
            {
                end = place;
            }
            hold = Math.Max(hold, Overlap(_held, stop));
        }
        if (end >= 0)
        {
            text = _held.Substring(0, end);
            _held = "";
            return (text, true);
        }
        int certain = _held.Length - hold;
        text = _held.Substring(0, certain);
        _held = _held.Substring(certain);
        return (text, false);
    }

    /// <summary>What was held back, now that no more text comes.</summary>
    public string Finish() => _held;

    /// <summary>The length of the longest proper prefix of <c>stop</c> that ends <c>text</c>.</summary>
    private static int Overlap(string text, string stop)
    {
        for (int size = Math.Min(text.Length, stop.Length - 1); size > 0; size--)
        {
            if (string.CompareOrdinal(text, text.Length - size, stop, 0, size) == 0)
            {
                return size;
            }
        }
        return 0;
    }
}
