using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

namespace PhiMoEOnnx;

/// <summary>
/// Whether a graph has the inputs and outputs that the manifest says, wherever the graph has a number.
/// </summary>
internal sealed class Agreement
{
    private static readonly string[] TextInputs =
    {
        Tensors.InputIds, Tensors.AttentionMask, Tensors.LogitsToKeep, Tensors.RopeLength,
    };

    private readonly string _manifest;
    private readonly string _graph;

    private Agreement(string folder, string graph)
    {
        _manifest = Path.Combine(folder, "manifest.json");
        _graph = graph;
    }

    /// <summary>Holds an opened graph against the manifest's <c>decoding</c>.</summary>
    /// <exception cref="BundleException">They disagree.</exception>
    public static void Check(string folder, Graph graph, InferenceSession session, Decoding decoding)
    {
        Agreement agreement = new Agreement(folder, graph.File);
        Dictionary<string, NodeMetadata> inputs = new Dictionary<string, NodeMetadata>(session.InputMetadata);
        foreach (string name in graph.OptionalInputs)
        {
            inputs[name] = session.OverridableInitializerMetadata.TryGetValue(name, out NodeMetadata? input)
                ? input
                : throw agreement.Disagree("optional_inputs", $"has no input {name} with a default", "one");
        }
        IReadOnlyDictionary<string, NodeMetadata> outputs = session.OutputMetadata;
        foreach (string name in TextInputs)
        {
            int dimensions = name is Tensors.InputIds or Tensors.AttentionMask ? 2 : 1;
            agreement.CheckType(inputs, name, "graphs", TensorElementType.Int64, dimensions);
        }
        agreement.CheckType(outputs, Tensors.Logits, "graphs", TensorElementType.Float, 3);
        agreement.CheckSize(outputs[Tensors.Logits], Tensors.Logits, 2, "decoding.vocab_size", decoding.VocabSize);
        CacheShape cache = decoding.Cache;
        string[] past = agreement.CheckCache(inputs, Tensors.PastPrefix, Tensors.Past, cache);
        string[] present = agreement.CheckCache(outputs, Tensors.PresentPrefix, Tensors.Present, cache);
        agreement.CheckNoOther(inputs.Keys, past.Concat(TextInputs));
        agreement.CheckNoOther(outputs.Keys, present.Append(Tensors.Logits));
    }

    /// <summary>
    /// Holds the arrays [batch, num_key_value_heads, length, head_dim] of all layers against <c>shape</c>.
    /// </summary>
    /// <returns>Their names.</returns>
    private string[] CheckCache(
        IReadOnlyDictionary<string, NodeMetadata> found, string prefix, Func<int, string> name, CacheShape shape)
    {
        // counted before they are looked up, for the manifest may say a billion layers
        int count = found.Keys.Count(each => each.StartsWith(prefix, StringComparison.Ordinal));
        if (count != 2L * shape.NumHiddenLayers)
        {
            throw Disagree(
                "decoding.cache.num_hidden_layers",
                $"has {count} arrays {prefix}*",
                $"2 for each of {shape.NumHiddenLayers} layers");
        }
        string[] names = Enumerable.Range(0, count).Select(name).ToArray();
        foreach (string each in names)
        {
            CheckType(found, each, "decoding.cache.dtype", Tensors.CacheDtypes[shape.Dtype].Type, 4);
            CheckSize(found[each], each, 1, "decoding.cache.num_key_value_heads", shape.NumKeyValueHeads);
            CheckSize(found[each], each, 3, "decoding.cache.head_dim", shape.HeadDim);
        }
        return names;
    }

    private void CheckType(
        IReadOnlyDictionary<string, NodeMetadata> found,
        string name,
        string key,
        TensorElementType type,
        int dimensions)
    {
        if (!found.TryGetValue(name, out NodeMetadata? tensor))
        {
            throw Disagree(key, $"has no {name}", "one");
        }
        if (!tensor.IsTensor || tensor.ElementDataType != type || tensor.Dimensions.Length != dimensions)
        {
            string kind = tensor.IsTensor
                ? $"{tensor.ElementDataType} of {tensor.Dimensions.Length} dimensions"
                : "no tensor";
            throw Disagree(key, $"has {name} as {kind}", $"{type} of {dimensions}");
        }
    }

    /// <summary>
    /// Holds a dimension against the manifest's number; where the graph has a name for it any number will do.
    /// </summary>
    private void CheckSize(NodeMetadata tensor, string name, int dimension, string key, int expected)
    {
        int size = tensor.Dimensions[dimension];
        if (size >= 0 && size != expected)
        {
            throw Disagree(key, $"has {size} in dimension {dimension} of {name}", $"{expected}");
        }
    }

    private void CheckNoOther(IEnumerable<string> found, IEnumerable<string> known)
    {
        if (found.Except(known).FirstOrDefault() is string other)
        {
            throw Disagree("graphs", $"has {other}", "nothing of that name");
        }
    }

    private BundleException Disagree(string key, string found, string expected) =>
        new BundleException(
            $"{_manifest}: {key} does not fit {_graph}, which {found}, expected {expected}; export the bundle again");
}
