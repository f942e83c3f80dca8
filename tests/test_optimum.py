"""optimum-onnx and transformers' pipeline run a portable bundle unchanged, token for token; optimum-cli writes one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import BASE, MODEL, assert_close, random_ids, write_checkpoint

optimum = pytest.importorskip("optimum.onnxruntime")
commands = pytest.importorskip("optimum.commands.optimum_cli")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

Bundle = Callable[..., Path]
TEXTS = ["It was a truth universally known that Anne", "And the LORD said unto Moses,", "a"]
BOUNDARY = 256  # the small model's original_max_position_embeddings


@pytest.fixture(scope="module", params=["none", "fp16"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's model as a bundle."""
    return export(MODEL, tmp_path_factory.mktemp("optimum") / "bundle", target="portable", quantize=request.param)


def check_alike(bundle: Path, rows: Sequence[Sequence[int]], new: int, **options: Any) -> None:
    """Asserts that `ORTModelForCausalLM.generate` continues every row as `PhiMoE.generate` does, and ends it where it
    does.
    """
    ours = PhiMoE.load(bundle, threads=1)
    theirs = optimum.ORTModelForCausalLM.from_pretrained(bundle)
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows, strict=True)])
    output = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)
    for result, tokens in zip(
        ours.generate([list(row) for row in rows], max_new_tokens=new), output[:, longest:].tolist(), strict=True
    ):
        assert tokens[: len(result.token_ids)] == result.token_ids
        assert set(tokens[len(result.token_ids) :]) <= {0}


@pytest.mark.parametrize("text", TEXTS)
def test_the_small_model_continues_texts_alike(small: Path, text: str) -> None:
    check_alike(small, [PhiMoE.load(small).encode(text)], 100)


def test_a_batch_of_different_lengths_continues_alike(small: Path) -> None:
    check_alike(small, [PhiMoE.load(small).encode(text) for text in TEXTS], 60)


@pytest.mark.parametrize("shape", ["window", "longrope", "head_dim", "heads"])
def test_random_checkpoints_continue_alike(bundle: Bundle, shape: str) -> None:
    """`window` goes far past its 9 tokens; `longrope` stays below its boundary of 32."""
    new = 20 if shape == "longrope" else 60
    check_alike(bundle(shape, "portable", "none"), [random_ids(length) for length in (1, 7, 12)], new)


def test_sequences_that_begin_beyond_the_rope_boundary_continue_alike(small: Path) -> None:
    check_alike(small, [random_ids(BOUNDARY + 1), random_ids(BOUNDARY + 40)], 40)


def test_a_sequence_that_passes_the_rope_boundary_wants_no_cache(small: Path) -> None:
    """ORTModelForCausalLM keeps the keys that were rotated by the short factors; without a cache it computes all of
    them anew.
    """
    prompt = random_ids(BOUNDARY - 5)
    check_alike(small, [prompt], 40, use_cache=False)
    with pytest.raises(AssertionError):
        check_alike(small, [prompt], 40)


def test_the_pipeline_answers_chat_messages_alike(small: Path) -> None:
    ours = PhiMoE.load(small, threads=1)
    model, tokenizer = (
        optimum.ORTModelForCausalLM.from_pretrained(small),
        transformers.AutoTokenizer.from_pretrained(small),
    )
    answer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Anne?"}]
    expected = ours.generate(messages, max_new_tokens=60)
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
    tokens = answer(messages, return_tensors=True, **options)[0]["generated_token_ids"]
    assert tokens[expected.prompt_tokens :] == expected.token_ids
    *asked, said = answer(messages, **options)[0]["generated_text"]
    assert asked == messages
    # it cuts the text behind the prompt
    assert (said["role"], said["content"].lstrip(" ")) == ("assistant", expected.text)
    # a batch of texts is padded by the tokenizer, on the left
    answers = answer(TEXTS, return_full_text=False, batch_size=3, **options)
    for text, (generated,) in zip(TEXTS, answers, strict=True):
        assert generated["generated_text"].strip(" ") == ours.generate(text, max_new_tokens=60).text.strip(" ")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_texts_are_classified_and_embedded_alike(bundle: Bundle, task: str, side: str) -> None:
    folder = bundle("longrope-window", "portable", "none", task)
    rows = [random_ids(length) for length in (45, 20, 33, 1)]  # on both sides of the rope boundary of 32
    pads = [45 - len(row) for row in rows]
    ids = [[0] * pad + row if side == "left" else row + [0] * pad for pad, row in zip(pads, rows, strict=True)]
    mask = [
        [0] * pad + [1] * len(row) if side == "left" else [1] * len(row) + [0] * pad
        for pad, row in zip(pads, rows, strict=True)
    ]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    ours = PhiMoE.load(folder, threads=1)
    if task == "text-classification":
        logits = optimum.ORTModelForSequenceClassification.from_pretrained(folder)(**inputs).logits
        assert_close(logits, [result.logits for result in ours.classify(rows)])
    else:
        hidden = optimum.ORTModelForFeatureExtraction.from_pretrained(folder)(**inputs).last_hidden_state
        last = torch.tensor([44 if side == "left" else len(row) - 1 for row in rows])
        assert_close(hidden[torch.arange(4), last], ours.embed(rows))


