"""A checkpoint as a GGUF file for llama.cpp, through its own quantiser; token ids alone, without a tokenizer.

    python -m benchmarks.make_gguf CHECKPOINT FILE.gguf Q4_0

It needs llama-cpp-python and gguf beside this package's exporter. The form is one of llama.cpp's file types; matrices
get what that file type gives them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp
import torch

from benchmarks.compare_quantisers import read_tensors, write_gguf
from phimoe_onnx.config import read_config


def main() -> None:
    """Writes bf16 beside the target, quantises it and deletes it."""
    checkpoint, target, form = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = read_config(checkpoint)
    if config.longrope is not None:
        sys.exit(f"{checkpoint}: has longrope, whose factors this does not write; give a checkpoint without it")
    whole = target.with_name("bf16.gguf")
    whole.unlink(missing_ok=True)  # a run that was cut short may have left half of it
    write_gguf(whole, config, read_tensors(checkpoint, config), torch.bfloat16)
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = os.cpu_count(), getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(os.fsencode(whole), os.fsencode(partial), ctypes.byref(options)):
        sys.exit(f"llama.cpp could not quantise {whole}")
    partial.rename(target)
    whole.unlink()


if __name__ == "__main__":
    main()
