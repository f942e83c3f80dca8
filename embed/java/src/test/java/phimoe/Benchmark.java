package phimoe;

import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.IntStream;

/**
 * One line of JSON for benchmarks/compare_languages.py: how long loading takes, prefill and decoding speed in tokens a second, and
 * resident memory in MiB. Arguments: BUNDLE THREADS PROMPT_TOKENS NEW_TOKENS.
 */
final class Benchmark {
    private Benchmark() {}

    public static void main(String[] arguments) throws Exception {
        int[] numbers = IntStream.of(1, 2, 3).map(place -> Integer.parseInt(arguments[place])).toArray();
        List<Integer> ids = IntStream.range(0, numbers[1]).map(place -> 300 + place * 7 % 1000).boxed().toList();
        long start = System.nanoTime();
        try (PhiMoE model = PhiMoE.load(Path.of(arguments[0]), numbers[0])) {
            double load = (System.nanoTime() - start) / 1e9;
            Options options = Options.GREEDY.maxNewTokens(numbers[2]);
            model.generate(new Prompt.Tokens(ids), options); // warm
            Generation generation = model.generate(new Prompt.Tokens(ids), options);
            double first = generation.firstToken().toNanos() / 1e9;
            double rest = generation.total().toNanos() / 1e9 - first;
            System.out.printf(
                    "{\"load\": %.3f, \"prefill\": %.1f, \"decode\": %.2f, \"new_tokens\": %d, \"resident\": %d}%n",
                    load, ids.size() / first, (generation.tokenIds().size() - 1) / rest, generation.tokenIds().size(), resident());
        }
    }

    /** MiB of this process in memory. */
    static long resident() throws Exception {
        return Files.lines(Path.of("/proc/self/status")).filter(line -> line.startsWith("VmRSS"))
                .mapToLong(line -> Long.parseLong(line.replaceAll("\\D", "")) / 1024).sum();
    }
}
