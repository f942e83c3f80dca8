"""Classifiers and embeddings: their graphs against PyTorch, what the runtime makes of them, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from phimoe_onnx import (
    BundleError,
    CheckpointError,
    ExportError,
    GenerationError,
    PhiMoE,
    PhiMoEError,
    export,
    reference,
    verify,
)
from phimoe_onnx.bundle import Classes, describe_files, read_manifest
from phimoe_onnx.cli import chat as cli_chat
from phimoe_onnx.cli import classify as cli_classify
from phimoe_onnx.cli import export as cli_export
from phimoe_onnx.cli import generate as cli_generate
from phimoe_onnx.cli import verify as cli_verify
from phimoe_onnx.parity.stored import stored_as, stored_model
from phimoe_onnx.parity.texts import cut_texts
from phimoe_onnx.runtime.classification import classify
from phimoe_onnx.runtime.texts import BATCH_TOKENS, batches
from tests.checkpoints import BASE, SHAPES, TASKS, assert_close, make_model, open_graph, random_ids, write_checkpoint

Make = Callable[..., Path]
CLASSIFY, EMBED = "text-classification", "feature-extraction"
# on both sides of the rope boundary of 32, past both windows
ROWS = [random_ids(length) for length in (45, 3, 32, 33, 1, 60)]
TEXTS = ["Emma", "It was a fine morning, and Elizabeth", "And the LORD said unto Moses,", "a"]


def padded(rows: Sequence[list[int]], side: str = "right") -> dict[str, NDArray[np.int64]]:
    """The inputs of a graph, or of a model in modeling.py."""
    longest = max(map(len, rows))

    def pad(row: list[int], filler: int) -> list[int]:
        padding = [filler] * (longest - len(row))
        return row + padding if side == "right" else padding + row

    return {
        "input_ids": np.array([pad(row, 7) for row in rows]),
        "attention_mask": np.array([pad([1] * len(row), 0) for row in rows]),
    }


def assert_rows_close(got: NDArray[np.float32], model: Any, rows: Sequence[list[int]] = ROWS) -> None:
    """Holds a graph's logits, or its hidden states at every token, to what PyTorch gives for each row alone."""
    assert got.dtype == np.float32
    with torch.inference_mode():
        alone = [model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))[0].numpy() for row in rows]
    assert_close(
        np.vstack([row[: len(part)] if part.ndim == 2 else row for row, part in zip(got, alone, strict=True)]),
        np.vstack(alone),
    )


@pytest.mark.parametrize("shape", ["longrope", "window"])
def test_the_models_are_the_body_and_a_head_on_the_last_token(shape: str) -> None:
    body, classifier = (make_model(BASE | SHAPES[shape] | TASKS[task]) for task in (EMBED, CLASSIFY))
    classifier.model.load_state_dict(body.model.state_dict())
    generator = make_model(BASE | SHAPES[shape] | {"lm_head_bias": False})
    generator.model.load_state_dict(body.model.state_dict())
    for row in ROWS:
        with torch.inference_mode():
            hidden = body(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))[0]
            assert_close(reference.last(classifier, row), (hidden[-1] @ classifier.score.weight.T).numpy())
            assert_close((hidden @ generator.lm_head.weight.T).numpy(), reference.logits(generator, row))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", ["longrope-window", "plain"])
def test_a_padded_batch_gives_each_row_what_it_gets_alone(shape: str, side: str) -> None:
    model = make_model(BASE | SHAPES[shape] | TASKS[CLASSIFY])
    with torch.inference_mode():
        logits = model(**{name: torch.tensor(value) for name, value in padded(ROWS, side).items()})
    assert_rows_close(logits.numpy(), model)


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("task", [CLASSIFY, EMBED])
@pytest.mark.parametrize("shape", ["plain", "longrope", "window", "longrope-window", "heads", "head_dim", "tied"])
def test_float32_is_pytorch(bundle: Make, shape: str, task: str, target: str) -> None:
    """Rows on both sides of the rope boundary in one batch, each by its own factors."""
    session = open_graph(bundle(shape, target, "none", task) / "model.onnx")
    assert_rows_close(session.run(None, padded(ROWS))[0], make_model(BASE | SHAPES[shape] | TASKS[task]))


