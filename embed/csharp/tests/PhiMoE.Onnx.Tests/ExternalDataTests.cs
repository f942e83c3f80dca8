using System.Text;
using Xunit;

namespace PhiMoEOnnx.Tests;

public sealed class ExternalDataTests : IDisposable
{
    private static readonly Dictionary<string, BundleFile> Files = new Dictionary<string, BundleFile>
    {
        ["listed.data"] = new BundleFile(0, ""),
    };

    private readonly string _path = Path.GetTempFileName();

    /// <summary>The fields from a model to a tensor, by onnx.proto's numbers.</summary>
    [Theory]
    [InlineData(7, 5)] // graph.initializer
    [InlineData(7, 15, 1)] // graph.sparse_initializer.values
    [InlineData(7, 15, 2)]
    [InlineData(7, 1, 5, 5)] // graph.node.attribute.t
    [InlineData(7, 1, 5, 10)]
    [InlineData(7, 1, 5, 22, 1)]
    [InlineData(7, 1, 5, 23, 2)]
    [InlineData(7, 1, 5, 6, 5)] // graph.node.attribute.g.initializer
    [InlineData(7, 1, 5, 11, 1, 5, 6, 5)]
    [InlineData(25, 7, 5, 5)] // functions.node.attribute.t
    [InlineData(25, 11, 5)] // functions.attribute_proto.t
    public void FindsALocation(params int[] fields)
    {
        Check(Model("listed.data", fields));
        foreach (string other in new[] { "other.data", "../listed.data", "./listed.data", "/etc/hostname", "" })
        {
            string message = Assert.Throws<BundleException>(() => Check(Model(other, fields))).Message;
            Assert.Contains(_path, message);
            Assert.Contains(other, message);
        }
    }

    [Fact]
    public void LooksAtLocationsOnly()
    {
        byte[] entry = Entry("location", "x");
        Check(Join(Field(1, entry), Field(7, Field(2, entry)), Model("listed.data", 7, 5)));
        Check(Join(Number(1, ulong.MaxValue), Field(7, Field(5, Field(13, Entry("offset", "location"))))));
    }

    [Fact]
    public void FindsALocationAtAnyDepth()
    {
        int[] fields = Enumerable.Repeat(new[] { 6, 1, 5 }, 30_000).SelectMany(each => each).ToArray();
        fields = new[] { 7, 1, 5 }.Concat(fields).Append(5).ToArray();
        Assert.Contains("other.data", Assert.Throws<BundleException>(() => Check(Model("other.data", fields))).Message);
    }

    [Theory]
    [InlineData(0x7F, 1)] // no such kind of field
    [InlineData(0x0B, 1)] // a group, which ONNX has none of
    [InlineData(0x00, 1)] // number 0
    [InlineData(0x3A, 0x7F)] // longer than the file
    [InlineData(0x3A, 0xFF)] // a length that does not end
    [InlineData(0x39, 1)] // half of 8 bytes
    public void RefusesDamage(params int[] end)
    {
        byte[] bytes = Join(Model("listed.data", 7, 5), end.Select(each => (byte)each).ToArray());
        Assert.Contains(_path, Assert.Throws<BundleException>(() => Check(bytes)).Message);
    }

    [Fact]
    public void RefusesANumberOfElevenBytes()
    {
        byte[] number = Enumerable.Repeat((byte)0xFF, 10).Append((byte)0).ToArray();
        byte[] bytes = Join(Model("listed.data", 7, 5), new byte[] { 8 }, number);
        Assert.Throws<BundleException>(() => Check(bytes));
    }

    [Fact]
    public void RefusesALocationThatIsNoUtf8()
    {
        byte[] entry = Join(Field(1, Encoding.UTF8.GetBytes("location")), Field(2, new byte[] { 0xFF }));
        Assert.Throws<BundleException>(() => Check(Field(7, Field(5, Field(13, entry)))));
    }

    public void Dispose() => File.Delete(_path);

    private void Check(byte[] model)
    {
        File.WriteAllBytes(_path, model);
        ExternalData.Check(_path, Files);
    }

    /// <summary>A model with a tensor at the end of these fields, whose weights lie in a file.</summary>
    private static byte[] Model(string location, params int[] fields)
    {
        // from the inside, and each part once, for otherwise each level would copy all within it
        List<byte[]> parts = new List<byte[]> { Field(13, Entry("location", location)) };
        int length = parts[0].Length;
        foreach (int field in fields.Reverse())
        {
            parts.Add(Join(Varint((ulong)field << 3 | 2), Varint((ulong)length)));
            length += parts[parts.Count - 1].Length;
        }
        parts.Reverse();
        return Join(parts.ToArray());
    }

    private static byte[] Entry(string key, string value) =>
        Join(Field(1, Encoding.UTF8.GetBytes(key)), Field(2, Encoding.UTF8.GetBytes(value)));

    private static byte[] Field(int number, byte[] content) =>
        Join(Varint((ulong)number << 3 | 2), Varint((ulong)content.Length), content);

    private static byte[] Number(int field, ulong value) => Join(Varint((ulong)field << 3), Varint(value));

    private static byte[] Varint(ulong value)
    {
        List<byte> bytes = new List<byte>();
        for (; value >= 0x80; value >>= 7)
        {
            bytes.Add((byte)(value | 0x80));
        }
        bytes.Add((byte)value);
        return bytes.ToArray();
    }

    private static byte[] Join(params byte[][] parts) => parts.SelectMany(part => part).ToArray();
}
