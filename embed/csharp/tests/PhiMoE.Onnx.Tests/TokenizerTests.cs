using System.Text.Json.Nodes;
using Xunit;

namespace PhiMoEOnnx.Tests;

public sealed class TokenizerTests
{
    /// <summary>All characters are bytes but a, b, ab, the space's sign and "▁ab".</summary>
    private static JsonNode Small()
    {
        JsonObject vocabulary = new JsonObject();
        for (int value = 0; value < 256; value++)
        {
            vocabulary[$"<0x{value:X2}>"] = value;
        }
        string[] texts = { "▁", "a", "b", "ab", "▁ab" };
        for (int i = 0; i < texts.Length; i++)
        {
            vocabulary[texts[i]] = 256 + i;
        }
        JsonNode tokenizer = JsonNode.Parse(@"{
            ""added_tokens"": [{
                ""id"": 261, ""content"": ""<|end|>"", ""special"": true,
                ""single_word"": false, ""lstrip"": false, ""rstrip"": true, ""normalized"": false
            }],
            ""normalizer"": {""type"": ""Sequence"", ""normalizers"": [
                {""type"": ""Prepend"", ""prepend"": ""▁""},
                {""type"": ""Replace"", ""pattern"": {""String"": "" ""}, ""content"": ""▁""}
            ]},
            ""pre_tokenizer"": null,
            ""post_processor"": null,
            ""decoder"": {""type"": ""Sequence"", ""decoders"": [
                {""type"": ""Replace"", ""pattern"": {""String"": ""▁""}, ""content"": "" ""},
                {""type"": ""ByteFallback""},
                {""type"": ""Fuse""},
                {""type"": ""Strip"", ""content"": "" "", ""start"": 1, ""stop"": 0}
            ]},
            ""model"": {
                ""type"": ""BPE"", ""dropout"": null, ""unk_token"": null, ""byte_fallback"": true, ""fuse_unk"": true,
                ""merges"": [[""a"", ""b""], [""▁"", ""ab""]]
            }
        }")!;
        tokenizer["model"]!["vocab"] = vocabulary;
        return tokenizer;
    }

    private static Bpe Read(JsonNode tokenizer)
    {
        string path = Path.GetTempFileName();
        try
        {
            File.WriteAllText(path, tokenizer.ToJsonString());
            return Bpe.Read(path);
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public void MergesAndFallsBackToBytes()
    {
        Bpe bpe = Read(Small());
        int[] ids = { 260, 0xC3, 0xA9, 261, 256, 258, 260 };
        Assert.Equal(ids, bpe.Encode("abé<|end|> \nb ab", special: true).ToArray());
        Assert.Equal("abé<|end|> b ab", bpe.Decode(ids));
    }

    [Fact]
    public void ABrokenCharacterIsAReplacementCharacterAByte()
    {
        Assert.Equal("a\uFFFD\uFFFDb", Read(Small()).Decode(new[] { 257, 0xF0, 0x9F, 258 }));
    }

    [Fact]
    public void PutsTheTemplatesTokensAroundAText()
    {
        JsonNode tokenizer = Small();
        tokenizer["post_processor"] = JsonNode.Parse(@"{""type"": ""TemplateProcessing"",
            ""single"": [{""SpecialToken"": {""id"": ""<s>""}}, {""Sequence"": {""id"": ""A""}}],
            ""special_tokens"": {""<s>"": {""id"": ""<s>"", ""ids"": [261], ""tokens"": [""<s>""]}}}");
        Bpe bpe = Read(tokenizer);
        Assert.Equal(new[] { 261, 260 }, bpe.Encode("ab", special: true).ToArray());
        Assert.Equal(new[] { 260 }, bpe.Encode("ab", special: false).ToArray());
    }

    [Theory]
    [InlineData("never", 259)]
    [InlineData("first", 260)]
    [InlineData("always", 260)]
    public void ReadsTheFormOfNewerWriters(string scheme, int expected)
    {
        JsonNode tokenizer = Small();
        tokenizer["normalizer"] = null;
        tokenizer["pre_tokenizer"] =
            JsonNode.Parse(@"{""type"": ""Metaspace"", ""replacement"": ""▁"", ""split"": false}");
        tokenizer["pre_tokenizer"]!["prepend_scheme"] = scheme;
        Bpe bpe = Read(tokenizer);
        int second = scheme == "always" ? 260 : 259;
        Assert.Equal(new[] { expected, 261, second }, bpe.Encode("ab<|end|>ab", special: false).ToArray());
    }

    [Theory]
    [InlineData("abababab", 2)]
    [InlineData("ab ab\n\u3000ab", 1)]
    [InlineData("<|end|><|end|>      ", 4)]
    [InlineData("ééé", 0)]
    [InlineData("", 0)]
    public void KnowsHowManyTokensATextHasAtTheLeast(string text, int expected)
    {
        Bpe bpe = Read(Small()); // <|end|> has seven characters, the most
        Assert.Equal(expected, bpe.LeastTokens(text + text));
        Assert.True(bpe.Encode(text + text, special: false).Count >= expected);
    }

    [Fact]
    public void ANormalizerThatShortensMayLeaveNoToken()
    {
        JsonNode tokenizer = Small();
        tokenizer["normalizer"]!["normalizers"]![1]!["pattern"]!["String"] = "ab";
        tokenizer["normalizer"]!["normalizers"]![1]!["content"] = "";
        Bpe bpe = Read(tokenizer);
        Assert.Equal(0, bpe.LeastTokens(new string('x', 100)));
        Assert.Equal(new[] { 256 }, bpe.Encode("abab", special: false));
    }

    [Theory]
    [InlineData("model", "ignore_merges", "true")]
    [InlineData("model", "byte_fallback", "false")]
    [InlineData("model", "type", "\"Unigram\"")]
    [InlineData("model", "merges", "[[\"a\", \"c\"]]")]
    [InlineData("normalizer", "type", "\"NFC\"")]
    [InlineData("decoder", "type", "\"ByteLevel\"")]
    [InlineData("", "pre_tokenizer", "{\"type\": \"ByteLevel\"}")]
    [InlineData("", "post_processor", "{\"type\": \"BertProcessing\"}")]
    [InlineData("", "decoder", "null")]
    public void RefusesWhatItDoesNotKnow(string part, string key, string value)
    {
        JsonNode tokenizer = Small();
        (part.Length == 0 ? tokenizer : tokenizer[part]!)[key] = JsonNode.Parse(value);
        Assert.Throws<BundleException>(() => Read(tokenizer));
    }

    [Fact]
    public void RefusesAnAddedTokenThatTheNormalizerChanges()
    {
        JsonNode tokenizer = Small();
        tokenizer["added_tokens"]![0]!["normalized"] = true;
        Assert.Contains("<|end|>", Assert.Throws<BundleException>(() => Read(tokenizer)).Message);
    }
}
