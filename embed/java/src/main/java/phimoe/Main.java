package phimoe;

import java.nio.file.InvalidPathException;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.function.Function;

/**
 * The example on the command line: continues a prompt, or answers it as a chat message, and streams the text. Or holds the
 * bundle against a golden file.
 */
final class Main {
    private static final String USAGE = """
            usage: phimoe.Main BUNDLE PROMPT [OPTION]...
                   phimoe.Main BUNDLE --golden FILE [--threads N]

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
              --help                   print this""";

    private final List<String> plain = new ArrayList<>();
    private final List<Message> messages = new ArrayList<>();
    private final List<String> stop = new ArrayList<>();
    private Options options = Options.GREEDY;
    private boolean chat;
    private Integer threads;
    private String golden;

    /** Arguments that cannot be understood. */
    private static final class UsageException extends Exception {
        private static final long serialVersionUID = 1;

        private UsageException(String message) {
            super(message);
        }
    }

    private Main() {}

    /** Runs the command; exits with 1 after an error of this library and with 2 after arguments that make no sense. */
    public static void main(String[] arguments) {
        int code = 0;
        if (List.of(arguments).contains("--help")) {
            System.out.println(USAGE);
            return;
        }
        Main main = new Main();
        try {
            main.parse(arguments);
            code = main.golden == null ? main.run() : main.verify();
        } catch (PhiMoEException error) {
            System.err.println("error: " + error.getMessage());
            code = 1;
        } catch (UsageException error) {
            System.err.println("error: " + error.getMessage());
            code = 2;
        }
        if (code != 0) {
            System.exit(code);
        }
    }

    private void parse(String[] arguments) throws UsageException {
        for (int place = 0; place < arguments.length; place++) {
            String name = arguments[place];
            if (!name.startsWith("--")) {
                plain.add(name);
            } else if (name.equals("--chat")) {
                chat = true;
            } else {
                set(name, place + 1 < arguments.length ? arguments[++place] : null);
            }
        }
        if (golden != null && plain.size() != 1) {
            throw new UsageException("--golden goes with a bundle and no prompt, found " + plain.size() + " arguments; see --help");
        }
        if (golden == null && plain.size() != 2) {
            throw new UsageException("expected a bundle and a prompt, found " + plain.size() + " arguments; see --help");
        }
        for (String argument : arguments) {
            if (argument.indexOf('\uFFFD') >= 0) { // what Java makes of bytes that are no character of the locale
                throw new UsageException("an argument is no text in this locale's encoding; give UTF-8, and set LC_ALL=C.UTF-8");
            }
        }
    }

    private void set(String name, String value) throws UsageException {
        switch (name) {
            case "--system" -> messages.add(new Message("system", given(name, value)));
            case "--max-new-tokens" -> options = options.maxNewTokens(integer(name, value));
            case "--temperature" -> options = options.temperature(number(name, value));
            case "--top-k" -> options = options.topK(integer(name, value));
            case "--top-p" -> options = options.topP(number(name, value));
            case "--min-p" -> options = options.minP(number(name, value));
            case "--repetition-penalty" -> options = options.repetitionPenalty(number(name, value));
            case "--seed" -> options = options.seed(read(name, value, Long::valueOf, "a whole number of 64 bits"));
            case "--stop" -> {
                stop.add(given(name, value));
                options = options.stop(stop.toArray(String[]::new));
            }
            case "--golden" -> golden = given(name, value);
            case "--threads" -> threads = integer(name, value);
            default -> throw new UsageException(name + " is no option; see --help");
        }
    }

    private static Integer integer(String name, String value) throws UsageException {
        return read(name, value, Integer::valueOf, "a whole number");
    }

    private static Double number(String name, String value) throws UsageException {
        return read(name, value, Double::valueOf, "a number");
    }

    private static <T> T read(String name, String value, Function<String, T> read, String expected) throws UsageException {
        try {
            return read.apply(given(name, value));
        } catch (NumberFormatException error) {
            throw new UsageException(name + " is " + value + ", expected " + expected);
        }
    }

    private static String given(String name, String value) throws UsageException {
        if (value == null) {
            throw new UsageException(name + " needs a value; see --help");
        }
        return value;
    }

    /** Prints the text as it comes, and its speed; returns the exit code. */
    private int run() throws UsageException {
        Prompt prompt = new Prompt.Text(plain.get(1));
        if (chat || !messages.isEmpty()) {
            messages.add(new Message("user", plain.get(1)));
            prompt = new Prompt.Chat(messages);
        }
        try (PhiMoE model = PhiMoE.load(Path.of(plain.get(0)), threads);
                Pieces pieces = model.stream(prompt, options)) {
            for (Piece piece : pieces) {
                System.out.print(piece.text());
                if (System.out.checkError()) {
                    return 1; // nobody reads on
                }
                piece.result().ifPresent(Main::report);
            }
        } catch (InvalidPathException error) {
            throw new UsageException("the bundle " + plain.get(0) + " is no path of a folder (" + error.getReason() + ")");
        }
        return 0;
    }

    /** Prints the figures of the golden file; returns the exit code. */
    private int verify() throws UsageException {
        boolean watched = System.console() != null;
        try (PhiMoE model = PhiMoE.load(Path.of(plain.get(0)), threads)) {
            Report report = model.verifyGolden(Path.of(golden), (done, count) -> {
                if (watched) {
                    System.err.printf("\rran %d of %d windows%s", done, count, done.equals(count) ? "\n" : "");
                }
            });
            System.out.println(report.text());
            if (!report.passed()) {
                System.err.println("error: " + plain.get(0) + ": " + String.join("; ", report.failures()));
            }
            return report.passed() ? 0 : 1;
        } catch (InvalidPathException error) {
            throw new UsageException(error.getInput() + " is no path (" + error.getReason() + ")");
        }
    }

    private static void report(Generation result) {
        System.out.println();
        int tokens = result.tokenIds().size();
        double seconds = Math.max(result.total().minus(result.firstToken()).toNanos() / 1e9, 1e-9);
        System.err.printf(Locale.ROOT, "[%d prompt tokens, %d new, %.1f tokens/s, ended by %s]%n", result.promptTokens(),
                tokens, (tokens - 1) / seconds, result.finishReason().name().toLowerCase(Locale.ROOT));
    }
}
