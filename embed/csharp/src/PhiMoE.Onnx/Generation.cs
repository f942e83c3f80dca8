using System.Globalization;

namespace PhiMoEOnnx;

/// <summary>The options of a generation; what is not set has its default.</summary>
public sealed record GenerationOptions
{
    /// <summary>Where to end at the latest; null, the default, is 1024 or what the context leaves.</summary>
    public int? MaxNewTokens { get; init; }

    /// <summary>
    /// Divides the logits; 0, the default, and what is less than 2^-126 take the most likely token.
    /// </summary>
    public double Temperature { get; init; }

    /// <summary>Keeps the k most likely tokens; 0, the default, keeps all.</summary>
    public int TopK { get; init; }

    /// <summary>
    /// Keeps the fewest most likely tokens whose probabilities reach this (nucleus sampling); 1, the default, keeps
    /// all.
    /// </summary>
    public double TopP { get; init; } = 1;

    /// <summary>Keeps tokens at least this times as likely as the most likely one; 0, the default, keeps all.</summary>
    public double MinP { get; init; }

    /// <summary>
    /// Divides the positive logits of seen tokens and multiplies the others; 1, the default, changes nothing. From
    /// 1e-30 to 1e30.
    /// </summary>
    public double RepetitionPenalty { get; init; } = 1;

    /// <summary>
    /// The same seed draws the same random numbers, in every language; null, the default, is a fresh one for each row.
    /// </summary>
    public long? Seed { get; init; }

    /// <summary>Strings at which the text ends, themselves left out; null is none.</summary>
    public IReadOnlyList<string>? Stop { get; init; } = Array.Empty<string>();

    /// <exception cref="GenerationException">A value is out of its range.</exception>
    internal void Check()
    {
        Expect(nameof(MaxNewTokens), MaxNewTokens ?? 1, MaxNewTokens is null or >= 1, "1 or more");
        bool isTemperature = Temperature >= 0 && double.IsFinite(Temperature);
        Expect(nameof(Temperature), Temperature, isTemperature, "0 (greedy) or more");
        Expect(nameof(TopK), TopK, TopK >= 0, "0 (off) or more");
        Expect(nameof(TopP), TopP, TopP > 0 && TopP <= 1, "more than 0 and at most 1 (off)");
        Expect(nameof(MinP), MinP, MinP >= 0 && MinP <= 1, "between 0 (off) and 1");
        bool isPenalty = RepetitionPenalty is >= 1e-30 and <= 1e30;
        Expect(nameof(RepetitionPenalty), RepetitionPenalty, isPenalty, "1e-30 to 1e30; 1 is off");
        foreach (string? stop in Stop ?? Array.Empty<string>())
        {
            if (string.IsNullOrEmpty(stop))
            {
                throw new GenerationException(
                    stop == null
                        ? "Stop holds null, expected strings"
                        : "Stop holds an empty string, which would end the text before it began");
            }
            Tokenizer.CheckCharacters(nameof(Stop), stop);
        }
    }

    private static void Expect(string name, IFormattable value, bool holds, string expected)
    {
        if (!holds)
        {
            throw new GenerationException(
                $"{name} is {value.ToString(null, CultureInfo.InvariantCulture)}, expected {expected}");
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
/// <param name="Text">
/// The text that became certain with it; empty while a character is incomplete or a stop string may have begun.
/// </param>
/// <param name="Result">On the row's last piece, all of it; else null.</param>
public sealed record Piece(int Row, int TokenId, string Text, Generation? Result);
