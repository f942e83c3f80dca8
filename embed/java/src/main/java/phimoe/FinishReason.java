package phimoe;

/** Why a text ended. */
public enum FinishReason {
    /** At an end token of the model. */
    EOS,
    /** At a stop string. */
    STOP,
    /** At {@link Options#maxNewTokens}. */
    LENGTH
}
