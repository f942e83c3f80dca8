"""`optimum-cli export onnx --model CHECKPOINT --task text-generation-with-past OUT` for a PhiMoE: writes its portable
bundle.

optimum's own way is to trace transformers' model. It has none for PhiMoE, and its trace would fix one choice of rope
factors and of experts. So its command is asked first whether the model is a PhiMoE, and is left as it is for every
other. The bundle's files are those that optimum expects of a model, and its graph is one that ORTModelForCausalLM runs,
or ORTModelForSequenceClassification or ORTModelForFeatureExtraction.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from phimoe_onnx.config import family_of

# optimum's names of tasks, and ours
TASKS = {
    "auto": None,
    "text-generation-with-past": "text-generation",
    "causal-lm-with-past": "text-generation",
    "text-classification": "text-classification",
    "feature-extraction": "feature-extraction",
}

# optimum-cli's options that would change what is written, with the values that can be had here; the first is the
# default
OPTIONS: dict[str, tuple[Any, ...]] = {
    "task": tuple(TASKS),
    "dtype": (None, "fp32", "fp16"),
    "opset": (None, 18),
    "optimize": (None,),
    "slim": (False,),
    "monolith": (False,),
    "no_dynamic_axes": (False,),
    "variant": ("default",),
    "model_kwargs": (None,),
}


def register() -> None:
    """Puts PhiMoE in front of optimum's command; where this optimum has no such command, says so if it is asked for."""
    try:
        from optimum.commands.export.onnx import ONNXExportCommand

        otherwise = ONNXExportCommand.run
    except (ImportError, AttributeError) as error:
        if "onnx" in sys.argv:
            print(
                f"note: this release of optimum cannot export a PhiMoE ({error}); use phimoe-export --target portable",
                file=sys.stderr,
            )
        return

    def run(command: Any) -> None:
        if family_of(_model_type(command.args)) is not None:
            sys.exit(_export(command.args))
        otherwise(command)

    ONNXExportCommand.run = run


def _model_type(arguments: argparse.Namespace) -> object:
    """As config.json says, in a folder or on the hub; None where it cannot be read, which optimum then reports in its
    own way.
    """
    try:
        from transformers import PretrainedConfig

        config, _ = PretrainedConfig.get_config_dict(arguments.model, cache_dir=arguments.cache_dir)
    except Exception:
        return None
    return config.get("model_type")


def _export(arguments: argparse.Namespace) -> int:
    """The export as phimoe-export does it; returns the exit code."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from phimoe_onnx.cli import export

    for name, values in (OPTIONS | {"cache_dir": (HF_HUB_CACHE,)}).items():
        if (given := getattr(arguments, name, values[0])) not in values:
            expected = " or ".join(str(value) for value in values if value is not None)
            print(
                f"error: {name} is {given}, expected {expected or 'none'}; phimoe-onnx exports this model",
                file=sys.stderr,
            )
            return 1
    quantize = "fp16" if getattr(arguments, "dtype", None) == "fp16" else "none"
    options = ["--target", "portable", "--quantize", quantize]
    if os.path.lexists(arguments.output):
        if not _is_portable(Path(arguments.output)):
            print(
                f"error: {arguments.output}: exists, and is no portable bundle, the only thing that is replaced here; "
                "name another output",
                file=sys.stderr,
            )
            return 1
        options.append("--overwrite")
    if task := TASKS[getattr(arguments, "task", "auto")]:
        options += ["--task", task]
    return export.main([arguments.model, "--output", str(arguments.output), *options])


def _is_portable(output: Path) -> bool:
    """Whether this is a bundle as this command writes them; the export looks closer before it replaces one."""
    from phimoe_onnx.bundle import read_manifest
    from phimoe_onnx.errors import BundleError

    try:
        return not read_manifest(output).decoding.cache.shared
    except BundleError:
        return False
