// Prints the tokens of a text, of a chat and of a stream, and an error.
using PhiMoEOnnx;

GenerationOptions options = new GenerationOptions { MaxNewTokens = 8, Stop = new[] { "." } };
using PhiMoE model = PhiMoE.Load(args[0], threads: 1);
Console.WriteLine(string.Join(" ", model.Generate("It was", options).TokenIds));
Console.WriteLine(string.Join(" ", model.Generate(new[] { new Message("user", "Hi") }, options).TokenIds));
await foreach (Piece piece in model.StreamAsync("It was", options))
{
    Console.Write($"{piece.TokenId} ");
}
Console.WriteLine();
try
{
    PhiMoE.Load(Path.Combine(args[0], "nowhere"));
}
catch (BundleException error)
{
    Console.WriteLine(error.Message);
}
