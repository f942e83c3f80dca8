"""The places of a model whose widths are chosen: a kind of matrix in a layer, and the head."""

from __future__ import annotations

from typing import NamedTuple

from phimoe_onnx.config import PhiMoEConfig
from phimoe_onnx.exporter.recipe import HEAD

EXPERTS = "block_sparse_moe.experts."
KINDS = {  # the parameters of a layer, less "model.layers.N."
    "q, k, v": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "o": ("self_attn.o_proj.weight",),
    "gate, up": (f"{EXPERTS}gate_up_proj",),
    "down": (f"{EXPERTS}down_proj",),
}
HEAD_KIND = "lm_head"


class Place(NamedTuple):
    """A kind of matrix in a layer; the head is in the layer behind the last."""

    kind: str
    layer: int

    def parameters(self) -> tuple[str, ...]:
        """Their names in modeling.py."""
        if self.kind == HEAD_KIND:
            return (HEAD,)
        return tuple(f"model.layers.{self.layer}.{name}" for name in KINDS[self.kind])


def places(config: PhiMoEConfig) -> list[Place]:
    """All of a model, in order."""
    layers = [Place(kind, layer) for layer in range(config.num_hidden_layers) for kind in KINDS]
    return [*layers, Place(HEAD_KIND, config.num_hidden_layers)]