@pytest.mark.parametrize(
    ("quantize", "graph"), [("int4", "model.onnx"), ("int4", "model.branches.onnx"), ("int8", "model.branches.onnx")]
)
@pytest.mark.parametrize("task", [CLASSIFY, EMBED])
def test_quantized_graphs_are_pytorch_over_the_stored_weights(
    checkpoint: Make, bundle: Make, bundle_at_level_0: Make, task: str, quantize: str, graph: str
) -> None:
    original = bundle("longrope-window", "cpu", quantize, task)
    model = stored_model(
        reference.load_reference(checkpoint("longrope-window", task)), original, read_manifest(original)
    )
    session = open_graph(bundle_at_level_0("longrope-window", quantize, graph, task) / graph)
    assert_rows_close(session.run(None, padded(ROWS))[0], model)


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("task", [CLASSIFY, EMBED])
def test_fp16_weights_are_pytorch_over_the_rounded_weights(
    checkpoint: Make, bundle: Make, task: str, target: str
) -> None:
    folder = bundle("longrope", target, "fp16", task)
    model = stored_model(reference.load_reference(checkpoint("longrope", task)), folder, read_manifest(folder))
    assert_rows_close(open_graph(folder / "model.onnx").run(None, padded(ROWS))[0], model)


@pytest.mark.parametrize(("quantize", "bound"), [("none", 1e-2), ("int8", 0.1), ("int4", 0.1)])
@pytest.mark.parametrize("shape", ["tiles", "tiles-xqa"])
def test_cuda_graphs_on_the_cpu(checkpoint: Make, bundle: Make, shape: str, quantize: str, bound: float) -> None:
    """As near as float16 is, and for int8 and int4 activations rounded to int8; but where that moved a choice of
    experts.
    """
    folder = bundle(shape, "cuda", quantize, EMBED)
    model = stored_model(reference.load_reference(checkpoint(shape, EMBED)), folder, read_manifest(folder))
    hidden = open_graph(folder / "model.onnx").run(None, padded(ROWS))[0]
    assert hidden.dtype == np.float32
    with torch.inference_mode():
        expected = [model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.int64))[0].numpy() for row in ROWS]
    difference = (
        np.vstack([row[: len(part)] - part for row, part in zip(hidden, expected, strict=True)])
        / np.vstack(expected).std()
    )
    assert np.median(np.abs(difference).max(axis=1)) <= bound


