using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;

namespace PhiMoEOnnx;

/// <summary>An array of a golden file, in row-major order.</summary>
internal sealed record GoldenArray(string Dtype, IReadOnlyList<int> Shape, ReadOnlyMemory<byte> Bytes)
{
    /// <summary>All numbers of an array of I32.</summary>
    public int[] Integers() => MemoryMarshal.Cast<byte, int>(Bytes.Span).ToArray();

    /// <summary>All numbers of an array of F32 or F64.</summary>
    public double[] Numbers() => Dtype == "F64"
        ? MemoryMarshal.Cast<byte, double>(Bytes.Span).ToArray()
        : Array.ConvertAll(MemoryMarshal.Cast<byte, float>(Bytes.Span).ToArray(), number => (double)number);

    public override string ToString() => $"{Dtype} [{string.Join(", ", Shape)}]";
}

/// <summary>What is known of PyTorch over the weights that one bundle stores.</summary>
/// <param name="Files">The names and SHA-256 of its files of weights.</param>
/// <param name="Scales">Of each window.</param>
/// <param name="Perplexity">Over all windows.</param>
/// <param name="RoutingAgreement">The share of choices of experts that the stored weights leave unchanged.</param>
/// <param name="ToReference">How far it is from the reference.</param>
internal sealed record Stored(
    IReadOnlyDictionary<string, string> Files,
    IReadOnlyList<double> Scales,
    double Perplexity,
    double RoutingAgreement,
    Comparison ToReference);

/// <summary>
/// A golden file, held against the rules of spec/golden.md; docs/golden.md says what each part means.
/// </summary>
internal sealed class Golden
{
    public const int Top = 64;
    public const int Sampled = 32;
    private const int FormatVersion = 1;
    private const string TextGeneration = "text-generation";
    private const string Metadata = "__metadata__";
    private const string Mark = "{\"__metadata__\":{\"written_by\":\"phimoe-verify\"";
    private const string Save = "phimoe-verify --save-golden";
    private static readonly Dictionary<string, int> Widths =
        new Dictionary<string, int> { ["F64"] = 8, ["F32"] = 4, ["I32"] = 4, ["I16"] = 2 };

    private readonly IReadOnlyDictionary<string, GoldenArray> _arrays;
    private readonly string _task;
    private readonly int _layers;

    private Golden(string path, Json golden, IReadOnlyDictionary<string, GoldenArray> arrays)
    {
        _arrays = arrays;
        _task = golden["task"].Text();
        _layers = golden["config"]["num_hidden_layers"].Integer(1);
        Path = path;
        Checkpoint = golden["checkpoint"].Text();
        CheckpointSha256 = golden["checkpoint_sha256"].Text();
        AdapterSha256 = golden.FindValue("adapter_sha256")?.Text();
        VocabSize = golden["config"]["vocab_size"].Integer(1);
        Windows = golden["windows"].Items(length => length.Integer(1));
        Scales = golden["scales"].Items(scale => scale.Number());
        if (Windows.Count == 0)
        {
            throw golden["windows"].Unexpected("a window or more");
        }
        if (_task == TextGeneration) // others have other figures, and are refused in the end
        {
            Perplexity = golden["perplexity"].Number();
            Stored = golden.FindValue("stored") is Json stored ? ReadStored(stored) : null;
            CheckArrays();
        }
    }

    public string Path { get; }

    public string Checkpoint { get; }

    public string CheckpointSha256 { get; }

    /// <summary>Null without an adapter.</summary>
    public string? AdapterSha256 { get; }

    public int VocabSize { get; }

    /// <summary>How many tokens each window has.</summary>
    public IReadOnlyList<int> Windows { get; }

    /// <summary>Of each window.</summary>
    public IReadOnlyList<double> Scales { get; }

    public double Perplexity { get; }

    /// <summary>Null where nothing is known of stored weights.</summary>
    public Stored? Stored { get; }

    /// <summary>An array by its name.</summary>
    public GoldenArray this[string name] =>
        _arrays.TryGetValue(name, out GoldenArray? array) ? array : throw Damaged(Path, $"{name} is missing");

