using System.Diagnostics;
using Xunit;

namespace PhiMoEOnnx.Tests;

/// <summary>Bundles whose files are links, as in a hub's cache, and files that are none.</summary>
public sealed class FilesTests : IDisposable
{
    private static readonly GenerationOptions Short = new GenerationOptions { MaxNewTokens = 8 };

    private readonly string _root = Directory.CreateTempSubdirectory().FullName;
    private readonly string _bundle = Conformance.CopyBundle();

    [Theory]
    [InlineData("snapshots/main")]
    [InlineData("short")] // a link to the folder, from where the links' own paths lead elsewhere
    public void LoadsABundleOfLinks(string path)
    {
        if (OperatingSystem.IsWindows())
        {
            return; // links need a right there that not everyone has
        }
        MakeCache();
        using PhiMoE whole = PhiMoE.Load(_bundle, threads: 1);
        using PhiMoE linked = PhiMoE.Load(Path.Combine(_root, path), threads: 1);
        Assert.Equal(whole.Generate("It was", Short).TokenIds, linked.Generate("It was", Short).TokenIds);
    }

    [Theory]
    [InlineData("model.onnx")]
    [InlineData("model.data")]
    [InlineData("tokenizer.json")]
    [InlineData("manifest.json")]
    public void HoldsWhatALinkLeadsToAgainstTheManifest(string file)
    {
        if (OperatingSystem.IsWindows())
        {
            return;
        }
        MakeCache();
        string target = Path.Combine(_root, "blobs", file);
        File.AppendAllText(target, "x");
        AssertRefused(Path.Combine(_root, "short"), file);
        File.Delete(target);
        AssertRefused(Path.Combine(_root, "short"), file);
    }

    [Theory]
    [InlineData("manifest.json")]
    [InlineData("tokenizer.json")]
    [InlineData("model.data")]
    public void RefusesWhatIsNoFileWithoutOpeningIt(string file)
    {
        if (OperatingSystem.IsWindows())
        {
            return;
        }
        string path = Path.Combine(_bundle, file);
        File.Delete(path);
        using (Process pipe = Process.Start("mkfifo", path)) // to open one would wait for somebody who writes
        {
            pipe.WaitForExit();
        }
        AssertRefused(_bundle, file);
        File.Delete(path);
        File.CreateSymbolicLink(path, "/dev/zero");
        AssertRefused(_bundle, file);
        File.Delete(path);
        Directory.CreateDirectory(path);
        AssertRefused(_bundle, file);
    }

    [Fact]
    public async Task LoadsOneBundleWhileAnotherTakesItsPlace()
    {
        if (OperatingSystem.IsWindows())
        {
            return; // a folder whose files are mapped cannot be moved there
        }
        string place = Path.Combine(_root, "bundle");
        string other = Path.Combine(_root, "other");
        CopyTo(place);
        CopyTo(other);
        byte[] scales = File.ReadAllBytes(Path.Combine(other, "model.scales.data"));
        Array.Reverse(scales); // so that the tokens are others
        File.WriteAllBytes(Path.Combine(other, "model.scales.data"), scales);
        Changes.List(other, "model.scales.data");
        Stopwatch loads = Stopwatch.StartNew();
        int[][] expected = { Tokens(place), Tokens(other) };
        int pause = (int)loads.ElapsedMilliseconds; // of about two loads at most, so that both ends are seen
        Assert.NotEqual(expected[0], expected[1]);
        using CancellationTokenSource enough = new CancellationTokenSource();
        Task swaps = Task.Run(() =>
        {
            for (int number = 0; !enough.IsCancellationRequested; number++)
            {
                // no bundle comes back as the same one
                File.SetLastWriteTimeUtc(Path.Combine(other, "model.data"), DateTime.UnixEpoch.AddSeconds(number));
                Directory.Move(place, place + ".old");
                Directory.Move(other, place);
                Directory.Move(place + ".old", other);
                Thread.Sleep(Random.Shared.Next(pause));
            }
        });
        (int loaded, int refused) = (0, 0);
        for (int number = 0; number < 400 && (loaded < 5 || refused < 5); number++)
        {
            try
            {
                Assert.Contains(Tokens(place), expected);
                loaded++;
            }
            catch (BundleException error)
            {
                Assert.Contains(place, error.Message);
                refused++;
            }
        }
        enough.Cancel();
        await swaps;
        Assert.True(loaded >= 5 && refused >= 5, $"{loaded} loaded, {refused} refused");
    }

    [Fact]
    public void AManifestMayBeWrittenAnewMeanwhile()
    {
        Manifest manifest = Bundle.ReadManifest(_bundle);
        IReadOnlyDictionary<string, FileState?> before = Bundle.Look(_bundle, manifest);
        Changes.Set(_bundle, "/parity", "phimoe-verify writes this");
        Assert.True(Bundle.IsAsBefore(_bundle, manifest, before));
        Changes.Set(_bundle, "/files/config.json/size", 1);
        Assert.False(Bundle.IsAsBefore(_bundle, manifest, before));
        Changes.List(_bundle, "config.json");
        Assert.True(Bundle.IsAsBefore(_bundle, manifest, before));
        File.SetLastWriteTimeUtc(Path.Combine(_bundle, "model.data"), DateTime.UnixEpoch);
        Assert.False(Bundle.IsAsBefore(_bundle, manifest, before));
    }

    public void Dispose()
    {
        Directory.Delete(_root, recursive: true);
        Directory.Delete(_bundle, recursive: true);
    }

    /// <summary>blobs with the files, snapshots/main with a link to each, and short, a link to that.</summary>
    private void MakeCache()
    {
        string blobs = Directory.CreateDirectory(Path.Combine(_root, "blobs")).FullName;
        string snapshot = Directory.CreateDirectory(Path.Combine(_root, "snapshots", "main")).FullName;
        foreach (string path in Directory.GetFiles(_bundle))
        {
            string name = Path.GetFileName(path);
            File.Copy(path, Path.Combine(blobs, name));
            File.CreateSymbolicLink(Path.Combine(snapshot, name), Path.Combine("..", "..", "blobs", name));
        }
        Directory.CreateSymbolicLink(Path.Combine(_root, "short"), snapshot);
    }

    private void CopyTo(string folder)
    {
        Directory.CreateDirectory(folder);
        foreach (string path in Directory.GetFiles(_bundle))
        {
            File.Copy(path, Path.Combine(folder, Path.GetFileName(path)));
        }
    }

    private static int[] Tokens(string bundle)
    {
        using PhiMoE model = PhiMoE.Load(bundle, threads: 1);
        return model.Generate("It was", Short).TokenIds.ToArray();
    }

    private static void AssertRefused(string bundle, string file)
    {
        Assert.Contains(file, Assert.Throws<BundleException>(() => PhiMoE.Load(bundle)).Message);
    }
}
