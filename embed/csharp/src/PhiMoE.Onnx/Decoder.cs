using Microsoft.ML.OnnxRuntime;

namespace PhiMoEOnnx;

/// <summary>
/// The tokens that each row of a batch holds, and how they go on: prefill one row, or step all rows by a token.
/// </summary>
/// <remarks>
/// Longrope's change of factors is handled here and nowhere above: a sequence that passes the rope boundary rotates
/// every position by other factors, so its cached keys are then worth nothing and the row is prefilled again.
/// </remarks>
internal sealed class Decoder : IDisposable
{
    private readonly ICache _cache;
    // a cancelled pass is no error to be logged, and every other one is thrown
    private readonly RunOptions _run = new RunOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL };
    private readonly Decoding _decoding;
    private readonly CancellationToken _cancellation;
    private readonly CancellationTokenRegistration _registration;
    private readonly List<List<int>> _held;

    /// <summary>
    /// Empty caches for <c>rows</c> rows of up to <c>capacity</c> tokens; a cancellation ends a pass between two
    /// operators.
    /// </summary>
    public Decoder(
        Session session, Decoding decoding, int rows, int capacity, CancellationToken cancellationToken)
    {
        _decoding = decoding;
        _held = Enumerable.Range(0, rows).Select(row => new List<int>()).ToList();
        _cache = decoding.Cache.Shared
            ? new SharedCache(session, _run, decoding, rows, capacity)
            : new GrowingCache(session, _run, decoding, rows);
        _cancellation = cancellationToken;
        _registration = cancellationToken.Register(() => _run.Terminate = true);
    }

    /// <summary>Makes a row hold <c>ids</c>.</summary>
    public void Prefill(int row, IReadOnlyList<int> ids) => Prefill(row, ids, ids.Count);

    /// <summary>
    /// Makes row 0 hold <c>ids</c>, and hands out the logits after each of them in order, float32 [vocab_size].
    /// </summary>
    public void Logits(IReadOnlyList<int> ids, Action<ReadOnlyMemory<float>> each)
    {
        for (int start = 0; start < ids.Count; start += _decoding.PrefillChunk)
        {
            int[] chunk = ids.Skip(start).Take(_decoding.PrefillChunk).ToArray();
            float[] logits = Array.Empty<float>();
            Pass(() => logits = _cache.RunAll(chunk, start + chunk.Length, ids.Count));
            for (int place = 0; place < chunk.Length; place++)
            {
                each(logits.AsMemory(place * _decoding.VocabSize, _decoding.VocabSize));
            }
        }
        _held[0] = ids.ToList();
    }

    /// <summary>Appends one token to every row.</summary>
    public void Step(IReadOnlyList<int> ids)
    {
        for (int row = 0; row < _held.Count; row++)
        {
            if (_held[row].Count == _decoding.RopeBoundary)
            {
                Prefill(row, _held[row], _held[row].Count + 1);
            }
        }
        for (int row = 0; row < _held.Count; row++)
        {
            _held[row].Add(ids[row]);
        }
        Run(0, ids, _held.Select(held => held.Count).ToArray(), 0);
    }

    /// <summary>The logits after the row's last token, float32 [vocab_size], until the next prefill or step.</summary>
    public Span<float> Logits(int row) => _cache.Logits(row);

    /// <summary>Forgets a row; the last row takes its number.</summary>
    public void Drop(int row)
    {
        _cache.Drop(row);
        _held[row] = _held[_held.Count - 1];
        _held.RemoveAt(_held.Count - 1);
    }

    public void Dispose()
    {
        _registration.Dispose();
        _cache.Dispose();
        _run.Dispose();
    }

    private void Prefill(int row, IReadOnlyList<int> ids, int ropeLength)
    {
        for (int start = 0; start < ids.Count; start += _decoding.PrefillChunk)
        {
            int[] chunk = ids.Skip(start).Take(_decoding.PrefillChunk).ToArray();
            Run(row, chunk, new[] { start + chunk.Length }, ropeLength);
        }
        _held[row] = ids.ToList();
    }

    private void Run(int first, IReadOnlyList<int> ids, IReadOnlyList<int> totals, int ropeLength) =>
        Pass(() => _cache.Run(first, ids, totals, ropeLength));

    private void Pass(Action run)
    {
        try
        {
            run();
        }
        catch (OnnxRuntimeException) when (_cancellation.IsCancellationRequested)
        {
            throw new OperationCanceledException(_cancellation);
        }
        catch (OnnxRuntimeException error)
        {
            throw new GenerationException($"ONNX Runtime failed: {error.Message}", error);
        }
    }
}
