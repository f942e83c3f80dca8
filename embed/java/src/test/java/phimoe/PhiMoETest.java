package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.stream.IntStream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;

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

    @Test
    void logitsThatAreNotFiniteAreAnError() {
        for (float bad : new float[] {Float.NaN, Float.POSITIVE_INFINITY}) {
            float[] logits = {1, bad, 2};
            assertThrows(GenerationException.class, () -> Sampler.sample(logits, SHORT, 0, 0, Set.of()));
        }
    }
}
