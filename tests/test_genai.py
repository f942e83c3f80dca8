"""onnxruntime-genai loads a bundle unchanged, and reads the same token ids and writes the same greedy tokens as
`PhiMoE`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.text.template import ChatTemplate
from tests.checkpoints import MODEL, longrope, write_checkpoint

og = pytest.importorskip("onnxruntime_genai")

Bundle = Callable[[str, str, str], Path]

TEXTS = [
    "It was a truth universally known that Anne",
    " two  spaces,\n\na tab\tand a “quotation”; café, 日本 🙂",
    "<|user|>\nWho is Mr. Darcy?<|end|>\n<|assistant|>\n",
    "a",
    "",
]


@pytest.fixture(
    scope="module", params=[("none", "none"), ("int4", "none"), ("int4", "int8")], ids=["none", "int4", "int4-kv-int8"]
)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's model as a bundle."""
    quantize, kv_cache = request.param
    folder = tmp_path_factory.mktemp("genai") / "bundle"
    return export(MODEL, folder, quantize=quantize, kv_cache=kv_cache, operators="stock")


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_the_small_model_continues_texts_alike(small: Path, text: str) -> None:
    prompt = PhiMoE.load(small).encode(text)
    check_alike(small, [prompt], 100)


def test_the_tokenizer_and_the_chat_template_read_alike(small: Path) -> None:
    ours, theirs = PhiMoE.load(small).tokenizer, og.Tokenizer(og.Model(str(small)))
    for text in TEXTS:
        assert theirs.encode(text).tolist() == ours.encode(text)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Anne?"}]
    rendered = theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert rendered == ChatTemplate(small).render(messages)


def test_a_batch_that_its_tokenizer_pads_continues_alike(small: Path) -> None:
    texts = [text for text in TEXTS if text]
    rows = [PhiMoE.load(small).encode(text) for text in texts]
    assert og.Tokenizer(og.Model(str(small))).encode_batch(texts).as_numpy().tolist() == padded(small, rows)
    check_alike(small, rows, 60)


def test_a_chat_streams_alike(small: Path) -> None:
    """The answer to messages, token for token, and its text piece by piece, each a whole character."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Anne? 日本 🙂"}]
    ours, theirs = PhiMoE.load(small), og.Model(str(small))
    tokenizer = og.Tokenizer(theirs)
    prompt = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))
    parameters = og.GeneratorParams(theirs)
    parameters.set_search_options(max_length=len(prompt) + 60)
    generator, stream = og.Generator(theirs, parameters), tokenizer.create_stream()
    generator.append_tokens(prompt)
    pieces = []
    for expected in ours.generate(messages, max_new_tokens=60, stream=True):
        generator.generate_next_token()
        (token,) = generator.get_next_tokens().tolist()
        assert token == expected.token_id
        pieces.append((stream.decode(token), expected.text))
        if expected.result:
            break
    assert generator.is_done()
    (first, ours_first), *rest = pieces
    # theirs keeps the space that a decoder strips from a text's first word
    assert first.lstrip(" ") == ours_first.lstrip(" ")
    assert all(piece == our_piece for piece, our_piece in rest)


@pytest.mark.parametrize("quantize", ["none", "int4"])
@pytest.mark.parametrize(
    ("shape", "new"), [("plain", 60), ("window", 60), ("longrope", 12), ("no-bias", 60), ("head_dim", 60)]
)
def test_random_checkpoints_continue_alike(bundle: Bundle, shape: str, new: int, quantize: str) -> None:
    """`window` goes far past its 9 tokens; `longrope` stays below its boundary of 32."""
    for length in (1, 7, 20):
        check_alike(bundle(shape, "cpu", quantize), [random_ids(length)], new)


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_a_long_text_with_plain_rope_continues_alike(tmp_path: Path, quantize: str) -> None:
    check_alike(export_random(tmp_path, quantize, max_position_embeddings=512), [random_ids(20)], 400)


@pytest.mark.parametrize("shape", ["plain", "window", "longrope"])
def test_a_batch_of_different_lengths_continues_alike(bundle: Bundle, shape: str) -> None:
    check_alike(bundle(shape, "cpu", "int4"), [random_ids(length) for length in (5, 12, 9)], 20)


@pytest.mark.parametrize("length", [4090, 4100])
def test_longrope_at_the_published_models_boundary(tmp_path: Path, length: int) -> None:
    """Past the boundary both recompute the prefix.

    onnxruntime-genai does so for `phimoe` when a single sequence gets its 4097th token, whatever the configuration says
    (`phi3_rope_threshold_` in its generators.cpp), and never in a batch. So a longrope model agrees past its boundary
    only if that is 4096, as it is in Phi-3.5-MoE, and only in a batch of one.
    """
    config = {"rope_scaling": longrope(16, 4096), "max_position_embeddings": 8192}
    check_alike(export_random(tmp_path, "none", **config), [random_ids(length)], 20)


@pytest.mark.parametrize(
    ("generation", "pad"), [({}, 2043), ({"bos_token_id": None, "pad_token_id": None}, 2043), ({"pad_token_id": 5}, 5)]
)
def test_without_a_first_token(tmp_path: Path, generation: dict[str, int | None], pad: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", bos_token_id=None, pad_token_id=None)
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    bundle = export(checkpoint, tmp_path / "bundle")
    model = json.loads((bundle / "genai_config.json").read_text())["model"]
    assert "bos_token_id" not in model
    assert model["pad_token_id"] == pad
    check_alike(bundle, [random_ids(7)], 20)


def export_random(folder: Path, quantize: str, **config: object) -> Path:
    """A random checkpoint's bundle."""
    checkpoint = write_checkpoint(folder / "checkpoint", **config)
    return export(checkpoint, folder / "bundle", quantize=quantize, operators="stock")


def random_ids(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 2000, length).tolist()


def check_alike(bundle: Path, rows: Sequence[Sequence[int]], new: int) -> None:
    """Asserts that both runtimes continue every row by the same tokens, and end it at the same one."""
    model = PhiMoE.load(bundle)
    ours = model.generate([list(row) for row in rows], max_new_tokens=new)
    theirs = genai_greedy(bundle, rows, new)
    for row, (result, tokens) in enumerate(zip(ours, theirs, strict=True)):
        ended = result.finish_reason == "eos"
        expected = result.token_ids[:-1] if ended else result.token_ids  # onnxruntime-genai leaves the end token out
        assert tokens[: len(expected)] == expected, f"row {row}"
        assert ended or len(expected) == new
        assert set(tokens[len(expected) :]) <= model.eos  # a row that ended is padded


def padded(bundle: Path, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows as onnxruntime-genai's own tokenizer pads them, on the right."""
    pad = json.loads((bundle / "genai_config.json").read_text())["model"]["pad_token_id"]
    longest = max(map(len, rows))
    return [[*row, *[pad] * (longest - len(row))] for row in rows]


def genai_greedy(bundle: Path, rows: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """The tokens that onnxruntime-genai appends to each row."""
    model = og.Model(str(bundle))
    longest = max(map(len, rows))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + new, batch_size=len(rows))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(padded(bundle, rows), np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[longest:].tolist() for row in range(len(rows))]
