package phimoe;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.InvalidPathException;
import java.nio.file.Path;
import java.nio.file.attribute.BasicFileAttributes;
import java.nio.file.attribute.FileTime;
import java.util.HashMap;
import java.util.Map;

/** Which files a bundle had when its manifest was read: an export may replace them while they are opened one by one. */
final class Snapshot {
    private final Path bundle;
    private final Map<String, Manifest.Entry> files;
    private final Map<String, State> before;

    /** What tells a file from another of the same name; `key` is null where the system has none. */
    private record State(long size, FileTime modified, Object key) {}

    Snapshot(Path bundle, Manifest manifest) {
        this.bundle = bundle;
        files = manifest.files();
        before = look();
    }

    /** Whether the files, and what manifest.json says of them, are still what they were. */
    boolean isCurrent() {
        try {
            return Manifest.read(bundle).files().equals(files) && look().equals(before);
        } catch (BundleException error) {
            return false;
        }
    }

    /** Each file's state; null where there is none. */
    private Map<String, State> look() {
        Map<String, State> states = new HashMap<>();
        for (String name : files.keySet()) {
            try {
                BasicFileAttributes file = Files.readAttributes(bundle.resolve(name), BasicFileAttributes.class);
                states.put(name, new State(file.size(), file.lastModifiedTime(), file.fileKey()));
            } catch (IOException | InvalidPathException error) {
                states.put(name, null);
            }
        }
        return states;
    }
}
