using Xunit;

namespace PhiMoEOnnx.Tests;

public sealed class GenerationTests : IClassFixture<Conformance>
{
    private static readonly GenerationOptions Short = new GenerationOptions { MaxNewTokens = 8 };
    private static readonly GenerationOptions LongText = new GenerationOptions { MaxNewTokens = 1000 };
    private readonly PhiMoE _model;

    public GenerationTests(Conformance conformance)
    {
        _model = conformance.Model;
    }

    /// <summary>Calls with a null in each place, and what the error names.</summary>
    public static IEnumerable<object[]> Nulls
    {
        get
        {
            Message[] roleless = { new Message(null!, "x") };
            Message[] empty = { new Message("user", null!) };
            (string Names, Action<PhiMoE> Call)[] calls =
            {
                ("the prompt is null", model => model.Generate((Prompt)null!)),
                ("the prompt is empty", model => model.Generate((string)null!)),
                ("the prompt is empty", model => model.Generate((IReadOnlyList<int>)null!)),
                ("the prompt is empty", model => model.StreamAsync((IEnumerable<Message>)null!)),
                ("the batch is null", model => model.Generate((IEnumerable<Prompt>)null!)),
                ("the batch is null", model => _ = model.GenerateAsync((IEnumerable<string>)null!)),
                ("prompt 1 is null", model => model.Generate(new Prompt[] { "It was", null! })),
                ("prompt 1 is null", model => model.StreamAsync(new[] { "It was", null! })),
                ("a message is null", model => model.Generate(new Message[] { null! })),
                ("a message's role is null", model => model.Generate(roleless)),
                ("content is null", model => model.Generate(empty)),
                ("Stop", model => model.Generate("It was", Short with { Stop = new[] { "a", null! } })),
                ("text is null", model => model.Tokenizer.Encode(null!)),
                ("tokenIds is null", model => model.Tokenizer.Decode(null!)),
                ("token is null", model => model.Tokenizer.TokenId(null!)),
            };
            return calls.Select(each => new object[] { each.Names, each.Call });
        }
    }

    [Fact]
    public async Task EndsWhenItIsCancelled()
    {
        using CancellationTokenSource source = new CancellationTokenSource();
        List<Piece> pieces = new List<Piece>();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(async () =>
        {
            await foreach (Piece piece in _model.StreamAsync("It was", null, source.Token))
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
            await foreach (Piece piece in _model.StreamAsync("It was").WithCancellation(cancelled))
            {
                Assert.Fail(piece.Text);
            }
        });
    }

    [Fact]
    public async Task GoesOnAfterAStreamThatWasLeft()
    {
        string expected = _model.Generate("It was", Short).Text;
        await foreach (Piece piece in _model.StreamAsync("It was", Short))
        {
            break;
        }
        Assert.Equal(expected, _model.Generate("It was", Short).Text);
    }

    [Fact]
    public async Task TakesTheInterfacesThatPeopleHave()
    {
        IReadOnlyList<int> ids = _model.Tokenizer.Encode("It was");
        IEnumerable<string> texts = new Queue<string>(new[] { "It was", "Emma" });
        IEnumerable<Message> messages = new Queue<Message>(new[] { new Message("user", "Who is Emma?") });
        Generation one = _model.Generate("It was", Short);
        Generation two = _model.Generate("Emma", Short);
        Generation answer = _model.Generate(new[] { new Message("user", "Who is Emma?") }, Short);
        AssertSame(new[] { one, one, two, answer }, new[] { _model.Generate(ids, Short) },
            _model.Generate(texts, Short), new[] { _model.Generate(messages, Short) });
        AssertSame(new[] { one, one, two, answer }, new[] { await _model.GenerateAsync(ids, Short) },
            await _model.GenerateAsync(texts, Short), new[] { await _model.GenerateAsync(messages, Short) });
        AssertSame(new[] { one, one, two, answer }, Results(_model.StreamAsync(ids, Short)),
            Results(_model.StreamAsync(texts, Short)).ToArray(), Results(_model.StreamAsync(messages, Short)));
        AssertSame(new[] { one, two, one }, new[] { await _model.GenerateAsync("It was", Short) },
            await _model.GenerateAsync(new List<Prompt> { "Emma", new Prompt(ids) }, Short));
    }

