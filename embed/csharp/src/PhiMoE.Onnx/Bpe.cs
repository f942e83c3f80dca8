using System.Globalization;
using System.Text;
using System.Text.Unicode;

namespace PhiMoEOnnx;

/// <summary>
/// tokenizer.json as Llama's and Phi-3's are: BPE over characters, with a token for every byte of those it lacks.
/// </summary>
/// <remarks>
/// Does what the library "tokenizers" does with such a file, and refuses a file that asks for anything else.
/// </remarks>
internal sealed class Bpe
{
    private readonly Dictionary<string, int> _vocabulary;
    private readonly Dictionary<int, string> _texts = new Dictionary<int, string>();
    private readonly Dictionary<string, AddedToken> _added = new Dictionary<string, AddedToken>();
    private readonly int[] _bytes;
    private readonly Dictionary<(int Left, int Right), (int Rank, int Id)> _merges =
        new Dictionary<(int, int), (int, int)>();
    private readonly List<Func<string, string>> _normalizers = new List<Func<string, string>>();
    private readonly List<Func<List<string>, List<string>>> _decoders = new List<Func<List<string>, List<string>>>();
    private readonly List<int> _before = new List<int>(); // the tokens around a text
    private readonly List<int> _after = new List<int>();
    // found in the text as it is, by their first character, the longest first
    private readonly ILookup<char, AddedToken> _raw;
    private readonly ILookup<char, AddedToken> _normalized; // found in the normalized text
    private readonly int _longest; // characters of a token
    private bool _shortens; // whether the normalizer may leave fewer characters
    private Func<string, bool, string> _preTokenizer = (text, first) => text;

    private Bpe(Json root)
    {
        Json model = root["model"];
        Expect(model, "type", "\"BPE\"");
        Expect(model, "byte_fallback", "true");
        Expect(model, "dropout", "null", "0.0");
        Expect(model, "continuing_subword_prefix", "null", "\"\"");
        Expect(model, "end_of_word_suffix", "null", "\"\"");
        Expect(model, "ignore_merges", "false", "null");
        _vocabulary = model["vocab"].Members(id => id.Integer(0));
        foreach (KeyValuePair<string, int> token in _vocabulary)
        {
            if (!_texts.TryAdd(token.Value, token.Key))
            {
                throw new NotSupportedException($"its vocabulary has the id {token.Value} twice");
            }
        }
        _bytes = Enumerable.Range(0, 256).Select(value => Id($"<0x{value:X2}>")).ToArray();
        ReadMerges(model);
        if (root.FindValue("normalizer") is Json normalizer)
        {
            ReadNormalizer(normalizer);
        }
        if (root.FindValue("pre_tokenizer") is Json preTokenizer)
        {
            ReadPreTokenizer(preTokenizer);
        }
        if (root.FindValue("post_processor") is Json postProcessor)
        {
            ReadPostProcessor(postProcessor);
        }
        ReadDecoder(root["decoder"]);
        List<AddedToken> added = root["added_tokens"].Items(each => new AddedToken(each)).ToList();
        added.RemoveAll(each => each.Text.Length == 0);
        CheckIds(added);
        if (added.Find(each => (each.StripsLeft || each.StripsRight) && string.IsNullOrWhiteSpace(each.Text)) != null)
        {
            throw new NotSupportedException("it has an added token of white space that strips white space");
        }
        added.ForEach(each => _texts[each.Id] = each.Text);
        added.ForEach(each => _added[each.Text] = each);
        _longest = _texts.Values.Max(text => text.Length);
        _raw = Lookup(added.Where(each => !each.Normalized));
        _normalized = Lookup(added.Where(each => each.Normalized));
        if (added.Find(each => each.Normalized && Normalize(each.Text) != each.Text) is AddedToken changed)
        {
            // releases of the library "tokenizers" disagree on such a file
            throw new NotSupportedException($"its added token {changed.Text} is one that the normalizer changes");
        }
    }

