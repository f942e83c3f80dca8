using System.Text;
using System.Text.Json;

namespace PhiMoEOnnx;

/// <summary>A value of a JSON file that nobody vouches for, and where it stands.</summary>
/// <remarks>
/// Every member throws a BundleException that names the file and the key where the value is of another kind.
/// </remarks>
internal readonly struct Json
{
    private static readonly Encoding Utf8 =
        new UTF8Encoding(encoderShouldEmitUTF8Identifier: false, throwOnInvalidBytes: true);

    private readonly JsonElement _value;
    private readonly string _path;
    private readonly string _key; // from the top, such as graphs[0].file

    private Json(JsonElement value, string path, string key)
    {
        _value = value;
        _path = path;
        _key = key;
    }

    /// <summary>The value in short, as it stands in the file.</summary>
    public string Raw
    {
        get
        {
            string raw = _value.GetRawText();
            return raw.Length <= 60 ? raw : raw.Substring(0, 57) + "...";
        }
    }

    /// <summary>Whether it is null.</summary>
    public bool IsNull => _value.ValueKind == JsonValueKind.Null;

    /// <summary>Whether it is a string.</summary>
    public bool IsText => _value.ValueKind == JsonValueKind.String;

    /// <summary>What stands under a key.</summary>
    public Json this[string key] =>
        Find(key) ?? throw Damaged(_path, $"{Inside(key)} is missing");

    /// <summary>What <c>read</c> makes of the file.</summary>
    /// <exception cref="BundleException">
    /// It cannot be read, is no JSON, or <c>read</c> found another value than it expected.
    /// </exception>
    public static T Read<T>(string path, Func<Json, T> read)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(Utf8.GetString(File.ReadAllBytes(path)));
            return read(new Json(document.RootElement, path, ""));
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new BundleException($"{path}: cannot be read ({error.Message}); expected a file of a bundle", error);
        }
        // JsonElement throws an InvalidOperationException for a string with half of a surrogate pair
        catch (Exception error) when (error is JsonException or DecoderFallbackException or InvalidOperationException)
        {
            throw Damaged(path, error.Message, error);
        }
    }

    /// <summary>What stands under a key; null where nothing does.</summary>
    public Json? Find(string key)
    {
        Expect(JsonValueKind.Object, "an object");
        return _value.TryGetProperty(key, out JsonElement value) ? new Json(value, _path, Inside(key)) : null;
    }

    /// <summary>What stands under a key; null where nothing or null does.</summary>
    public Json? FindValue(string key) => Find(key) is Json value && !value.IsNull ? value : null;

    /// <summary>The members of an object; of equal names the last one.</summary>
    public Dictionary<string, T> Members<T>(Func<Json, T> read)
    {
        Expect(JsonValueKind.Object, "an object");
        Dictionary<string, T> members = new Dictionary<string, T>();
        foreach (JsonProperty member in _value.EnumerateObject())
        {
            members[member.Name] = read(new Json(member.Value, _path, Inside(member.Name)));
        }
        return members;
    }

    /// <summary>The items of a list.</summary>
    public IReadOnlyList<T> Items<T>(Func<Json, T> read)
    {
        Expect(JsonValueKind.Array, "a list");
        List<T> items = new List<T>();
        foreach (JsonElement item in _value.EnumerateArray())
        {
            items.Add(read(new Json(item, _path, $"{_key}[{items.Count}]")));
        }
        return items;
    }

    /// <summary>A string.</summary>
    public string Text()
    {
        Expect(JsonValueKind.String, "a string");
        return _value.GetString()!;
    }

    /// <summary>A whole number from <c>least</c> to 2147483647.</summary>
    public int Integer(int least)
    {
        bool isInteger =
            _value.ValueKind == JsonValueKind.Number && _value.TryGetInt32(out int found) && found >= least;
        return isInteger ? _value.GetInt32() : throw Unexpected($"a whole number from {least} to {int.MaxValue}");
    }

    /// <summary>A number of bytes.</summary>
    public long Size()
    {
        bool isSize = _value.ValueKind == JsonValueKind.Number && _value.TryGetInt64(out long found) && found >= 0;
        return isSize ? _value.GetInt64() : throw Unexpected("a whole number of bytes");
    }

    /// <summary>true or false.</summary>
    public bool Boolean() => _value.ValueKind switch
    {
        JsonValueKind.True => true,
        JsonValueKind.False => false,
        _ => throw Unexpected("true or false"),
    };

    /// <summary>The error that this value is not what was expected.</summary>
    public BundleException Unexpected(string expected) =>
        Damaged(_path, $"{(_key.Length == 0 ? "the whole" : _key)} is {Raw}, expected {expected}");

    private static BundleException Damaged(string path, string what, Exception? inner = null) =>
        new BundleException($"{path}: is damaged ({what}); copy or export the bundle again", inner);

    private string Inside(string key) => _key.Length == 0 ? key : $"{_key}.{key}";

    private void Expect(JsonValueKind kind, string expected)
    {
        if (_value.ValueKind != kind)
        {
            throw Unexpected(expected);
        }
    }
}
