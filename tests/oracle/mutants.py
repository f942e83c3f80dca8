"""Accepted mutants of checkpoints against transformers 4.57: the same ids, prompts, logits and refusals."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from phimoe_onnx import reference
from phimoe_onnx.bundle import Manifest
from phimoe_onnx.errors import CheckpointError, PhiMoEError
from phimoe_onnx.text.template import ChatTemplate
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.mutants.exports import Exports
from tests.mutants.inputs import CONVERSATION, PROMPT
from tests.mutants.mutator import Mutator

TEXTS = [
    "a stop",
    "",
    "  the  top\n\n\N{SLIGHTLY SMILING FACE} é",
    "<|user|>\na<|end|>\n<|assistant|>\n",
    "a<new> b <s>c </s>x , 's n't .",
]
USER = CONVERSATION[1]
TOOL = {"type": "function", "function": {"name": "<add>", "parameters": {"type": "object"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    CONVERSATION,
    [*CONVERSATION, {"role": "assistant", "content": " b "}, USER],
]
# what transformers 4.57 refuses and we take on purpose: other spellings of the model's name, a boundary that stands
# beside rope_scaling, and what a safetensors file says of its writer
STRICTER = ("does not recognize this architecture", "original_max_position_embeddings", "File metadata is not")
ENDLESS = re.compile(r"10\s*\*\*")  # which transformers would go on with for hours


class Oracle:
    """A campaign: `run` exports a mutant, and holds what is accepted against transformers."""

    def __init__(self, folder: Path) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.disable(logging.WARNING)
        self._exports = Exports(folder, judge)

    def run(self, mutator: Mutator, folder: Path) -> tuple[str, PhiMoEError | None]:
        """As `Exports.run`."""
        return self._exports.run(mutator, folder)


def judge(file: str, checkpoint: Path, adapter: Path | None, bundle: Path, manifest: Manifest) -> None:
    """Raises AssertionError where transformers gives something else, or refuses what we took."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = theirs(lambda: transformers.AutoTokenizer.from_pretrained(checkpoint))
        if oracle is not None:
            _compare_ids(oracle, bundle, manifest)
            _compare_prompts(oracle, bundle)
        if adapter is None and ("config" in file or "safetensors" in file):
            _compare_logits(checkpoint, bundle)


def theirs(call: Any) -> Any:
    """What transformers gives, None where it is stricter than we mean to be.

    Raises:
        AssertionError: it refuses.
    """
    try:
        return call()
    except Exception as error:
        if any(reason in str(error) for reason in STRICTER):
            return None
        raise AssertionError(f"transformers refuses it: {type(error).__name__}: {str(error)[:200]}") from None


def _compare_ids(oracle: Any, bundle: Path, manifest: Manifest) -> None:
    decoding = manifest.decoding
    ours = Tokenizer(bundle, decoding.hidden_tokens.values(), decoding.clean_up_tokenization_spaces)
    for text in TEXTS:
        ids = theirs(lambda text=text: oracle(text).input_ids)
        assert ours.encode(text) == ids, f"ids of {text!r}: {ours.encode(text)}, transformers has {ids}"
        plain = oracle(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=False) == plain, f"ids of {text!r} alone"
        found, expected = ours.decode(ids), oracle.decode(ids, skip_special_tokens=True)
        assert found == expected or _hides_bytes(oracle), f"text of {ids}: {found!r}, transformers has {expected!r}"


def _hides_bytes(oracle: Any) -> bool:
    """transformers skips bytes that are marked as special tokens, and with them newlines and emoji; we do not."""
    return any(token.special and token.content == "<0x0A>" for token in oracle.added_tokens_decoder.values())


def _compare_prompts(oracle: Any, bundle: Path) -> None:
    ours = ChatTemplate(bundle)
    if ENDLESS.search(json.dumps(oracle.chat_template)):
        return
    for messages in CONVERSATIONS:
        for tools in (None, [TOOL]):
            options = {"tools": tools, "add_generation_prompt": True, "tokenize": False}
            try:
                expected = oracle.apply_chat_template(messages, **options)
                expected.encode()
            except Exception as error:
                expected = error
            try:
                found = ours.render(messages, tools)
            except PhiMoEError as error:
                assert isinstance(expected, Exception), f"refused: {error}; transformers has {expected!r:.200}"
            else:
                assert not isinstance(expected, Exception), f"{found!r:.200}; transformers refuses it: {expected}"
                found, expected = (re.sub("0x[0-9a-f]+", "", text) for text in (found, expected))  # of an object
                assert found == expected, f"prompt {found!r:.200}, transformers has {expected!r:.200}"


def _compare_logits(checkpoint: Path, bundle: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    if raw.get("head_dim") is not None:  # transformers 4.57 knows none
        return
    raw = json.loads((bundle / "config.json").read_text())
    config = theirs(lambda: transformers.PhimoeConfig(**raw))
    model = theirs(
        lambda: transformers.PhimoeForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    )
    if model is None:
        return
    with torch.inference_mode():
        expected = theirs(lambda: model.eval()(torch.tensor([PROMPT])).logits[0].numpy())
    if expected is None:
        return
    try:
        found = reference.logits(reference.load_reference(checkpoint), PROMPT)
    except CheckpointError as error:  # an export says so when it comes to these weights
        if "not finite" in str(error):
            return
        raise
    apart = np.abs(found - expected).max()
    if np.isfinite(expected).all():
        assert apart <= 1e-3 * max(1, np.abs(expected).max()), f"logits {apart} apart"
