package phimoe;

/** Base of every error raised on purpose; its message says what was found, what was expected and what to do. */
public abstract class PhiMoEException extends RuntimeException {
    private static final long serialVersionUID = 1;

    PhiMoEException(String message, Throwable... cause) {
        super(message, cause.length == 0 ? null : cause[0]);
    }
}
