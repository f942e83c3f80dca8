using System.Runtime.InteropServices;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace PhiMoEOnnx;

/// <summary>The KV cache of a batch, and one pass of the graph over it.</summary>
/// <remarks>
/// Dimensions: B rows, S new tokens, P cached tokens, T = P + S, K num_key_value_heads, D head_dim, V vocab_size.
/// Decoder says which tokens a row holds, a cache only where their keys and values lie.
/// </remarks>
internal interface ICache : IDisposable
{
    /// <summary>
    /// Runs new tokens [B, S] of the rows from <c>first</c> on, and keeps the logits of each row's last one.
    /// </summary>
    /// <param name="first">The first of the rows; they are all, or one.</param>
    /// <param name="ids">
    /// The tokens, S of the first row, S of the next one; S is 1 where there are several rows.
    /// </param>
    /// <param name="totals">T of each row.</param>
    /// <param name="ropeLength">Rows count as at least this long when longrope's factors are chosen.</param>
    void Run(int first, IReadOnlyList<int> ids, IReadOnlyList<int> totals, int ropeLength);

    /// <summary>Runs new tokens [S] of row 0.</summary>
    /// <param name="ids">The tokens.</param>
    /// <param name="total">T.</param>
    /// <param name="ropeLength">As of <c>Run</c>.</param>
    /// <returns>The logits after each of them, float32 [S, V].</returns>
    float[] RunAll(IReadOnlyList<int> ids, int total, int ropeLength);

    /// <summary>The row's kept logits, float32 [V].</summary>
    Span<float> Logits(int row);

    /// <summary>Forgets a row; the last row takes its number.</summary>
    void Drop(int row);
}

/// <summary>
/// One buffer [B, K, capacity, D] per layer and part that is past and present at once; the graph writes in place.
/// </summary>
/// <remarks>
/// The operator takes several new tokens over a past for one row only, so a prefill runs each row alone, on the slice
/// of the buffers that is the row's own memory; a step runs all rows together.
/// </remarks>
internal sealed class SharedCache : ICache
{
    private readonly Session _session;
    private readonly RunOptions _run;
    private readonly TensorElementType _dtype;
    private readonly CacheShape _shape;
    private readonly int _vocabSize;
    private readonly int _capacity;
    private readonly int _rowSize; // in longs
    private readonly long[][] _buffers; // of longs, for an array of them may have more bytes than one of bytes
    private readonly float[] _logits;
    private int _rows;
    private OrtIoBinding? _binding;
    private (InferenceSession? Session, int First, int Rows) _bound;

    public SharedCache(Session session, RunOptions run, Decoding decoding, int rows, int capacity)
    {
        _session = session;
        _run = run;
        _shape = decoding.Cache;
        _vocabSize = decoding.VocabSize;
        _rows = rows;
        long room = (capacity + 7L) / 8 * 8; // a row is then a whole number of longs, whatever the dtype
        (_dtype, int size) = Tensors.CacheDtypes[_shape.Dtype];
        Int128 rowSize = (Int128)room * _shape.NumKeyValueHeads * _shape.HeadDim * size / sizeof(long);
        if (rows * rowSize > Array.MaxLength)
        {
            throw new GenerationException(
                $"{rows} rows of {capacity} tokens need a buffer of more than 16 GiB; "
                + "give fewer prompts or a smaller MaxNewTokens");
        }
        _capacity = (int)room;
        _rowSize = (int)rowSize;
        _buffers = new long[2 * _shape.NumHiddenLayers][];
        for (int i = 0; i < _buffers.Length; i++)
        {
            _buffers[i] = GC.AllocateArray<long>(rows * _rowSize, pinned: true);
        }
        _logits = GC.AllocateArray<float>(rows * _vocabSize, pinned: true);
    }

    public void Run(int first, IReadOnlyList<int> ids, IReadOnlyList<int> totals, int ropeLength)
    {
        InferenceSession session = _session.For(ids.Count);
        Bind(session, first, totals.Count);
        RunBound(session, Tensors.Inputs(ids, totals, ropeLength));
    }

    public float[] RunAll(IReadOnlyList<int> ids, int total, int ropeLength)
    {
        InferenceSession session = _session.For(ids.Count);
        float[] logits = GC.AllocateUninitializedArray<float>(ids.Count * _vocabSize, pinned: true);
        long[] shape = { 1, ids.Count, _vocabSize };
        Bind(session, 0, 1);
        using OrtValue all = Over(logits, 0, TensorElementType.Float, shape, (long)logits.Length * sizeof(float));
        _binding!.BindOutput(Tensors.Logits, all);
        _bound = default; // to be bound anew
        RunBound(session, Tensors.Inputs(ids, new[] { total }, ropeLength, keep: 0));
        return logits;
    }

    private void RunBound(InferenceSession session, Dictionary<string, OrtValue> inputs)
    {
        try
        {
            foreach (KeyValuePair<string, OrtValue> input in inputs)
            {
                _binding!.BindInput(input.Key, input.Value);
            }
            session.RunWithBinding(_run, _binding!);
        }
        finally
        {
            Tensors.Free(inputs.Values);
        }
    }

    public Span<float> Logits(int row) => _logits.AsSpan(row * _vocabSize, _vocabSize);