    /// <summary>Reads a tokenizer.json.</summary>
    /// <exception cref="BundleException">It is missing or damaged, or has a part that is not known here.</exception>
    public static Bpe Read(string path)
    {
        try
        {
            return Json.Read(path, root => new Bpe(root));
        }
        catch (NotSupportedException error)
        {
            throw new BundleException(
                $"{path}: {error.Message}; PhiMoE.Onnx reads byte-fallback BPE as PhiMoE checkpoints have it", error);
        }
    }

    /// <summary>The text's token ids; <c>special</c> adds those that the file puts around a text.</summary>
    public List<int> Encode(string text, bool special)
    {
        List<int> ids = new List<int>();
        ids.AddRange(special ? _before : Enumerable.Empty<int>());
        foreach (Part raw in Split(text, _raw))
        {
            if (raw.Token != null)
            {
                ids.Add(raw.Token.Id);
                continue;
            }
            foreach (Part part in Split(Normalize(raw.Text), _normalized))
            {
                if (part.Token != null)
                {
                    ids.Add(part.Token.Id);
                }
                else
                {
                    Merge(_preTokenizer(part.Text, raw.Start == 0 && part.Start == 0), ids);
                }
            }
        }
        ids.AddRange(special ? _after : Enumerable.Empty<int>());
        return ids;
    }

    /// <summary>
    /// How many tokens a text has at the least, which takes no time: white space aside, which an added token may strip,
    /// each holds no more characters than the longest.
    /// </summary>
    public int LeastTokens(string text) =>
        _shortens ? 0 : text.Count(character => !char.IsWhiteSpace(character)) / _longest;

    /// <summary>The text of the ids.</summary>
    public string Decode(IEnumerable<int> ids)
    {
        List<string> texts = new List<string>();
        foreach (int id in ids)
        {
            if (_texts.TryGetValue(id, out string? text))
            {
                texts.Add(text);
            }
        }
        return string.Concat(_decoders.Aggregate(texts, (before, decoder) => decoder(before)));
    }

    /// <summary>The id of a token by its own text.</summary>
    public int? TokenId(string token)
    {
        if (_added.TryGetValue(token, out AddedToken? added))
        {
            return added.Id;
        }
        return _vocabulary.TryGetValue(token, out int id) ? id : null;
    }

    /// <summary>
    /// Appends the ids of a text: its characters, or their bytes, merged in pairs, by rank and then from the left.
    /// </summary>
    private void Merge(string text, List<int> ids)
    {
        List<int> symbols = new List<int>();
        foreach (Rune rune in text.EnumerateRunes())
        {
            if (_vocabulary.TryGetValue(rune.ToString(), out int id))
            {
                symbols.Add(id);
            }
            else
            {
                symbols.AddRange(Encoding.UTF8.GetBytes(rune.ToString()).Select(value => _bytes[value]));
            }
        }
        int[] next = Enumerable.Range(1, symbols.Count).ToArray(); // the symbols that are left, as a chain
        int[] previous = Enumerable.Range(-1, symbols.Count).ToArray();
        bool[] gone = new bool[symbols.Count];
        PriorityQueue<(int Place, int Id), (int Rank, int Place)> queue = new PriorityQueue<(int, int), (int, int)>();

        bool Find(int place, out (int Rank, int Id) merge)
        {
            merge = default;
            return place >= 0 && !gone[place] && next[place] < symbols.Count
                && _merges.TryGetValue((symbols[place], symbols[next[place]]), out merge);
        }

        void Look(int place)
        {
            if (Find(place, out (int Rank, int Id) merge))
            {
                queue.Enqueue((place, merge.Id), (merge.Rank, place));
            }
        }

        for (int place = 0; place < symbols.Count; place++)
        {
            Look(place);
        }
        while (queue.TryDequeue(out (int Place, int Id) pair, out _))
        {
            int place = pair.Place;
            if (!Find(place, out (int Rank, int Id) merge) || merge.Id != pair.Id)
            {
                continue; // the pair has changed since it was queued
            }
            symbols[place] = merge.Id;
            gone[next[place]] = true;
            next[place] = next[next[place]];
            if (next[place] < symbols.Count)
            {
                previous[next[place]] = place;
            }
            Look(previous[place]);
            Look(place);
        }
        ids.AddRange(symbols.Where((id, place) => !gone[place]));
    }

