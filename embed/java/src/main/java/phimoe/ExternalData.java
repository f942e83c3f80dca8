package phimoe;

import java.io.IOException;
import java.nio.BufferUnderflowException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.channels.FileChannel.MapMode;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.Map;
import java.util.Set;

/**
 * Which files a graph reads its weights from, found in the graph's own bytes before ONNX Runtime opens them: it opens
 * whatever a location names, "../x" and absolute paths too.
 *
 * <p>An ONNX file is a Protocol Buffers message (https://protobuf.dev/programming-guides/encoding/) of the fields in
 * onnx.proto3. This walks those in which tensors can be, and passes over all others.
 */
final class ExternalData {
    private static final int DEEPEST = 100; // messages inside each other, as Protocol Buffers' own parsers allow
    private static final ByteBuffer LOCATION = StandardCharsets.US_ASCII.encode("location");

    /** The messages that lead to a location. */
    private enum Message { MODEL, FUNCTION, GRAPH, NODE, ATTRIBUTE, SPARSE_TENSOR, TENSOR, ENTRY }

    /** For each message the fields that lead on, by number. */
    private static final Map<Message, Map<Integer, Message>> FIELDS = Map.of(
            Message.MODEL, Map.of(7, Message.GRAPH, 25, Message.FUNCTION),
            Message.FUNCTION, Map.of(7, Message.NODE, 11, Message.ATTRIBUTE),
            Message.GRAPH, Map.of(1, Message.NODE, 5, Message.TENSOR, 15, Message.SPARSE_TENSOR),
            Message.NODE, Map.of(5, Message.ATTRIBUTE),
            Message.ATTRIBUTE, Map.of(
                    5, Message.TENSOR,
                    6, Message.GRAPH,
                    10, Message.TENSOR,
                    11, Message.GRAPH,
                    22, Message.SPARSE_TENSOR,
                    23, Message.SPARSE_TENSOR),
            Message.SPARSE_TENSOR, Map.of(1, Message.TENSOR, 2, Message.TENSOR),
            Message.TENSOR, Map.of(13, Message.ENTRY));

    private final Path graph;
    private final Set<String> files;

    private ExternalData(Path graph, Set<String> files) {
        this.graph = graph;
        this.files = files;
    }

    /**
     * Holds every location of a graph against the names of the bundle's files.
     *
     * @throws BundleException a location is none of them, or the graph is damaged
     */
    static void check(Path graph, Set<String> files) {
        try (FileChannel channel = FileChannel.open(graph)) {
            if (channel.size() > Integer.MAX_VALUE) {
                throw damaged(graph, "more than 2 GiB");
            }
            ByteBuffer model = channel.map(MapMode.READ_ONLY, 0, channel.size());
            new ExternalData(graph, files).walk(model, Message.MODEL, DEEPEST);
        } catch (BufferUnderflowException | CharacterCodingException error) {
            throw damaged(graph, "a field ends behind its message, or a name is no text");
        } catch (IOException error) {
            throw new BundleException(graph + ": cannot be read (" + error + "); copy the bundle again", error);
        }
    }

    /** Looks through one message; most hold no location, and are passed over by one search for the key's text. */
    private void walk(ByteBuffer message, Message kind, int depth) throws CharacterCodingException {
        if (!holdsLocation(message)) {
            return;
        }
        if (depth == 0) {
            throw damaged(graph, "more than " + DEEPEST + " messages inside each other");
        }
        while (message.hasRemaining()) {
            Field field = field(message);
            Message inner = FIELDS.get(kind).get(field.number);
            if (field.content != null && inner == Message.ENTRY) {
                checkEntry(field.content);
            } else if (field.content != null && inner != null) {
                walk(field.content, inner, depth - 1);
            }
        }
    }

    /** A StringStringEntryProto: 1 is the key, 2 the value, and the last one of each counts. */
    private void checkEntry(ByteBuffer entry) throws CharacterCodingException {
        String[] texts = {"", "", ""};
        while (entry.hasRemaining()) {
            Field field = field(entry);
            if (field.content != null && (field.number == 1 || field.number == 2)) {
                texts[field.number] = StandardCharsets.UTF_8.newDecoder().decode(field.content).toString();
            }
        }
        if (texts[1].equals("location") && !files.contains(texts[2])) {
            throw new BundleException(graph + ": reads weights from " + texts[2] + ", which is none of the files of "
                    + Manifest.FILE + "; export the bundle again");
        }
    }

    /** A field; `content` is null where it is a number. */
    private record Field(int number, ByteBuffer content) {}

    private Field field(ByteBuffer message) {
        long key = varint(message);
        if (key >>> 32 != 0) { // some parsers drop these bits, and would see another field than this one
            throw damaged(graph, "a field's number has more than 32 bits");
        }
        int number = (int) (key >>> 3);
        switch ((int) (key & 7)) {
            case 0 -> varint(message);
            case 1 -> message.getLong();
            case 2 -> {
                long size = varint(message);
                if (size < 0 || size > message.remaining()) {
                    throw new BufferUnderflowException();
                }
                ByteBuffer content = message.slice(message.position(), (int) size);
                message.position(message.position() + (int) size);
                return new Field(number, content);
            }
            case 5 -> message.getInt();
            default -> throw damaged(graph, "a field has the wire type " + (key & 7));
        }
        return new Field(number, null);
    }

    /** A number of seven bits a byte, the lowest first. */
    private long varint(ByteBuffer message) {
        long value = 0;
        for (int shift = 0; shift < 70; shift += 7) {
            byte next = message.get();
            value |= (next & 0x7FL) << shift;
            if (next >= 0) {
                return value;
            }
        }
        throw damaged(graph, "a number has more than ten bytes");
    }

    private static boolean holdsLocation(ByteBuffer message) {
        for (int place = 0; place <= message.limit() - LOCATION.limit(); place++) {
            if (message.get(place) == LOCATION.get(0) && message.slice(place, LOCATION.limit()).equals(LOCATION)) {
                return true;
            }
        }
        return false;
    }

    private static BundleException damaged(Path graph, String what) {
        return new BundleException(
                graph + ": is damaged, so no ONNX graph (" + what + "); copy or export the bundle again");
    }
}
