package phimoe;

import java.nio.file.Path;
import java.util.List;

/** An example on the command line: {@code BUNDLE PROMPT [--chat] [--max-new-tokens N] [--temperature T] [--seed S]}. */
final class Main {
    private Main() {}

    /** Prints the continuation of a prompt as it comes. */
    public static void main(String[] arguments) {
        if (arguments.length < 2) {
            System.err.println("usage: BUNDLE PROMPT [--chat] [--max-new-tokens N] [--temperature T] [--seed S]");
            System.exit(2);
        }
        try (PhiMoE model = PhiMoE.load(Path.of(arguments[0]))) {
            Prompt prompt = new Prompt.Text(arguments[1]);
            Options options = Options.GREEDY;
            for (int place = 2; place < arguments.length; place++) {
                switch (arguments[place]) {
                    case "--chat" -> prompt = new Prompt.Chat(List.of(new Message("user", arguments[1])));
                    case "--max-new-tokens" -> options = options.maxNewTokens(Integer.parseInt(arguments[++place]));
                    case "--temperature" -> options = options.temperature(Double.parseDouble(arguments[++place]));
                    case "--seed" -> options = options.seed(Long.parseLong(arguments[++place]));
                    default -> throw new IllegalArgumentException("unknown option " + arguments[place]);
                }
            }
            try (Pieces pieces = model.stream(prompt, options)) {
                for (Piece piece : pieces) {
                    System.out.print(piece.text());
                    System.out.flush();
                }
            }
            System.out.println();
        } catch (PhiMoEException error) {
            System.err.println(error.getMessage());
            System.exit(1);
        }
    }
}
