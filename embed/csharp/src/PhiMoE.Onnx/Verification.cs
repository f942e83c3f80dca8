namespace PhiMoEOnnx;

/// <summary>Holds a bundle against a golden file, as spec/golden.md says.</summary>
internal sealed class Verification
{
    private const int PromptTokens = 32; // of the greedy continuation

    private readonly Golden _golden;
    private readonly Tokenizer _tokenizer;
    private readonly IReadOnlyDictionary<string, double> _limits;
    private readonly Stored? _stored; // what the file knows of the bundle's stored weights
    private readonly int[] _tokenIds; // of all windows
    private readonly int[] _expected; // how the reference continues the prompt
    private readonly List<int> _continuation = new List<int>();
    private readonly Comparer _toReference;
    private readonly Comparer? _toStored;
    private int _first; // token of the next window
    private double _loss;

    /// <exception cref="BundleException">The manifest does not say how the weights are stored.</exception>
    /// <exception cref="GoldenException">The file has longer texts than the bundle's context.</exception>
    public Verification(Golden golden, Manifest manifest, Tokenizer tokenizer)
    {
        _golden = golden;
        _tokenizer = tokenizer;
        _limits = Thresholds.Of(manifest.Dtypes, manifest.Decoding.Cache.Dtype)
            ?? throw new BundleException(
                "manifest.json does not say how the weights are stored (weights, dtype), so there are no limits to hold "
                + "the figures against; export the bundle again");
        _stored = golden.Stored is Stored stored && IsOf(stored, manifest) ? stored : null;
        _tokenIds = golden["token_ids"].Integers();
        _expected = golden["greedy"].Integers();
        _toReference = new Comparer(golden, "");
        _toStored = _stored == null ? null : new Comparer(golden, "stored_");
        Longest = Math.Max(golden.Windows.Max(), Prompt.Length + _expected.Length);
        if (Longest > manifest.Decoding.Context)
        {
            throw new GoldenException(
                $"{golden.Path}: has texts of {Longest} tokens, the bundle's context is {manifest.Decoding.Context}; "
                + "give the golden file of this bundle's checkpoint");
        }
    }

    /// <summary>How many tokens a cache must hold.</summary>
    public int Longest { get; }

    /// <summary>How many windows there are.</summary>
    public int Windows => _golden.Windows.Count;

    private int[] Prompt => _tokenIds[..Math.Min(PromptTokens, _golden.Windows[0])];

    /// <summary>Runs the next window, which has this number.</summary>
    public void RunWindow(Decoder decoder, int number)
    {
        int[] window = _tokenIds[_first..(_first + _golden.Windows[number])];
        int place = 0;
        decoder.Logits(window, logits =>
        {
            double sum = Comparer.LogSumExp(logits.Span);
            _toReference.Add(logits.Span, sum, _golden.Scales[number]);
            _toStored?.Add(logits.Span, sum, _stored!.Scales[number]);
            if (++place < window.Length)
            {
                _loss += sum - logits.Span[window[place]];
            }
        });
        _first += window.Length;
    }

    /// <summary>
    /// Finds the bundle's own most likely tokens after the prompt; none follows logits that are not finite.
    /// </summary>
    public void Continue(Decoder decoder)
    {
        while (_continuation.Count < _expected.Length)
        {
            if (_continuation.Count == 0)
            {
                decoder.Prefill(0, Prompt);
            }
            else
            {
                decoder.Step(new[] { _continuation[_continuation.Count - 1] });
            }
            ReadOnlySpan<float> logits = decoder.Logits(0);
            if (!double.IsFinite(Comparer.LogSumExp(logits)))
            {
                break;
            }
            _continuation.Add(Comparer.Best(logits));
        }
    }

    /// <summary>What was found, once all windows were run; <c>bundle</c> is its name there.</summary>
    public Report Report(string bundle)
    {
        double perplexity = Math.Exp(_loss / (_first - Windows));
        Comparison reference = _toReference.Result();
        Comparison? kernels = _toStored?.Result();
        Dictionary<string, double> measured = new Dictionary<string, double>
        {
            ["mean_difference"] = reference.MeanDifference,
            ["max_difference"] = reference.MaxDifference,
            ["kl"] = reference.Kl,
            ["perplexity_ratio"] = perplexity / _golden.Perplexity,
        };
        Dictionary<string, double> perplexities =
            new Dictionary<string, double> { ["reference"] = _golden.Perplexity };
        if (_stored != null)
        {
            measured["kernel_kl"] = kernels!.Kl;
            perplexities["stored"] = _stored.Perplexity;
        }
        perplexities["bundle"] = perplexity;
        Check[] checks = Thresholds.Units.Keys
            .Where(name => _limits.ContainsKey(name) && measured.ContainsKey(name))
            .Select(name => new Check(name, measured[name], _limits[name])).ToArray();
        int agreeing = _continuation.Zip(_expected).TakeWhile(pair => pair.First == pair.Second).Count();
        return new Report(
            bundle,
            $"{_golden.Checkpoint} in {_golden.Path}",
            reference.Tokens,
            _golden.Windows,
            reference,
            kernels,
            _stored?.ToReference,
            _stored?.RoutingAgreement,
            perplexities,
            new Greedy(_tokenizer.Decode(_expected), _tokenizer.Decode(_continuation), agreeing, _expected.Length),
            Notes(),
            checks);
    }

    private static bool IsOf(Stored stored, Manifest manifest)
    {
        KeyValuePair<string, BundleFile>[] weights =
            manifest.Files.Where(file => file.Key.EndsWith(".data", StringComparison.Ordinal)).ToArray();
        return weights.Length == stored.Files.Count
            && weights.All(file => stored.Files.GetValueOrDefault(file.Key) == file.Value.Sha256);
    }

    private IReadOnlyList<string> Notes()
    {
        string adapter = _golden.AdapterSha256 is string sha256 ? $", with an adapter of SHA-256 {sha256}" : "";
        int vocabSize = _golden.VocabSize;
        List<string> notes = new List<string>
        {
            $"the checkpoint's SHA-256 is {_golden.CheckpointSha256}{adapter}",
            $"the golden file keeps {Math.Min(Golden.Top, vocabSize)} top and {Math.Min(Golden.Sampled, vocabSize)} other "
                + $"logits of {vocabSize} a token: KL and mean |d| are estimates, max |d| is a lower bound; perplexity and "
                + "top-1 agreement are exact",
        };
        if (_stored == null && _limits.ContainsKey("kernel_kl"))
        {
            notes.Add("not checked: kernel_kl; the golden file was saved with a bundle of other stored weights");
        }
        return notes;
    }
}
