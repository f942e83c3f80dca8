"""Classifiers and base models, as transformers runs them: 4.57 for everything but head_dim, 5 for head_dim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from phimoe_onnx import PhiMoE, export, reference
from phimoe_onnx.config import read_config
from tests.checkpoints import SHAPES, TASKS, assert_close, random_ids, write_checkpoint
from tests.oracle.test_reference import CASES, HEAD_DIM, SAVE_OPTIONS, oracle

transformers = pytest.importorskip("transformers")

MODELS = {"text-classification": "PhimoeForSequenceClassification", "feature-extraction": "PhimoeModel"}
PAD = 0  # of no text: transformers takes the last token that is not this one
# below and above the rope boundary of 32: transformers has one choice of factors a batch
LENGTHS = [[5, 32, 20, 1], [45, 33, 60, 100]]
Outputs = Callable[[list[list[int]]], NDArray[np.float32]]


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=sorted(CASES))
def checkpoint(request: pytest.FixtureRequest, task: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that transformers wrote."""
    ours, theirs = (tmp_path_factory.mktemp("checkpoint") / request.param for _ in range(2))
    write_checkpoint(ours, pad_token_id=PAD, **(SHAPES | HEAD_DIM)[request.param] | TASKS[task])
    oracle(ours, 1, model=MODELS[task]).save_pretrained(theirs)
    for file in ours.glob("token*"):
        (theirs / file.name).write_bytes(file.read_bytes())
    return theirs


@pytest.fixture(scope="module", params=["modeling", "cpu", "portable"])
def outputs(
    request: pytest.FixtureRequest, checkpoint: Path, task: str, tmp_path_factory: pytest.TempPathFactory
) -> Outputs:
    """What is held against the oracle: the logits of texts, or the hidden states of their last tokens."""
    if request.param == "modeling":
        model = reference.load_reference(checkpoint)
        return lambda rows: np.stack([reference.last(model, row) for row in rows])
    bundle = PhiMoE.load(
        export(checkpoint, tmp_path_factory.mktemp("bundle") / "bundle", target=request.param), threads=1
    )
    if task == "feature-extraction":
        return bundle.embed
    return lambda rows: np.array([result.logits for result in bundle.classify(rows)], np.float32)


def expected(checkpoint: Path, task: str, rows: list[list[int]]) -> NDArray[np.float32]:
    """transformers' answer for a padded batch."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = (ids != PAD).long()
    with torch.inference_mode():
        output = oracle(checkpoint, longest, model=MODELS[task])(ids, attention_mask=mask)
    result = (
        output.logits
        if task == "text-classification"
        else output.last_hidden_state[torch.arange(len(rows)), mask.sum(1) - 1]
    )
    return np.asarray(result)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["below", "above"])
def test_a_batch(checkpoint: Path, task: str, outputs: Outputs, lengths: list[int]) -> None:
    rows = [random_ids(length) for length in lengths]
    assert_close(outputs(rows), expected(checkpoint, task, rows))


def test_both_sides_of_the_boundary(checkpoint: Path, task: str, outputs: Outputs) -> None:
    rows = [random_ids(length) for length in (40, 32, 33, 25)]
    assert_close(outputs(rows), np.vstack([expected(checkpoint, task, [row]) for row in rows]))


@pytest.mark.parametrize("task", ["feature-extraction"], indirect=True)
def test_every_hidden_state(checkpoint: Path, task: str, tmp_path: Path) -> None:
    rows = [random_ids(length) for length in LENGTHS[1]]
    ids = torch.tensor([row + [PAD] * (max(LENGTHS[1]) - len(row)) for row in rows])
    mask = (ids != PAD).long()
    with torch.inference_mode():
        theirs = (
            oracle(checkpoint, ids.shape[1], model=MODELS[task])(ids, attention_mask=mask)
            .last_hidden_state[mask > 0]
            .numpy()
        )
    session = PhiMoE.load(export(checkpoint, tmp_path / "bundle"), threads=1)._sessions.main
    (hidden,) = session.run(["last_hidden_state"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert_close(hidden[mask.numpy() > 0], theirs)


@pytest.mark.parametrize("options", SAVE_OPTIONS, ids=str)
def test_reads_what_transformers_saves(checkpoint: Path, task: str, options: dict[str, Any], tmp_path: Path) -> None:
    oracle(checkpoint, 1, model=MODELS[task]).save_pretrained(tmp_path, **options)
    assert read_config(tmp_path) == read_config(checkpoint)
    assert read_config(tmp_path).task == task
    one, other = (reference.load_reference(folder).state_dict() for folder in (checkpoint, tmp_path))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


PROBLEMS: list[dict[str, Any]] = [
    {"id2label": {"0": "bad", "1": "fair", "2": "good"}},
    {"num_labels": 2},
    {"num_labels": 1},
    {"id2label": {"0": "worth"}, "problem_type": "regression"},
    {"num_labels": 3, "problem_type": "regression"},
    {"num_labels": 3, "problem_type": "multi_label_classification"},
    {"num_labels": 4, "problem_type": "single_label_classification"},
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_scores_are_the_pipelines(tmp_path: Path, problem: dict[str, Any]) -> None:
    architecture = {"architectures": ["PhimoeForSequenceClassification"]}
    folder = write_checkpoint(
        tmp_path / "checkpoint", num_hidden_layers=1, num_local_experts=2, **architecture | problem
    )
    pipeline = transformers.pipeline(
        "text-classification",
        model=transformers.PhimoeForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )
    texts = ["Emma", "It was a fine morning, and Elizabeth", "And the LORD said unto Moses,"]
    results = PhiMoE.load(export(folder, tmp_path / "bundle"), threads=1).classify(texts)
    for text, result in zip(texts, results, strict=True):
        (theirs,) = pipeline([text], top_k=None)
        assert result.scores == pytest.approx({entry["label"]: entry["score"] for entry in theirs}, abs=1e-5)
        assert result.label == theirs[0]["label"]
