namespace PhiMoEOnnx;

/// <summary>One graph file over the bundle's weights, and what it takes to run it.</summary>
/// <param name="File">Its name.</param>
/// <param name="Devices">
/// The devices that it runs on, "cpu" or "cuda", each with the least ONNX Runtime release there.
/// </param>
/// <param name="OptionalInputs">The inputs that have a default.</param>
/// <param name="Requires">
/// What it needs beyond an ONNX Runtime release; a graph with a name unknown here is passed over.
/// </param>
public sealed record Graph(
    string File,
    IReadOnlyDictionary<string, string> Devices,
    IReadOnlyList<string> OptionalInputs,
    IReadOnlyList<string> Requires);

/// <summary>What stands around the content of one role's message.</summary>
/// <param name="Prefix">Before it.</param>
/// <param name="Suffix">After it.</param>
public sealed record Turn(string Prefix, string Suffix);

/// <summary>The chat template as plain strings.</summary>
/// <param name="Turns">The turn of each role.</param>
/// <param name="Generation">Opens the answer.</param>
/// <param name="SkippedWhenEmpty">The roles that have no turn where the content is empty.</param>
public sealed record ChatFormat(
    IReadOnlyDictionary<string, Turn> Turns, string Generation, IReadOnlySet<string> SkippedWhenEmpty);

/// <summary>
/// One of the cache's arrays is [batch, NumKeyValueHeads, length, HeadDim] of Dtype; a layer has two, key and value.
/// </summary>
/// <param name="NumHiddenLayers">How many layers.</param>
/// <param name="NumKeyValueHeads">How many heads.</param>
/// <param name="HeadDim">Numbers a head; of an int4 cache half as many, for each holds two channels.</param>
/// <param name="Dtype">"float32", "float16", "bfloat16", "int8" or "uint8".</param>
/// <param name="Shared">
/// Whether past and present may be one buffer that the graph writes in place; else present is past + new.
/// </param>
public sealed record CacheShape(int NumHiddenLayers, int NumKeyValueHeads, int HeadDim, string Dtype, bool Shared);

/// <summary>What a generation loop must know.</summary>
/// <param name="VocabSize">The logits' width.</param>
/// <param name="Context">The most tokens of a sequence, the prompt's and the new ones.</param>
/// <param name="RopeBoundary">
/// The length beyond which longrope rotates every position by other factors; null without longrope.
/// </param>
/// <param name="PrefillChunk">How many tokens of a prompt run at once.</param>
/// <param name="EosTokenIds">The tokens that end a text.</param>
/// <param name="HiddenTokens">The special tokens that are no text, by their own.</param>
/// <param name="Cache">The cache's shape.</param>
/// <param name="CleanUpTokenizationSpaces">Whether decoded text loses spaces before punctuation.</param>
public sealed record Decoding(
    int VocabSize,
    int Context,
    int? RopeBoundary,
    int PrefillChunk,
    IReadOnlySet<int> EosTokenIds,
    IReadOnlyDictionary<string, int> HiddenTokens,
    CacheShape Cache,
    bool CleanUpTokenizationSpaces = false);

/// <summary>What the manifest says of a file.</summary>
/// <param name="Size">Bytes.</param>
/// <param name="Sha256">In hexadecimal.</param>
public sealed record BundleFile(long Size, string Sha256);

/// <summary>manifest.json, as far as running a bundle needs it.</summary>
/// <param name="Task">"text-generation".</param>
/// <param name="Graphs">In order of preference.</param>
/// <param name="Decoding">What a generation loop must know.</param>
/// <param name="Files">Every other file, by name.</param>
/// <param name="Chat">The chat format; null where there is none.</param>
public sealed record Manifest(
    string Task,
    IReadOnlyList<Graph> Graphs,
    Decoding Decoding,
    IReadOnlyDictionary<string, BundleFile> Files,
    ChatFormat? Chat)
{
    /// <summary>
    /// The dtypes of stored matrices and of activations; empty where the manifest does not say them.
    /// </summary>
    public IReadOnlyList<string> Dtypes { get; init; } = Array.Empty<string>();
}
