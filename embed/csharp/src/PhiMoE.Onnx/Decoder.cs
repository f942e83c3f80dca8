using Microsoft.ML.OnnxRuntime;

namespace PhiMoEOnnx;

/// <summary>The tokens that each row of a batch holds; longrope's change of factors is handled here and nowhere above.</summary>
/// <remarks>
/// A sequence that passes the rope boundary rotates every position by other factors, so its cached keys are then worth nothing
/// and the row is prefilled again.
/// </remarks>
internal sealed class Decoder : IDisposable
{
    private readonly ICache _cache;
    // a cancelled pass is no error to be logged, and every other one is thrown
    private readonly RunOptions _run = new RunOptions { LogSeverityLevel = OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL };
    private readonly CancellationToken _cancellation;
    private readonly CancellationTokenRegistration _registration;
    private readonly List<List<int>> _tokens;
    private readonly int? _boundary;
    private readonly int _chunk;

    /// <summary>Empty caches for <c>rows</c> rows of up to <c>capacity</c> tokens; a cancellation ends a pass between two operators.</summary>
    public Decoder(InferenceSession session, Decoding decoding, int rows, int capacity, CancellationToken cancellationToken)
    {
        _boundary = decoding.RopeBoundary;
        _chunk = decoding.PrefillChunk;
        _tokens = Enumerable.Range(0, rows).Select(row => new List<int>()).ToList();
        _cache = decoding.Cache.Shared
            ? new SharedCache(session, _run, decoding, rows, capacity)
            : new GrowingCache(session, _run, decoding, rows);
        _cancellation = cancellationToken;
        _registration = cancellationToken.Register(() => _run.Terminate = true);
    }

    /// <summary>Makes an empty row hold <c>ids</c>.</summary>
    public void Prefill(int row, IReadOnlyList<int> ids)
    {
        Run(() => Prefill(row, ids, ids.Count));
    }

    /// <summary>Appends one token to every row.</summary>
    public void Step(IReadOnlyList<int> ids)
    {
        Run(() =>
        {
            for (int row = 0; row < _tokens.Count; row++)
            {
                if (_tokens[row].Count == _boundary)
                {
                    Prefill(row, _tokens[row], _tokens[row].Count + 1);
                }
            }
            for (int row = 0; row < _tokens.Count; row++)
            {
                _tokens[row].Add(ids[row]);
            }
            _cache.RunStep(ids, _tokens.Select(held => held.Count).ToArray());
        });
    }

    /// <summary>The logits after the row's last token, float32 [vocab_size], until the next prefill or step.</summary>
    public Span<float> Logits(int row) => _cache.Logits(row);

    /// <summary>Forgets a row; the last row takes its number.</summary>
    public void Drop(int row)
    {
        _cache.Drop(row);
        _tokens[row] = _tokens[_tokens.Count - 1];
        _tokens.RemoveAt(_tokens.Count - 1);
    }

    public void Dispose()
    {
        _registration.Dispose();
        _cache.Dispose();
        _run.Dispose();
    }

    private void Prefill(int row, IReadOnlyList<int> ids, int ropeLength)
    {
        for (int start = 0; start < ids.Count; start += _chunk)
        {
            _cache.RunRow(row, ids.Skip(start).Take(_chunk).ToArray(), start, ropeLength);
        }
        _tokens[row] = ids.ToList();
    }

    private void Run(Action passes)
    {
        try
        {
            passes();
        }
        catch (OnnxRuntimeException) when (_cancellation.IsCancellationRequested)
        {
            throw new OperationCanceledException(_cancellation);
        }
    }
}
