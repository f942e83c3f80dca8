"""Mutated bundles, hashes and sizes repaired, loaded and run: refused in words of ours, or the tokens are right."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer as Library

from phimoe_onnx import PhiMoE
from phimoe_onnx.errors import PhiMoEError
from tests.mutants.inputs import CONVERSATION, NEW_TOKENS, PROMPT, bundles
from tests.mutants.mutator import Mutator

STEPS = {
    "read_manifest": "manifest",
    "check_files": "files",
    "Tokenizer": "tokenizer",
    "ChatTemplate": "template",
    "open_sessions": "graph",
    "load": "load",
    "generate": "run",
    "logits": "run",
}
DEPTHS = ("read", "manifest", "files", "tokenizer", "template", "graph", "run", "accepted")
FILES = [
    *["manifest.json"] * 6,
    *["tokenizer.json"] * 4,
    *["tokenizer_config.json"] * 2,
    *["chat template"] * 4,
    "special_tokens_map.json",
    *["model.onnx"] * 5,
    *["*.data"] * 3,
]
UNREPAIRED = 0.1  # of the mutants keep their hashes, and are refused for that


class Loads:
    """A campaign: `run` changes one file of a bundle, makes the manifest agree, loads it and runs it."""

    def __init__(self, folder: Path) -> None:
        self._bundle = bundles(folder) / "generate"
        model = PhiMoE.load(self._bundle, threads=1)
        self._tokens = model.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids
        self._chat = model.generate(CONVERSATION, max_new_tokens=NEW_TOKENS).token_ids
        self._text = model.generate("a stop", max_new_tokens=NEW_TOKENS).token_ids

    def run(self, mutator: Mutator, folder: Path) -> tuple[str, PhiMoEError | None]:
        """How deep the mutant got, and what it was refused with.

        Raises:
            Exception: any is a fault.
        """
        bundle = folder / "bundle"
        shutil.copytree(self._bundle, bundle)
        file = _change(mutator, bundle)
        repaired = (
            mutator.pick.random() > UNREPAIRED or file == "manifest.json" or _same(bundle / file, self._bundle / file)
        )
        if repaired and file != "manifest.json":
            _repair(bundle, file)
        try:
            model = PhiMoE.load(bundle, threads=1)
            assert repaired or file not in json.loads((bundle / "manifest.json").read_text())["files"], "not refused"
            self._check(model, bundle, file)
        except PhiMoEError as error:
            _check_error(error, self._bundle)
            return _depth(error), error
        return "accepted", None

    def _check(self, model: PhiMoE, bundle: Path, file: str) -> None:
        """The tokens are those of the bundle before, or for other graphs and weights those of a loop over them."""
        found = model.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids
        if file in ("model.onnx", "model.branches.onnx") or file.endswith(".data"):
            expected, logits = _loop(bundle, model, len(found))
            if not np.isfinite(logits).all() or np.abs(logits).max() > 1e6:  # each kernel has its own way to overflow
                return
            assert found == expected, f"{found}, a loop over the graph gives {expected}"
            scored = model.logits(PROMPT)
            if found:
                np.testing.assert_allclose(scored, logits, rtol=1e-3, atol=1e-3 * max(1, np.abs(scored).max()))
            return
        decoding = model.decoding
        whole = len(found) == len(self._tokens) or found[: len(self._tokens)] == self._tokens
        ended = file == "manifest.json" and len(found) < len(self._tokens)  # by its eos_token_ids or context
        assert found == self._tokens[: len(found)], "other tokens"
        assert whole or (ended and (set(self._tokens) & set(decoding.eos_token_ids) or decoding.context < 99))
        library = Library.from_file(str(bundle / "tokenizer.json"))
        library.no_truncation()
        library.no_padding()
        try:
            text = model.generate("a stop", max_new_tokens=NEW_TOKENS)
        except PhiMoEError as error:
            _check_error(error, self._bundle)
        else:
            assert model.encode("a stop") == list(library.encode("a stop").ids)
            if file not in ("tokenizer.json", "manifest.json"):
                assert text.token_ids == self._text
        try:
            chat = model.generate(CONVERSATION, max_new_tokens=NEW_TOKENS).token_ids
        except PhiMoEError as error:
            _check_error(error, self._bundle)
        else:
            assert all(0 <= id < decoding.vocab_size for id in chat)


def _change(mutator: Mutator, bundle: Path) -> str:
    """Changes a file; its name."""
    pick = mutator.pick
    file = pick.choice(FILES)
    if file == "chat template":
        file = pick.choice(("chat_template.jinja", "chat_template.tool_use.jinja", "tokenizer_config.json"))
        config = json.loads((bundle / "tokenizer_config.json").read_text())
        template = mutator.text(config["chat_template"])
        if file == "tokenizer_config.json":
            (bundle / file).write_text(json.dumps(config | {"chat_template": template}))
        else:
            (bundle / file).write_bytes(template.encode("utf-8", "surrogatepass"))
    else:
        path = pick.choice(sorted(bundle.glob(file)))
        file = path.name
        mutator.said.append(f"{file}:")
        if pick.random() < 0.04:
            _replace(mutator, path)
        elif file.endswith(".json"):
            path.write_bytes(mutator.json_file(path.read_text()))
        elif file.endswith(".onnx"):
            path.write_bytes(mutator.graph(path.read_bytes()))
        else:
            path.write_bytes(mutator.raw(path.read_bytes()))
    return file


def _replace(mutator: Mutator, path: Path) -> None:
    """Puts something in a file's place."""
    other = mutator.pick.choice(sorted(path.parent.iterdir()))
    path_bytes = other.read_bytes()
    what = mutator.pick.choice(("nothing", "folder", "pipe", "loop", "another", "empty"))
    mutator.said.append(f"{what} in its place ({other.name})")
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "another":
        path.write_bytes(path_bytes)
    elif what == "empty":
        path.touch()