def optimum_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """`optimum-cli export onnx` in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "onnx", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        commands.main()
    return int(end.value.code or 0)


def test_optimum_cli_writes_the_portable_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    dtype = {"none": "fp32", "fp16": "fp16"}[read_manifest(small).quantize]
    for _ in range(2):  # an earlier output is replaced
        options = ("--task", "text-generation-with-past", "--dtype", dtype)
        assert optimum_cli(monkeypatch, "--model", MODEL, *options, tmp_path / "out") == 0
        assert describe_files(tmp_path / "out") == describe_files(small)


def test_optimum_cli_leaves_alone_what_it_did_not_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Bundle,
    bundle: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path(shutil.copytree(bundle("plain", "cpu", "none"), tmp_path / "for the CPU"))
    Path(shutil.copytree(bundle("plain", "portable", "none"), tmp_path / "with notes"))
    (tmp_path / "theirs").mkdir()
    for folder in ("theirs", "with notes"):
        (tmp_path / folder / "notes.txt").write_text("keep")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for output, words in {
        "for the CPU": "is no portable bundle",
        "theirs": "is no portable bundle",
        "link": "is no portable bundle",
        "with notes": "holds notes.txt",
    }.items():
        assert optimum_cli(monkeypatch, "--model", checkpoint("plain"), tmp_path / output) == 1
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert read_manifest(tmp_path / "for the CPU").target == "cpu"


def test_optimum_clis_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        optimum_cli(monkeypatch, "--model", checkpoint("plain"), "--task", "feature-extraction", tmp_path / "out") == 0
    )
    assert read_manifest(tmp_path / "out").task == "feature-extraction"
    classifier = checkpoint("plain", "text-classification")
    assert optimum_cli(monkeypatch, "--model", classifier, tmp_path / "classifier") == 0
    assert read_manifest(tmp_path / "classifier").task == "text-classification"
    assert optimum_cli(monkeypatch, "--model", classifier, "--task", "text-generation-with-past", tmp_path / "no") == 1
    assert "has no head for text-generation" in capsys.readouterr().err


def test_optimum_cli_takes_grin_moe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"model_type": "grinmoe", "architectures": ["GRIN-MoE"]}
    source = write_checkpoint(tmp_path / "grin", **names)
    assert optimum_cli(monkeypatch, "--model", source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == BASE | {
        "model_type": "phimoe",
        "architectures": ["PhimoeForCausalLM"],
    }
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").model_type == "phimoe"
    check_alike(tmp_path / "out", [random_ids(7)], 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "text-generation"), "task is text-generation, expected auto or text-generation-with-past"),
        (("--dtype", "bf16"), "dtype is bf16, expected fp32 or fp16"),
        (("--opset", "14"), "opset is 14, expected 18"),
        (("--optimize", "O2"), "optimize is O2, expected none"),
        (("--cache_dir", "elsewhere"), "cache_dir is elsewhere, expected "),
    ],
)
def test_optimum_cli_says_what_it_cannot_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    assert optimum_cli(monkeypatch, "--model", MODEL, *options, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"error: {words}")
    assert not (tmp_path / "out").exists()


def test_optimum_cli_leaves_other_models_to_optimum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    monkeypatch.setattr(
        sys, "argv", ["optimum-cli", "export", "onnx", "-m", str(tmp_path / "gpt2"), "--task", "fill-mask", "out"]
    )
    with pytest.raises(ValueError, match="fill-mask"):  # optimum's own error
        commands.main()


def test_an_installed_optimum_cli_finds_the_plug_in(tmp_path: Path) -> None:
    """Away from the repository, as a user runs it."""
    command = [
        Path(sys.executable).with_name("optimum-cli"),
        "export",
        "onnx",
        "--model",
        MODEL,
        "--dtype",
        "bf16",
        "out",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines()[-1].partition(";")[0]) == (
        1,
        "error: dtype is bf16, expected fp32 or fp16",
    )
