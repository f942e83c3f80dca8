using System.Security.Cryptography;
using System.Text.Json;

namespace PhiMoEOnnx;

/// <summary>One graph file over the bundle's weights.</summary>
/// <param name="File">Its name.</param>
/// <param name="MinimumOnnxRuntime">The least ONNX Runtime release that loads it.</param>
public sealed record Graph(string File, string MinimumOnnxRuntime);

/// <summary>What stands around the content of one role's message.</summary>
/// <param name="Prefix">Before it.</param>
/// <param name="Suffix">After it.</param>
public sealed record Turn(string Prefix, string Suffix);

/// <summary>The chat template as plain strings.</summary>
/// <param name="Turns">The turn of each role.</param>
/// <param name="Generation">Opens the answer.</param>
/// <param name="SkippedWhenEmpty">The roles that have no turn where the content is empty.</param>
public sealed record ChatFormat(IReadOnlyDictionary<string, Turn> Turns, string Generation, IReadOnlySet<string> SkippedWhenEmpty);

/// <summary>One of the cache's arrays is [batch, NumKeyValueHeads, length, HeadDim] of Dtype; a layer has two, key and value.</summary>
/// <param name="NumHiddenLayers">How many layers.</param>
/// <param name="NumKeyValueHeads">How many heads.</param>
/// <param name="HeadDim">Numbers a head; of an int4 cache half as many, for each holds two channels.</param>
/// <param name="Dtype">"float32", "float16", "int8" or "uint8".</param>
/// <param name="Shared">Whether past and present may be one buffer that the graph writes in place; else present is past + new.</param>
public sealed record CacheShape(int NumHiddenLayers, int NumKeyValueHeads, int HeadDim, string Dtype, bool Shared);

/// <summary>What a generation loop must know.</summary>
/// <param name="VocabSize">The logits' width.</param>
/// <param name="Context">The most tokens of a sequence, the prompt's and the new ones.</param>
/// <param name="RopeBoundary">The length beyond which longrope rotates every position by other factors; null without longrope.</param>
/// <param name="PrefillChunk">How many tokens of a prompt run at once.</param>
/// <param name="EosTokenIds">The tokens that end a text.</param>
/// <param name="HiddenTokens">The special tokens that are no text, by their own.</param>
/// <param name="Cache">The cache's shape.</param>
public sealed record Decoding(
    int VocabSize,
    int Context,
    int? RopeBoundary,
    int PrefillChunk,
    IReadOnlySet<int> EosTokenIds,
    IReadOnlyDictionary<string, int> HiddenTokens,
    CacheShape Cache);

/// <summary>What the manifest says of a file.</summary>
/// <param name="Size">Bytes.</param>
/// <param name="Sha256">In hexadecimal.</param>
public sealed record BundleFile(long Size, string Sha256);

/// <summary>manifest.json, as far as running a bundle needs it.</summary>
/// <param name="Task">"text-generation".</param>
/// <param name="Target">"cpu", "cuda" or "portable".</param>
/// <param name="Graphs">In order of preference.</param>
/// <param name="Decoding">What a generation loop must know.</param>
/// <param name="Files">Every other file, by name.</param>
/// <param name="Chat">The chat format; null where there is none.</param>
public sealed record Manifest(
    string Task,
    string Target,
    IReadOnlyList<Graph> Graphs,
    Decoding Decoding,
    IReadOnlyDictionary<string, BundleFile> Files,
    ChatFormat? Chat);

/// <summary>A bundle on disk: its manifest and its files.</summary>
internal static class Bundle
{
    private const int FormatVersion = 1;
    private const long HashLimit = 256L << 20; // bytes; to read 20 GB takes longer than to load them

    /// <summary>Reads manifest.json of a bundle for text generation.</summary>
    /// <exception cref="BundleException">There is no bundle here, it is for another task, or its manifest is damaged or newer.</exception>
    public static Manifest ReadManifest(string folder)
    {
        string path = Path.Combine(folder, "manifest.json");
        using JsonDocument document = ReadJson(path, "not a bundle of phimoe-export");
        JsonElement root = document.RootElement;
        try
        {
            string version = Get(root, "format_version").GetRawText();
            if (version != $"{FormatVersion}")
            {
                throw new BundleException($"{path}: format_version is {version}, this release reads {FormatVersion}; upgrade PhiMoE.Onnx");
            }
            string task = Text(root, "task");
            if (task != "text-generation")
            {
                throw new BundleException($"{path}: is a bundle for {task}, expected one for text-generation");
            }
            return new Manifest(
                task,
                Text(root, "target"),
                Items(root, "graphs").Select(each => new Graph(Text(each, "file"), Text(each, "minimum_onnxruntime"))).ToArray(),
                ReadDecoding(Get(root, "decoding")),
                Members(root, "files").ToDictionary(each => each.Name, each => ReadFile(each.Value)),
                ReadChat(root));
        }
        catch (Exception error) when (IsMalformed(error))
        {
            throw new BundleException($"{path}: is damaged ({error.Message}); export the bundle again", error);
        }
    }