@pytest.mark.parametrize("target", ["cpu", "portable", "cuda"])
@pytest.mark.parametrize("task", [CLASSIFY, EMBED])
def test_the_graph_and_the_manifest_keep_the_contract(bundle: Make, task: str, target: str) -> None:
    folder = bundle("longrope", target, "none", task)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    kinds = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}
    values = {
        value.name: (
            kinds[value.type.tensor_type.elem_type],
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    output = {"logits": ["batch", 3]} if task == CLASSIFY else {"last_hidden_state": ["batch", "sequence", 64]}
    inputs = {name: ("int64", ["batch", "sequence"]) for name in ("input_ids", "attention_mask")}
    assert values == inputs | {name: ("float32", shape) for name, shape in output.items()}
    manifest = read_manifest(folder)
    assert (manifest.task, manifest.chat) == (task, None)
    assert manifest.classes == (Classes(("bad", "fair", "good"), "softmax") if task == CLASSIFY else None)
    stored = stored_as(manifest)
    assert "lm_head.weight" not in stored
    assert [stored[name].dtype for name in stored if "score" in name] == (["float32"] if task == CLASSIFY else [])
    assert not (folder / "genai_config.json").exists()


@pytest.mark.parametrize("shape", ["longrope", "window"])
def test_attention_without_a_cache(bundle: Make, shape: str) -> None:
    """The presents, which nothing reads, keep the operator's memory linear in the length; rows turn by positions of
    their own.
    """
    operators = list(ir.load(bundle(shape, "cpu", "none", CLASSIFY) / "model.onnx").graph)
    attention = [node for node in operators if node.op_type == "GroupQueryAttention"]
    assert len(attention) == 2
    for node in attention:
        assert node.inputs[3] is node.inputs[4] is None
        assert all(output.name for output in node.outputs[:3])
        assert node.attributes["do_rotary"].as_int() == (shape == "window")
    assert sum(node.op_type == "RotaryEmbedding" for node in operators) == (0 if shape == "window" else 2)


@pytest.mark.parametrize("writer", ["hub", "fused"])
def test_a_base_model_and_the_body_of_another_are_the_same_bundle(tmp_path: Path, writer: str) -> None:
    """AutoModel writes the body's tensors without `model.`; the others have a head that is left out."""
    generator = write_checkpoint(tmp_path / "generator", writer, num_local_experts=2, num_hidden_layers=1)
    tensors = load_file(generator / "model.safetensors")
    body = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}
    others = {
        "base": ({name.removeprefix("model."): tensor for name, tensor in body.items()}, "PhiMoEModel"),
        "classifier": (body | {"score.weight": torch.zeros(2, 64)}, "PhiMoEForSequenceClassification"),
    }
    for name, (stored, architecture) in others.items():
        shutil.copytree(generator, tmp_path / name)
        save_file(stored, tmp_path / name / "model.safetensors")
        config = json.loads((generator / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    bundles = [export(tmp_path / name, tmp_path / f"{name}-bundle", task=EMBED) for name in ("generator", *others)]
    first, *rest = ([(folder / name).read_bytes() for name in ("model.onnx", "model.data")] for folder in bundles)
    assert rest == [first, first]


def test_what_a_checkpoint_cannot_serve(tmp_path: Path, checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cases = [
        ("text-generation", CLASSIFY, "was made for text-generation and has no head for text-classification"),
        (
            CLASSIFY,
            "text-generation",
            "has no head for text-generation; use --task text-classification or feature-extraction",
        ),
        (
            EMBED,
            "text-generation",
            "was made for feature-extraction and has no head for text-generation; use --task feature-extraction",
        ),
        (EMBED, CLASSIFY, "has no head for text-classification; use --task feature-extraction"),
        (
            EMBED,
            "summarization",
            "task is 'summarization', expected one of text-generation, text-classification, feature-extraction",
        ),
    ]
    for made_for, task, message in cases:
        with pytest.raises(ExportError) as error:
            export(checkpoint("plain", made_for), task=task)
        assert message in str(error.value)
    with pytest.raises(ExportError, match="--task feature-extraction has no --kv-cache int8"):
        export(checkpoint("plain", EMBED), kv_cache="int8")
    nameless = write_checkpoint(tmp_path / "nameless", architectures=None)
    with pytest.raises(CheckpointError, match=r"lacks the tensor score\.weight"):
        export(nameless, task=CLASSIFY)
    labels = {"id2label": {"0": "no", "1": "yes"}}
    config = json.loads((checkpoint("plain", CLASSIFY) / "config.json").read_text()) | labels
    (nameless / "config.json").write_text(json.dumps(config))
    (nameless / "model.safetensors").write_bytes((checkpoint("plain", CLASSIFY) / "model.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"score\.weight has the shape \[3, 64\], config\.json makes it \[2, 64\]"
    ):
        export(nameless)
    assert [path.name for path in tmp_path.iterdir()] == ["nameless"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [("softmax", [0.0, 1 / 3, 2 / 3]), ("sigmoid", [0.0, 1 / 2, 2 / 3]), ("none", [-1000.0, 0.0, np.log(2)])],
)
def test_scores_of_logits(function: str, expected: list[float]) -> None:
    logits = np.array([-1000, 0, np.log(2)], np.float32)
    result = classify(logits, Classes(("bad", "fair", "good"), function))
    assert (result.label, result.score) == ("good", result.scores["good"])
    assert list(result.scores) == ["bad", "fair", "good"]
    np.testing.assert_allclose(list(result.scores.values()), expected, atol=1e-7)
    assert result.logits == tuple(logits.tolist())


@pytest.mark.parametrize(("target", "quantize"), [("cpu", "none"), ("cpu", "int4"), ("portable", "fp16")])
def test_classify(bundle: Make, target: str, quantize: str) -> None:
    model = PhiMoE.load(bundle("longrope-window", target, quantize, CLASSIFY), threads=1)
    together, alone = model.classify(TEXTS), [model.classify(text) for text in TEXTS]
    assert [result.label for result in together] == [result.label for result in alone]
    if quantize != "int4":  # whose sums run in another order for one token than for many, and are then rounded
        np.testing.assert_allclose([r.logits for r in together], [r.logits for r in alone], atol=1e-5)
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    assert model.classify(ids) == together
    assert model.classify(ids[0]) == alone[0]
    assert model.classify([]) == []
    conversation = [{"role": "user", "content": "Who is Emma?"}]
    assert model.classify([conversation]) == [model.classify(conversation)]


def test_embed(bundle: Make, checkpoint: Make) -> None:
    model = PhiMoE.load(bundle("longrope-window", "cpu", "none", EMBED), threads=1)
    exact = reference.load_reference(checkpoint("longrope-window", EMBED))
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    together = model.embed(TEXTS)
    assert (together.shape, together.dtype) == ((4, 64), np.float32)
    assert_close(together, np.stack([reference.last(exact, text) for text in ids]))
    assert np.array_equal(model.embed(ids), together)
    assert model.embed(TEXTS[0]).shape == (64,)
    assert_close(model.embed(TEXTS[0]), together[0])
    assert model.embed([]).shape == (0, 64)


def test_bad_texts(bundle: Make) -> None:
    model = PhiMoE.load(bundle("longrope-window", "cpu", "none", EMBED), threads=1)
    with pytest.raises(GenerationError, match=r"text 1 has 129 tokens, expected 1 to 128 \(the context\)"):
        model.embed([[5] * 128, [5] * 129])
    with pytest.raises(GenerationError, match="the text has 200 tokens"):
        model.embed([5] * 200)
    for text in ("", ["a", ""], [[]]):
        with pytest.raises(GenerationError, match="is empty"):
            model.embed(text)
    with pytest.raises(GenerationError, match="text 0 holds 2048"):
        model.embed([[5, 2048]])


def test_methods_of_another_task_are_refused(bundle: Make, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = bundle("longrope-window", "cpu", "none", CLASSIFY)
    methods = {"text-generation": ["generate", "chat", "score", "logits"], CLASSIFY: ["classify"], EMBED: ["embed"]}
    for task in methods:
        model = PhiMoE.load(bundle("longrope-window", "cpu", "none", task), threads=1)
        for other in methods.keys() - {task}:
            for name in methods[other]:
                with pytest.raises(
                    BundleError, match=rf"^{name}\(\) needs a bundle for {other}, this one is for {task}$"
                ):
                    getattr(model, name)("Emma")
    for command, arguments in ((cli_generate, [str(classifier), "Emma"]), (cli_chat, [str(classifier)])):
        assert command.main(arguments) == 1
        assert (
            capsys.readouterr().err.count("needs a bundle for text-generation, this one is for text-classification\n")
            == 1
        )


@pytest.mark.parametrize("damage", [{"classes": None}, {"classes": {"labels": ["a"]}}, {"task": "summarization"}])
def test_a_manifest_without_its_classes(tmp_path: Path, bundle: Make, damage: dict[str, object]) -> None:
    manifest = json.loads((bundle("plain", "cpu", "none", CLASSIFY) / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | damage))
    with pytest.raises(BundleError, match=r"is damaged|is of a bundle for summarization, expected one for"):
        PhiMoE.load(tmp_path)


@given(st.lists(st.integers(1, 2 * BATCH_TOKENS), max_size=60))
def test_batches(lengths: list[int]) -> None:
    made = list(batches(lengths))
    assert sorted(number for batch in made for number in batch) == list(range(len(lengths)))
    for batch in made:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or len(batch) * longest <= BATCH_TOKENS
        assert longest <= 2 * min(lengths[number] for number in batch)
        assert longest == lengths[batch[-1]]


@pytest.mark.parametrize("length", [2, 17, 200, 600])
def test_the_texts_of_verify(length: int) -> None:
    config = make_model(BASE | TASKS[CLASSIFY]).config
    texts = list(cut_texts(range(length), config))
    joined = [token for text in texts for token in text]
    assert joined == list(range(min(length, length // 2 + 128)))
    assert len(texts[-1]) == min(length - length // 2, 128)
    assert {len(text) for text in texts[:-2]} <= {8, 16, 32, 64, 128}


@pytest.mark.parametrize(
    ("task", "quantize"), [(CLASSIFY, "none"), (EMBED, "none"), (EMBED, "fp16"), (CLASSIFY, "int4")]
)
def test_verify(checkpoint: Make, bundle: Make, task: str, quantize: str) -> None:
    folder = bundle("longrope-window", "cpu", quantize, task)
    report = verify(folder, checkpoint("longrope-window", task), tokens=300)
    assert (report.task, report.perplexity, report.greedy) == (task, {}, {})
    assert report.bundle_to_reference.tokens == len(report.windows) >= 5
    if quantize == "none":
        assert report.failures == []
        assert 0 < report.bundle_to_reference.mean_difference <= 1e-5
    if quantize == "fp16":
        assert report.bundle_to_stored is not None
        assert report.bundle_to_stored.mean_difference <= 1e-5
    assert (report.bundle_to_reference.kl is None) == (task == EMBED)


def test_verify_fails_a_doctored_bundle(tmp_path: Path, checkpoint: Make) -> None:
    other = write_checkpoint(tmp_path / "longrope-window", seed=1, **SHAPES["longrope-window"] | TASKS[EMBED])
    folder = export(other, tmp_path / "bundle")
    report = verify(folder, checkpoint("longrope-window", EMBED), tokens=60)
    assert [failure.split()[0] for failure in report.failures] == ["mean_difference", "max_difference"]
    with pytest.raises(PhiMoEError, match=r"config\.json is not that of"):
        verify(folder, checkpoint("longrope-window", CLASSIFY))


def test_the_commands(tmp_path: Path, checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bundle"
    assert cli_export.main([str(checkpoint("plain")), "-o", str(folder), "--task", EMBED]) == 0
    assert read_manifest(folder).task == EMBED
    assert cli_verify.main([str(folder), "--reference", str(checkpoint("plain")), "--tokens", "60"]) == 0
    parity = read_manifest(folder).parity
    assert parity is not None
    assert parity["passed"] is True
    capsys.readouterr()
    assert (
        cli_verify.main([str(folder), "--reference", str(checkpoint("plain")), "--tokens", "60", "--max-kl", "1"]) == 1
    )
    assert "there is no kl to check of a bundle for feature-extraction" in capsys.readouterr().err
    assert cli_export.main([str(checkpoint("plain", CLASSIFY)), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "score 0.0 M" in printed
    assert "lm_head" not in printed


def test_phimoe_classify(bundle: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bundle("longrope-window", "cpu", "none", CLASSIFY)
    results = PhiMoE.load(folder).classify(TEXTS)
    expected = [f"{result.label}\t{result.score:.4f}\t{text}" for text, result in zip(TEXTS, results, strict=True)]
    assert cli_classify.main([str(folder), *TEXTS]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS) + "\n"))
    assert cli_classify.main([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == expected


def test_phimoe_classify_takes_lines_as_they_are(
    bundle: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bundle("longrope-window", "cpu", "none", CLASSIFY)
    model = PhiMoE.load(folder)
    lines = ["a", "", "  ", "a\x0cb", ""]
    row = {text: f"{(found := model.classify(text)).label}\t{found.score:.4f}\t{text}" for text in lines if text}
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert cli_classify.main([str(folder)]) == 0
    output, errors = capsys.readouterr()
    assert output.split("\n") == [*(row.get(text, "\t\t") for text in lines), ""]
    assert [line.split(" is ")[0] for line in errors.splitlines()] == ["note: text 2", "note: text 5"]

    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))  # whose tokenizer begins every text with a token
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    begin = tokenizer.id_to_token(1)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", pair="$A $B", special_tokens=[(begin, 1)]
    )
    (copy / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    dataclasses.replace(read_manifest(copy), files=describe_files(copy)).write(copy)
    alone = PhiMoE.load(copy).classify([1])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert cli_classify.main([str(copy)]) == 0
    assert capsys.readouterr() == (f"{alone.label}\t{alone.score:.4f}\t\n", "")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli_classify.main([str(copy)]) == 0
    assert capsys.readouterr() == ("", "")
