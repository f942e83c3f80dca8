namespace PhiMoEOnnx;

/// <summary>
/// Base of every error thrown on purpose; the message says what was found, what was expected and what to do.
/// </summary>
public abstract class PhiMoEException : Exception
{
    private protected PhiMoEException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }
}

/// <summary>A bundle's files are missing, changed, or written by a newer version.</summary>
public sealed class BundleException : PhiMoEException
{
    internal BundleException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }
}

/// <summary>This machine or its ONNX Runtime cannot run the bundle.</summary>
public sealed class DeviceException : PhiMoEException
{
    internal DeviceException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }
}

/// <summary>
/// A prompt or an option is out of range, ONNX Runtime cannot run the graph, or its logits are not finite.
/// </summary>
public sealed class GenerationException : PhiMoEException
{
    internal GenerationException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }
}

/// <summary>A golden file is missing, damaged, or another checkpoint's.</summary>
public sealed class GoldenException : PhiMoEException
{
    internal GoldenException(string message, Exception? inner = null)
        : base(message, inner)
    {
    }
}
