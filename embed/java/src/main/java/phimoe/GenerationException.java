package phimoe;

/** A prompt or an option is out of range, or the graph failed. */
public final class GenerationException extends PhiMoEException {
    private static final long serialVersionUID = 1;

    GenerationException(String message, Throwable... cause) {
        super(message, cause);
    }
}
