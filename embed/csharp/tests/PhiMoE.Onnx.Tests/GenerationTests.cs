using Xunit;

namespace PhiMoEOnnx.Tests;

public sealed class GenerationTests : IClassFixture<Conformance>
{
    private static readonly GenerationOptions Short = new GenerationOptions { MaxNewTokens = 8 };
    private readonly PhiMoE _model;

    public GenerationTests(Conformance conformance)
    {
        _model = conformance.Model;
    }

    [Fact]
    public async Task EndsWhenItIsCancelled()
    {
        using CancellationTokenSource source = new CancellationTokenSource();
        List<Piece> pieces = new List<Piece>();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(async () =>
        {
            await foreach (Piece piece in _model.GenerateAsync("It was", null, source.Token))
            {
                pieces.Add(piece);
                source.Cancel();
            }
        });
        Assert.Single(pieces);
    }

    [Fact]
    public async Task TakesTheTokenOfWithCancellation()
    {
        CancellationToken cancelled = new CancellationToken(canceled: true);
        await Assert.ThrowsAnyAsync<OperationCanceledException>(async () =>
        {
            await foreach (Piece piece in _model.GenerateAsync("It was").WithCancellation(cancelled))
            {
                Assert.Fail(piece.Text);
            }
        });
    }

    [Fact]
    public async Task GoesOnAfterAStreamThatWasLeft()
    {
        string expected = _model.Generate("It was", Short).Text;
        await foreach (Piece piece in _model.GenerateAsync("It was", Short))
        {
            break;
        }
        Assert.Equal(expected, _model.Generate("It was", Short).Text);
    }

    [Fact]
    public void AStreamCanBeReadAgain()
    {
        IEnumerable<Piece> pieces = _model.GenerateAsync("It was", Short).ToBlockingEnumerable();
        Assert.Equal(pieces.Select(piece => piece.TokenId).ToArray(), pieces.Select(piece => piece.TokenId).ToArray());
    }

    [Fact]
    public async Task ServesSeveralCallersAtOnce()
    {
        string[] prompts = { "It was", "Emma", "And the LORD said", "The king" };
        string[] expected = prompts.Select(prompt => _model.Generate(prompt, Short).Text).ToArray();
        Task<string>[] tasks = prompts.Select(prompt => Task.Run(() => _model.Generate(prompt, Short).Text)).ToArray();
        Assert.Equal(expected, await Task.WhenAll(tasks));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void AClosedModelRefusesWhatIsStillToCome(bool growing)
    {
        string bundle = growing ? Conformance.GrowingBundle() : Conformance.CopyBundle();
        try
        {
            PhiMoE model = PhiMoE.Load(bundle, threads: 1);
            using IEnumerator<Piece> pieces =
                model.GenerateAsync("It was", Short).ToBlockingEnumerable().GetEnumerator();
            Assert.True(pieces.MoveNext());
            model.Dispose();
            model.Dispose();
            Assert.Throws<ObjectDisposedException>(() => pieces.MoveNext());
            Assert.Throws<ObjectDisposedException>(() => model.Generate("It was", Short));
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    [Fact]
    public void RefusesMoreTokensThanABufferHolds()
    {
        string bundle = Conformance.CopyBundle();
        try
        {
            Changes.Set(bundle, "/decoding/context", int.MaxValue);
            using PhiMoE model = PhiMoE.Load(bundle, threads: 1);
            GenerationOptions most = new GenerationOptions { MaxNewTokens = int.MaxValue - 1 };
            GenerationException error = Assert.Throws<GenerationException>(() => model.Generate(new[] { 5 }, most));
            Assert.Contains("16 GiB", error.Message);
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    [Fact]
    public void WithoutASeedEveryRowHasAFreshOne()
    {
        GenerationOptions options = new GenerationOptions { MaxNewTokens = 24, Temperature = 2 };
        IReadOnlyList<Generation> rows = _model.Generate(new Prompt[] { "It was", "It was" }, options);
        Assert.NotEqual(rows[0].TokenIds, rows[1].TokenIds);
    }

    [Fact]
    public void RefusesARoleThatTheFormatLacks()
    {
        GenerationException error =
            Assert.Throws<GenerationException>(() => _model.Generate(new[] { new Message("tool", "3") }));
        Assert.Contains("tool", error.Message);
        Assert.Contains("user", error.Message);
    }

    [Fact]
    public void RefusesLogitsThatAreNotFinite()
    {
        foreach (float bad in new[] { float.NaN, float.PositiveInfinity })
        {
            float[] logits = { 0f, bad, 1f };
            Assert.Throws<GenerationException>(() => Sampler.Sample(logits, Short, 0, 0, Array.Empty<int>()));
        }
        float[] some = { float.NegativeInfinity, 1f };
        Assert.Equal(1, Sampler.Sample(some, Short, 0, 0, Array.Empty<int>()));
    }

    [Fact]
    public void DrawsTheNumbersOfSplitMix64()
    {
        Assert.Equal((6457827717110365317UL >> 11) / Math.Pow(2, 53), Sampler.Uniform(1234567, 0));
        Assert.Equal((3203168211198807973UL >> 11) / Math.Pow(2, 53), Sampler.Uniform(1234567, 1));
    }
}
