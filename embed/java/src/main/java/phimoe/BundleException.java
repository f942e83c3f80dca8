package phimoe;

/** A bundle's files are missing, changed, or written by a newer version. */
public final class BundleException extends PhiMoEException {
    private static final long serialVersionUID = 1;

    BundleException(String message, Throwable... cause) {
        super(message, cause);
    }
}
