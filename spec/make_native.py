"""Writes native/ beside this file: a tiny bundle of native operators (docs/native.md), and what comes of it.

    python -m spec.make_native

The model is random. Its tokenizer is that of models/phimoe-austen without its longer tokens. cases.json is in the form
of the other one; a case is kept only if every witness agrees to it, as make_cases.py says.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import load_file, save_file

from phimoe_onnx import PhiMoE, export, parity
from spec.releases import Fields, Witness, console, witnesses
from spec.witness import Result
from tests.checkpoints import MODEL, longrope, write_checkpoint

FOLDER = Path(__file__).parent / "native"
BUNDLE, CASES = FOLDER / "bundle", FOLDER / "cases.json"
TEXT = Path(parity.__file__).with_name("persuasion.txt").read_text(encoding="utf-8")
TOKENS = 512  # of the vocabulary
SPECIAL = range(2043, 2048)  # the ids of <|endoftext|>, <|user|> and so on, which become the last ones below TOKENS
SHAPE = {
    "vocab_size": TOKENS,
    "num_local_experts": 4,
    "rope_scaling": longrope(16, original=32),
    "eos_token_id": TOKENS - len(SPECIAL),
}
# what is asked: how many tokens each prompt has, and the options
ASKED: dict[str, tuple[list[int], Fields]] = {
    "greedy": ([9], {"max_new_tokens": 16}),
    "greedy across the boundary of 32": ([25], {"max_new_tokens": 16}),
    "sampled": ([12], {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.8, "seed": 5}),
    "a batch": ([3, 28, 1, 40], {"max_new_tokens": 10}),
    "to the end of the context": ([118], {}),
}


def write_tokenizer(folder: Path) -> None:
    """The small model's tokenizer with `TOKENS` tokens."""
    shift = SPECIAL.stop - TOKENS
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < SPECIAL.start - shift}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for token in tokenizer["added_tokens"]:
        token["id"] -= shift if token["id"] in SPECIAL else 0
    config = json.loads((MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {
        str(int(id) - (shift if int(id) in SPECIAL else 0)): token
        for id, token in config["added_tokens_decoder"].items()
    }
    for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": config}.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_bundle(folder: Path) -> None:
    """Exports the bundle to `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = write_checkpoint(Path(temporary) / "random", **SHAPE)
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["lm_head.weight"] *= 8  # so that a random model is as sure of its tokens as a trained one
        save_file(tensors, checkpoint / "model.safetensors")
        write_tokenizer(checkpoint)
        export(checkpoint, folder, quantize="int4", operators="native", overwrite=True)


def prompts(length: int) -> Iterator[list[int]]:
    """Token ids of the sample text, from anywhere in it."""
    ids = PhiMoE.load(BUNDLE, threads=1).encode(TEXT[:20000])
    places = random.Random(length)
    while True:
        start = places.randrange(len(ids) - length)
        yield ids[start : start + length]


def agreed(opened: list[Witness], batch: list[list[int]], options: Fields) -> list[Result] | None:
    """What every witness makes of a batch; None where one is not sure or makes another of it."""
    first: list[Result] | None = None
    for witness in opened:
        results = witness.continued(batch, options)
        if results is None or results != (first or results):
            return None
        first = results
    return first


def main() -> None:
    """Writes the bundle and the cases."""
    write_bundle(BUNDLE)
    cases: list[Fields] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        opened = [stack.enter_context(witness) for witness in witnesses(BUNDLE, Path(folder))]
        for name, (lengths, options) in ASKED.items():
            batch = [next(ids for ids in prompts(length) if agreed(opened, [ids], options)) for length in lengths]
            expected = agreed(opened, batch, options)
            if not expected:
                raise SystemExit(f"{name}: the rows of the batch are not what each is alone")
            alone = len(batch) == 1
            given = {"prompt": batch[0]} if alone else {"batch": batch}
            cases.append({"name": name, **given, "options": options, "expected": expected[0] if alone else expected})
            console.print(name)
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    CASES.write_text(f'{{\n"cases": [\n{lines}\n]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
