using System.Text;
using System.Text.Json.Nodes;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>Spaces before punctuation, where a manifest asks for it.</summary>
public sealed class CleanUpTests
{
    [Theory]
    [InlineData("a . b ? c ! d , e ' f n't 'm 's 've 're", "a. b? c! d, e'fn't'm's've're")] // as transformers 4.57
    [InlineData("  ' s  . ' '  ' ve n ' t ", "'s .'''ven't ")]
    [InlineData("it is n ' t .", "it isn't.")]
    [InlineData("the word", "the word")]
    public void ATextLosesThem(string text, string expected)
    {
        Assert.Equal(expected, CleanUp.Of(text));
    }

    [Fact]
    public void AStreamIsTheWholeTextCleaned()
    {
        Random random = new Random(0);
        for (int number = 0; number < 5000; number++)
        {
            string text = new string(random.GetItems<char>(" '.,?!ntmsver a", random.Next(20)));
            CleanUp stream = new CleanUp();
            StringBuilder given = new StringBuilder();
            for (int place = 0, size; place < text.Length; place += size)
            {
                size = Math.Min(random.Next(1, 6), text.Length - place);
                given.Append(stream.Add(text.Substring(place, size)));
                Assert.StartsWith(given.ToString(), CleanUp.Of(text), StringComparison.Ordinal);
            }
            Assert.Equal(CleanUp.Of(text), given + stream.Finish());
        }
    }

    [Fact]
    public void TextComesAsSoonAsItIsCertain()
    {
        Assert.Equal("the word", new CleanUp().Add("the word"));
        Assert.Equal("the word", new CleanUp().Add("the word "));
    }

    [Fact]
    public void ABundlesManifestAsksForIt()
    {
        using PhiMoE plain = Load(cleanUp: false);
        using PhiMoE cleaned = Load(cleanUp: true);
        int changed = 0;
        for (int seed = 0; seed < 10; seed++)
        {
            GenerationOptions options = new GenerationOptions { MaxNewTokens = 20, Temperature = 1, Seed = seed };
            Generation before = plain.Generate("It was", options);
            Piece[] pieces = cleaned.StreamAsync("It was", options).ToBlockingEnumerable().ToArray();
            Generation after = pieces[pieces.Length - 1].Result!;
            Assert.Equal(before.TokenIds, after.TokenIds);
            Assert.Equal(CleanUp.Of(before.Text), after.Text);
            Assert.Equal(after.Text, string.Concat(pieces.Select(piece => piece.Text)));
            changed += after.Text == before.Text ? 0 : 1;
            string whole = plain.Tokenizer.Decode(after.TokenIds);
            Assert.Equal(CleanUp.Of(whole), cleaned.Tokenizer.Decode(after.TokenIds));
        }
        Assert.True(changed > 5, $"{changed} texts lost spaces");
    }

    [Theory]
    [InlineData("1")]
    [InlineData("null")]
    [InlineData("\"true\"")]
    [InlineData("[]")]
    public void TheManifestSaysTrueOrFalse(string value)
    {
        string bundle = Conformance.CopyBundle();
        try
        {
            Changes.Set(bundle, "/decoding/clean_up_tokenization_spaces", JsonNode.Parse(value));
            BundleException error = Assert.Throws<BundleException>(() => PhiMoE.Load(bundle));
            Assert.Contains("decoding.clean_up_tokenization_spaces", error.Message);
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    [Fact]
    public void AStopStringIsFoundInTheTextAsItIsGiven()
    {
        const string Prompt = "of the gentleman, and the head";
        using PhiMoE model = Load(cleanUp: true);
        int atTheEnd = 0;
        for (int length = 1; length <= 12; length++)
        {
            // each cuts the text elsewhere, also where a piece is held back
            GenerationOptions options = new GenerationOptions { MaxNewTokens = length };
            string whole = model.Generate(Prompt, options).Text;
            string last = whole.Substring(whole.Length - 1);
            Generation stopped = model.Generate(Prompt, options with { Stop = new[] { last } });
            Assert.Equal(whole.Substring(0, whole.IndexOf(last, StringComparison.Ordinal)), stopped.Text);
            Assert.Equal(FinishReason.Stop, stopped.FinishReason);
            atTheEnd += last == "'" ? 1 : 0;
        }
        Assert.True(atTheEnd > 0, "no text ends with what was held back");
    }

    /// <summary>
    /// The model writes no such spaces, so its tokenizer gives " ," and " ' " in place of two frequent words.
    /// </summary>
    private static PhiMoE Load(bool cleanUp)
    {
        string bundle = Conformance.CopyBundle();
        try
        {
            string path = Path.Combine(bundle, "tokenizer.json");
            JsonNode tokenizer = JsonNode.Parse(File.ReadAllText(path))!;
            JsonArray decoders = tokenizer["decoder"]!["decoders"]!.AsArray();
            decoders.Insert(1, Replace("the", " ,"));
            decoders.Insert(1, Replace("of", " ' "));
            File.WriteAllText(path, tokenizer.ToJsonString());
            Changes.List(bundle, "tokenizer.json");
            Changes.Set(bundle, "/decoding/clean_up_tokenization_spaces", cleanUp);
            return PhiMoE.Load(bundle, threads: 1);
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    private static JsonObject Replace(string text, string content) => new JsonObject
    {
        ["type"] = "Replace",
        ["pattern"] = new JsonObject { ["String"] = text },
        ["content"] = content,
    };
}
