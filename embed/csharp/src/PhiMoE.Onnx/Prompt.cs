namespace PhiMoEOnnx;

/// <summary>
/// What a model continues or answers: a text, the messages of a chat, or token ids; each converts to it by itself.
/// </summary>
public sealed class Prompt
{
    /// <summary>A text to continue.</summary>
    public Prompt(string text)
    {
        Text = text;
    }

    /// <summary>Messages to answer.</summary>
    public Prompt(IReadOnlyList<Message> messages)
    {
        Messages = messages;
    }

    /// <summary>Token ids to continue.</summary>
    public Prompt(IReadOnlyList<int> tokenIds)
    {
        TokenIds = tokenIds;
    }

    internal bool IsEmpty => string.IsNullOrEmpty(Text) && !(Messages?.Count > 0) && !(TokenIds?.Count > 0);

    internal string? Text { get; }

    internal IReadOnlyList<Message>? Messages { get; }

    internal IReadOnlyList<int>? TokenIds { get; }

    /// <summary>A text to continue.</summary>
    public static implicit operator Prompt(string text) => new Prompt(text);

    /// <summary>Messages to answer.</summary>
    public static implicit operator Prompt(Message[] messages) => new Prompt(messages);

    /// <summary>Messages to answer.</summary>
    public static implicit operator Prompt(List<Message> messages) => new Prompt(messages);

    /// <summary>Token ids to continue.</summary>
    public static implicit operator Prompt(int[] tokenIds) => new Prompt(tokenIds);
}
