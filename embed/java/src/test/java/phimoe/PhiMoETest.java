package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;

/** What cases.json cannot say: cancellation, threads, closing, fresh seeds. */
class PhiMoETest {
    private static final Options SHORT = Options.GREEDY.maxNewTokens(12);
    private static PhiMoE model;

    @BeforeAll
    static void load() {
        model = PhiMoE.load(Conformance.BUNDLE, 1);
    }

    @AfterAll
    static void close() {
        model.close();
    }

    private static Prompt tokens(int count) {
        return new Prompt.Tokens(IntStream.range(0, count).map(place -> 300 + place * 7 % 1000).boxed().toList());
    }

    @Test
    void aListenerSeesEveryTokenAndMayEndTheText() {
        List<Integer> seen = new ArrayList<>();
        Generation generation = model.generate(new Prompt.Text("Emma"), SHORT, piece -> seen.add(piece.tokenId()));
        assertEquals(generation.tokenIds(), seen);
        assertTrue(generation.total().compareTo(generation.firstToken()) >= 0);
        Prompt prompt = new Prompt.Text("Emma");
        assertThrows(ArithmeticException.class, () -> model.generate(prompt, SHORT, piece -> {
            throw new ArithmeticException();
        }));
        assertEquals(seen, model.generate("Emma", SHORT).tokenIds());
    }

    @Test
    void aStreamLeftEarlyIsCancelled() {
        Pieces pieces = model.stream(new Prompt.Text("Emma"), SHORT);
        pieces.next();
        pieces.close();
        assertFalse(pieces.hasNext());
        pieces.close();
    }

    @Test
    void closingCancelsARunInAnotherThread() throws Exception {
        List<Prompt> batch = IntStream.range(0, 40).mapToObj(row -> tokens(1000)).toList(); // seconds of prefill
        Pieces pieces = model.stream(batch, SHORT);
        CountDownLatch begun = new CountDownLatch(1);
        CompletableFuture<Boolean> more = CompletableFuture.supplyAsync(() -> {
            begun.countDown();
            return pieces.hasNext();
        });
        begun.await();
        pieces.close();
        assertFalse(more.get());
        assertEquals(12, model.generate("Emma", SHORT).tokenIds().size());
    }

    @Test
    void threadsDoNotDisturbEachOther() {
        List<Generation> alone = IntStream.of(3, 250, 400).mapToObj(count -> model.generate(tokens(count), SHORT)).toList();
        List<CompletableFuture<Generation>> together = IntStream.of(3, 250, 400)
                .mapToObj(count -> CompletableFuture.supplyAsync(() -> model.generate(tokens(count), SHORT))).toList();
        assertEquals(
                alone.stream().map(Generation::tokenIds).toList(), together.stream().map(each -> each.join().tokenIds()).toList());
    }

    @Test
    void withoutASeedEveryRowHasItsOwn() {
        Options hot = SHORT.temperature(100);
        List<Generation> rows = model.generate(List.<Prompt>of(tokens(5), tokens(5)), hot);
        assertNotEquals(rows.get(0).tokenIds(), rows.get(1).tokenIds());
        assertEquals(model.generate(tokens(5), hot.seed(1)).tokenIds(), model.generate(tokens(5), hot.seed(1)).tokenIds());
    }

    @Test
    void aClosedModelSaysSo() {
        PhiMoE other = PhiMoE.load(Conformance.BUNDLE);
        Pieces pieces = other.stream(new Prompt.Text("Emma"), SHORT);
        pieces.next();
        other.close();
        other.close();
        assertThrows(IllegalStateException.class, pieces::hasNext);
        pieces.close();
        assertThrows(IllegalStateException.class, () -> other.generate("Emma", SHORT));
    }

    @Test
    void aBadRoleIsNamed() {
        Prompt chat = new Prompt.Chat(List.of(new Message("tool", "a")));
        GenerationException error = assertThrows(GenerationException.class, () -> model.generate(chat, SHORT));
        assertTrue(error.getMessage().contains("role tool"));
    }

    private static void refuse(String expected, Executable call) {
        GenerationException error = assertThrows(GenerationException.class, call);
        assertTrue(error.getMessage().contains(expected), () -> expected + " in " + error.getMessage());
    }

