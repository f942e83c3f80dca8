using System.Text.Json;

namespace PhiMoEOnnx.Tests;

/// <summary>spec of the repository: what a runtime in any language must give, and the bundle that gives it.</summary>
public sealed class Conformance : IDisposable
{
    private static readonly string Folder = Find();
    private static readonly JsonElement Root =
        JsonDocument.Parse(File.ReadAllText(Path.Combine(Folder, "cases.json"))).RootElement;

    /// <summary>The repository's folder.</summary>
    public static string Repository => Path.GetDirectoryName(Folder)!;

    public PhiMoE Model { get; } = PhiMoE.Load(Path.Combine(Folder, "bundle"), threads: 1);

    public static IEnumerable<JsonElement> Section(string name) => Root.GetProperty(name).EnumerateArray();

    public static JsonElement Case(string name) => Section("cases").Single(each => Text(each, "name") == name);

    /// <summary>The names of the cases that have this key, each the only argument of a test.</summary>
    public static IEnumerable<object[]> Names(string key) =>
        Section("cases")
            .Where(each => each.TryGetProperty(key, out _))
            .Select(each => new object[] { Text(each, "name") });

    public static string Text(JsonElement json, string key) => json.GetProperty(key).GetString()!;

    public static int[] Ids(JsonElement json, string key) =>
        json.GetProperty(key).EnumerateArray().Select(id => id.GetInt32()).ToArray();

    public static Prompt Prompt(JsonElement json)
    {
        if (json.ValueKind == JsonValueKind.String)
        {
            return json.GetString()!;
        }
        JsonElement[] items = json.EnumerateArray().ToArray();
        if (items.Length > 0 && items[0].ValueKind == JsonValueKind.Object)
        {
            return items.Select(each => new Message(Text(each, "role"), Text(each, "content"))).ToArray();
        }
        return items.Select(each => each.GetInt32()).ToArray();
    }

    public static Prompt[] Batch(JsonElement json) => json.EnumerateArray().Select(Prompt).ToArray();

    public static GenerationOptions Options(JsonElement json)
    {
        GenerationOptions options = new GenerationOptions();
        foreach (JsonProperty option in json.EnumerateObject())
        {
            JsonElement value = option.Value;
            options = option.Name switch
            {
                "max_new_tokens" => options with { MaxNewTokens = value.GetInt32() },
                "temperature" => options with { Temperature = value.GetDouble() },
                "top_k" => options with { TopK = value.GetInt32() },
                "top_p" => options with { TopP = value.GetDouble() },
                "min_p" => options with { MinP = value.GetDouble() },
                "repetition_penalty" => options with { RepetitionPenalty = value.GetDouble() },
                "seed" => options with { Seed = value.GetInt64() },
                "stop" => options with { Stop = Strings(value) },
                _ => throw new NotSupportedException(option.Name),
            };
        }
        return options;
    }

    /// <summary>An option by the name that it has in C#; other words as they are.</summary>
    public static string NameHere(string name)
    {
        string pascal =
            string.Concat(name.Split('_').Select(word => char.ToUpperInvariant(word[0]) + word.Substring(1)));
        return typeof(GenerationOptions).GetProperty(pascal) == null ? name : pascal;
    }

    /// <summary>A copy of the bundle, changed as a case says; the caller deletes it.</summary>
    public static string ChangedBundle(JsonElement given)
    {
        string copy = CopyBundle();
        if (given.TryGetProperty("bundle", out JsonElement steps))
        {
            Changes.Apply(copy, steps);
        }
        return copy;
    }

    /// <summary>Whether a case loads a bundle of its own.</summary>
    public static bool LoadsItsOwn(JsonElement given) =>
        given.TryGetProperty("bundle", out _) || given.TryGetProperty("load", out _);

    /// <summary>The case's option of loading.</summary>
    public static int? Threads(JsonElement given) =>
        given.TryGetProperty("load", out JsonElement load) && load.TryGetProperty("threads", out JsonElement threads)
            ? threads.GetInt32()
            : 1;

    /// <summary>A copy of the bundle; the caller deletes it.</summary>
    public static string CopyBundle()
    {
        string copy = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
        Directory.CreateDirectory(copy);
        foreach (string file in Directory.GetFiles(Path.Combine(Folder, "bundle")))
        {
            File.Copy(file, Path.Combine(copy, Path.GetFileName(file)));
        }
        return copy;
    }

    /// <summary>
    /// A copy of the bundle whose cache grows with every pass, as a portable bundle's does; the caller deletes it.
    /// </summary>
    public static string GrowingBundle()
    {
        string copy = CopyBundle();
        Changes.Set(copy, "/decoding/cache/shared", false);
        return copy;
    }

    public void Dispose() => Model.Dispose();

    private static string[] Strings(JsonElement json)
    {
        return json.ValueKind == JsonValueKind.String
            ? new[] { json.GetString()! }
            : json.EnumerateArray().Select(each => each.GetString()!).ToArray();
    }

    private static string Find()
    {
        DirectoryInfo here = new DirectoryInfo(AppContext.BaseDirectory);
        for (DirectoryInfo? folder = here; folder != null; folder = folder.Parent)
        {
            string found = Path.Combine(folder.FullName, "spec");
            if (File.Exists(Path.Combine(found, "cases.json")))
            {
                return found;
            }
        }
        throw new DirectoryNotFoundException(
            $"no spec above {AppContext.BaseDirectory}; run the tests inside the repository");
    }
}
