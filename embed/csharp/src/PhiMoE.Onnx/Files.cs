namespace PhiMoEOnnx;

/// <summary>Opens files of a bundle. Each may be a link, as in a hub's cache, where every file is one.</summary>
internal static class Files
{
    /// <summary>The file's bytes, to be read from the beginning.</summary>
    /// <exception cref="BundleException">It is missing or cannot be read.</exception>
    public static Stream Open(string path)
    {
        try
        {
            FileInfo file = new FileInfo(path);
            // a link's length is its own; a pipe has none, and to open one could wait for ever
            return file.LinkTarget == null && file.Length == 0 ? Stream.Null : File.OpenRead(path);
        }
        catch (Exception error) when (error is FileNotFoundException or DirectoryNotFoundException)
        {
            throw new BundleException(
                $"{path}: is missing, expected a file of a bundle; copy or export the bundle again", error);
        }
        catch (Exception error) when (IsReading(error))
        {
            throw CannotRead(path, error);
        }
    }

    /// <summary>All of the file's bytes.</summary>
    /// <exception cref="BundleException">It is missing, cannot be read, or has 2 GiB or more.</exception>
    public static byte[] ReadAll(string path)
    {
        using Stream stream = Open(path);
        return Reading(path, () =>
        {
            if (stream.Length > Array.MaxLength)
            {
                throw new IOException($"it has {stream.Length} bytes, expected less than 2 GiB");
            }
            byte[] bytes = new byte[stream.Length];
            stream.ReadExactly(bytes);
            return bytes;
        });
    }

    /// <summary>What <c>read</c> makes of an opened file.</summary>
    /// <exception cref="BundleException">The system cannot read it.</exception>
    public static T Reading<T>(string path, Func<T> read)
    {
        try
        {
            return read();
        }
        catch (Exception error) when (IsReading(error))
        {
            throw CannotRead(path, error);
        }
    }

    /// <summary>Whether the system could not read; it supports no length of a device.</summary>
    private static bool IsReading(Exception error) =>
        error is IOException or UnauthorizedAccessException or NotSupportedException;

    private static BundleException CannotRead(string path, Exception error) =>
        new BundleException($"{path}: cannot be read ({error.Message}); expected a file of a bundle", error);
}

/// <summary>What the system tells of a file without opening it; of a link, of the link itself.</summary>
/// <param name="Size">Bytes.</param>
/// <param name="Written">When it was last changed.</param>
/// <param name="Link">Where a link leads; else null.</param>
internal sealed record FileState(long Size, DateTime Written, string? Link)
{
    /// <summary>The state of what is at a path; null where nothing is, or no file.</summary>
    public static FileState? Of(string path)
    {
        try
        {
            FileInfo file = new FileInfo(path);
            return new FileState(file.Length, file.LastWriteTimeUtc, file.LinkTarget);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }
}
