using System.Security.Cryptography;
using System.Text.RegularExpressions;

namespace PhiMoEOnnx;

/// <summary>A bundle on disk: its manifest, held against the rules of spec/embedding.md, and its files.</summary>
internal static class Bundle
{
    private const int FormatVersion = 2; // version 1 is read, too
    private const long HashLimit = 256L << 20; // bytes; to read 20 GB takes longer than to load them

    /// <summary>
    /// Reads manifest.json of a bundle for text generation; keys that are not known here are ignored.
    /// </summary>
    /// <exception cref="BundleException">
    /// There is no bundle here, it is for another task, or its manifest is damaged or newer.
    /// </exception>
    public static Manifest ReadManifest(string folder)
    {
        string path = Path.Combine(folder, "manifest.json");
        return Json.Read(path, root =>
        {
            string version = root["format_version"].Raw;
            if (version != "1" && version != $"{FormatVersion}")
            {
                throw new BundleException(
                    $"{path}: format_version is {version}, this release reads 1 to {FormatVersion}; "
                    + "upgrade PhiMoE.Onnx");
            }
            string task = root["task"].Text();
            if (task != "text-generation")
            {
                throw new BundleException(
                    $"{path}: task is {task}, expected text-generation; PhiMoE.Onnx runs no other");
            }
            Dictionary<string, BundleFile> files = ReadFiles(root["files"]);
            string? target = version == "1" ? root["target"].Text() : null;
            IReadOnlyList<Graph> graphs = root["graphs"].Items(each => ReadGraph(each, target, files));
            if (graphs.Count == 0)
            {
                throw root["graphs"].Unexpected("a graph or more");
            }
            Decoding decoding = ReadDecoding(root["decoding"], files);
            ChatFormat? chat = root.FindValue("chat") is Json format ? ReadChat(format) : null;
            return new Manifest(task, graphs, decoding, files, chat) { Dtypes = ReadDtypes(root, version) };
        });
    }

    /// <summary>Holds every file against the manifest: its size always, its SHA-256 up to 256 MiB.</summary>
    /// <exception cref="BundleException">A file is missing, or is not the one that was exported.</exception>
    public static void CheckFiles(string folder, Manifest manifest)
    {
        foreach (KeyValuePair<string, BundleFile> entry in manifest.Files)
        {
            CheckFile(Path.Combine(folder, entry.Key), entry.Value);
        }
    }

    /// <summary>What the system tells of each of the manifest's files; null where there is none.</summary>
    public static IReadOnlyDictionary<string, FileState?> Look(string folder, Manifest manifest) =>
        manifest.Files.Keys.ToDictionary(name => name, name => FileState.Of(Path.Combine(folder, name)));

    /// <summary>Whether the files, and what manifest.json says of them, are still what they were.</summary>
    public static bool IsAsBefore(string folder, Manifest manifest, IReadOnlyDictionary<string, FileState?> before)
    {
        try
        {
            IReadOnlyDictionary<string, BundleFile> files = ReadManifest(folder).Files;
            return files.Count == manifest.Files.Count
                && files.All(file => manifest.Files.GetValueOrDefault(file.Key) == file.Value)
                && before.All(file => FileState.Of(Path.Combine(folder, file.Key)) == file.Value);
        }
        catch (BundleException)
        {
            return false;
        }
    }

    private static void CheckFile(string path, BundleFile expected)
    {
        using Stream file = Files.Open(path);
        long size = Files.Reading(path, () => file.Length);
        if (size != expected.Size)
        {
            throw new BundleException(
                $"{path}: has {size} bytes, the manifest says {expected.Size}; copy or export the bundle again");
        }
        if (size <= HashLimit && Files.Reading(path, () => Sha256(file)) != expected.Sha256)
        {
            throw new BundleException(
                $"{path}: its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again");
        }
    }

    private static Dictionary<string, BundleFile> ReadFiles(Json json)
    {
        Dictionary<string, BundleFile> files = json.Members(file => new BundleFile(
            file["size"].Size(), Matching(file["sha256"], "[0-9a-f]{64}", "64 digits from 0 to f")));
        foreach (string name in files.Keys)
        {
            if (!IsPlain(name))
            {
                throw json.Unexpected($"plain names of files, which {name} is not");
            }
        }
        if (!files.ContainsKey(Tokenizer.File))
        {
            throw json.Unexpected($"{Tokenizer.File} among its names");
        }
        return files;
    }

