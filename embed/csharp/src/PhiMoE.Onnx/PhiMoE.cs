using System.Runtime.CompilerServices;

namespace PhiMoEOnnx;

/// <summary>A bundle loaded for generation; <see cref="Load"/> makes one.</summary>
/// <remarks>Its methods may be called from several threads: each call has a cache of its own.</remarks>
public sealed class PhiMoE : IDisposable
{
    private readonly string _bundle;
    private readonly Engine _engine;

    private PhiMoE(string bundle, Session session, Manifest manifest, Tokenizer tokenizer)
    {
        _bundle = bundle;
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
    /// Threads for one operator, from 1 to 256 or the number of processors, whichever is more; null takes one a
    /// physical core, and one alone for passes that are short.
    /// </param>
    /// <exception cref="BundleException">
    /// The folder is no bundle, a file of it is missing or changed, or another one took its place meanwhile.
    /// </exception>
    /// <exception cref="DeviceException">
    /// The bundle is for another device, or the installed ONNX Runtime cannot run it.
    /// </exception>
    public static PhiMoE Load(string bundle, int? threads = null)
    {
        if (bundle == null || bundle.Contains('\0'))
        {
            throw new BundleException("the bundle is null or has a character NUL, expected the path of a folder");
        }
        Manifest manifest = Bundle.ReadManifest(bundle);
        IReadOnlyDictionary<string, FileState?> before = Bundle.Look(bundle, manifest);
        try
        {
            PhiMoE model = Open(bundle, manifest, threads);
            if (Bundle.IsAsBefore(bundle, manifest, before))
            {
                return model;
            }
            model.Dispose();
        }
        catch (PhiMoEException) when (!Bundle.IsAsBefore(bundle, manifest, before))
        {
        }
        // what was opened may be some of one bundle and some of another
        throw new BundleException($"{bundle}: was changed while it was read; load it again");
    }

    /// <summary>Continues or answers one prompt.</summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <param name="cancellationToken">
    /// Ends the generation, also within a pass over the model, with an OperationCanceledException.
    /// </param>
    /// <exception cref="GenerationException">
    /// The prompt is empty or does not fit the context, or an option is out of range.
    /// </exception>
    public Generation Generate(
        Prompt prompt, GenerationOptions? options = null, CancellationToken cancellationToken = default) =>
        Results(Single(prompt, options), cancellationToken)[0];

    /// <summary>Continues or answers each prompt of a batch exactly as if it were alone.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">
    /// As for one prompt, for all of them; a row has the random numbers that its prompt would have alone.
    /// </param>
    /// <param name="cancellationToken">As for one prompt.</param>
    /// <returns>A result for each prompt, in their order.</returns>
    /// <exception cref="GenerationException">As for one prompt; the batch is empty.</exception>
    public IReadOnlyList<Generation> Generate(
        IEnumerable<Prompt> prompts,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        Results(Batch(prompts, options), cancellationToken);

    /// <summary>As <c>Generate</c>, on the thread pool.</summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <param name="cancellationToken">As for <c>Generate</c>.</param>
    /// <exception cref="GenerationException">As for <c>Generate</c>; thrown by this call, not by its task.</exception>
    public Task<Generation> GenerateAsync(
        Prompt prompt, GenerationOptions? options = null, CancellationToken cancellationToken = default)
    {
        IReadOnlyList<Request> requests = Single(prompt, options);
        return Task.Run(() => Results(requests, cancellationToken)[0], cancellationToken);
    }

    /// <summary>As <c>Generate</c> of a batch, on the thread pool.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">As for one prompt, for all of them.</param>
    /// <param name="cancellationToken">As for <c>Generate</c>.</param>
    /// <exception cref="GenerationException">As for <c>Generate</c>; thrown by this call, not by its task.</exception>
    public Task<IReadOnlyList<Generation>> GenerateAsync(
        IEnumerable<Prompt> prompts, GenerationOptions? options = null, CancellationToken cancellationToken = default)
    {
        IReadOnlyList<Request> requests = Batch(prompts, options);
        return Task.Run(() => Results(requests, cancellationToken), cancellationToken);
    }

    /// <summary>
    /// Streams the continuation of one prompt, or its answer, piece by piece; the work is done on the thread pool.
    /// </summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <param name="cancellationToken">As for <c>Generate</c>.</param>
    /// <exception cref="GenerationException">
    /// As for <c>Generate</c>; thrown by this call, before the first piece.
    /// </exception>
    public IAsyncEnumerable<Piece> StreamAsync(
        Prompt prompt, GenerationOptions? options = null, CancellationToken cancellationToken = default) =>
        RunAsync(Single(prompt, options), cancellationToken);

    /// <summary>Streams the continuations of a batch, the rows in turn.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">As for one prompt, for all of them.</param>
    /// <param name="cancellationToken">As for <c>Generate</c>.</param>
    /// <exception cref="GenerationException">As for one prompt; the batch is empty.</exception>
    public IAsyncEnumerable<Piece> StreamAsync(
        IEnumerable<Prompt> prompts,
        GenerationOptions? options = null,
        CancellationToken cancellationToken = default) =>
        RunAsync(Batch(prompts, options), cancellationToken);

    /// <summary>
    /// Holds the bundle against what phimoe-verify --save-golden kept of the checkpoint that it came from: runs the
    /// same tokens, and judges by the limits of the bundle's precision. Neither the checkpoint nor Python is needed.
    /// </summary>
    /// <param name="golden">
    /// The file's path; it was saved with this bundle or with another of the same checkpoint.
    /// </param>
    /// <param name="progress">Is told how many windows of tokens were run, and of how many.</param>
    /// <param name="cancellationToken">As for <c>Generate</c>.</param>
    /// <exception cref="GoldenException">It is missing, damaged, or another checkpoint's.</exception>
    /// <exception cref="BundleException">The manifest does not say how the weights are stored.</exception>
    public Report VerifyGolden(
        string golden, Action<int, int>? progress = null, CancellationToken cancellationToken = default) =>
        _engine.Verify(
            _bundle,
            new Verification(Golden.Read(golden, Manifest), Manifest, Tokenizer),
            progress,
            cancellationToken);

    /// <summary>
    /// Frees the model; waits for a pass in another thread, after which what goes on throws an ObjectDisposedException.
    /// </summary>
    public void Dispose() => _engine.Dispose();

    private static PhiMoE Open(string bundle, Manifest manifest, int? threads)
    {
        Graph graph = Session.ChooseGraph(bundle, manifest, Session.Installed(), Operators.Provided);
        Bundle.CheckFiles(bundle, manifest);
        Tokenizer tokenizer = new Tokenizer(
            bundle, manifest.Decoding.HiddenTokens.Values, manifest.Decoding.CleanUpTokenizationSpaces);
        return new PhiMoE(bundle, Session.Open(bundle, manifest, graph, threads), manifest, tokenizer);
    }

    private IReadOnlyList<Request> Single(Prompt prompt, GenerationOptions? options) =>
        new[] { MakeRequest("the prompt", prompt, options) };

    private IReadOnlyList<Request> Batch(IEnumerable<Prompt> prompts, GenerationOptions? options)
    {
        Request[] requests =
            prompts?.Select((prompt, number) => MakeRequest($"prompt {number}", prompt, options)).ToArray()
            ?? Array.Empty<Request>();
        return requests.Length > 0
            ? requests
            : throw new GenerationException(
                $"the batch is {(prompts == null ? "null" : "empty")}; give at least one prompt");
    }

    private Request MakeRequest(string name, Prompt? prompt, GenerationOptions? options)
    {
        if (prompt == null || prompt.IsEmpty)
        {
            throw new GenerationException(
                $"{name} is {(prompt == null ? "null" : "empty")}; give at least one character, message or token");
        }
        return Request.Make(name, Encode(prompt, name), Manifest.Decoding, options ?? new GenerationOptions());
    }

    private IReadOnlyList<int> Encode(Prompt prompt, string name)
    {
        if (prompt.TokenIds != null)
        {
            return prompt.TokenIds.ToArray();
        }
        string text = prompt.Text ?? Chat.Render(Manifest.Chat, prompt.Messages!);
        Tokenizer.CheckCharacters(name, text);
        int least = Tokenizer.LeastTokens(text);
        if (least >= Manifest.Decoding.Context)
        {
            throw new GenerationException(
                $"{name} has {least} tokens or more, which leaves no room in the context of "
                + $"{Manifest.Decoding.Context}; shorten it");
        }
        return Tokenizer.Encode(text, special: prompt.Text != null);
    }

    private IReadOnlyList<Generation> Results(IReadOnlyList<Request> requests, CancellationToken cancellationToken)
    {
        Generation[] results = new Generation[requests.Count];
        foreach (Piece piece in _engine.Run(requests, cancellationToken))
        {
            results[piece.Row] = piece.Result ?? results[piece.Row];
        }
        return results;
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
