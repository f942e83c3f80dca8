package phimoe;

import java.io.IOException;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.InvalidPathException;
import java.nio.file.Path;
import java.security.DigestInputStream;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.HexFormat;
import java.util.Map;

/** Whether a bundle's files are those that were exported. */
final class BundleFiles {
    private static final long HASH_LIMIT = 256 << 20; // bytes; reading 20 GB takes longer than loading them

    private BundleFiles() {}

    /**
     * Holds every file against the manifest: its size, and its hash up to 256 MiB.
     *
     * @throws BundleException a file is missing or another one
     */
    static void check(Path bundle, Map<String, Manifest.Entry> files) {
        files.forEach((name, expected) -> {
            try {
                check(bundle.resolve(name), expected);
            } catch (InvalidPathException error) { // some systems allow fewer names than others
                String reason = error.getReason();
                throw new BundleException(bundle + ": cannot hold a file " + name + " (" + reason + ")", error);
            }
        });
    }

    private static void check(Path path, Manifest.Entry expected) {
        try {
            if (!Files.isRegularFile(path)) {
                throw new BundleException(path + ": is missing; the bundle is incomplete, copy or export it again");
            }
            long size = Files.size(path);
            if (size != expected.size()) {
                throw new BundleException(
                        path + ": has " + size + " bytes, the manifest says " + expected.size()
                                + "; copy or export the bundle again");
            }
            if (size <= HASH_LIMIT && !sha256(path).equals(expected.sha256())) {
                throw new BundleException(
                        path + ": its SHA-256 is not the manifest's, so it was changed; copy or export the bundle again");
            }
        } catch (IOException error) {
            throw new BundleException(path + ": cannot be read (" + error + ")", error);
        }
    }

    private static String sha256(Path path) throws IOException {
        try (InputStream file = Files.newInputStream(path)) {
            DigestInputStream digest = new DigestInputStream(file, MessageDigest.getInstance("SHA-256"));
            byte[] block = new byte[1 << 20];
            while (digest.read(block) >= 0) {}
            return HexFormat.of().formatHex(digest.getMessageDigest().digest());
        } catch (NoSuchAlgorithmException error) {
            throw new AssertionError("every Java has SHA-256", error);
        }
    }
}
