"""Checkpoint to bundle: needs torch, onnx-ir and onnxscript."""
