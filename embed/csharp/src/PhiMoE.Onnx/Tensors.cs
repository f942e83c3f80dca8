using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace PhiMoEOnnx;

/// <summary>The graph's names, and its inputs but the cache.</summary>
internal static class Tensors
{
    public const string PastPrefix = "past_key_values.";
    public const string PresentPrefix = "present.";
    public const string InputIds = "input_ids"; // int64 [B, S]
    public const string AttentionMask = "attention_mask"; // int64 [B, T]
    public const string LogitsToKeep = "logits_to_keep"; // int64 [1]
    public const string RopeLength = "rope_length"; // int64 [1]
    public const string Logits = "logits"; // float32 [B, logits_to_keep, V]

    /// <summary>The dtypes that a cache may have, each with its bytes.</summary>
    public static readonly IReadOnlyDictionary<string, (TensorElementType Type, int Size)> CacheDtypes =
        new Dictionary<string, (TensorElementType, int)>
        {
            ["float32"] = (TensorElementType.Float, 4),
            ["float16"] = (TensorElementType.Float16, 2),
            ["bfloat16"] = (TensorElementType.BFloat16, 2),
            ["int8"] = (TensorElementType.Int8, 1),
            ["uint8"] = (TensorElementType.UInt8, 1),
        };

    /// <summary>
    /// The name of the cache's array number <c>index</c>, key and value of each layer in turn, as an input.
    /// </summary>
    public static string Past(int index) => PastPrefix + Part(index);

    /// <summary>The same as an output.</summary>
    public static string Present(int index) => PresentPrefix + Part(index);

    /// <summary>
    /// New tokens [B, S] of rows that then hold so many in <c>totals</c>; logits of the last <c>keep</c> ones are asked
    /// for, of all where it is 0.
    /// </summary>
    public static Dictionary<string, OrtValue> Inputs(
        IReadOnlyList<int> ids, IReadOnlyList<int> totals, int ropeLength, int keep = 1)
    {
        int rows = totals.Count;
        int longest = totals.Max();
        long[] mask = new long[rows * longest]; // rows are padded on the right
        for (int row = 0; row < rows; row++)
        {
            Array.Fill(mask, 1, row * longest, totals[row]);
        }
        return new Dictionary<string, OrtValue>
        {
            [InputIds] = Tensor(ids.Select(id => (long)id).ToArray(), rows, ids.Count / rows),
            [AttentionMask] = Tensor(mask, rows, longest),
            [LogitsToKeep] = Tensor(new[] { (long)keep }, 1),
            [RopeLength] = Tensor(new[] { (long)ropeLength }, 1),
        };
    }

    public static void Free(IEnumerable<OrtValue> values)
    {
        foreach (OrtValue value in values)
        {
            value.Dispose();
        }
    }

    private static string Part(int index) => $"{index / 2}.{(index % 2 == 0 ? "key" : "value")}";

    private static OrtValue Tensor(long[] values, params long[] shape) =>
        OrtValue.CreateTensorValueFromMemory(values, shape);
}
