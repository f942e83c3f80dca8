namespace PhiMoEOnnx;

/// <summary>
/// Passes text on up to the first stop string; what may be the beginning of one is held back until that is known.
/// </summary>
internal sealed class StopStrings
{
    private readonly IReadOnlyList<string> _stops;
    private string _held = "";

    public StopStrings(IReadOnlyList<string> stops)
    {
        _stops = stops;
    }

    /// <summary>
    /// The text that is now certain, and whether a stop string was met; it and what follows it are dropped.
    /// </summary>
    public (string Text, bool Stopped) Add(string text)
    {
        _held += text;
        int[] found =
            _stops.Select(stop => _held.IndexOf(stop, StringComparison.Ordinal)).Where(place => place >= 0).ToArray();
        int certain = found.Length > 0 ? found.Min() : _held.Length - Overlap();
        text = _held.Substring(0, certain);
        _held = found.Length > 0 ? "" : _held.Substring(certain);
        return (text, found.Length > 0);
    }

    /// <summary>What was held back, now that no more text comes.</summary>
    public string Finish()
    {
        string text = _held;
        _held = "";
        return text;
    }

    /// <summary>The length of the longest end of what is held back that begins a stop string.</summary>
    private int Overlap()
    {
        int longest = 0;
        foreach (string stop in _stops)
        {
            for (int size = longest + 1; size < stop.Length && size <= _held.Length; size++)
            {
                longest = string.CompareOrdinal(_held, _held.Length - size, stop, 0, size) == 0 ? size : longest;
            }
        }
        return longest;
    }
}
