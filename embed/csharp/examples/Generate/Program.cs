// Continues a prompt with a PhiMoE bundle, or answers it as a chat message, and streams the text.
// Or holds the bundle against a golden file. Or measures: Measure.cs.
using System.Globalization;
using System.Text;
using PhiMoEOnnx;

const string Usage = """
    usage: Generate BUNDLE PROMPT [OPTION]...
           Generate BUNDLE --golden FILE [--threads N]
           Generate benchmark BUNDLE THREADS PROMPT_TOKENS NEW_TOKENS
           Generate soak BUNDLE COUNT

      BUNDLE                   a folder that phimoe-export wrote
      PROMPT                   the text to continue
      --chat                   give the prompt as a user's message
      --system TEXT            the same, after a system message
      --max-new-tokens N       end after N tokens (default: 1024, or where the context ends)
      --temperature T          0, the default, takes the most likely token
      --top-k K                draw from the K most likely tokens; 0, the default, is off
      --top-p P                draw from the most likely tokens that reach P; 1, the default, is off
      --min-p P                draw from tokens at least P times as likely as the first; 0, the default, is off
      --repetition-penalty X   divide the logits of seen tokens; 1, the default, is off
      --seed N                 the same seed gives the same random numbers (default: a fresh one)
      --stop TEXT              end the text before TEXT; may be repeated
      --golden FILE            hold the bundle against a file of phimoe-verify --save-golden; exits with 1 if a figure
                               is past its limit
      --threads N              threads for one operator (default: one a physical core)
      --help                   print this
    """;

Console.OutputEncoding = new UTF8Encoding(false);
using CancellationTokenSource interrupt = new CancellationTokenSource();
Console.CancelKeyPress += (sender, pressed) =>
{
    pressed.Cancel = true; // end the generation, not the process
    interrupt.Cancel();
};
try
{
    if (args.Contains("--help"))
    {
        Console.WriteLine(Usage);
        return 0;
    }
    if (args.Length == 5 && args[0] == "benchmark")
    {
        int[] numbers = args.Skip(2).Select(number => int.Parse(number, CultureInfo.InvariantCulture)).ToArray();
        Measure.Benchmark(args[1], numbers[0], numbers[1], numbers[2]);
        return 0;
    }
    if (args.Length == 3 && args[0] == "soak")
    {
        return await Measure.Soak(args[1], int.Parse(args[2], CultureInfo.InvariantCulture)) ? 0 : 1;
    }
    List<string> plain = new List<string>();
    List<Message> messages = new List<Message>();
    List<string> stop = new List<string>();
    GenerationOptions options = new GenerationOptions();
    bool chat = false;
    int? threads = null;
    string? golden = null;
    for (int i = 0; i < args.Length; i++)
    {
        string Value() => ++i < args.Length ? args[i] : throw new FormatException($"{args[i - 1]} needs a value");
        T Parse<T>(string expected)
            where T : IParsable<T> =>
            T.TryParse(Value(), CultureInfo.InvariantCulture, out T? value)
                ? value
                : throw new FormatException($"{args[i - 1]} is {args[i]}, expected {expected}");
        int Integer() => Parse<int>("a whole number");
        double Number() => Parse<double>("a number");
        switch (args[i])
        {
            case "--chat": chat = true; break;
            case "--system": messages.Add(new Message("system", Value())); break;
            case "--max-new-tokens": options = options with { MaxNewTokens = Integer() }; break;
            case "--temperature": options = options with { Temperature = Number() }; break;
            case "--top-k": options = options with { TopK = Integer() }; break;
            case "--top-p": options = options with { TopP = Number() }; break;
            case "--min-p": options = options with { MinP = Number() }; break;
            case "--repetition-penalty": options = options with { RepetitionPenalty = Number() }; break;
            case "--seed": options = options with { Seed = Parse<long>("a whole number of 64 bits") }; break;
            case "--stop": stop.Add(Value()); break;
            case "--golden": golden = Value(); break;
            case "--threads": threads = Integer(); break;
            case string option when option.StartsWith("--", StringComparison.Ordinal):
                throw new FormatException($"{option} is no option");
            default: plain.Add(args[i]); break;
        }
    }
    if (plain.Count != (golden == null ? 2 : 1))
    {
        throw new FormatException($"expected a bundle and {(golden == null ? "a" : "with --golden no")} prompt");
    }
    if (args.Any(argument => argument.Contains('\uFFFD'))) // what .NET makes of bytes that are no UTF-8
    {
        throw new FormatException("an argument is no text; give UTF-8");
    }
    if (golden != null)
    {
        using PhiMoE verified = PhiMoE.Load(plain[0], threads);
        Report report = verified.VerifyGolden(golden, ShowProgress, interrupt.Token);
        Console.WriteLine(report.Text());
        if (!report.Passed)
        {
            Console.Error.WriteLine($"error: {plain[0]}: {string.Join("; ", report.Failures)}");
        }
        return report.Passed ? 0 : 1;
    }
    Prompt prompt = plain[1];
    if (chat || messages.Count > 0)
    {
        messages.Add(new Message("user", plain[1]));
        prompt = messages;
    }
    using PhiMoE model = PhiMoE.Load(plain[0], threads);
    await foreach (Piece piece in model.StreamAsync(prompt, options with { Stop = stop }, interrupt.Token))
    {
        Console.Write(piece.Text);
        if (piece.Result is Generation result)
        {
            Console.WriteLine();
            Console.Error.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"[{result.PromptTokens} prompt tokens, {result.TokenIds.Count} new, {result.TokensPerSecond:F1} "
                + $"tokens/s, ended by {result.FinishReason}]"));
        }
    }
    return 0;
}
catch (PhiMoEException error)
{
    Console.Error.WriteLine($"error: {error.Message}");
    return 1;
}
catch (Exception error) when (error is FormatException || error is OverflowException)
{
    Console.Error.WriteLine($"error: {error.Message}; see --help");
    return 2;
}
catch (OperationCanceledException)
{
    Console.WriteLine();
    return 130;
}

static void ShowProgress(int done, int total)
{
    if (!Console.IsErrorRedirected)
    {
        Console.Error.Write($"\rran {done} of {total} windows{(done == total ? "\n" : "")}");
    }
}
