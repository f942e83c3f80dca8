package phimoe;

/** A golden file is missing, damaged, or another checkpoint's. */
public final class GoldenException extends PhiMoEException {
    private static final long serialVersionUID = 1;

    GoldenException(String message, Throwable... cause) {
        super(message, cause);
    }
}
