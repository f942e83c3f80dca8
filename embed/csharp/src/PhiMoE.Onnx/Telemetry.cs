using System.Runtime.InteropServices;

namespace PhiMoEOnnx;

/// <summary>Keeps ONNX Runtime from writing about this machine.</summary>
/// <remarks>
/// From 1.29 on its library, once it is loaded, writes a device's id and a queue of events under the user's home on
/// Linux and macOS. It looks at one variable of the process's own environment as it is loaded, and at nothing later.
/// </remarks>
internal static class Telemetry
{
    private const string Variable = "ORT_DISABLE_TELEMETRY";

    /// <summary>
    /// Turns it off for this process, before ONNX Runtime is loaded; a variable that is set already stays as it is.
    /// </summary>
    public static void TurnOff()
    {
        if (OperatingSystem.IsWindows())
        {
            Environment.SetEnvironmentVariable(Variable, Environment.GetEnvironmentVariable(Variable) ?? "1");
        }
        else
        {
            // .NET's own call changes a copy of the environment that native libraries do not see
            _ = SetVariable(Variable, "1", overwrite: 0);
        }
    }

    [DllImport("libc", EntryPoint = "setenv")]
    private static extern int SetVariable(
        [MarshalAs(UnmanagedType.LPUTF8Str)] string name,
        [MarshalAs(UnmanagedType.LPUTF8Str)] string value,
        int overwrite);
}
