using System.Runtime.CompilerServices;
using Microsoft.ML.OnnxRuntime;

namespace PhiMoEOnnx;

/// <summary>A bundle loaded for generation; <see cref="Load"/> makes one.</summary>
/// <remarks>Its methods may be called from several threads: each call has a cache of its own.</remarks>
public sealed class PhiMoE : IDisposable
{
    private readonly Engine _engine;

    private PhiMoE(InferenceSession session, Manifest manifest, Tokenizer tokenizer)
    {
        _engine = new Engine(session, manifest.Decoding, tokenizer);
        Manifest = manifest;
        Tokenizer = tokenizer;
    }

    /// <summary>The bundle's manifest.</summary>
    public Manifest Manifest { get; }

    /// <summary>Text to token ids and back.</summary>
    public Tokenizer Tokenizer { get; }

    /// <summary>Loads a bundle that phimoe-export wrote.</summary>
    /// <param name="bundle">Its folder.</param>
    /// <param name="threads">
    /// Threads for one operator; null leaves it to ONNX Runtime, which takes one a physical core.
    /// </param>
    /// <exception cref="BundleException">The folder is no bundle, or a file of it is missing or changed.</exception>
    /// <exception cref="DeviceException">
    /// The bundle is for another device, or the installed ONNX Runtime cannot run it.
    /// </exception>
    public static PhiMoE Load(string bundle, int? threads = null)
    {
        Manifest manifest = Bundle.ReadManifest(bundle);
        Graph graph = Session.ChooseGraph(bundle, manifest, Session.Installed());
        Bundle.CheckFiles(bundle, manifest);
        Tokenizer tokenizer = new Tokenizer(bundle, manifest.Decoding.HiddenTokens.Values);
        return new PhiMoE(Session.Open(bundle, manifest, graph, threads), manifest, tokenizer);
    }

    /// <summary>Continues or answers one prompt.</summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <exception cref="GenerationException">
    /// The prompt is empty or does not fit the context, or an option is out of range.
    /// </exception>
    public Generation Generate(Prompt prompt, GenerationOptions? options = null) =>
        _engine.Run(Single(prompt, options), CancellationToken.None).Last().Result!;

    /// <summary>Continues or answers each prompt of a batch exactly as if it were alone.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">
    /// As for one prompt, for all of them; a row has the random numbers that its prompt would have alone.
    /// </param>
    /// <returns>A result for each prompt, in their order.</returns>
    /// <exception cref="GenerationException">As for one prompt; the batch is empty.</exception>
    public IReadOnlyList<Generation> Generate(IReadOnlyList<Prompt> prompts, GenerationOptions? options = null)
    {
        Generation[] results = new Generation[prompts.Count];
        foreach (Piece piece in _engine.Run(Batch(prompts, options), CancellationToken.None))
        {
            results[piece.Row] = piece.Result ?? results[piece.Row];
        }
        return results;
    }

    /// <summary>
    /// Streams the continuation of one prompt, or its answer, piece by piece; the work is done on the thread pool.
    /// </summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <param name="cancellationToken">
    /// Ends the generation, also within a pass over the model, with an OperationCanceledException.
    /// </param>
    /// <exception cref="GenerationException">
    /// As for <c>Generate</c>; thrown by this call, before the first piece.
    /// </exception>
    public IAsyncEnumerable<Piece> GenerateAsync(
        Prompt prompt, GenerationOptions? options = null, CancellationToken cancellationToken = default) =>
        RunAsync(Single(prompt, options), cancellationToken);

    /// <summary>Streams the continuations of a batch, the rows in turn.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">As for one prompt, for all of them.</param>
    /// <param name="cancellationToken">As for one prompt.</param>
    /// <exception cref="GenerationException">As for one prompt; the batch is empty.</exception>
    public IAsyncEnumerable<Piece> GenerateAsync(
        IReadOnlyList<Prompt> prompts,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        RunAsync(Batch(prompts, options), cancellationToken);

    /// <summary>
    /// Frees the model; waits for a pass in another thread, after which what goes on throws an ObjectDisposedException.
    /// </summary>
    public void Dispose() => _engine.Dispose();

    private IReadOnlyList<Request> Single(Prompt prompt, GenerationOptions? options) =>
        new[] { MakeRequest("the prompt", prompt, options) };

    private IReadOnlyList<Request> Batch(IReadOnlyList<Prompt> prompts, GenerationOptions? options)
    {
        if (prompts.Count == 0)
        {
            throw new GenerationException("the batch is empty; give at least one prompt");
        }
        return prompts.Select((prompt, number) => MakeRequest($"prompt {number}", prompt, options)).ToArray();
    }

    private Request MakeRequest(string name, Prompt prompt, GenerationOptions? options) =>
        Request.Make(name, Encode(prompt, name), Manifest.Decoding, options ?? new GenerationOptions());

    private IReadOnlyList<int> Encode(Prompt prompt, string name)
    {
        if (string.IsNullOrEmpty(prompt.Text) && !(prompt.Messages?.Count > 0) && !(prompt.TokenIds?.Count > 0))
        {
            throw new GenerationException($"{name} is empty; give at least one character, message or token");
        }
        if (prompt.Text != null)
        {
            return Tokenizer.Encode(prompt.Text);
        }
        if (prompt.Messages != null)
        {
            return Tokenizer.Encode(Chat.Render(Manifest.Chat, prompt.Messages), special: false);
        }
        return prompt.TokenIds!.ToArray();
    }

    private async IAsyncEnumerable<Piece> RunAsync(
        IReadOnlyList<Request> requests, [EnumeratorCancellation] CancellationToken cancellationToken)
    {
        using IEnumerator<Piece> pieces = _engine.Run(requests, cancellationToken).GetEnumerator();
        while (await Task.Run(pieces.MoveNext, cancellationToken).ConfigureAwait(false))
        {
            yield return pieces.Current;
        }
    }
}