    /// <summary>A graph; of version 1 with the <c>target</c> that stood for its devices, else null.</summary>
    private static Graph ReadGraph(Json json, string? target, IReadOnlyDictionary<string, BundleFile> files)
    {
        Dictionary<string, string> devices;
        if (target == null)
        {
            devices = json["devices"].Members(ReadRelease);
        }
        else
        {
            devices = new Dictionary<string, string>
            {
                [target == "portable" ? "cpu" : target] = ReadRelease(json["minimum_onnxruntime"]),
            };
        }
        if (devices.Count == 0)
        {
            throw json["devices"].Unexpected("a device or more");
        }
        return new Graph(
            ListedFile(json["file"], files),
            devices,
            json["optional_inputs"].Items(each => each.Text()),
            json.Find("requires")?.Items(each => each.Text()) ?? Array.Empty<string>());
    }

    private static Decoding ReadDecoding(Json json, IReadOnlyDictionary<string, BundleFile> files)
    {
        if (json.FindValue("sampling_graph") is Json sampling)
        {
            ListedFile(sampling, files);
        }
        Json boundary = json["rope_boundary"];
        Json cache = json["cache"];
        string dtype = cache["dtype"].Text();
        if (!Tensors.CacheDtypes.ContainsKey(dtype))
        {
            throw cache["dtype"].Unexpected($"one of {string.Join(", ", Tensors.CacheDtypes.Keys)}");
        }
        return new Decoding(
            json["vocab_size"].Integer(1),
            json["context"].Integer(1),
            boundary.IsNull ? null : boundary.Integer(1),
            json["prefill_chunk"].Integer(1),
            json["eos_token_ids"].Items(id => id.Integer(0)).ToHashSet(),
            json["hidden_tokens"].Members(id => id.Integer(0)),
            new CacheShape(
                cache["num_hidden_layers"].Integer(1),
                cache["num_key_value_heads"].Integer(1),
                cache["head_dim"].Integer(1),
                dtype,
                cache["shared"].Boolean()),
            json.Find("clean_up_tokenization_spaces")?.Boolean() ?? false);
    }

    /// <summary>
    /// Running a bundle takes none of this, so nothing is wrong with a manifest that says it in other ways or not at
    /// all.
    /// </summary>
    private static IReadOnlyList<string> ReadDtypes(Json root, string version)
    {
        try
        {
            IEnumerable<string> stored = version == "1"
                ? root["weights"].Members(form => form.Text().Split(',')[0]).Values // such as "int4, block 32"
                : root["weights"].Items(group => group["dtype"].Text());
            return stored.Append(root["dtype"].Text()).Distinct().ToArray();
        }
        catch (BundleException)
        {
            return Array.Empty<string>();
        }
    }

    private static ChatFormat ReadChat(Json json) => new ChatFormat(
        json["turns"].Members(ReadTurn),
        json["generation"].Text(),
        json["skipped_when_empty"].Items(role => role.Text()).ToHashSet());

    private static Turn ReadTurn(Json json)
    {
        IReadOnlyList<string> turn = json.Items(each => each.Text());
        return turn.Count == 2 ? new Turn(turn[0], turn[1]) : throw json.Unexpected("a prefix and a suffix");
    }

    private static string ReadRelease(Json json) =>
        Matching(json, @"[0-9]{1,9}(\.[0-9]{1,9})*", "a release, numbers with dots between");

    /// <summary>The plain name of a file that the manifest lists.</summary>
    private static string ListedFile(Json json, IReadOnlyDictionary<string, BundleFile> files)
    {
        string name = json.Text();
        return IsPlain(name) && files.ContainsKey(name)
            ? name
            : throw json.Unexpected("the plain name of one of the manifest's files");
    }

    /// <summary>
    /// Whether a name leads nowhere but into the bundle's own folder; a colon leads elsewhere on Windows.
    /// </summary>
    private static bool IsPlain(string name) =>
        name.Length > 0 && name != "." && name != ".." && name.IndexOfAny(new[] { '/', '\\', ':', '\0' }) < 0;

    private static string Matching(Json json, string pattern, string expected)
    {
        string text = json.Text();
        return Regex.IsMatch(text, $@"\A(?:{pattern})\z") ? text : throw json.Unexpected(expected);
    }

    private static string Sha256(Stream file) => Convert.ToHexString(SHA256.HashData(file)).ToLowerInvariant();
}
