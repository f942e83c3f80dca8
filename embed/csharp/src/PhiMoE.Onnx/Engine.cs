namespace PhiMoEOnnx;

/// <summary>Carries requests to their end over a session, which it closes only between two passes.</summary>
internal sealed class Engine : IDisposable
{
    private readonly Session _session;
    private readonly Decoding _decoding;
    private readonly Tokenizer _tokenizer;
    private readonly ReaderWriterLockSlim _lock = new ReaderWriterLockSlim(); // read: in use; write: closing
    private bool _closed;

    public Engine(Session session, Decoding decoding, Tokenizer tokenizer)
    {
        _session = session;
        _decoding = decoding;
        _tokenizer = tokenizer;
    }

    /// <summary>The generation loop: prefills each row, then steps all rows until each has reached its end.</summary>
    /// <returns>Every new token, the rows in turn.</returns>
    /// <exception cref="ObjectDisposedException">The engine is closed.</exception>
    public IEnumerable<Piece> Run(IReadOnlyList<Request> requests, CancellationToken cancellationToken)
    {
        int capacity = requests.Max(request => request.Prompt.Count + request.MaxNewTokens);
        List<Row> active =
            requests.Select((request, number) => new Row(number, request, _decoding, _tokenizer)).ToList();
        using Decoder decoder = new Decoder(_session, _decoding, requests.Count, capacity, cancellationToken);
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

    /// <summary>Holds the bundle, which has the name <c>bundle</c> in the report, against a golden file.</summary>
    /// <exception cref="ObjectDisposedException">The engine is closed.</exception>
    public Report Verify(
        string bundle, Verification verification, Action<int, int>? progress, CancellationToken cancellationToken)
    {
        using Decoder decoder = new Decoder(_session, _decoding, 1, verification.Longest, cancellationToken);
        for (int window = 0; window < verification.Windows; window++)
        {
            progress?.Invoke(window, verification.Windows);
            WhileOpen(() => verification.RunWindow(decoder, window));
        }
        progress?.Invoke(verification.Windows, verification.Windows);
        WhileOpen(() => verification.Continue(decoder));
        return verification.Report(bundle);
    }

    /// <summary>Frees the session, once no pass is under way.</summary>
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

    /// <summary>A pass over the model, during which it stays open.</summary>
    private void WhileOpen(Action pass)
    {
        _lock.EnterReadLock();
        try
        {
            ObjectDisposedException.ThrowIf(_closed, typeof(PhiMoE));
            pass();
        }
        finally
        {
            _lock.ExitReadLock();
        }
    }
}
