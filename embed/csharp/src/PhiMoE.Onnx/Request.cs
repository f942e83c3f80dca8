namespace PhiMoEOnnx;

/// <summary>A prompt, how many tokens may follow it, and how they are chosen and ended.</summary>
internal sealed record Request(IReadOnlyList<int> Prompt, int MaxNewTokens, GenerationOptions Options)
{
    private const int DefaultNewTokens = 1024; // where MaxNewTokens is not given

    /// <summary>
    /// A request whose options are in range and whose tokens fit the context; <c>name</c> is the prompt's in errors.
    /// </summary>
    /// <exception cref="GenerationException">They are not, or a token is none of the vocabulary.</exception>
    public static Request Make(string name, IReadOnlyList<int> prompt, Decoding decoding, GenerationOptions options)
    {
        // the caller's may change
        options = options with { Stop = options.Stop?.ToArray() ?? Array.Empty<string>() };
        options.Check();
        foreach (int id in prompt)
        {
            if (id < 0 || id >= decoding.VocabSize)
            {
                throw new GenerationException(
                    $"{name} holds {id}, expected token ids from 0 to {decoding.VocabSize - 1}");
            }
        }
        int context = decoding.Context;
        int room = context - prompt.Count;
        if (room <= 0)
        {
            throw new GenerationException(
                $"{name} has {prompt.Count} tokens, which leaves no room in the context of {context}; shorten it");
        }
        int most = options.MaxNewTokens ?? Math.Min(DefaultNewTokens, room);
        if (most > room)
        {
            throw new GenerationException(
                $"{name} has {prompt.Count} tokens and MaxNewTokens is {most}, together more than the "
                + $"context of {context}; at most {room} new tokens fit");
        }
        return new Request(prompt, most, options);
    }
}
