package phimoe;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonParser;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.nio.file.attribute.FileTime;
import java.util.List;
import java.util.Random;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.stream.Stream;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.condition.DisabledOnOs;
import org.junit.jupiter.api.condition.OS;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Bundles whose files are links, as in a hub's cache, files that are none, and bundles that are replaced. */
@DisabledOnOs(value = OS.WINDOWS, disabledReason = "links need a right there, and mapped files cannot be moved")
class FilesTest {
    private static final JsonElement NOTHING = new JsonArray();
    @TempDir
    private Path folder;
    private Path bundle;

    @BeforeEach
    void copy() {
        bundle = Changes.copy(folder, NOTHING);
    }

    private static List<Integer> tokens(Path bundle) {
        try (PhiMoE model = PhiMoE.load(bundle, 1)) {
            return model.generate("It was", Options.GREEDY.maxNewTokens(8)).tokenIds();
        }
    }

    private static List<Path> files(Path folder) throws IOException {
        try (Stream<Path> files = Files.list(folder)) {
            return files.toList();
        }
    }

    /** Folders "blobs" with the files and "snapshots/main" with a link to each, and "short", a link to that. */
    private void makeCache() throws IOException {
        Path snapshot = Files.createDirectories(folder.resolve("snapshots/main"));
        for (Path file : files(bundle)) {
            Path link = snapshot.resolve(file.getFileName());
            Files.createSymbolicLink(link, Path.of("../../blobs").resolve(file.getFileName()));
        }
        Files.move(bundle, folder.resolve("blobs"));
        Files.createSymbolicLink(folder.resolve("short"), snapshot);
    }

    @Test
    void aBundleOfLinksIsOne() throws IOException {
        List<Integer> expected = tokens(bundle);
        makeCache();
        assertEquals(expected, tokens(folder.resolve("snapshots/main")));
        assertEquals(expected, tokens(folder.resolve("short"))); // from where the links' own paths lead elsewhere
    }

    @ParameterizedTest
    @ValueSource(strings = {"model.onnx", "model.data", "tokenizer.json", "manifest.json"})
    void whatALinkLeadsToIsHeldAgainstTheManifest(String file) throws IOException {
        makeCache();
        Path target = folder.resolve("blobs").resolve(file);
        Files.writeString(target, "x", StandardOpenOption.APPEND);
        refuse(folder.resolve("short"), file);
        Files.delete(target);
        refuse(folder.resolve("short"), file);
    }

    @ParameterizedTest
    @ValueSource(strings = {"manifest.json", "tokenizer.json", "model.data"})
    void whatIsNoFileIsNotOpened(String file) throws Exception {
        Path path = bundle.resolve(file);
        Files.delete(path);
        new ProcessBuilder("mkfifo", path.toString()).start().waitFor(); // to open one would wait for somebody who writes
        refuse(bundle, file);
        Files.delete(path);
        Files.createSymbolicLink(path, Path.of("/dev/zero"));
        refuse(bundle, file);
        Files.delete(path);
        Files.createDirectory(path);
        refuse(bundle, file);
    }

    private static void refuse(Path bundle, String file) {
        BundleException error = assertThrows(BundleException.class, () -> PhiMoE.load(bundle));
        assertTrue(error.getMessage().contains(file), error.getMessage());
    }

    @Test
    void aManifestMayBeWrittenAnewMeanwhile() throws IOException {
        Snapshot snapshot = new Snapshot(bundle, Manifest.read(bundle));
        change("[['set', '/parity', 'phimoe-verify writes this']]");
        assertTrue(snapshot.isCurrent());
        change("[['set', '/files/config.json/size', 1]]");
        assertFalse(snapshot.isCurrent());
        change("[['list', 'config.json']]");
        assertTrue(snapshot.isCurrent());
        Files.setLastModifiedTime(bundle.resolve("model.data"), FileTime.fromMillis(1));
        assertFalse(snapshot.isCurrent());
    }

    private void change(String changes) throws IOException {
        Changes.apply(bundle, JsonParser.parseString(changes));
    }

    /** A load gives the tokens of the one or of the other, or says that the bundle changed; never something between. */
    @Test
    void oneBundleIsLoadedWhileAnotherTakesItsPlace() throws Exception {
        Path other = Changes.copy(folder, NOTHING);
        byte[] scales = Files.readAllBytes(other.resolve("model.scales.data"));
        for (int place = 0; place < scales.length / 2; place++) { // reversed, so that the tokens are others
            byte last = scales[scales.length - 1 - place];
            scales[scales.length - 1 - place] = scales[place];
            scales[place] = last;
        }
        Files.write(other.resolve("model.scales.data"), scales);
        Changes.apply(other, JsonParser.parseString("[['list', 'model.scales.data']]"));
        long start = System.nanoTime();
        List<List<Integer>> expected = List.of(tokens(bundle), tokens(other));
        long pause = (System.nanoTime() - start) / 1_000_000; // of about two loads at most, so that both ends are seen
        assertNotEquals(expected.get(0), expected.get(1));
        AtomicBoolean enough = new AtomicBoolean();
        CompletableFuture<Void> swaps = CompletableFuture.runAsync(() -> swap(other, enough, (int) pause));
        int loaded = 0;
        int refused = 0;
        for (int number = 0; number < 400 && (loaded < 3 || refused < 3); number++) {
            try {
                assertTrue(expected.contains(tokens(bundle)));
                loaded++;
            } catch (BundleException error) {
                assertTrue(error.getMessage().contains(bundle.toString()), error.getMessage());
                refused++;
            }
        }
        enough.set(true);
        swaps.get();
        assertTrue(loaded >= 3 && refused >= 3, loaded + " loaded, " + refused + " refused");
    }

    private void swap(Path other, AtomicBoolean enough, int pause) {
        Random random = new Random(0);
        Path old = folder.resolve("old");
        try {
            for (int number = 0; !enough.get(); number++) {
                // no bundle comes back as the same one
                Files.setLastModifiedTime(other.resolve("model.data"), FileTime.fromMillis(1000L * number));
                Files.move(bundle, old);
                Files.move(other, bundle);
                Files.move(old, other);
                Thread.sleep(random.nextInt(pause));
            }
        } catch (IOException error) {
            throw new UncheckedIOException(error);
        } catch (InterruptedException error) {
            throw new AssertionError(error);
        }
    }
}