    /// <summary>Reads a golden file for a bundle.</summary>
    /// <exception cref="GoldenException">
    /// It is missing, damaged, of a newer format, no golden file, or another checkpoint's.
    /// </exception>
    public static Golden Read(string path, Manifest manifest)
    {
        byte[] bytes = ReadBytes(path);
        ulong length = BinaryPrimitives.ReadUInt64LittleEndian(bytes);
        if (length > (ulong)bytes.Length - 8)
        {
            throw Damaged(path, $"its header has {length} bytes, behind which {bytes.Length - 8} are left");
        }
        ReadOnlyMemory<byte> numbers = bytes.AsMemory((int)length + 8);
        Golden golden = Json.Parse(bytes.AsSpan(8, (int)length), what => Damaged(path, what), header =>
        {
            byte[] text = Encoding.UTF8.GetBytes(header[Metadata]["golden"].Text());
            string sha256 = header[Metadata]["sha256"].Text();
            return Json.Parse(text, what => Damaged(path, what), found =>
            {
                string version = found["format_version"].Raw;
                if (version != $"{FormatVersion}")
                {
                    throw new GoldenException(
                        $"{path}: format_version is {version}, this release reads {FormatVersion}; upgrade PhiMoE.Onnx");
                }
                if (Sha256(text, numbers.Span) != sha256)
                {
                    throw Damaged(path, "its SHA-256 is not the one that it says");
                }
                Dictionary<string, GoldenArray> arrays = header.Members(entry => entry.Find("dtype") is null
                    ? new GoldenArray("", Array.Empty<int>(), default) // the metadata
                    : ReadArray(entry, numbers));
                arrays.Remove(Metadata);
                return new Golden(path, found, arrays);
            });
        });
        golden.CheckCheckpoint(manifest.Decoding);
        return golden;
    }

    private static byte[] ReadBytes(string path)
    {
        if (path == null || path.Contains('\0'))
        {
            throw new GoldenException("the golden file is null or has a character NUL, expected a path");
        }
        try
        {
            FileInfo file = new FileInfo(path);
            if (file.LinkTarget == null && (!file.Exists || file.Length == 0)) // a pipe has no length, and never ends
            {
                string what = Directory.Exists(path) ? "cannot be read (it is a folder)"
                    : file.Exists ? $"is no golden file; {Save} writes one" : "cannot be read (there is no such file)";
                throw new GoldenException($"{path}: {what}; give a file of {Save}");
            }
            using FileStream stream = File.OpenRead(path);
            byte[] beginning = new byte[8 + Mark.Length]; // so that no other large file is read
            int read = stream.ReadAtLeast(beginning, beginning.Length, throwOnEndOfStream: false);
            string text = Encoding.Latin1.GetString(beginning, 0, read);
            if (text.StartsWith("version https://git-lfs", StringComparison.Ordinal))
            {
                throw new GoldenException(
                    $"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder");
            }
            if (text.IndexOf(Mark, StringComparison.Ordinal) != 8)
            {
                throw new GoldenException($"{path}: is no golden file; {Save} writes one");
            }
            return File.ReadAllBytes(path);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new GoldenException($"{path}: cannot be read ({error.Message}); give a file of {Save}", error);
        }
    }

    private static GoldenException Damaged(string path, string what) =>
        new GoldenException($"{path}: is damaged ({what}); save it again with {Save}");

    private static string Sha256(ReadOnlySpan<byte> text, ReadOnlySpan<byte> numbers)
    {
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        hash.AppendData(text);
        hash.AppendData(numbers);
        return Convert.ToHexString(hash.GetHashAndReset()).ToLowerInvariant();
    }

