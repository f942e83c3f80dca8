"""The PyTorch reference as one model, for checkpoints that fit into memory: loading it, running it, and keeping its
routing apart from everything else. layered.py gives the same numbers for those that don't.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phimoe_onnx import modeling
from phimoe_onnx.checkpoint.adapter import read_adapter
from phimoe_onnx.checkpoint.source import task_for
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import read_config
from phimoe_onnx.layered import Read, Routing, checkpoint_weights
from phimoe_onnx.modeling import (
    AnyModel,
    PhiMoEForCausalLM,
    PhiMoEForFeatureExtraction,
    PhiMoEForSequenceClassification,
    with_seams,
)

TextModel = PhiMoEForSequenceClassification | PhiMoEForFeatureExtraction


def load_reference(checkpoint: Path, task: str | None = None, adapter: Path | None = None) -> modeling.Model:
    """The checkpoint as modeling.py's model for the task, by default the one it was made for, in float32.

    Raises:
        ConfigError, CheckpointError, ExportError: as for an export.
    """
    config = read_config(checkpoint)
    task = task_for(config, task, checkpoint)
    rows = parameters(config, read_headers(checkpoint), task, None if adapter is None else read_adapter(adapter))
    with torch.device("meta"):
        model = modeling.MODELS[task](config)
    model = model.to_empty(device="cpu").eval()
    if isinstance(model, PhiMoEForCausalLM) and config.tie_word_embeddings:  # to_empty gave each its own tensor
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rope = modeling.Rope(config)
    fill(model, checkpoint_weights(config, rows))
    return model


@torch.no_grad()
def fill(model: modeling.Model, read: Read) -> None:
    """Sets all parameters of a model."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            for expert, matrix in enumerate(parameter):
                matrix.copy_(read(name, expert))
        else:
            parameter.copy_(read(name, None))


@torch.inference_mode()
def logits(model: PhiMoEForCausalLM, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """The logits after every token, float32 [S, V], in one pass."""
    result: NDArray[np.float32] = _forward(model, token_ids, model.empty_cache())[0][0].numpy()
    return result


@torch.inference_mode()
def last(model: TextModel, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """What the model says of a text's last token: a classifier's logits [labels], or the hidden state [H]."""
    output = model(torch.tensor([token_ids]), torch.ones(1, len(token_ids), dtype=torch.int64))[0]
    result: NDArray[np.float32] = (output if output.ndim == 1 else output[-1]).numpy()
    return result


@torch.inference_mode()
def greedy(model: PhiMoEForCausalLM, token_ids: Sequence[int], new: int) -> list[int]:
    """The `new` most likely tokens one by one, with the prefix recomputed where longrope changes its factors."""
    ids = list(token_ids)
    boundary = model.config.longrope.original_max_position_embeddings if model.config.longrope else None
    cache, cached = model.empty_cache(), 0
    for _ in range(new):
        if boundary is not None and len(ids) == boundary + 1:
            cache, cached = model.empty_cache(), 0
        output, cache = _forward(model, ids[cached:], cache)
        cached = len(ids)
        ids.append(int(output[0, -1].argmax()))
    return ids[len(token_ids) :]


def recorded(model: AnyModel) -> tuple[AnyModel, Routing]:
    """The model as one that notes the experts that it chooses, and the list that it adds them to, layer by layer."""
    routing: Routing = []

    def record(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
        weights, chosen = model.seams.sparse_mixer(scores, jitter)
        routing.append(chosen)
        return weights, chosen

    return with_seams(model, dataclasses.replace(model.seams, sparse_mixer=record)), routing


def replayed(model: AnyModel, routing: Routing) -> AnyModel:
    """The model as one that chooses the recorded experts, with weights from its own scores; for one pass."""
    remaining = iter(routing)

    def replay(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
        chosen = next(remaining)
        return modeling.mixer_weights(scores, chosen, jitter), chosen

    return with_seams(model, dataclasses.replace(model.seams, sparse_mixer=replay))


def _forward(
    model: PhiMoEForCausalLM, token_ids: Sequence[int], cache: list[modeling.KeyValue]
) -> tuple[Tensor, list[modeling.KeyValue]]:
    length = cache[0][0].shape[2] + len(token_ids)
    mask, rope_length = torch.ones(1, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    output: tuple[Tensor, list[modeling.KeyValue]] = model(torch.tensor([token_ids]), mask, rope_length, cache)
    return output
