using System.Text.Json;
using System.Text.Json.Nodes;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>
/// Changed tokenizers: the ids and texts of the library "tokenizers" (tokenizers.json, which make_tokenizers.py
/// writes), or an error of this library.
/// </summary>
public sealed class TokenizerMutationTests : IDisposable
{
    private static readonly JsonNode Recorded =
        JsonNode.Parse(File.ReadAllText(Path.Combine(AppContext.BaseDirectory, "tokenizers.json")))!;

    private static readonly string[] Texts =
        Recorded["texts"]!.AsArray().Select(text => text!.GetValue<string>()).ToArray();

    private readonly string _path = Path.GetTempFileName();

    [Fact]
    public void ReadsTheWholeOneAsTheLibraryDoes()
    {
        Assert.Equal(Recorded["results"]!.ToJsonString(), Results(Recorded["tokenizer"]!));
    }

    [Fact]
    public void AChangedOneGivesTheLibrarysIdsOrAnError()
    {
        List<string> wrong = new List<string>();
        int read = 0;
        string whole = Recorded["results"]!.ToJsonString();
        foreach (JsonNode? mutant in Recorded["mutants"]!.AsArray())
        {
            JsonObject given = mutant!.AsObject();
            // what the library refuses may be read here as if it were whole, since some of it has no use here
            string expected = given["results"]?.ToJsonString() ?? whole;
            try
            {
                string found = Results(Changed(given["steps"]!.AsArray()));
                read++;
                if (found != expected)
                {
                    wrong.Add($"{given["steps"]!.ToJsonString()}\n  {found}\n  {expected}");
                }
            }
            catch (BundleException error)
            {
                Assert.Contains(_path, error.Message);
            }
            catch (Exception error)
            {
                wrong.Add($"{given["steps"]!.ToJsonString()}: {error.Message}");
            }
        }
        Assert.True(wrong.Count == 0, $"{wrong.Count} wrong:\n{string.Join("\n", wrong)}");
        Assert.True(read > 100, $"{read} were read"); // the others are refused
    }

    public void Dispose() => File.Delete(_path);

    private static JsonNode Changed(JsonArray steps)
    {
        JsonNode tokenizer = Recorded["tokenizer"]!.DeepClone();
        foreach (JsonNode? step in steps)
        {
            string pointer = string.Concat(step![1]!.AsArray().Select(Part));
            if (step[0]!.GetValue<string>() == "remove")
            {
                Changes.Remove(tokenizer, pointer);
            }
            else
            {
                Changes.Set(tokenizer, pointer, step[2]?.DeepClone());
            }
        }
        return tokenizer;
    }

    private static string Part(JsonNode? key) => "/" + key!.ToString().Replace("~", "~0").Replace("/", "~1");

    /// <summary>As make_tokenizers.py's: ids without and with the template, and the texts of the former.</summary>
    private string Results(JsonNode tokenizer)
    {
        File.WriteAllText(_path, tokenizer.ToJsonString());
        Bpe bpe = Bpe.Read(_path);
        List<int>[] plain = Texts.Select(text => bpe.Encode(text, special: false)).ToArray();
        List<int>[] full = Texts.Select(text => bpe.Encode(text, special: true)).ToArray();
        JsonArray results = new JsonArray(
            JsonSerializer.SerializeToNode(plain),
            JsonSerializer.SerializeToNode(full),
            JsonSerializer.SerializeToNode(plain.Select(bpe.Decode)));
        return results.ToJsonString();
    }
}
