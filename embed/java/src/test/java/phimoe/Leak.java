package phimoe;

import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Random;

/**
 * Prints the process's resident memory while it generates: memory that never comes back would show as growth. A fifth of the
 * generations are batches, a fifth are left early, one in a hundred loads the bundle anew. Arguments: BUNDLE COUNT.
 */
final class Leak {
    private Leak() {}

    public static void main(String[] arguments) throws Exception {
        Path bundle = Path.of(arguments[0]);
        int count = Integer.parseInt(arguments[1]);
        Random random = new Random(0);
        PhiMoE model = PhiMoE.load(bundle, 1);
        for (int number = 0; number <= count; number++) {
            List<Prompt> prompts = new ArrayList<>();
            for (int row = 0; row < (number % 5 == 0 ? 3 : 1); row++) {
                prompts.add(new Prompt.Tokens(random.ints(1 + random.nextInt(30), 300, 2000).boxed().toList()));
            }
            try (Pieces pieces = model.stream(prompts, Options.GREEDY.maxNewTokens(8).temperature(0.8))) {
                for (int left = number % 5 == 1 ? 2 : 100; left > 0 && pieces.hasNext(); left--) {
                    pieces.next();
                }
            }
            if (number % 100 == 99) {
                model.close();
                model = PhiMoE.load(bundle, 1);
            }
            if (number % (count / 10) == 0) {
                System.out.printf("%d generations, %d MiB resident%n", number, Benchmark.resident());
            }
        }
        model.close();
    }
}
