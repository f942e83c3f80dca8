package phimoe;

/** The installed ONNX Runtime cannot run the bundle, or not as asked. */
public final class DeviceException extends PhiMoEException {
    private static final long serialVersionUID = 1;

    DeviceException(String message, Throwable... cause) {
        super(message, cause);
    }
}
