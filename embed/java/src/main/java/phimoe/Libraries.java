package phimoe;

import com.sun.jna.NativeLibrary;
import com.sun.jna.Platform;
import com.sun.jna.WString;

/**
 * Turns off what the libraries underneath would write and report by themselves, before they are loaded. What a program
 * has set already stays as it is.
 */
final class Libraries {
    private static final String VARIABLE = "ORT_DISABLE_TELEMETRY";

    static {
        set("OPT_OUT_TRACKING", "true"); // DJL would report its use where it runs in Amazon's cloud
        set("slf4j.internal.verbosity", "ERROR"); // a program that logs nothing need not hear that it does not
        set("jna.tmpdir", System.getProperty("java.io.tmpdir")); // else JNA makes a folder in the home
        turnOffTelemetry();
    }

    private Libraries() {}

    /** To be called before any class of these libraries is used; the first call does it. */
    static void prepare() {}

    private static void set(String property, String value) {
        System.setProperty(property, System.getProperty(property, value));
    }

    /**
     * From 1.29 on ONNX Runtime, once it is loaded, writes a device's id and a queue of events under the home on Linux and
     * macOS. It looks at one variable of the process's own environment, which Java itself can only read.
     */
    private static void turnOffTelemetry() {
        if (!Platform.isWindows()) {
            int overwrite = 0;
            NativeLibrary.getProcess().getFunction("setenv").invokeInt(new Object[] {VARIABLE, "1", overwrite});
        } else if (System.getenv(VARIABLE) == null) {
            Object[] arguments = {new WString(VARIABLE), new WString("1")};
            NativeLibrary.getInstance("kernel32").getFunction("SetEnvironmentVariableW").invokeInt(arguments);
        }
    }
}
