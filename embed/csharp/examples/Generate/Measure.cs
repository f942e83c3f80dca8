using System.Diagnostics;
using System.Globalization;
using PhiMoEOnnx;

/// <summary>How fast a bundle is, and whether memory comes back.</summary>
internal static class Measure
{
    /// <summary>
    /// One line of JSON for benchmarks/compare_languages.py: seconds of loading, tokens a second, and MiB in memory.
    /// </summary>
    public static void Benchmark(string bundle, int threads, int promptTokens, int newTokens)
    {
        int[] ids = Enumerable.Range(0, promptTokens).Select(place => 300 + place * 7 % 1000).ToArray();
        Stopwatch clock = Stopwatch.StartNew();
        using PhiMoE model = PhiMoE.Load(bundle, threads);
        double load = clock.Elapsed.TotalSeconds;
        GenerationOptions options = new GenerationOptions { MaxNewTokens = newTokens };
        model.Generate(ids, options); // warm
        Generation generation = model.Generate(ids, options);
        Console.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"{{\"load\": {load:F3}, \"prefill\": {promptTokens / generation.FirstTokenSeconds:F1}, "
            + $"\"decode\": {generation.TokensPerSecond:F2}, \"new_tokens\": {generation.TokenIds.Count}, "
            + $"\"resident\": {Resident()}}}"));
    }

    /// <summary>
    /// Prints the memory of so many short generations; false where it grew by more than a tenth after the first fifth.
    /// </summary>
    /// <remarks>
    /// A fifth are batches, a fifth are streams that are left early, one in a hundred loads the bundle anew.
    /// </remarks>
    public static async Task<bool> Soak(string bundle, int count)
    {
        Random random = new Random(0);
        GenerationOptions options = new GenerationOptions { MaxNewTokens = 8, Temperature = 0.8 };
        PhiMoE model = PhiMoE.Load(bundle, threads: 1);
        List<long> residents = new List<long>();
        for (int number = 1; number <= count; number++)
        {
            Prompt Next() => Enumerable.Range(0, random.Next(1, 31)).Select(place => random.Next(300, 2000)).ToArray();
            if (number % 5 == 0)
            {
                model.Generate(new[] { Next(), Next(), Next() }, options);
            }
            else if (number % 5 == 1)
            {
                await foreach (Piece piece in model.StreamAsync(Next(), options))
                {
                    break;
                }
            }
            else
            {
                model.Generate(Next(), options);
            }
            if (number % 100 == 0)
            {
                model.Dispose();
                model = PhiMoE.Load(bundle, threads: 1);
            }
            if (number % Math.Max(count / 10, 1) == 0)
            {
                residents.Add(Resident());
                Console.WriteLine($"{number} generations, {residents[residents.Count - 1]} MiB resident");
            }
        }
        model.Dispose();
        return residents.Count < 3 || residents[residents.Count - 1] <= 1.1 * residents[1];
    }

    /// <summary>MiB of this process in memory.</summary>
    private static long Resident()
    {
        using Process process = Process.GetCurrentProcess();
        return process.WorkingSet64 >> 20;
    }
}