    /// <summary>Holds every file against the manifest: its size always, its SHA-256 up to 256 MiB.</summary>
    /// <exception cref="BundleException">A file is missing, or is not the one that was exported.</exception>
    public static void CheckFiles(string folder, Manifest manifest)
    {
        foreach (KeyValuePair<string, BundleFile> entry in manifest.Files)
        {
            string path = Path.Combine(folder, entry.Key);
            BundleFile expected = entry.Value;
            FileInfo file = new FileInfo(path);
            if (!file.Exists)
            {
                throw new BundleException($"{path}: is missing; the bundle is incomplete, copy or export it again");
            }
            if (file.Length != expected.Size)
            {
                throw new BundleException(
                    $"{path}: has {file.Length} bytes, the manifest says {expected.Size}; copy or export the bundle again");
            }
            if (file.Length <= HashLimit && !Sha256(path).Equals(expected.Sha256, StringComparison.OrdinalIgnoreCase))
            {
                throw new BundleException($"{path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again");
            }
        }
    }

    /// <summary>A JSON file; <c>problem</c> opens the message where it cannot be read.</summary>
    /// <exception cref="BundleException">It cannot be read.</exception>
    public static JsonDocument ReadJson(string path, string problem)
    {
        try
        {
            return JsonDocument.Parse(File.ReadAllText(path));
        }
        catch (Exception error) when (error is IOException || error is UnauthorizedAccessException || error is JsonException)
        {
            throw new BundleException($"{path}: {problem} ({error.Message}); copy or export the bundle again", error);
        }
    }

    /// <summary>Whether this is what JsonElement throws where a key is missing or a value is of another kind.</summary>
    public static bool IsMalformed(Exception error)
    {
        return error is KeyNotFoundException || error is InvalidOperationException || error is FormatException
            || error is ArgumentException || error is IndexOutOfRangeException;
    }

    /// <summary>What stands under a key.</summary>
    public static JsonElement Get(JsonElement json, string key) =>
        json.TryGetProperty(key, out JsonElement value) ? value : throw new FormatException($"{key} is missing");

    /// <summary>The string under a key.</summary>
    public static string Text(JsonElement json, string key) => Text(Get(json, key));

    /// <summary>A string.</summary>
    public static string Text(JsonElement json) => json.GetString() ?? throw new FormatException("null, expected a string");

    /// <summary>The items of the list under a key.</summary>
    public static IEnumerable<JsonElement> Items(JsonElement json, string key) => Get(json, key).EnumerateArray();

    /// <summary>The members of the object under a key.</summary>
    public static IEnumerable<JsonProperty> Members(JsonElement json, string key) => Get(json, key).EnumerateObject();

    private static BundleFile ReadFile(JsonElement json) => new BundleFile(Get(json, "size").GetInt64(), Text(json, "sha256"));

    private static Decoding ReadDecoding(JsonElement json)
    {
        JsonElement cache = Get(json, "cache");
        JsonElement boundary = Get(json, "rope_boundary");
        return new Decoding(
            Count(json, "vocab_size"),
            Count(json, "context"),
            boundary.ValueKind == JsonValueKind.Null ? null : Count(json, "rope_boundary"),
            Count(json, "prefill_chunk"),
            Items(json, "eos_token_ids").Select(id => id.GetInt32()).ToHashSet(),
            Members(json, "hidden_tokens").ToDictionary(token => token.Name, token => token.Value.GetInt32()),
            new CacheShape(
                Count(cache, "num_hidden_layers"),
                Count(cache, "num_key_value_heads"),
                Count(cache, "head_dim"),
                Text(cache, "dtype"),
                Get(cache, "shared").GetBoolean()));
    }

    private static ChatFormat? ReadChat(JsonElement root)
    {
        if (!root.TryGetProperty("chat", out JsonElement chat) || chat.ValueKind == JsonValueKind.Null)
        {
            return null;
        }
        return new ChatFormat(
            Members(chat, "turns").ToDictionary(turn => turn.Name, turn => new Turn(Text(turn.Value[0]), Text(turn.Value[1]))),
            Text(chat, "generation"),
            Items(chat, "skipped_when_empty").Select(role => Text(role)).ToHashSet());
    }

    private static int Count(JsonElement json, string key)
    {
        int count = Get(json, key).GetInt32();
        return count > 0 ? count : throw new FormatException($"{key} is {count}, expected a positive integer");
    }

    private static string Sha256(string path)
    {
        try
        {
            using FileStream stream = File.OpenRead(path);
            return Convert.ToHexString(SHA256.HashData(stream));
        }
        catch (Exception error) when (error is IOException || error is UnauthorizedAccessException)
        {
            throw new BundleException($"{path}: cannot be read ({error.Message})", error);
        }
    }
}
