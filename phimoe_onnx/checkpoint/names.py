"""What the names of a checkpoint's tensors say: who wrapped the model when it was saved, and who
changed its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from phimoe_onnx.config import quantised
from phimoe_onnx.errors import CheckpointError

# What DataParallel, torch.compile, FSDP and activation checkpointing put into a module's path, and peft before it.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PEFT = "base_model.model."
QUANTISED = (  # the first that matches a name
    (r"\.g_idx$", "GPTQ"),
    (r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\..+)$|\.SCB$", "bitsandbytes"),
    (r"\.weight_packed$", "compressed-tensors"),
    (r"\.qweight$", "AWQ or GPTQ"),
)


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Each tensor's stored name by the one that it has in a model that nobody has wrapped.

    Raises:
        CheckpointError: the weights are quantised, an adapter is not merged, or two names mean the same tensor.
    """
    stored = sorted(names)
    for pattern, method in QUANTISED:
        if found := next((name for name in stored if re.search(pattern, name)), None):
            raise CheckpointError(f"{found}: {quantised(method)}")
    if found := next((name for name in stored if re.search(r"\.lora_\w+\.|\.lora_\w+$|\.base_layer\.", name)), None):
        raise CheckpointError(
            f"{found}: is part of an adapter that is not merged; save the model after peft's merge_and_unload"
        )
    spelt: dict[str, str] = {}
    for name in stored:
        if (other := spelt.setdefault(_unwrapped(name), name)) != name:
            raise CheckpointError(f"{other} and {name} mean the same tensor; expected one of them")
    return spelt


def _unwrapped(name: str) -> str:
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return name.removeprefix(PEFT)