    public void Drop(int row)
    {
        _rows--;
        foreach (long[] buffer in _buffers)
        {
            Array.Copy(buffer, _rows * _rowSize, buffer, row * _rowSize, _rowSize);
        }
    }

    public void Dispose() => _binding?.Dispose();

    /// <summary>Rows first .. first + rows of every buffer as past and as present, and of the logits.</summary>
    private void Bind(InferenceSession session, int first, int rows)
    {
        if (_bound == (session, first, rows))
        {
            return;
        }
        _binding?.Dispose();
        _binding = session.CreateIoBinding();
        _bound = (session, first, rows);
        long[] shape = { rows, _shape.NumKeyValueHeads, _capacity, _shape.HeadDim };
        for (int i = 0; i < _buffers.Length; i++)
        {
            using OrtValue buffer =
                Over(_buffers[i], first * _rowSize, _dtype, shape, (long)rows * _rowSize * sizeof(long));
            _binding.BindInput(Tensors.Past(i), buffer);
            _binding.BindOutput(Tensors.Present(i), buffer);
        }
        shape = new long[] { rows, 1, _vocabSize };
        using OrtValue logits =
            Over(_logits, first * _vocabSize, TensorElementType.Float, shape, (long)rows * _vocabSize * sizeof(float));
        _binding.BindOutput(Tensors.Logits, logits);
    }

    /// <summary>A tensor over a part of a pinned array, which must outlive it.</summary>
    private static OrtValue Over<T>(T[] array, int start, TensorElementType dtype, long[] shape, long bytes)
    {
        // CreateTensorValueFromMemory counts the bytes in an int
        IntPtr address = Marshal.UnsafeAddrOfPinnedArrayElement(array, start);
        return OrtValue.CreateTensorValueWithData(OrtMemoryInfo.DefaultInstance, dtype, shape, address, bytes);
    }
}

/// <summary>
/// Each row's own keys and values [1, K, P, D], which every pass replaces by [1, K, T, D]; for standard operators.
/// </summary>
internal sealed class GrowingCache : ICache
{
    private readonly Session _session;
    private readonly RunOptions _run;
    private readonly int _vocabSize;
    private readonly string[] _outputs;
    private readonly OrtValue _nothing; // the past of an empty row
    private readonly List<IDisposableReadOnlyCollection<OrtValue>?> _rows; // the outputs of each row's last pass
    private readonly float[] _logits;

    public GrowingCache(Session session, RunOptions run, Decoding decoding, int rows)
    {
        CacheShape shape = decoding.Cache;
        _session = session;
        _run = run;
        _vocabSize = decoding.VocabSize;
        _outputs =
            Enumerable.Range(0, 2 * shape.NumHiddenLayers).Select(Tensors.Present).Append(Tensors.Logits).ToArray();
        _nothing = OrtValue.CreateAllocatedTensorValue(
            OrtAllocator.DefaultInstance,
            Tensors.CacheDtypes[shape.Dtype].Type,
            new long[] { 1, shape.NumKeyValueHeads, 0, shape.HeadDim });
        _rows = Enumerable.Repeat<IDisposableReadOnlyCollection<OrtValue>?>(null, rows).ToList();
        _logits = new float[rows * _vocabSize];
    }

    public void Run(int first, IReadOnlyList<int> ids, IReadOnlyList<int> totals, int ropeLength)
    {
        int sequence = ids.Count / totals.Count;
        for (int i = 0; i < totals.Count; i++)
        {
            float[] logits =
                RunRow(first + i, ids.Skip(i * sequence).Take(sequence).ToArray(), totals[i], ropeLength, keep: 1);
            logits.CopyTo(Logits(first + i));
        }
    }

    public float[] RunAll(IReadOnlyList<int> ids, int total, int ropeLength) =>
        RunRow(0, ids, total, ropeLength, keep: 0);

    public Span<float> Logits(int row) => _logits.AsSpan(row * _vocabSize, _vocabSize);

    public void Drop(int row)
    {
        _rows[row]?.Dispose();
        _rows[row] = _rows[_rows.Count - 1];
        _rows.RemoveAt(_rows.Count - 1);
    }

    public void Dispose()
    {
        _rows.ForEach(row => row?.Dispose());
        _nothing.Dispose();
    }

    private float[] RunRow(int row, IReadOnlyList<int> ids, int total, int ropeLength, int keep)
    {
        Dictionary<string, OrtValue> small = Tensors.Inputs(ids, new[] { total }, ropeLength, keep);
        try
        {
            Dictionary<string, OrtValue> inputs = new Dictionary<string, OrtValue>(small);
            for (int i = 0; i < _outputs.Length - 1; i++)
            {
                inputs[Tensors.Past(i)] = total == ids.Count ? _nothing : _rows[row]![i];
            }
            IDisposableReadOnlyCollection<OrtValue> outputs =
                _session.For(ids.Count).Run(_run, inputs, _outputs);
            _rows[row]?.Dispose();
            _rows[row] = outputs;
            return outputs[_outputs.Length - 1].GetTensorDataAsSpan<float>().ToArray();
        }
        finally
        {
            Tensors.Free(small.Values);
        }
    }
}
