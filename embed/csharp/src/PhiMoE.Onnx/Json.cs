using System.Text;
using System.Text.Json;

namespace PhiMoEOnnx;

/// <summary>A value of a JSON file that nobody vouches for, and where it stands.</summary>
/// <remarks>
/// Every member throws an error that names the file and the key where the value is of another kind.
/// </remarks>
internal readonly struct Json
{
    private static readonly Encoding Utf8 =
        new UTF8Encoding(encoderShouldEmitUTF8Identifier: false, throwOnInvalidBytes: true);

    private readonly JsonElement _value;
    private readonly Func<string, PhiMoEException> _damaged; // the error that the file is damaged in this way
    private readonly string _outer; // the key of what it stands in, from the top, such as graphs[0]
    private readonly string? _name; // in an object
    private readonly int _index; // in a list

    private Json(
        JsonElement value, Func<string, PhiMoEException> damaged, string outer, string? name, int index = 0)
    {
        _value = value;
        _damaged = damaged;
        _outer = outer;
        _name = name;
        _index = index;
    }

    /// <summary>Where it stands; put together when asked for, since most values of a file never are.</summary>
    private string Key => _name == null ? $"{_outer}[{_index}]" : Inside(_outer, _name);

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
        Find(key) ?? throw _damaged($"{Inside(Key, key)} is missing");

    /// <summary>What <c>read</c> makes of the file.</summary>
    /// <exception cref="BundleException">
    /// It cannot be read, is no JSON, or <c>read</c> found another value than it expected.
    /// </exception>
    public static T Read<T>(string path, Func<Json, T> read) =>
        Parse(
            Files.ReadAll(path),
            what => new BundleException($"{path}: is damaged ({what}); copy or export the bundle again"),
            read);

    /// <summary>
    /// What <c>read</c> makes of the bytes of a text; <c>damaged</c> is the error that they are damaged in some way.
    /// </summary>
    public static T Parse<T>(ReadOnlySpan<byte> text, Func<string, PhiMoEException> damaged, Func<Json, T> read)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(Utf8.GetString(text));
            return read(new Json(document.RootElement, damaged, "", ""));
        }
        // JsonElement throws an InvalidOperationException for a string with half of a surrogate pair
        catch (Exception error) when (error is JsonException or DecoderFallbackException or InvalidOperationException)
        {
            throw damaged(error.Message);
        }
    }

    /// <summary>What stands under a key; null where nothing does.</summary>
    public Json? Find(string key)
    {
        Expect(JsonValueKind.Object, "an object");
        return _value.TryGetProperty(key, out JsonElement value) ? new Json(value, _damaged, Key, key) : null;
    }

    /// <summary>What stands under a key; null where nothing or null does.</summary>
    public Json? FindValue(string key) => Find(key) is Json value && !value.IsNull ? value : null;

    /// <summary>The members of an object; of equal names the last one.</summary>
    public Dictionary<string, T> Members<T>(Func<Json, T> read)
    {
        Expect(JsonValueKind.Object, "an object");
        Dictionary<string, T> members = new Dictionary<string, T>();
        string key = Key;
        foreach (JsonProperty member in _value.EnumerateObject())
        {
            string name = member.Name;
            members[name] = read(new Json(member.Value, _damaged, key, name));
        }
        return members;
    }

    /// <summary>The items of a list.</summary>
    public IReadOnlyList<T> Items<T>(Func<Json, T> read)
    {
        Expect(JsonValueKind.Array, "a list");
        List<T> items = new List<T>();
        string key = Key;
        foreach (JsonElement item in _value.EnumerateArray())
        {
            items.Add(read(new Json(item, _damaged, key, null, items.Count)));
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

    /// <summary>A finite number.</summary>
    public double Number()
    {
        bool isFinite =
            _value.ValueKind == JsonValueKind.Number && _value.TryGetDouble(out double found) && double.IsFinite(found);
        return isFinite ? _value.GetDouble() : throw Unexpected("a finite number");
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
    public PhiMoEException Unexpected(string expected) =>
        _damaged($"{(Key.Length == 0 ? "the whole" : Key)} is {Raw}, expected {expected}");

    private static string Inside(string outer, string name) => outer.Length == 0 ? name : $"{outer}.{name}";

    private void Expect(JsonValueKind kind, string expected)
    {
        if (_value.ValueKind != kind)
        {
            throw Unexpected(expected);
        }
    }
}