    /// <summary>Cuts a text at added tokens, at each place the longest one.</summary>
    private static IEnumerable<Part> Split(string text, ILookup<char, AddedToken> tokens)
    {
        int start = 0; // of the text that is not cut yet
        int place = 0;
        while (place < text.Length)
        {
            AddedToken? token = tokens[text[place]].FirstOrDefault(each => each.IsAt(text, place));
            if (token == null)
            {
                place++;
                continue;
            }
            int left = place;
            place += token.Text.Length;
            int right = place;
            while (token.StripsLeft && left > start && char.IsWhiteSpace(text[left - 1]))
            {
                left--;
            }
            while (token.StripsRight && right < text.Length && char.IsWhiteSpace(text[right]))
            {
                right++;
            }
            if (left > start)
            {
                yield return new Part(text.Substring(start, left - start), start, null);
            }
            yield return new Part("", left, token);
            start = right;
        }
        if (start < text.Length)
        {
            yield return new Part(text.Substring(start), start, null);
        }
    }

    /// <summary>
    /// Holds the added tokens' ids against those that the library "tokenizers" gives them, whatever the file says: the
    /// vocabulary's, or the next free one.
    /// </summary>
    private void CheckIds(List<AddedToken> added)
    {
        int highest = -1;
        Dictionary<string, int> given = new Dictionary<string, int>();
        foreach (AddedToken token in added)
        {
            int id = _vocabulary.TryGetValue(token.Text, out int known) || given.TryGetValue(token.Text, out known)
                ? known
                : Math.Max(highest + 1, _vocabulary.Count);
            if (token.Id != id)
            {
                throw new NotSupportedException($"its added token {token.Text} has the id {token.Id}, expected {id}");
            }
            given[token.Text] = id;
            highest = Math.Max(highest, id);
        }
    }

    private static ILookup<char, AddedToken> Lookup(IEnumerable<AddedToken> tokens) =>
        tokens.OrderByDescending(each => each.Text.Length).ToLookup(each => each.Text[0]);

    private string Normalize(string text) => _normalizers.Aggregate(text, (before, normalizer) => normalizer(before));

    private void ReadMerges(Json model)
    {
        int rank = 0;
        foreach ((string left, string right) in model["merges"].Items(ReadPair))
        {
            _merges[(Id(left), Id(right))] = (rank++, Id(left + right));
        }
    }

    /// <summary>A pair, or in older files a string with a space between.</summary>
    private static (string Left, string Right) ReadPair(Json merge)
    {
        IReadOnlyList<string> pair = merge.IsText ? merge.Text().Split(' ') : merge.Items(each => each.Text());
        return pair.Count == 2 ? (pair[0], pair[1]) : throw merge.Unexpected("a pair");
    }

    private int Id(string text) =>
        _vocabulary.TryGetValue(text, out int id)
            ? id
            : throw new NotSupportedException($"its vocabulary lacks {text}");

    private void ReadNormalizer(Json json)
    {
        switch (json["type"].Text())
        {
            case "Sequence":
                json["normalizers"].Items(each => each).ToList().ForEach(ReadNormalizer);
                break;
            case "Prepend":
                string prefix = json["prepend"].Text();
                _normalizers.Add(text => text.Length == 0 ? text : prefix + text);
                break;
            case "Replace":
                _normalizers.Add(Replace(json));
                _shortens |= json["content"].Text().Length < json["pattern"]["String"].Text().Length;
                break;
            default:
                throw Unknown("normalizer", json);
        }
    }

    private void ReadPreTokenizer(Json json)
    {
        switch (json["type"].Text())
        {
            case "Metaspace":
                Expect(json, "split", "false");
                string space = Character(json["replacement"]);
                string scheme = json["prepend_scheme"].Text();
                _preTokenizer = (text, first) =>
                {
                    string replaced = text.Replace(" ", space);
                    bool prepends = scheme == "always" || (scheme == "first" && first);
                    return prepends && !replaced.StartsWith(space, StringComparison.Ordinal)
                        ? space + replaced
                        : replaced;
                };
                break;
            default:
                throw Unknown("pre_tokenizer", json);
        }
    }

