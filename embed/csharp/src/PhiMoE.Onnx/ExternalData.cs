using System.Text;

namespace PhiMoEOnnx;

/// <summary>Where an ONNX file says that its weights lie.</summary>
/// <remarks>
/// ONNX Runtime opens whatever a location names, "../x" and absolute paths too, so they are looked at before it does.
/// Of protobuf's encoding (protobuf.dev/programming-guides/encoding) this reads what leads to them, by the field
/// numbers of onnx.proto.
/// </remarks>
internal static class ExternalData
{
    private static readonly Encoding Utf8 =
        new UTF8Encoding(encoderShouldEmitUTF8Identifier: false, throwOnInvalidBytes: true);

    private enum Message
    {
        Other,
        Model,
        Graph,
        Function,
        Node,
        Attribute,
        SparseTensor,
        Tensor,
        Entry, // StringStringEntryProto of TensorProto.external_data
    }

    /// <summary>Holds the locations of the file at <c>path</c> against the bundle's <c>files</c>.</summary>
    /// <exception cref="BundleException">Weights lie in another file, or the file is no ONNX file.</exception>
    public static void Check(string path, IReadOnlyDictionary<string, BundleFile> files)
    {
        try
        {
            string? other = Locations(Files.ReadAll(path)).FirstOrDefault(location => !files.ContainsKey(location));
            if (other != null)
            {
                throw new BundleException(
                    $"{path}: has weights in {other}, which is none of the files in manifest.json; "
                    + "copy or export the bundle again");
            }
        }
        catch (Exception error) when (error is InvalidDataException || error is DecoderFallbackException)
        {
            throw new BundleException(
                $"{path}: is no ONNX file, or damaged ({error.Message}); copy or export the bundle again", error);
        }
    }

    /// <summary>
    /// Every location in a model: of its initializers, of its nodes' attributes, and of subgraphs and functions.
    /// </summary>
    private static IEnumerable<string> Locations(byte[] model)
    {
        if (model.AsSpan().IndexOf("location"u8) < 0)
        {
            yield break; // whether it is an ONNX file is then ONNX Runtime's to say
        }
        // a stack of its own, for a file may nest its messages deeper than a thread's stack
        Stack<(Message Message, int Start, int End)> open = new Stack<(Message, int, int)>();
        open.Push((Message.Model, 0, model.Length));
        while (open.TryPop(out (Message Message, int Start, int End) next))
        {
            string? key = null;
            string? value = null;
            int place = next.Start;
            while (place < next.End)
            {
                (int field, int start, int end) = ReadField(model, ref place, next.End);
                if (next.Message == Message.Entry)
                {
                    key = field == 1 ? Utf8.GetString(model, start, end - start) : key;
                    value = field == 2 ? Utf8.GetString(model, start, end - start) : value;
                }
                else if (Inside(next.Message, field) is var message and not Message.Other)
                {
                    open.Push((message, start, end));
                }
            }
            if (key == "location")
            {
                yield return value ?? "";
            }
        }
    }

    /// <summary>The message in a field of a message; Other where it leads to no tensor.</summary>
    private static Message Inside(Message message, int field) => (message, field) switch
    {
        (Message.Model, 7) => Message.Graph,
        (Message.Model, 25) => Message.Function,
        (Message.Graph, 1) => Message.Node,
        (Message.Graph, 5) => Message.Tensor, // initializer
        (Message.Graph, 15) => Message.SparseTensor, // sparse_initializer
        (Message.Function, 7) => Message.Node,
        (Message.Function, 11) => Message.Attribute, // attribute_proto: defaults
        (Message.Node, 5) => Message.Attribute,
        (Message.Attribute, 5 or 10) => Message.Tensor, // t, tensors
        (Message.Attribute, 6 or 11) => Message.Graph, // g, graphs
        (Message.Attribute, 22 or 23) => Message.SparseTensor, // sparse_tensor, sparse_tensors
        (Message.SparseTensor, 1 or 2) => Message.Tensor, // values, indices
        (Message.Tensor, 13) => Message.Entry, // external_data
        _ => Message.Other,
    };

    /// <summary>
    /// The next field's number, and where its bytes lie if it is one with a length; else its number is 0.
    /// </summary>
    private static (int Field, int Start, int End) ReadField(byte[] bytes, ref int place, int end)
    {
        ulong tag = ReadVarint(bytes, ref place, end);
        if (tag > uint.MaxValue || tag >> 3 == 0)
        {
            throw new InvalidDataException($"a field at byte {place} has no number");
        }
        ulong length;
        switch (tag & 7)
        {
            case 0:
                ReadVarint(bytes, ref place, end);
                return default;
            case 1:
                length = 8;
                break;
            case 2:
                length = ReadVarint(bytes, ref place, end);
                break;
            case 5:
                length = 4;
                break;
            default:
                throw new InvalidDataException($"a field at byte {place} is of no kind that ONNX has");
        }
        if (length > (ulong)(end - place))
        {
            throw new InvalidDataException($"a field at byte {place} ends after what it lies in");
        }
        int start = place;
        place += (int)length;
        return (tag & 7) == 2 ? ((int)(tag >> 3), start, place) : default;
    }

    private static ulong ReadVarint(byte[] bytes, ref int place, int end)
    {
        ulong value = 0;
        for (int shift = 0; shift < 64 && place < end; shift += 7)
        {
            byte next = bytes[place++];
            if (shift == 63 && next > 1)
            {
                break;
            }
            value |= (ulong)(next & 0x7F) << shift;
            if (next < 0x80)
            {
                return value;
            }
        }
        throw new InvalidDataException($"a number at byte {place} does not end");
    }
}
