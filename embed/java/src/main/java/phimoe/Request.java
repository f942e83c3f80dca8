package phimoe;

import java.util.List;

/** One prompt, how many tokens may follow it, and how they are chosen and ended. */
record Request(List<Integer> prompt, int maxNewTokens, Options options) {
    private static final int DEFAULT_NEW_TOKENS = 1024; // where maxNewTokens is not given

    /**
     * A request whose tokens fit a `context` of so many; `name` is the prompt's in errors.
     *
     * @throws GenerationException the prompt and the new tokens do not fit
     */
    static Request of(String name, List<Integer> prompt, Options options, int context) {
        int room = context - prompt.size();
        if (room <= 0) {
            throw new GenerationException(name + " has " + prompt.size()
                    + " tokens, which leaves no room in the context of " + context + "; shorten it");
        }
        int maxNewTokens = options.maxNewTokens() == null ? Math.min(DEFAULT_NEW_TOKENS, room) : options.maxNewTokens();
        if (maxNewTokens > room) {
            throw new GenerationException(name + " has " + prompt.size() + " tokens and maxNewTokens is " + maxNewTokens
                    + ", together more than the context of " + context + "; at most " + room + " new tokens fit");
        }
        return new Request(prompt, maxNewTokens, options);
    }
}
