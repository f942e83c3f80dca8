using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>
/// Random options: refused exactly where spec/embedding.md says, by name; else tokens, the same ones each time.
/// </summary>
public sealed class OptionsMutationTests : IClassFixture<Conformance>
{
    private const string Prompt = "It was a fine morning, and";

    private static readonly double[] Numbers =
    {
        0, -0.0, 1, 0.5, 0.999, 2, 100, 1e-9, 1e-30, 9e-31, 1e30, 1.1e30, 1e-45, 1e-46, 1e-300, 1e-308, double.Epsilon, 3e38, 4e38, 1e308,
        double.MaxValue, -1, -1e-300, double.NaN, double.PositiveInfinity, double.NegativeInfinity,
    };

    private static readonly int[] Integers = { 0, 1, 2, 3, 40, 2048, 2049, int.MaxValue, -1, int.MinValue };

    private static readonly string[] Stops =
    {
        "very", ".", " ", "\n", "<|end|>", "\0", "e\u0301", "\ud83d\ude00", new string('x', 10_000), "\ud800",
        "a\udc00", "", null!,
    };

    private readonly PhiMoE _model;

    public OptionsMutationTests(Conformance conformance)
    {
        _model = conformance.Model;
    }

    [Theory]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    public void AreRefusedByNameOrGiveTokens(int seed)
    {
        Random random = new Random(seed);
        int refused = 0;
        for (int number = 0; number < 150; number++)
        {
            GenerationOptions options = Mutate(random);
            HashSet<string> wrong = Wrong(options);
            string what = $"seed {seed}, {number}: {options}";
            try
            {
                Generation found = _model.Generate(Prompt, options);
                Assert.True(wrong.Count == 0, $"{what}: was not refused");
                Assert.True(IsGeneration(found, options), $"{what}: {found}");
                Assert.Equal(found.TokenIds, _model.Generate(Prompt, options).TokenIds);
            }
            catch (GenerationException error)
            {
                Assert.True(wrong.Any(error.Message.Contains), $"{what}: {error.Message}");
                refused++;
            }
        }
        Assert.InRange(refused, 40, 130);
    }

    [Theory]
    [InlineData(1e-308)]
    [InlineData(double.Epsilon)]
    [InlineData(1e-300)]
    [InlineData(1.1754943e-38)]
    public void ATemperatureNearNothingIsTheGreedyChoice(double temperature)
    {
        GenerationOptions cold = new GenerationOptions { MaxNewTokens = 20, Temperature = temperature, Seed = 3 };
        int[] greedy = _model.Generate(Prompt, cold with { Temperature = 0 }).TokenIds.ToArray();
        Assert.Equal(greedy, _model.Generate(Prompt, cold).TokenIds);
        Assert.Equal(greedy, _model.Generate(Prompt, cold with { TopP = 0.5, MinP = 1, TopK = 9 }).TokenIds);
    }

    [Fact]
    public void AKeptTokenIsTheGreedyChoice()
    {
        GenerationOptions hot = new GenerationOptions { MaxNewTokens = 20, Temperature = 1e308, Seed = 3 };
        int[] greedy = _model.Generate(Prompt, hot with { Temperature = 0 }).TokenIds.ToArray();
        Assert.Equal(greedy, _model.Generate(Prompt, hot with { TopK = 1 }).TokenIds);
        Assert.Equal(greedy, _model.Generate(Prompt, hot with { TopP = 1e-300 }).TokenIds);
        Assert.NotEqual(greedy, _model.Generate(Prompt, hot).TokenIds);
    }

    /// <summary>Up to three options with random values; the seed is one that can be had again.</summary>
    private static GenerationOptions Mutate(Random random)
    {
        double Number() => random.Next(4) == 0 ? random.NextDouble() : Numbers[random.Next(Numbers.Length)];
        int Integer() => Integers[random.Next(Integers.Length)];
        string[] Strings() => Enumerable.Range(0, random.Next(3)).Select(i => random.GetItems(Stops, 1)[0]).ToArray();
        GenerationOptions options = new GenerationOptions { MaxNewTokens = 3, Seed = random.NextInt64() };
        for (int count = random.Next(1, 4); count > 0; count--)
        {
            options = random.Next(7) switch
            {
                0 => options with { MaxNewTokens = random.Next(2) == 0 ? 3 : Integer() % 8 },
                1 => options with { Temperature = Number() },
                2 => options with { TopK = Integer() },
                3 => options with { TopP = Number() },
                4 => options with { MinP = Number() },
                5 => options with { RepetitionPenalty = Number() },
                _ => options with { Stop = random.Next(9) == 0 ? null! : Strings() },
            };
        }
        return options;
    }

    /// <summary>The names of the options that are out of their range.</summary>
    private static HashSet<string> Wrong(GenerationOptions options)
    {
        string[] bad = { "", null!, "\ud800", "a\udc00" };
        (string Name, bool Right)[] ranges =
        {
            ("MaxNewTokens", options.MaxNewTokens >= 1),
            ("Temperature", options.Temperature is >= 0 and <= double.MaxValue),
            ("TopK", options.TopK >= 0),
            ("TopP", options.TopP is > 0 and <= 1),
            ("MinP", options.MinP is >= 0 and <= 1),
            ("RepetitionPenalty", options.RepetitionPenalty is >= 1e-30 and <= 1e30),
            ("Stop", options.Stop == null || !options.Stop.Intersect(bad).Any()),
        };
        return ranges.Where(each => !each.Right).Select(each => each.Name).ToHashSet();
    }

    private bool IsGeneration(Generation found, GenerationOptions options) =>
        found.TokenIds.Count >= 1 && found.TokenIds.Count <= options.MaxNewTokens
        && found.TokenIds.All(id => id >= 0 && id < _model.Manifest.Decoding.VocabSize)
        && (found.FinishReason != FinishReason.Length || found.TokenIds.Count == options.MaxNewTokens)
        && !(options.Stop ?? Array.Empty<string>()).Any(found.Text.Contains);
}
