namespace PhiMoEOnnx;

/// <summary>
/// The calls of <see cref="PhiMoE"/> for prompts behind interfaces, from which C# lets no <see cref="Prompt"/> be
/// converted. Parameters and errors are those of the calls that take a Prompt.
/// </summary>
public static class PhiMoEExtensions
{
    /// <summary>Continues token ids.</summary>
    public static Generation Generate(
        this PhiMoE model,
        IReadOnlyList<int> tokenIds,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.Generate(new Prompt(tokenIds), options, cancellationToken);

    /// <summary>Continues token ids, on the thread pool.</summary>
    public static Task<Generation> GenerateAsync(
        this PhiMoE model,
        IReadOnlyList<int> tokenIds,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.GenerateAsync(new Prompt(tokenIds), options, cancellationToken);

    /// <summary>Continues token ids, piece by piece.</summary>
    public static IAsyncEnumerable<Piece> StreamAsync(
        this PhiMoE model,
        IReadOnlyList<int> tokenIds,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.StreamAsync(new Prompt(tokenIds), options, cancellationToken);

    /// <summary>Answers messages.</summary>
    public static Generation Generate(
        this PhiMoE model,
        IEnumerable<Message> messages,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.Generate(Chat(messages), options, cancellationToken);

    /// <summary>Answers messages, on the thread pool.</summary>
    public static Task<Generation> GenerateAsync(
        this PhiMoE model,
        IEnumerable<Message> messages,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.GenerateAsync(Chat(messages), options, cancellationToken);

    /// <summary>Answers messages, piece by piece.</summary>
    public static IAsyncEnumerable<Piece> StreamAsync(
        this PhiMoE model,
        IEnumerable<Message> messages,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.StreamAsync(Chat(messages), options, cancellationToken);

    /// <summary>Continues each text of a batch.</summary>
    public static IReadOnlyList<Generation> Generate(
        this PhiMoE model,
        IEnumerable<string> texts,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.Generate(Batch(texts), options, cancellationToken);

    /// <summary>Continues each text of a batch, on the thread pool.</summary>
    public static Task<IReadOnlyList<Generation>> GenerateAsync(
        this PhiMoE model,
        IEnumerable<string> texts,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.GenerateAsync(Batch(texts), options, cancellationToken);

    /// <summary>Continues each text of a batch, piece by piece.</summary>
    public static IAsyncEnumerable<Piece> StreamAsync(
        this PhiMoE model,
        IEnumerable<string> texts,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        model.StreamAsync(Batch(texts), options, cancellationToken);

    private static Prompt Chat(IEnumerable<Message> messages) => new Prompt(messages?.ToArray()!);

    private static IEnumerable<Prompt> Batch(IEnumerable<string> texts) =>
        texts?.Select(text => text == null ? null! : new Prompt(text))!;
}
