package phimoe;

import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;
import java.util.Random;
import java.util.Set;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Where a graph's external data may lie. */
class ExternalDataTest {
    private static final Set<String> FILES = Set.of("model.data");
    @TempDir
    private Path folder;

    /** A field that holds a message or a string. */
    private static byte[] field(int number, byte[]... contents) {
        ByteArrayOutputStream message = new ByteArrayOutputStream();
        varint(message, number << 3 | 2);
        varint(message, Arrays.stream(contents).mapToInt(content -> content.length).sum());
        Arrays.stream(contents).forEach(message::writeBytes);
        return message.toByteArray();
    }

    private static void varint(ByteArrayOutputStream message, int value) {
        for (; value >= 0x80; value >>>= 7) {
            message.write(value & 0x7F | 0x80);
        }
        message.write(value);
    }

    private static byte[] tensor(int field, String location) {
        return field(field, field(8, text("name")), field(13, field(1, text("location")), field(2, text(location))),
                field(13, field(1, text("offset")), field(2, text("../4"))));
    }

    private static byte[] text(String value) {
        return value.getBytes(StandardCharsets.UTF_8);
    }

    private void check(byte[] model) throws IOException {
        ExternalData.check(Files.write(folder.resolve("model.onnx"), model), FILES);
    }

    private BundleException refuse(byte[] model) {
        BundleException error = assertThrows(BundleException.class, () -> check(model));
        assertTrue(error.getMessage().contains("model.onnx"), error.getMessage());
        return error;
    }

    @ParameterizedTest
    @ValueSource(strings = {"../model.data", "/etc/hosts", "other.data", "", "model.data\0", "sub/model.data", "./a"})
    void aLocationThatIsNotListedIsRefusedWhereverATensorCanBe(String location) {
        byte[][] models = {
            field(7, tensor(5, location)), // an initializer
            field(7, field(15, tensor(1, location))), // a sparse one's values
            field(7, field(15, tensor(2, location))), // and indices
            field(7, field(1, field(5, tensor(5, location)))), // a constant
            field(7, field(1, field(5, tensor(10, location)))),
            field(7, field(1, field(5, field(22, tensor(1, location))))),
            field(7, field(1, field(5, field(23, tensor(2, location))))),
            field(7, field(1, field(5, field(6, tensor(5, location))))), // in a subgraph
            field(7, field(1, field(5, field(11, field(1, field(5, field(6, tensor(5, location)))))))),
            field(25, field(7, field(5, tensor(5, location)))), // in a function
            field(25, field(11, tensor(5, location))), // a default of its attributes
        };
        for (byte[] model : models) {
            assertTrue(refuse(model).getMessage().contains("reads weights from " + location));
        }
    }

    @Test
    void listedLocationsAreAllowed() {
        assertDoesNotThrow(() -> check(field(7, tensor(5, "model.data"), field(1, field(5, tensor(5, "model.data"))))));
    }

    @Test
    void damageIsNamed() {
        byte[] model = field(7, tensor(5, "model.data"));
        refuse(Arrays.copyOf(model, model.length - 1));
        byte[] deep = tensor(5, "model.data");
        for (int level = 0; level < 200; level++) {
            deep = field(1, field(5, field(6, deep)));
        }
        refuse(field(7, deep));
        byte[] notText = field(7, tensor(5, "model.data"));
        notText[notText.length - 20] = (byte) 0xFF;
        refuse(notText);
    }

    /** Protocol Buffers' C++ parser drops the bits of a tag beyond 32, and would see field 7 here. */
    @Test
    void aTagOfMoreThan32BitsHidesNothing() throws IOException {
        byte[] graph = field(7, tensor(5, "/etc/hosts"));
        ByteArrayOutputStream model = new ByteArrayOutputStream();
        model.writeBytes(new byte[] {(byte) (graph[0] | 0x80), (byte) 0x80, (byte) 0x80, (byte) 0x80, 0x10});
        model.write(graph, 1, graph.length - 1);
        refuse(model.toByteArray());
    }

    /** Bytes changed at random in a real graph: no other exception than a BundleException. */
    @Test
    void noDamageIsAnotherError() throws IOException {
        byte[] original = Files.readAllBytes(Conformance.BUNDLE.resolve("model.onnx"));
        Set<String> files = Set.of("model.data", "model.scales.data");
        for (int seed = 0; seed < 2000; seed++) {
            Random random = new Random(seed);
            byte[] changed = original.clone();
            for (int count = random.nextInt(4); count >= 0; count--) {
                changed[random.nextInt(changed.length)] = (byte) random.nextInt(256);
            }
            Path model = Files.write(folder.resolve("model.onnx"), changed);
            try {
                ExternalData.check(model, files);
            } catch (BundleException error) {
                assertTrue(error.getMessage().contains("model.onnx"));
            }
        }
    }
}
