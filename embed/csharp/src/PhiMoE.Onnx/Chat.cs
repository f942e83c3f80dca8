using System.Text;

namespace PhiMoEOnnx;

/// <summary>One message of a chat.</summary>
/// <param name="Role">"system", "user" or "assistant".</param>
/// <param name="Content">Its text.</param>
public sealed record Message(string Role, string Content);

/// <summary>Chat messages to one prompt, by the manifest's chat format.</summary>
internal static class Chat
{
    /// <summary>The prompt that asks for the assistant's next answer.</summary>
    /// <exception cref="GenerationException">
    /// The bundle has no chat format, a role is none of its, or a message is null or holds null.
    /// </exception>
    public static string Render(ChatFormat? format, IEnumerable<Message> messages)
    {
        if (format == null)
        {
            throw new GenerationException("the bundle has no chat format; give the prompt as a string");
        }
        StringBuilder text = new StringBuilder();
        foreach (Message message in messages)
        {
            if (message?.Role == null || message.Content == null)
            {
                string what = message == null ? "a message" : message.Role == null ? "a message's role" : "a content";
                throw new GenerationException($"{what} is null; give each message a role and a content");
            }
            if (!format.Turns.TryGetValue(message.Role, out Turn? turn))
            {
                string roles = string.Join(", ", format.Turns.Keys.OrderBy(role => role, StringComparer.Ordinal));
                throw new GenerationException($"a message has the role {message.Role}, expected one of {roles}");
            }
            if (message.Content.Length > 0 || !format.SkippedWhenEmpty.Contains(message.Role))
            {
                text.Append(turn.Prefix).Append(message.Content).Append(turn.Suffix);
            }
        }
        return text.Append(format.Generation).ToString();
    }
}
