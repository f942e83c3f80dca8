"""ONNX Runtime: sessions, the CUDA driver, errors and mapped files."""
