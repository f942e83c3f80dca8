using System.Security.Cryptography;
using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace PhiMoEOnnx.Tests;

/// <summary>The steps by which a case changes a copy of the bundle; spec/embedding.md says what each does.</summary>
internal static class Changes
{
    private static readonly JsonDocumentOptions Deep = new JsonDocumentOptions { MaxDepth = 1000 };

    public static void Apply(string bundle, JsonElement steps)
    {
        foreach (JsonElement step in steps.EnumerateArray())
        {
            Apply(bundle, step[0].GetString()!, step.EnumerateArray().Skip(1).ToArray());
        }
    }

    /// <summary>Sets the value at a JSON pointer of manifest.json.</summary>
    public static void Set(string bundle, string pointer, JsonNode? value) =>
        ChangeManifest(bundle, manifest => Set(manifest, pointer, value));

    /// <summary>Sets the value at a JSON pointer.</summary>
    public static void Set(JsonNode manifest, string pointer, JsonNode? value)
    {
        (JsonNode parent, string last) = Find(manifest, pointer);
        if (parent is JsonArray array)
        {
            array[int.Parse(last)] = value;
        }
        else
        {
            parent[last] = value;
        }
    }

    /// <summary>Removes the value at a JSON pointer.</summary>
    public static void Remove(JsonNode manifest, string pointer)
    {
        (JsonNode parent, string last) = Find(manifest, pointer);
        if (parent is JsonArray array)
        {
            array.RemoveAt(int.Parse(last));
        }
        else if (!parent.AsObject().Remove(last))
        {
            throw new KeyNotFoundException(pointer);
        }
    }

    /// <summary>Gives a file's own size and hash to the manifest.</summary>
    public static void List(string bundle, string file)
    {
        byte[] bytes = File.ReadAllBytes(Path.Combine(bundle, file));
        string sha256 = Convert.ToHexString(SHA256.HashData(bytes)).ToLowerInvariant();
        JsonObject listed = new JsonObject { ["size"] = bytes.Length, ["sha256"] = sha256 };
        ChangeManifest(bundle, manifest => manifest["files"]![file] = listed);
    }

    private static void Apply(string bundle, string step, JsonElement[] given)
    {
        string first = given[0].GetString()!;
        string path = Path.Combine(bundle, first);
        switch (step)
        {
            case "delete":
                File.Delete(path);
                break;
            case "copy":
                File.Copy(path, Path.Combine(bundle, given[1].GetString()!));
                break;
            case "replace":
            case "replace all":
                Replace(path, given[1].GetString()!, given[2].GetString()!, step == "replace all");
                break;
            case "set":
                Set(bundle, first, JsonNode.Parse(given[1].GetRawText(), null, Deep));
                break;
            case "remove":
                ChangeManifest(bundle, manifest => Remove(manifest, first));
                break;
            case "list":
                List(bundle, first);
                break;
            default:
                throw new NotSupportedException(step);
        }
    }

    private static void Replace(string path, string before, string after, bool all)
    {
        // Latin-1 has a character for every byte
        string Bytes(string text) => Encoding.Latin1.GetString(Encoding.UTF8.GetBytes(text));
        string found = Encoding.Latin1.GetString(File.ReadAllBytes(path));
        int place = found.IndexOf(Bytes(before), StringComparison.Ordinal);
        if (place < 0)
        {
            throw new ArgumentException($"{path} has no {before}");
        }
        string changed = all
            ? found.Replace(Bytes(before), Bytes(after), StringComparison.Ordinal)
            : found.Substring(0, place) + Bytes(after) + found.Substring(place + Bytes(before).Length);
        File.WriteAllBytes(path, Encoding.Latin1.GetBytes(changed));
    }

    private static void ChangeManifest(string bundle, Action<JsonNode> change)
    {
        string path = Path.Combine(bundle, "manifest.json");
        JsonNode manifest = JsonNode.Parse(File.ReadAllText(path), null, Deep)!;
        change(manifest);
        File.WriteAllText(path, manifest.ToJsonString());
    }

    /// <summary>Where a JSON pointer (RFC 6901) leads: what its last part stands in, and that part.</summary>
    private static (JsonNode Parent, string Last) Find(JsonNode root, string pointer)
    {
        string[] parts =
            pointer.Split('/').Skip(1).Select(part => part.Replace("~1", "/").Replace("~0", "~")).ToArray();
        JsonNode parent = root;
        foreach (string part in parts.SkipLast(1))
        {
            parent = (parent is JsonArray array ? array[int.Parse(part)] : parent[part])!;
        }
        return (parent, parts[parts.Length - 1]);
    }
}
