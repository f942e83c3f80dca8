package phimoe;

import ai.onnxruntime.OrtException;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.function.BiConsumer;
import java.util.stream.Collectors;

/** Holds a bundle against a golden file, as spec/golden.md says. */
final class Verification {
    private static final int PROMPT = 32; // tokens, of the greedy continuation
    private static final List<String> MEASURES =
            List.of("mean_difference", "max_difference", "kl", "kernel_kl", "perplexity_ratio");

    private final Manifest manifest;
    private final Tokenizer tokenizer;
    private final Golden golden;
    private final List<Integer> tokenIds; // of all windows
    private final List<Integer> prompt;
    private final List<Integer> expected; // how the reference continues it
    private final boolean stored; // whether the file knows the bundle's stored weights

    Verification(Manifest manifest, Tokenizer tokenizer, Golden golden) {
        this.manifest = manifest;
        this.tokenizer = tokenizer;
        this.golden = golden;
        tokenIds = golden.array("token_ids").integers();
        prompt = tokenIds.subList(0, Math.min(PROMPT, golden.windows().get(0)));
        expected = golden.array("greedy").integers();
        stored = golden.stored() != null && golden.stored().files().equals(weights());
    }

    /** The SHA-256 of the bundle's files of weights. */
    private Map<String, String> weights() {
        return manifest.files().entrySet().stream().filter(file -> file.getKey().endsWith(".data"))
                .collect(Collectors.toMap(Map.Entry::getKey, file -> file.getValue().sha256()));
    }

    /** Runs all of it; `progress` is told the windows done and to do. `bundle` names it in the report. */
    Report run(String bundle, Session session, BiConsumer<Integer, Integer> progress) throws OrtException {
        Map<String, Double> limits = limits();
        int longest = golden.windows().stream().mapToInt(length -> length).max().orElseThrow();
        longest = Math.max(longest, prompt.size() + expected.size());
        if (longest > manifest.decoding().context()) {
            throw new GoldenException(golden.path() + ": has texts of " + longest + " tokens, the bundle's context is "
                    + manifest.decoding().context() + "; give the golden file of this bundle's checkpoint");
        }
        Comparer toReference = new Comparer(golden, "");
        Comparer toStored = stored ? new Comparer(golden, "stored_") : null;
        try (Decoder decoder = new Decoder(session, manifest.decoding(), 1, longest)) {
            double perplexity = compare(decoder, toReference, toStored, progress);
            return report(bundle, limits, perplexity, toReference, toStored, continuation(decoder));
        }
    }

    private Map<String, Double> limits() {
        try {
            String cache = manifest.decoding().cache().dtype().name().toLowerCase(Locale.ROOT);
            return Thresholds.of(manifest.dtypes(), cache);
        } catch (IllegalArgumentException error) {
            throw new BundleException("manifest.json does not say how the weights are stored (weights, dtype), so there are no "
                    + "limits to hold the figures against; export the bundle again", error);
        }
    }

    /** Runs the windows; returns the bundle's perplexity. */
    private double compare(Decoder decoder, Comparer toReference, Comparer toStored, BiConsumer<Integer, Integer> progress)
            throws OrtException {
        double[] loss = {0};
        int first = 0;
        int count = golden.windows().size();
        progress.accept(0, count);
        for (int number = 0; number < count; number++) {
            List<Integer> window = tokenIds.subList(first, first + golden.windows().get(number));
            int current = number;
            int[] place = {0};
            decoder.logits(window, logits -> {
                double sum = Comparer.logSumExp(logits);
                toReference.add(logits, sum, golden.scales().get(current));
                if (toStored != null) {
                    toStored.add(logits, sum, golden.stored().scales().get(current));
                }
                if (++place[0] < window.size()) {
                    loss[0] += sum - logits[window.get(place[0])];
                }
            });
            first += window.size();
            progress.accept(number + 1, count);
        }
        return Math.exp(loss[0] / (first - count));
    }

    /** The bundle's own most likely tokens after the prompt; none follows logits that are not finite. */
    private List<Integer> continuation(Decoder decoder) throws OrtException {
        List<Integer> tokens = new ArrayList<>();
        while (tokens.size() < expected.size()) {
            if (tokens.isEmpty()) {
                decoder.prefill(0, prompt);
            } else {
                decoder.step(tokens.subList(tokens.size() - 1, tokens.size()));
            }
            float[] logits = decoder.logits(0);
            if (!Double.isFinite(Comparer.logSumExp(logits))) {
                break;
            }
            tokens.add(Comparer.best(logits));
        }
        return tokens;
    }

    private Report report(
            String bundle, Map<String, Double> limits, double perplexity, Comparer toReference, Comparer toStored,
            List<Integer> continuation) {
        Golden.Stored known = stored ? golden.stored() : null;
        Comparison reference = toReference.result();
        Comparison kernels = toStored == null ? null : toStored.result();
        Map<String, Double> measured = new LinkedHashMap<>();
        measured.put("mean_difference", reference.meanDifference());
        measured.put("max_difference", reference.maxDifference());
        measured.put("kl", reference.kl());
        measured.put("perplexity_ratio", perplexity / golden.perplexity());
        Map<String, Double> perplexities = new LinkedHashMap<>();
        perplexities.put("reference", golden.perplexity());
        if (known != null) {
            measured.put("kernel_kl", kernels.kl());
            perplexities.put("stored", known.perplexity());
        }
        perplexities.put("bundle", perplexity);
        List<Report.Check> checks = MEASURES.stream().filter(limits::containsKey).filter(measured::containsKey)
                .map(name -> new Report.Check(name, measured.get(name), limits.get(name))).toList();
        int agreeing = 0;
        while (agreeing < continuation.size() && continuation.get(agreeing).equals(expected.get(agreeing))) {
            agreeing++;
        }
        return new Report(
                bundle, golden.checkpoint() + " in " + golden.path(), reference.tokens(), golden.windows(), reference, kernels,
                known == null ? null : known.toReference(), known == null ? null : known.routingAgreement(), perplexities,
                new Report.Greedy(tokenizer.decode(expected), tokenizer.decode(continuation), agreeing, expected.size()),
                notes(limits), checks);
    }

    private List<String> notes(Map<String, Double> limits) {
        List<String> notes = new ArrayList<>();
        String adapter = golden.adapterSha256() == null ? "" : ", with an adapter of SHA-256 " + golden.adapterSha256();
        notes.add("the checkpoint's SHA-256 is " + golden.checkpointSha256() + adapter);
        notes.add("the golden file keeps " + Math.min(Golden.TOP, golden.vocabSize()) + " top and "
                + Math.min(Golden.SAMPLED, golden.vocabSize()) + " other logits of " + golden.vocabSize()
                + " a token: KL and mean |d| are estimates, max |d| is a lower bound; perplexity and top-1 agreement are exact");
        if (!stored && limits.containsKey("kernel_kl")) {
            notes.add("not checked: kernel_kl; the golden file was saved with a bundle of other stored weights");
        }
        return notes;
    }
}