    [Fact]
    public async Task EndsAWholeTextWhenItIsCancelled()
    {
        CancellationToken cancelled = new CancellationToken(canceled: true);
        Assert.ThrowsAny<OperationCanceledException>(() => _model.Generate("It was", Short, cancelled));
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => _model.GenerateAsync("It was", Short, cancelled));
        using CancellationTokenSource source = new CancellationTokenSource();
        Task<Generation> task = _model.GenerateAsync("It was", LongText, source.Token);
        source.Cancel();
        await Assert.ThrowsAnyAsync<OperationCanceledException>(() => task);
    }

    [Theory]
    [MemberData(nameof(Nulls))]
    public void RefusesNull(string names, Action<PhiMoE> call)
    {
        Assert.Contains(names, Assert.Throws<GenerationException>(() => call(_model)).Message);
    }

    [Fact]
    public void RefusesHalfACharacter()
    {
        foreach (string text in new[] { "\ud800", "It was \udc00.", "\ud83d\ud83d\ude00" })
        {
            (string Name, Action Call)[] calls =
            {
                ("the prompt", () => _model.Generate(text)),
                ("the prompt", () => _model.Generate(new[] { new Message("user", text) })),
                ("prompt 1", () => _model.Generate(new[] { "It was", text })),
                ("Stop", () => _model.Generate("It was", Short with { Stop = new[] { text } })),
                ("the text", () => _model.Tokenizer.Encode(text)),
            };
            foreach ((string name, Action call) in calls)
            {
                string message = Assert.Throws<GenerationException>(call).Message;
                Assert.StartsWith($"{name} holds \\ud", message, StringComparison.Ordinal);
                Assert.Contains("half a character", message);
            }
        }
    }

    [Fact]
    public void NullIsNoStopString()
    {
        Generation expected = _model.Generate("It was", Short);
        Assert.Equal(expected.TokenIds, _model.Generate("It was", Short with { Stop = null }).TokenIds);
    }

    [Theory]
    [InlineData(null)]
    [InlineData(2)]
    public void ThreadsChangeNoToken(int? threads)
    {
        string bundle = Conformance.CopyBundle();
        try
        {
            using PhiMoE model = PhiMoE.Load(bundle, threads); // by default short passes have a session of their own
            Prompt[] prompts = { "It was", "And the LORD said unto Moses,", new string('x', 300) };
            IReadOnlyList<Generation> expected = _model.Generate(prompts, Short);
            IReadOnlyList<Generation> found = model.Generate(prompts, Short);
            Assert.Equal(expected.Select(each => each.TokenIds), found.Select(each => each.TokenIds));
        }
        finally
        {
            Directory.Delete(bundle, recursive: true);
        }
    }

    [Theory]
    [InlineData(10_000_000)]
    [InlineData(100_000_000)]
    public void RefusesAPromptThatIsMuchTooLongBeforeItIsEncoded(int length)
    {
        long before = GC.GetAllocatedBytesForCurrentThread();
        string text = new string('x', length);
        Assert.Contains("context", Assert.Throws<GenerationException>(() => _model.Generate(text)).Message);
        Assert.InRange(GC.GetAllocatedBytesForCurrentThread() - before, 2L * length, 2L * length + 1_000_000);
    }

    [Fact]
    public void KeepsTheStopStringsOfTheCall()
    {
        List<string> stop = new List<string> { "very" };
        IAsyncEnumerable<Piece> stream = _model.StreamAsync("It was", Short with { Stop = stop });
        stop[0] = null!;
        Assert.Equal(FinishReason.Stop, Results(stream).Single().FinishReason);
    }

    [Fact]
    public void AStreamCanBeReadAgain()
    {
        IEnumerable<Piece> pieces = _model.StreamAsync("It was", Short).ToBlockingEnumerable();
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
                model.StreamAsync("It was", Short).ToBlockingEnumerable().GetEnumerator();
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

    private static Generation[] Results(IAsyncEnumerable<Piece> pieces) =>
        pieces.ToBlockingEnumerable().Where(piece => piece.Result != null).OrderBy(piece => piece.Row)
            .Select(piece => piece.Result!).ToArray();

    private static void AssertSame(Generation[] expected, params IReadOnlyList<Generation>[] found) =>
        Assert.Equal(
            expected.Select(each => each.TokenIds), found.SelectMany(each => each).Select(each => each.TokenIds));
}