    private static GoldenArray ReadArray(Json entry, ReadOnlyMemory<byte> numbers)
    {
        string dtype = entry["dtype"].Text();
        if (!Widths.TryGetValue(dtype, out int width))
        {
            throw entry["dtype"].Unexpected($"one of {string.Join(", ", Widths.Keys)}");
        }
        IReadOnlyList<int> shape = entry["shape"].Items(length => length.Integer(0));
        IReadOnlyList<int> offsets = entry["data_offsets"].Items(offset => offset.Integer(0));
        double size = shape.Aggregate((double)width, (product, length) => product * length);
        if (offsets.Count != 2 || offsets[1] > numbers.Length || offsets[1] - offsets[0] != size)
        {
            string expected = $"{dtype} [{string.Join(", ", shape)}] in {numbers.Length} bytes";
            throw entry["data_offsets"].Unexpected($"the place of {expected}");
        }
        return new GoldenArray(dtype, shape, numbers.Slice(offsets[0], (int)size));
    }

    private static Stored ReadStored(Json stored)
    {
        Json compared = stored["to_reference"];
        return new Stored(
            stored["files"].Members(sha256 => sha256.Text()),
            stored["scales"].Items(scale => scale.Number()),
            stored["perplexity"].Number(),
            stored["routing_agreement"].Number(),
            new Comparison(
                compared["tokens"].Integer(1),
                compared["mean_difference"].Number(),
                compared["max_difference"].Number(),
                compared["kl"].Number(),
                compared["top1_agreement"].Number()));
    }

    /// <summary>Holds each array against the sizes that the header tells.</summary>
    private void CheckArrays()
    {
        int tokens = (int)Math.Min(Windows.Sum(length => (long)length), int.MaxValue);
        int top = Math.Min(Top, VocabSize);
        Expect("token_ids", "I32", tokens);
        Expect("routing", "I16", _layers, tokens, 2);
        Expect("top_ids", "I32", tokens, top);
        Expect("greedy", "I32", this["greedy"].Shape.Take(1).ToArray());
        List<string> ids = new List<string> { "token_ids", "top_ids", "greedy" };
        foreach (string kind in Stored == null ? new[] { "" } : new[] { "", "stored_" })
        {
            Expect($"{kind}top_logits", "F32", tokens, top);
            Expect($"{kind}sampled_logits", "F32", tokens, Math.Min(Sampled, VocabSize));
            Expect($"{kind}logsumexp", "F64", tokens);
            CheckScales(kind.Length == 0 ? Scales : Stored!.Scales);
        }
        if (Stored != null)
        {
            Expect("stored_best", "I32", tokens);
            ids.Add("stored_best");
        }
        foreach (string name in ids)
        {
            if (this[name].Integers().Any(id => id < 0 || id >= VocabSize))
            {
                throw Damaged(Path, $"{name} holds ids outside the vocabulary of {VocabSize}");
            }
        }
        if (!(Perplexity > 0))
        {
            throw Damaged(Path, $"perplexity is {Perplexity}, expected a positive number");
        }
    }

    private void Expect(string name, string dtype, params int[] shape)
    {
        string expected = new GoldenArray(dtype, shape, default).ToString();
        if (this[name].ToString() != expected)
        {
            throw Damaged(Path, $"{name} is {this[name]}, expected {expected}");
        }
    }

    private void CheckScales(IReadOnlyList<double> scales)
    {
        if (scales.Count != Windows.Count || !scales.All(scale => scale > 0))
        {
            string found = string.Join(", ", scales.Take(4));
            throw Damaged(Path, $"scales are [{found}], expected {Windows.Count} positive numbers");
        }
    }

    /// <summary>Holds that the file is of the bundle's checkpoint, as far as the manifest knows that.</summary>
    private void CheckCheckpoint(Decoding decoding)
    {
        int layers = decoding.Cache.NumHiddenLayers;
        string? what = _task != TextGeneration ? $"the task {_task}, not {TextGeneration}"
            : VocabSize != decoding.VocabSize ? $"vocab_size {VocabSize}, not {decoding.VocabSize}"
            : _layers != layers ? $"num_hidden_layers {_layers}, not {layers}"
            : null;
        if (what != null)
        {
            throw new GoldenException(
                $"{Path}: is of the checkpoint {Checkpoint} (SHA-256 {CheckpointSha256}), whose bundle has {what} as "
                + "this one has; give the golden file of this bundle's checkpoint");
        }
    }
}
