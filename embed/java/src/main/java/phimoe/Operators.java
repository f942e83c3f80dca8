package phimoe;

import com.sun.jna.Native;
import java.io.IOException;
import java.util.Set;

/** Our own operators for ONNX Runtime, docs/native.md: a library in the jar, if it lay there when the jar was built. */
final class Operators {
    /** What a graph with these operators requires. */
    static final String NAME = "phimoe.native.1";

    // a file's name says the system; os.arch is Maven's, too, see pom.xml
    private static final String FILE = System.mapLibraryName("phimoe_operators");
    private static final String ARCHITECTURE = System.getProperty("os.arch");
    private static final String RESOURCE = "/phimoe/native/" + ARCHITECTURE + "/" + FILE;

    private static String unpacked; // null before its first use

    private Operators() {}

    /** What of a graph's `requires` is here. */
    static Set<String> provided() {
        return Operators.class.getResource(RESOURCE) == null ? Set.of() : Set.of(NAME);
    }

    /** Why a graph that requires them does not run, and what to do. */
    static String missing() {
        return "the bundle needs the native operators, and phimoe has no " + FILE + " for " + ARCHITECTURE
                + "; build native and then phimoe again (docs/native.md), or export with --operators stock";
    }

    /**
     * The path of the library, which is unpacked once, for as long as the program runs.
     *
     * @throws DeviceException it cannot be written
     */
    static synchronized String library() {
        if (unpacked == null) {
            try {
                unpacked = Native.extractFromResourcePath(RESOURCE, Operators.class.getClassLoader()).getPath();
            } catch (IOException error) {
                throw new DeviceException("cannot unpack " + FILE + ": " + error.getMessage(), error);
            }
        }
        return unpacked;
    }
}
