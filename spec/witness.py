"""A witness of make_cases.py: what one release of ONNX Runtime makes of prompts, and with which margins.

    python -m spec.witness BUNDLE... --copies COPY...

Opens the bundles that the installed release can run and writes a line of JSON, how many. Then, for each line
{"prompts": [...], "options": {...}} that it reads, it writes one: what comes of each prompt, or null where a token
was chosen without the margin or the bundles do not agree. Copies, whose numbers are a little off, have to agree alone.

The margin is looked at in the logits of one pass over the prompt and what was generated, so a step and a pass over
many tokens, which have kernels of their own, are witnesses of each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx import DeviceError, PhiMoE
from phimoe_onnx.runtime import Generation
from phimoe_onnx.runtime.sampling import Sampling, draw, penalize, sample, uniform

GAP = 0.1  # between the chosen token's logit and the nearest other one
DISTANCE = 0.01  # of a draw's random number from where it would choose another token

Result = dict[str, Any]  # of one prompt, as a case expects it


def result(generation: Generation) -> Result:
    """What a case expects of one prompt; the pieces of a stream put together are the text."""
    return {name: getattr(generation, name) for name in ("prompt_tokens", "token_ids", "text", "finish_reason")}


def continued(model: PhiMoE, prompts: list[Any], options: dict[str, Any]) -> list[Result] | None:
    """What comes of each prompt of a batch; None where a token has no margin.

    A row's margins are looked at when it has 1, 2, 4, ... tokens, so that most of the prompts without one cost little.
    """
    names = {field.name for field in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in options.items() if name in names})
    encoded = [model.encode(prompt) for prompt in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    checked = [0] * len(prompts)
    results: list[Result] = [{} for _ in prompts]
    for piece in model.generate(prompts, stream=True, **options):
        row, count = piece.row, len(tokens[piece.row]) + 1
        tokens[row].append(piece.token_id)
        if piece.result or count & (count - 1) == 0:
            if not have_margin(model, encoded[row], tokens[row], checked[row], sampling):
                return None
            checked[row] = count
        if piece.result:
            results[row] = result(piece.result)
    return results


def have_margin(model: PhiMoE, prompt: list[int], tokens: list[int], start: int, sampling: Sampling) -> bool:
    """Whether each of the tokens behind `prompt`, from number `start` on, was chosen with the margin."""
    ids = [*prompt, *tokens]
    following = logits_after(model, ids[:-1], len(prompt) + start)
    return all(
        chosen_clearly(logits, sampling, step, set(ids[: len(prompt) + step]), tokens[step])
        for step, logits in enumerate(following, start)
    )


def logits_after(model: PhiMoE, ids: list[int], first: int) -> list[NDArray[np.float32]]:
    """The logits [V] after the first `first` of `ids`, after one more, and so on to all of them.

    Up to the rope boundary they are those of a text that ends there: a longer one is rotated otherwise in all places.
    """
    boundary = model.decoding.rope_boundary or len(ids)
    following = [*model.logits(ids[:boundary])[first - 1 :]] if first <= boundary else []
    if len(ids) > boundary:
        following += [*model.logits(ids)[max(first - 1, boundary) :]]
    return following


def chosen_clearly(
    logits: NDArray[np.float32], sampling: Sampling, step: int, seen: Collection[int], token: int
) -> bool:
    """Whether `token` is what is chosen, and would be if logits [V] and random number were a little different."""
    if sample(logits, sampling, step, seen) != token:
        return False
    logits = penalize(logits, seen, sampling.repetition_penalty)
    if np.partition(np.abs(logits - logits[token]), 1)[1] < GAP:
        return False
    if sampling.temperature == 0:
        return True
    u = uniform(sampling.seed, step)
    near = np.clip([u - DISTANCE, u + DISTANCE], 0, 1 - 2**-53)
    return {draw(logits, sampling, float(v)) for v in near} == {token}


def agreed(
    models: list[PhiMoE], copies: list[PhiMoE], prompts: list[Any], options: dict[str, Any]
) -> list[Result] | None:
    """What all models make of the prompts; None where one has no margin or one or a copy makes another of them."""
    first: list[Result] | None = None
    for model in models:
        results = continued(model, prompts, options)
        if results is None or results != (first or results):
            return None
        first = results
    agree = all([*map(result, copy.generate(prompts, **options))] == first for copy in copies)
    return first if agree else None


def load(folders: list[str]) -> list[PhiMoE]:
    """The bundles that the installed release runs, each a single graph."""
    models = []
    for folder in folders:
        with suppress(DeviceError):  # a graph for a newer release
            models.append(PhiMoE.load(folder, threads=1))
    return models


def main() -> None:
    """Answers line by line."""
    parser = argparse.ArgumentParser(description="Says what an ONNX Runtime makes of prompts; make_cases.py runs it.")
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--copies", nargs="*", default=[])
    arguments = parser.parse_args()
    models, copies = load(arguments.bundles), load(arguments.copies)
    print(json.dumps(len(models)), flush=True)
    for line in sys.stdin:
        print(json.dumps(agreed(models, copies, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