    private void ReadPostProcessor(Json json)
    {
        switch (json["type"].Text())
        {
            case "TemplateProcessing":
                IReadOnlyList<Json> pieces = json["single"].Items(each => each);
                if (pieces.Count(each => each.Find("Sequence") != null) != 1)
                {
                    throw json["single"].Unexpected("a template with one text");
                }
                List<int> around = _before;
                foreach (Json each in pieces)
                {
                    if (each.Find("SpecialToken") is Json special)
                    {
                        Json token = json["special_tokens"][special["id"].Text()];
                        around.AddRange(token["ids"].Items(id => id.Integer(0)));
                    }
                    else
                    {
                        Expect(each["Sequence"], "id", "\"A\"");
                        around = _after;
                    }
                }
                break;
            default:
                throw Unknown("post_processor", json);
        }
    }

    private void ReadDecoder(Json json)
    {
        switch (json["type"].Text())
        {
            case "Sequence":
                json["decoders"].Items(each => each).ToList().ForEach(ReadDecoder);
                break;
            case "Replace":
                Func<string, string> replace = Replace(json);
                _decoders.Add(texts => texts.Select(replace).ToList());
                break;
            case "ByteFallback":
                _decoders.Add(JoinBytes);
                break;
            case "Fuse":
                _decoders.Add(texts => new List<string> { string.Concat(texts) });
                break;
            case "Strip":
                Expect(json, "start", "1");
                Expect(json, "stop", "0");
                string content = Character(json["content"]);
                string Strip(string text) =>
                    text.StartsWith(content, StringComparison.Ordinal) ? text.Substring(content.Length) : text;
                _decoders.Add(texts => texts.Select(Strip).ToList());
                break;
            default:
                throw Unknown("decoder", json);
        }
    }

    /// <summary>
    /// Puts runs of bytes together to text, or to a replacement character each where they are no UTF-8.
    /// </summary>
    private static List<string> JoinBytes(List<string> texts)
    {
        List<string> joined = new List<string>();
        List<byte> bytes = new List<byte>();

        void Flush()
        {
            if (bytes.Count > 0)
            {
                byte[] run = bytes.ToArray();
                bytes.Clear();
                joined.Add(Utf8.IsValid(run) ? Encoding.UTF8.GetString(run) : new string('\uFFFD', run.Length));
            }
        }

        foreach (string text in texts)
        {
            if (text.Length == 6 && text.StartsWith("<0x", StringComparison.Ordinal) && text[5] == '>'
                && byte.TryParse(text.AsSpan(3, 2), NumberStyles.AllowHexSpecifier, null, out byte value))
            {
                bytes.Add(value);
                continue;
            }
            Flush();
            joined.Add(text);
        }
        Flush();
        return joined;
    }

    private static string Character(Json json)
    {
        string text = json.Text();
        return text.EnumerateRunes().Count() == 1 ? text : throw json.Unexpected("one character");
    }

    private static Func<string, string> Replace(Json json)
    {
        string before = json["pattern"].Find("String")?.Text() ?? "";
        string after = json["content"].Text();
        if (before.Length == 0)
        {
            throw Unknown("pattern", json);
        }
        return text => text.Replace(before, after);
    }

    private static void Expect(Json json, string key, params string[] expected)
    {
        string found = json.Find(key)?.Raw ?? "null";
        if (!expected.Contains(found))
        {
            throw new NotSupportedException($"its {key} is {found}, expected {expected[0]}");
        }
    }

    private static NotSupportedException Unknown(string part, Json json) =>
        new NotSupportedException($"its {part} {json.Raw} is not known");

    private sealed record Part(string Text, int Start, AddedToken? Token);

    /// <summary>A token that is found in a text before anything else.</summary>
    private sealed record AddedToken(string Text, int Id, bool StripsLeft, bool StripsRight, bool Normalized)
    {
        public AddedToken(Json json)
            : this(
                json["content"].Text(),
                json["id"].Integer(0),
                json["lstrip"].Boolean(),
                json["rstrip"].Boolean(),
                json["normalized"].Boolean())
        {
            Expect(json, "single_word", "false");
        }

        public bool IsAt(string text, int place) => string.CompareOrdinal(text, place, Text, 0, Text.Length) == 0;
    }
}