    @Test
    void nullIsNamedWhereverItStands() {
        refuse("the prompt is null", () -> model.generate((String) null, SHORT));
        refuse("the prompt is null", () -> model.generate((Prompt) null, SHORT));
        refuse("the prompt is null", () -> model.stream(new Prompt.Chat(null), SHORT));
        refuse("the prompt is null", () -> model.stream(new Prompt.Tokens(null), SHORT));
        refuse("the prompt holds null", () -> model.generate(new Prompt.Tokens(Arrays.asList(5, null)), SHORT));
        refuse("the batch is null", () -> model.generate((List<Prompt>) null, SHORT));
        refuse("prompt 1 is null", () -> model.generate(Arrays.asList(tokens(3), null), SHORT));
        refuse("a message is null", () -> model.generate(chat((Message) null), SHORT));
        refuse("role is null", () -> model.generate(chat(new Message(null, "x")), SHORT));
        refuse("content is null", () -> model.generate(chat(new Message("user", null)), SHORT));
        refuse("stop", () -> SHORT.stop("a", null));
        assertThrows(BundleException.class, () -> PhiMoE.load(null));
    }

    private static Prompt chat(Message message) {
        return new Prompt.Chat(Collections.singletonList(message));
    }

    @Test
    void halfACharacterIsNamed() {
        for (String text : List.of("\ud800", "It was \udc00.", "\ud83d\ud83d\ude00")) {
            refuse("the prompt holds \\ud", () -> model.generate(text, SHORT));
            refuse("the prompt holds \\ud", () -> model.generate(chat(new Message("user", text)), SHORT));
            refuse("prompt 1 holds \\ud", () -> model.generate(List.of(tokens(3), new Prompt.Text(text)), SHORT));
            refuse("stop holds \\ud", () -> SHORT.stop(text));
        }
        assertEquals(12, model.generate("\ud83d\ude00\0", SHORT).tokenIds().size());
    }

    /** All of it would take a minute and gigabytes. */
    @Test
    void aPromptThatIsMuchTooLongIsRefusedByItsBeginning() {
        for (String part : List.of("x", "\ud83d\ude00", "a\ud83d\ude00")) { // the cut may lie inside a character
            refuse("of which the first 81", () -> model.generate(part.repeat(2_000_000), SHORT));
        }
    }

    @Test
    void theListsOfTheCallAreKept() {
        List<Integer> ids = new ArrayList<>(List.of(300, 307));
        List<Integer> expected = model.generate(new Prompt.Tokens(ids), SHORT).tokenIds();
        try (Pieces pieces = model.stream(new Prompt.Tokens(ids), SHORT)) {
            ids.set(0, null);
            List<Integer> found = new ArrayList<>();
            pieces.forEachRemaining(piece -> found.add(piece.tokenId()));
            assertEquals(expected, found);
        }
    }

    @Test
    void threadsAreBounded() {
        int most = Math.max(256, Runtime.getRuntime().availableProcessors());
        for (int threads : new int[] {0, -1, most + 1, 1_000_000, Integer.MIN_VALUE}) {
            DeviceException error = assertThrows(DeviceException.class, () -> PhiMoE.load(Conformance.BUNDLE, threads));
            assertTrue(error.getMessage().contains("threads is " + threads + ", expected 1 to " + most), error.getMessage());
        }
    }

    /** By default short passes have a session of their own. */
    @Test
    void threadsChangeNoToken() {
        List<Prompt> prompts = List.of(tokens(3), tokens(40), tokens(300));
        List<List<Integer>> expected = model.generate(prompts, SHORT).stream().map(Generation::tokenIds).toList();
        for (Integer threads : Arrays.asList(null, 2)) {
            try (PhiMoE other = PhiMoE.load(Conformance.BUNDLE, threads)) {
                assertEquals(expected, other.generate(prompts, SHORT).stream().map(Generation::tokenIds).toList());
            }
        }
    }

    @Test
    void logitsThatAreNotFiniteAreAnError() {
        for (float bad : new float[] {Float.NaN, Float.POSITIVE_INFINITY}) {
            float[] logits = {1, bad, 2};
            assertThrows(GenerationException.class, () -> Sampler.sample(logits, SHORT, 0, 0, Set.of()));
        }
    }
}
