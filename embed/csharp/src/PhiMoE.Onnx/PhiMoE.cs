using System.Runtime.CompilerServices;
using Microsoft.ML.OnnxRuntime;

namespace PhiMoEOnnx;

/// <summary>A bundle loaded for generation; <see cref="Load"/> makes one.</summary>
/// <remarks>Its methods may be called from several threads: each call has a cache of its own.</remarks>
public sealed class PhiMoE : IDisposable
{
    private const int DefaultNewTokens = 1024; // where MaxNewTokens is not given

    private readonly InferenceSession _session;
    private readonly ReaderWriterLockSlim _lock = new ReaderWriterLockSlim(); // read: in use; write: closing
    private bool _closed;

    private PhiMoE(InferenceSession session, Manifest manifest, Tokenizer tokenizer)
    {
        _session = session;
        Manifest = manifest;
        Tokenizer = tokenizer;
    }

    /// <summary>The bundle's manifest.</summary>
    public Manifest Manifest { get; }

    /// <summary>Text to token ids and back.</summary>
    public Tokenizer Tokenizer { get; }

    /// <summary>Loads a bundle that phimoe-export wrote.</summary>
    /// <param name="bundle">Its folder.</param>
    /// <param name="threads">Threads for one operator; null leaves it to ONNX Runtime, which takes one a physical core.</param>
    /// <exception cref="BundleException">The folder is no bundle, or a file of it is missing or changed.</exception>
    /// <exception cref="DeviceException">The bundle is for another device, or the installed ONNX Runtime cannot run it.</exception>
    public static PhiMoE Load(string bundle, int? threads = null)
    {
        Manifest manifest = Bundle.ReadManifest(bundle);
        Bundle.CheckFiles(bundle, manifest);
        Tokenizer tokenizer = new Tokenizer(bundle, manifest.Decoding.HiddenTokens.Values);
        return new PhiMoE(Session.Open(bundle, manifest, threads), manifest, tokenizer);
    }

    /// <summary>Continues or answers one prompt.</summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <exception cref="GenerationException">The prompt is empty or does not fit the context, or an option is out of range.</exception>
    public Generation Generate(Prompt prompt, GenerationOptions? options = null) =>
        Run(Single(prompt, options), CancellationToken.None).Last().Result!;

    /// <summary>Continues or answers each prompt of a batch exactly as if it were alone.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">As for one prompt, for all of them; a row has the random numbers that its prompt would have alone.</param>
    /// <returns>A result for each prompt, in their order.</returns>
    /// <exception cref="GenerationException">As for one prompt; the batch is empty.</exception>
    public IReadOnlyList<Generation> Generate(IReadOnlyList<Prompt> prompts, GenerationOptions? options = null)
    {
        Generation[] results = new Generation[prompts.Count];
        foreach (Piece piece in Run(Batch(prompts, options), CancellationToken.None))
        {
            results[piece.Row] = piece.Result ?? results[piece.Row];
        }
        return results;
    }

    /// <summary>Streams the continuation of one prompt, or its answer, piece by piece; the work is done on the thread pool.</summary>
    /// <param name="prompt">A text, messages or token ids.</param>
    /// <param name="options">How; null takes the defaults.</param>
    /// <param name="cancellationToken">Ends the generation, also within a pass over the model, with an OperationCanceledException.</param>
    /// <exception cref="GenerationException">As for <c>Generate</c>; thrown by this call, before the first piece.</exception>
    public IAsyncEnumerable<Piece> GenerateAsync(
        Prompt prompt, GenerationOptions? options = null, CancellationToken cancellationToken = default) =>
        RunAsync(Single(prompt, options), cancellationToken);

    /// <summary>Streams the continuations of a batch, the rows in turn.</summary>
    /// <param name="prompts">The prompts.</param>
    /// <param name="options">As for one prompt, for all of them.</param>
    /// <param name="cancellationToken">As for one prompt.</param>
    /// <exception cref="GenerationException">As for one prompt; the batch is empty.</exception>
    public IAsyncEnumerable<Piece> GenerateAsync(
        IReadOnlyList<Prompt> prompts, GenerationOptions? options = null, CancellationToken cancellationToken = default) =>
        RunAsync(Batch(prompts, options), cancellationToken);

