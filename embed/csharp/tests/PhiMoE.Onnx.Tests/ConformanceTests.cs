using System.Text;
using System.Text.Json;
using Xunit;

namespace PhiMoEOnnx.Tests;

public sealed class ConformanceTests : IClassFixture<Conformance>
{
    private readonly PhiMoE _model;

    public ConformanceTests(Conformance conformance)
    {
        _model = conformance.Model;
    }

    public static IEnumerable<object[]> Generations => Conformance.Names("expected");

    public static IEnumerable<object[]> GenerationErrors =>
        Conformance.Names("error").Where(each => !LoadsItsOwn(each));

    public static IEnumerable<object[]> LoadErrors => Conformance.Names("error").Where(LoadsItsOwn);

    [Fact]
    public void EncodesAsExpected()
    {
        foreach (JsonElement each in Conformance.Section("encodings"))
        {
            Assert.Equal(Conformance.Ids(each, "token_ids"), _model.Tokenizer.Encode(Conformance.Text(each, "text")));
        }
    }

    [Fact]
    public void StreamsAsExpected()
    {
        foreach (JsonElement each in Conformance.Section("streams"))
        {
            TextStream stream = new TextStream(_model.Tokenizer, Conformance.Ids(each, "prompt"));
            string[] pieces = Conformance.Ids(each, "token_ids").Select(stream.Add).ToArray();
            Assert.Equal(each.GetProperty("pieces").EnumerateArray().Select(piece => piece.GetString()!), pieces);
        }
    }

    [Fact]
    public void DrawsAsExpected()
    {
        foreach (JsonElement each in Conformance.Section("draws"))
        {
            float[] logits = each.GetProperty("logits").EnumerateArray().Select(logit => logit.GetSingle()).ToArray();
            GenerationOptions options = Conformance.Options(each.GetProperty("options"));
            int[] expected = Conformance.Ids(each, "token_ids");
            long seed = options.Seed!.Value;
            int Draw(int token, int step) => Sampler.Sample(logits, options, seed, step, Array.Empty<int>());
            Assert.Equal(expected, expected.Select(Draw));
        }
    }

    [Theory]
    [MemberData(nameof(Generations))]
    public async Task GeneratesAsExpected(string name)
    {
        JsonElement given = Conformance.Case(name);
        if (!Conformance.LoadsItsOwn(given))
        {
            await AssertGenerates(_model, given);
            return;
        }
        string bundle = Conformance.ChangedBundle(given);
        try
        {
            using PhiMoE model = PhiMoE.Load(bundle, Conformance.Threads(given));
            await AssertGenerates(model, given);
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    [Fact]
    public void GeneratesTheSameWithAGrowingCache()
    {
        string bundle = Conformance.GrowingBundle();
        try
        {
            using PhiMoE model = PhiMoE.Load(bundle, threads: 1);
            string[] names =
            {
                "greedy", "a batch around the boundary", "rows that end at different steps", "a sampled chat",
            };
            foreach (string name in names)
            {
                JsonElement given = Conformance.Case(name);
                JsonElement expected = given.GetProperty("expected");
                GenerationOptions options = Conformance.Options(given.GetProperty("options"));
                Prompt[] prompts = given.TryGetProperty("batch", out JsonElement batch)
                    ? Conformance.Batch(batch)
                    : new[] { Conformance.Prompt(given.GetProperty("prompt")) };
                bool isBatch = expected.ValueKind == JsonValueKind.Array;
                AssertSame(isBatch ? expected.EnumerateArray() : new[] { expected }, model.Generate(prompts, options));
            }
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    [Theory]
    [MemberData(nameof(GenerationErrors))]
    public void RefusesWhatCannotBeGenerated(string name)
    {
        JsonElement given = Conformance.Case(name);
        GenerationOptions options = Conformance.Options(given.GetProperty("options"));
        Action generate = given.TryGetProperty("batch", out JsonElement batch)
            ? () => _model.StreamAsync(Conformance.Batch(batch), options)
            : () => _model.StreamAsync(Conformance.Prompt(given.GetProperty("prompt")), options);
        AssertError(given, Record.Exception(generate));
    }

    [Theory]
    [MemberData(nameof(LoadErrors))]
    public void RefusesWhatCannotBeLoaded(string name)
    {
        JsonElement given = Conformance.Case(name);
        string bundle = Conformance.ChangedBundle(given);
        try
        {
            AssertError(given, Record.Exception(() => PhiMoE.Load(bundle, Conformance.Threads(given)).Dispose()));
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    private static bool LoadsItsOwn(object[] name) => Conformance.LoadsItsOwn(Conformance.Case((string)name[0]));

    internal static async Task AssertGenerates(PhiMoE model, JsonElement given)
    {
        JsonElement expected = given.GetProperty("expected");
        GenerationOptions options = Conformance.Options(given.GetProperty("options"));
        if (given.TryGetProperty("batch", out JsonElement batch))
        {
            Prompt[] prompts = Conformance.Batch(batch);
            AssertSame(expected.EnumerateArray(), model.Generate(prompts, options));
            AssertSame(expected.EnumerateArray(), await Collect(model.StreamAsync(prompts, options)));
        }
        else
        {
            Prompt prompt = Conformance.Prompt(given.GetProperty("prompt"));
            AssertSame(new[] { expected }, new[] { model.Generate(prompt, options) });
            AssertSame(new[] { expected }, await Collect(model.StreamAsync(prompt, options)));
        }
    }

    private static async Task<IReadOnlyList<Generation>> Collect(IAsyncEnumerable<Piece> pieces)
    {
        Dictionary<int, StringBuilder> texts = new Dictionary<int, StringBuilder>();
        SortedDictionary<int, Generation> results = new SortedDictionary<int, Generation>();
        await foreach (Piece piece in pieces)
        {
            if (!texts.TryGetValue(piece.Row, out StringBuilder? text))
            {
                texts[piece.Row] = text = new StringBuilder();
            }
            text.Append(piece.Text);
            if (piece.Result != null)
            {
                Assert.Equal(piece.Result.Text, text.ToString());
                results.Add(piece.Row, piece.Result);
            }
        }
        return results.Values.ToArray();
    }

    private static void AssertSame(IEnumerable<JsonElement> expected, IReadOnlyList<Generation> generations)
    {
        JsonElement[] rows = expected.ToArray();
        Assert.Equal(rows.Length, generations.Count);
        for (int row = 0; row < rows.Length; row++)
        {
            Assert.Equal(Conformance.Ids(rows[row], "token_ids"), generations[row].TokenIds);
            Assert.Equal(Conformance.Text(rows[row], "text"), generations[row].Text);
            Assert.Equal(rows[row].GetProperty("prompt_tokens").GetInt32(), generations[row].PromptTokens);
            string reason = generations[row].FinishReason.ToString().ToLowerInvariant();
            Assert.Equal(Conformance.Text(rows[row], "finish_reason"), reason);
        }
    }

    private static void AssertError(JsonElement given, Exception? error)
    {
        Assert.NotNull(error);
        Assert.Equal(Conformance.Text(given, "error").Replace("Error", "Exception"), error!.GetType().Name);
        foreach (JsonElement name in given.GetProperty("names").EnumerateArray())
        {
            Assert.Contains(Conformance.NameHere(name.GetString()!), error.Message);
        }
    }
}