def _repair(bundle: Path, file: str) -> None:
    path = bundle / file
    if path.is_symlink() or not path.is_file():
        return
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"][file] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def _depth(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    names = [
        Path(frame.filename).stem.title() if frame.name == "__init__" and "/text/" in frame.filename else frame.name
        for frame in frames
    ]
    names = ["ChatTemplate" if name == "Template" else name for name in names]
    return next((STEPS[name] for name in reversed(names) if name in STEPS), "read")


def _same(path: Path, other: Path) -> bool:
    return path.is_file() and other.exists() and path.read_bytes() == other.read_bytes()


def _check_error(error: PhiMoEError, bundle: Path) -> None:
    """A message names a file or what was asked for, and is no wall of text."""
    text = str(error)
    others = (".onnx", "/bundle/", "chat template", "the prompt", "the bundle's graph", "the graph's logits")
    named = any(name in text for name in (*others, *(path.name for path in bundle.iterdir())))
    assert named, f"names nothing: {text}"
    assert len(text) < 1200, f"{len(text)} characters: {text[:300]} ..."


def _loop(bundle: Path, model: PhiMoE, count: int) -> tuple[list[int], NDArray[np.float32]]:
    """Greedy tokens behind PROMPT and the prompt's logits [n, V], by ONNX Runtime alone and without shared buffers."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
    cache = model.decoding.cache
    nothing = np.zeros((1, cache.num_key_value_heads, 0, cache.head_dim), np.float32)
    past: dict[str, Any] = {each.name: nothing for each in session.get_inputs() if each.name.startswith("past")}
    names = [each.name for each in session.get_outputs()]
    ids, found, first = PROMPT, [], np.empty((0, 0), np.float32)
    for step in range(count):
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(PROMPT) + step), np.int64)}
        results = dict(zip(names, session.run(names, feeds | past), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        first = results["logits"][0] if step == 0 else first
        found.append(int(results["logits"][0, -1].argmax()))
        ids = found[-1:]
    return found, first