    /// <summary>Frees the model; waits for a pass in another thread, after which what goes on throws an ObjectDisposedException.</summary>
    public void Dispose()
    {
        _lock.EnterWriteLock();
        try
        {
            _closed = true;
            _session.Dispose();
        }
        finally
        {
            _lock.ExitWriteLock();
        }
    }

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

    /// <summary>A request whose options are in range and whose tokens fit the context; <c>name</c> is the prompt's in errors.</summary>
    private Request MakeRequest(string name, Prompt prompt, GenerationOptions? options)
    {
        options ??= new GenerationOptions();
        options.Check();
        IReadOnlyList<int> ids = Encode(prompt, name);
        int context = Manifest.Decoding.Context;
        int room = context - ids.Count;
        if (room <= 0)
        {
            throw new GenerationException($"{name} has {ids.Count} tokens, which leaves no room in the context of {context}; shorten it");
        }
        int most = options.MaxNewTokens ?? Math.Min(DefaultNewTokens, room);
        if (most > room)
        {
            throw new GenerationException(
                $"{name} has {ids.Count} tokens and MaxNewTokens is {most}, together more than the context of {context}; "
                + $"at most {room} new tokens fit");
        }
        return new Request(ids, most, options);
    }

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
        int width = Manifest.Decoding.VocabSize;
        int[] ids = prompt.TokenIds!.ToArray();
        foreach (int id in ids)
        {
            if (id < 0 || id >= width)
            {
                throw new GenerationException($"{name} holds {id}, expected token ids from 0 to {width - 1}");
            }
        }
        return ids;
    }

    /// <summary>The generation loop: prefills each row, then steps all rows until each has reached its end.</summary>
    /// <returns>Every new token, the rows in turn.</returns>
    private IEnumerable<Piece> Run(IReadOnlyList<Request> requests, CancellationToken cancellationToken)
    {
        int capacity = requests.Max(request => request.Prompt.Count + request.MaxNewTokens);
        List<Row> active = requests.Select((request, number) => new Row(number, request, Manifest.Decoding, Tokenizer)).ToList();
        using Decoder decoder = new Decoder(_session, Manifest.Decoding, requests.Count, capacity, cancellationToken);
        for (int row = 0; row < requests.Count; row++)
        {
            WhileOpen(() => decoder.Prefill(row, requests[row].Prompt));
        }
        while (true)
        {
            for (int place = 0; place < active.Count; place++)
            {
                yield return active[place].Next(decoder.Logits(place));
            }
            for (int place = active.Count - 1; place >= 0; place--)
            {
                if (active[place].Finished)
                {
                    decoder.Drop(place);
                    active[place] = active[active.Count - 1]; // as in the decoder, the last row takes its number
                    active.RemoveAt(active.Count - 1);
                }
            }
            if (active.Count == 0)
            {
                yield break;
            }
            WhileOpen(() => decoder.Step(active.Select(row => row.Last).ToArray()));
        }
    }

    /// <summary>A pass over the model, during which it stays open.</summary>
    private void WhileOpen(Action pass)
    {
        _lock.EnterReadLock();
        try
        {
            ObjectDisposedException.ThrowIf(_closed, this);
            pass();
        }
        finally
        {
            _lock.ExitReadLock();
        }
    }

    private async IAsyncEnumerable<Piece> RunAsync(
        IReadOnlyList<Request> requests, [EnumeratorCancellation] CancellationToken cancellationToken)
    {
        using IEnumerator<Piece> pieces = Run(requests, cancellationToken).GetEnumerator();
        while (await Task.Run(pieces.MoveNext, cancellationToken).ConfigureAwait(false))
        {
            yield return pieces.Current;
        }
    }
}
