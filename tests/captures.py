"""Nine tenths of so small an export are PyTorch's exporter, and tests export the same shapes hundreds of times. So what
it makes of a shape is kept in build/captures, for all processes and all environments of a checkout.

A file's name is a hash of all that a capture hangs on: where modeling.py, trace.py, config.py or a package changes, it
is made anew. tests/test_conformance.py holds that a bundle is the same with this and without.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from phimoe_onnx import config as configs
from phimoe_onnx import modeling
from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter import trace

FOLDER = Path(__file__).parent.parent / "build" / "captures"
capture = trace.capture


def keep_captures() -> None:
    """In this process, from now on."""
    trace.capture = kept


def kept(config: PhiMoEConfig, dtype: ir.DataType, task: str) -> ir.Model:
    """As `capture`, from the file of this shape, which is made where there is none."""
    path = FOLDER / f"{_key(config, dtype, task)}.onnx"
    if not path.exists():
        model = capture(config, dtype, task)
        for name, value in model.graph.initializers.items():  # numbers in no file, which nobody reads
            value.const_value = ir.ExternalTensor("none", None, None, value.dtype, shape=value.shape, name=name)
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # another process may be making the same
            ir.save(model, Path(folder, "model.onnx"))
            os.replace(Path(folder, "model.onnx"), path)
    return ir.load(path)


def _key(config: PhiMoEConfig, dtype: ir.DataType, task: str) -> str:
    # what no graph shows, or a number that `trace` sets; of the labels it shows how many, of the context the window
    unseen = {"family": "", "task": None, "problem_type": None, "fp8_block": (1, 1), "rope_theta": 0.0}
    unseen |= {"bos_token_id": None, "pad_token_id": None, "eos_token_id": (), "max_position_embeddings": 0}
    rope = config.longrope and dataclasses.replace(config.longrope, short_factor=(), long_factor=())
    labels = ("",) * len(config.labels)
    seen = dataclasses.replace(config, longrope=rope, sliding_window=config.window, labels=labels, **unseen)
    digest = hashlib.sha256(repr((seen, dtype, task)).encode())
    for module in (modeling, trace, configs):
        digest.update(Path(str(module.__file__)).read_bytes())
    for package in ("torch", "onnx", "onnx-ir", "onnxscript"):
        digest.update(version(package).encode())
    return digest.hexdigest()[:32]
