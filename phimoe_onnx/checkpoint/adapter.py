"""LoRA adapters, as peft writes them."""

from __future__ import annotations

from pathlib import Path

from phimoe_onnx.errors import CheckpointError
from phimoe_onnx.files import read_json

CONFIG = "adapter_config.json"


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError where an adapter lies in a checkpoint's folder: nobody can tell which model is meant."""
    if not (folder / CONFIG).exists():
        return
    if (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder / CONFIG}: an adapter lies beside the weights; merge it (peft's merge_and_unload) and save the "
            f"model, or move the adapter away to export the model without it"
        )
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    raise CheckpointError(
        f"{folder}: is an adapter{of} and no model; merge it (peft's merge_and_unload), save the model and give that"
    )
