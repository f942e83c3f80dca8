"""--calibrate: the walk through the layers, its folder, its text, and the bundles that are made of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from phimoe_onnx import convert, export
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.cli.export import main
from phimoe_onnx.config import parse_config, read_config
from phimoe_onnx.errors import ExportError
from phimoe_onnx.exporter import calibrate as calibration
from phimoe_onnx.exporter import calibration_text as texts
from phimoe_onnx.exporter.calibrate import calibrate
from phimoe_onnx.exporter.calibration_folder import CalibrationFolder
from phimoe_onnx.exporter.calibration_text import calibration_text, cut
from phimoe_onnx.exporter.pipeline import _name_rare_experts
from phimoe_onnx.exporter.plan import CALIBRATION_TOKENS, requirements
from phimoe_onnx.exporter.quantize.calibrated import round_calibrated
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.quantize.two_level import round_two_level
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import CPU
from phimoe_onnx.layered import Read, Text, checkpoint_weights, run
from phimoe_onnx.parity import verify as parity
from phimoe_onnx.parity.stored import stored_weights
from phimoe_onnx.parity.thresholds import Thresholds
from tests.checkpoints import BASE, MODEL, longrope, random_ids, write_checkpoint

Checkpoint = Callable[..., Path]
SAMPLE = parity.SAMPLE


def ignore(phase: str, done: int, total: int) -> None:
    """Takes a report of progress."""


def walk(
    source: Path,
    output: Path,
    report: Callable[[str, int, int], None] = ignore,
    windows: Sequence[Sequence[int]] = (random_ids(90), random_ids(40, seed=1), random_ids(17, seed=2)),
    **options: Any,
) -> tuple[CalibrationFolder, Read]:
    """A calibration without an export, and the parameters as it leaves them."""
    config = read_config(source)
    recipe = recipe_for(config, CPU, "int4", **{"operators": "native", "calibrate": True} | options)
    rows = parameters(config, read_headers(source))
    folder = CalibrationFolder(output)
    folder.begin("a plan")
    calibrate(config, recipe, rows, windows, folder, report)
    found = folder.rows(rows)

    def read(name: str, expert: int | None) -> torch.Tensor:
        parts = found[name]
        if expert is not None:
            each = len(parts) // config.num_local_experts
            parts = parts[expert * each : (expert + 1) * each]
        numbers = []
        for part in parts:
            given = part.read()
            assert given.shape == part.shape
            if given.dtype == torch.int32:
                form = recipe.form(name, expert)
                assert isinstance(form, Strips)
                (strips,) = round_calibrated(given, form, name, expert)
                given = form.unpack(strips, *given.shape)
            numbers.append(given.float())
        return torch.cat(numbers)

    return folder, read


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Kill(BaseException):
    """Nothing catches it."""


def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    source = checkpoint("experts")
    seen: list[str] = []
    whole, _ = walk(source, tmp_path / "whole", lambda phase, *_: seen.append(phase))
    steps: list[str] = []

    def kill(phase: str, done: int, total: int) -> None:
        steps.append(phase)
        if phase.startswith("calibrating: layer 3 of 3, expert 3"):
            raise Kill

    with pytest.raises(Kill):
        walk(source, tmp_path / "killed", kill)
    again: list[str] = []
    folder, _ = walk(source, tmp_path / "killed", lambda phase, *_: again.append(phase))
    assert again[0].startswith("calibrating: layer 3 of 3, attention")
    assert hashes(folder.path) == hashes(whole.path)


def test_both_streams_are_those_of_their_models(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hidden states behind the last layer: of the checkpoint, and of what is stored, each with its own routing."""
    source, windows = checkpoint("experts"), [random_ids(90), random_ids(40, seed=1)]
    for chunk in ("CHUNK", "QUERIES"):
        monkeypatch.setattr(calibration, chunk, {"CHUNK": 48, "QUERIES": 32}[chunk])

    def kill(phase: str, done: int, total: int) -> None:
        if phase.startswith("calibrating: lm_head"):
            raise Kill

    with pytest.raises(Kill):
        walk(source, tmp_path / "bundle", kill, windows)
    config, folder = read_config(source), CalibrationFolder(tmp_path / "bundle")
    states = torch.empty(2, 130, config.hidden_size)
    folder.load_states(config.num_hidden_layers, *states)
    _, stored = walk(source, tmp_path / "bundle", windows=windows)
    original = checkpoint_weights(config, parameters(config, read_headers(source)))
    for found, read in zip(states, (stored, original), strict=True):
        norm = [read(f"model.norm.{part}", None) for part in ("weight", "bias")]
        expected = torch.cat([ran.hidden[0] for ran in run(config, read, [Text(window) for window in windows])])
        normed = torch.nn.functional.layer_norm(found, (config.hidden_size,), *norm, config.rms_norm_eps)
        torch.testing.assert_close(normed, expected, rtol=0, atol=1e-4)


def test_finished_layers_of_another_plan_or_with_a_damaged_journal_count_for_nothing(
    tmp_path: Path, checkpoint: Checkpoint
) -> None:
    folder, _ = walk(checkpoint("experts"), tmp_path / "bundle")
    assert folder.finished == 4
    for plan in ("a plan", "another"):
        again = CalibrationFolder(tmp_path / "bundle")
        again.begin(plan)
        assert again.finished == (4 if plan == "a plan" else 0)
    assert [path.name for path in folder.path.iterdir()] == [".journal"]


def test_progress_says_where_it_is_and_ends_with_all_done(tmp_path: Path, checkpoint: Checkpoint) -> None:
    told: list[tuple[str, int, int]] = []
    walk(checkpoint("experts"), tmp_path / "bundle", lambda *report: told.append(report))
    phases = [phase for phase, _, _ in told]
    assert phases[0] == "calibrating: layer 1 of 3, attention"
    assert any(phase.startswith("calibrating: layer 2 of 3, expert 5 of 5, error ") for phase in phases)
    assert phases[-1].startswith("calibrating: lm_head, error ")
    done = [done for _, done, _ in told]
    assert done == sorted(done)
    h, i, v = 64, 96, 2048
    assert told[-1][1:] == (4 * (3 * (5 * 3 * h * i + 3 * h * h) + v * h),) * 2  # kv has half the heads: q, o, k + v


def test_its_outputs_are_nearer_than_those_of_rounding_without_a_text(tmp_path: Path) -> None:
    """On tokens that it has not seen, and with the checkpoint's choice of experts; one layer, as random ones behind it
    make noise of any difference.
    """
    source = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1, num_local_experts=3)
    config = read_config(source)
    original = checkpoint_weights(config, parameters(config, read_headers(source)))
    calibration = [random_ids(100, seed) for seed in range(20, 32)]
    _, calibrated = walk(source, tmp_path / "bundle", windows=calibration)

    def two_level(name: str, expert: int | None) -> torch.Tensor:
        weight = original(name, expert)
        if not name.endswith(("_proj.weight", "_proj")):
            return weight
        (strips,) = round_two_level(weight, Strips(4), name, expert)
        return Strips(4).unpack(strips, *weight.shape)

    (expected,) = run(config, original, [Text(random_ids(100, seed=99))])
    errors = []
    for read in (two_level, calibrated):
        (ran,) = run(config, read, [Text(random_ids(100, seed=99), expected.routing)])
        errors.append(float((ran.hidden - expected.hidden).square().mean()))
    assert errors[1] < 0.9 * errors[0], errors  # random weights are given almost uncorrelated inputs


def test_other_forms_and_plain_matrices(tmp_path: Path, checkpoint: Checkpoint) -> None:
    source = checkpoint("experts")
    store = {"model.layers.0.*o_proj.weight": "int8", "model.layers.1.*_proj.weight": "none", "lm_head.weight": "int8"}
    _, read = walk(source, tmp_path / "bundle", store=store)
    config = read_config(source)
    original = checkpoint_weights(config, parameters(config, read_headers(source)))
    for name, least, most in (
        ("model.layers.0.self_attn.q_proj.weight", 9, 32),  # two blocks of 16 levels
        ("model.layers.0.self_attn.o_proj.weight", 40, 64),
        ("lm_head.weight", 40, 64),
    ):
        numbers = [len(row.unique()) for row in read(name, None)]
        assert least <= sum(numbers) / len(numbers) <= max(numbers) <= most, name
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(read(name, None), original(name, None))
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert 1e-4 < (read(router, None) - original(router, None)).norm() / original(router, None).norm() < 0.3


def test_experts_that_no_token_chooses(
    tmp_path: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    folder, read = walk(checkpoint("experts"), tmp_path / "bundle", windows=[random_ids(2)])
    facts = folder.facts()
    assert len(facts) == 3 * 5
    assert sum(each.tokens for each in facts) == 3 * 2 * 2
    assert {each.shrinkage for each in facts if each.tokens < 2} == {1.0}
    assert torch.isfinite(read("model.layers.1.block_sparse_moe.experts.down_proj", 3)).all()
    with caplog.at_level(logging.WARNING):
        _name_rare_experts(facts)
    assert "experts got so few tokens of the text" in caplog.text
    assert "layer 1 expert 1 (" in caplog.text


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> dict[str, Path]:
    """A calibrated bundle for each kind of operators."""
    folder = tmp_path_factory.mktemp("calibrated")
    text = folder / "text.txt"
    text.write_text(SAMPLE.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return {
        operators: export(
            checkpoint("longrope-window"), folder / operators, quantize="int4", operators=operators, calibrate=text
        )
        for operators in ("stock", "native")
    }


def test_stock_and_native_bundles_are_one_model(bundles: dict[str, Path], checkpoint: Checkpoint) -> None:
    source = checkpoint("longrope-window")
    config = read_config(source)
    original = checkpoint_weights(config, parameters(config, read_headers(source)))
    stock, native = (stored_weights(original, each, read_manifest(each), config) for each in bundles.values())
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "block_sparse_moe.gate"):
            name = f"{prefix}{part}.weight"
            assert torch.equal(stock(name, None), native(name, None)), name
            assert not torch.equal(stock(name, None), original(name, None)), name
        for stack in ("gate_up_proj", "down_proj"):
            for expert in (0, 15):
                name = f"{prefix}block_sparse_moe.experts.{stack}"
                assert torch.equal(stock(name, expert), native(name, expert)), name
    assert torch.equal(stock("lm_head.weight", None), native("lm_head.weight", None))


def test_a_calibrated_bundle_says_so_and_agrees_with_what_it_stores(
    bundles: dict[str, Path], checkpoint: Checkpoint
) -> None:
    manifest = read_manifest(bundles["stock"])
    assert manifest.calibration is not None
    text = SAMPLE.read_text(encoding="utf-8")[:1500]
    assert manifest.calibration["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert manifest.calibration["text"] == "text.txt"
    assert 300 < manifest.calibration["tokens"] < 1500
    assert {path.name for path in bundles["stock"].parent.iterdir()} == {"stock", "native", "text.txt"}
    report = parity.verify(bundles["stock"], checkpoint("longrope-window"), tokens=150, new_tokens=2)
    assert report.bundle_to_stored is not None
    assert report.bundle_to_stored.mean_difference < 0.2


def test_one_kind_becomes_the_other_without_the_checkpoint(bundles: dict[str, Path], tmp_path: Path) -> None:
    for operators, other in (("native", "stock"), ("stock", "native")):
        folder = convert(bundles[other], tmp_path / operators, operators=operators)
        for path in bundles[operators].iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), f"{operators} {path.name}"


def test_the_widths_of_bits_are_calibrated(tmp_path: Path, checkpoint: Checkpoint) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    source = checkpoint("plain")
    folder = export(source, tmp_path / "bundle", bits=4.5, operators="native", calibrate=text)
    manifest = read_manifest(folder)
    assert manifest.calibration is not None
    assert {"int2", "int3", "int4", "int8"} >= (widths := {group.dtype for group in manifest.weights}) - {"float32"}
    assert len(widths) > 2
    report = parity.verify(folder, source, tokens=150, new_tokens=2, thresholds=Thresholds(kl=2, perplexity_ratio=2))
    assert report.bundle_to_stored is not None
    assert report.bundle_to_stored.mean_difference < 0.2


def test_the_recipe_knows_the_text(checkpoint: Checkpoint) -> None:
    source = checkpoint("plain")
    config = read_config(source)
    own = calibration_text(None, source, config)
    assert own.name == "default"
    assert own.digest() != calibration_text(SAMPLE, source, config).digest()
    assert own.digest() == calibration_text(None, source, config).digest()


def test_the_plan_counts_what_a_calibration_takes(checkpoint: Checkpoint) -> None:
    config = read_config(checkpoint("plain"))
    plain, calibrated = (
        requirements(config, recipe_for(config, CPU, "int4", calibrate=calibrate)) for calibrate in (False, True)
    )
    assert plain.calibration == 0
    assert calibrated.bundle == plain.bundle
    assert calibrated.calibration > calibrated.bundle
    assert calibrated.export_memory > plain.export_memory
    more = requirements(config, recipe_for(config, CPU, "int4", calibrate=True), 2 * CALIBRATION_TOKENS)
    assert more.calibration > calibrated.calibration


def test_the_packages_own_text_has_nothing_of_what_is_held_out() -> None:
    size = texts.DOCUMENTS.stat().st_size + texts.CHATS.stat().st_size
    assert size < 400_000
    own = " ".join((texts.DOCUMENTS.read_text(encoding="utf-8") + texts.CHATS.read_text(encoding="utf-8")).split())
    held_out = SAMPLE.read_text(encoding="utf-8").split()
    assert not [start for start in range(len(held_out) - 8) if " ".join(held_out[start : start + 9]) in own]


def test_chats_are_rendered_by_the_checkpoints_template(tmp_path: Path) -> None:
    rendered = texts._chats(MODEL)
    assert rendered[0].startswith("<|system|>")
    assert "<|end|>" in rendered[0]
    plain = texts._chats(tmp_path)  # no template
    assert plain[0].startswith("You are a helpful assistant who answers briefly.\n\nWhy is the sky blue?")
    assert len(plain) == len(rendered) == len(json.loads(texts.CHATS.read_text(encoding="utf-8")))


def test_windows_lie_on_both_sides_of_the_rope_boundary() -> None:
    config = parse_config(BASE | {"rope_scaling": longrope(16)})  # a boundary at 32 and a context of 128
    windows = cut(range(600), config)
    assert [len(window) for window in windows[:6]] == [32, 32, 32, 32, 128, 32]
    assert [token for window in windows for token in window] == list(range(600))
    plain = cut(range(600), parse_config(BASE))
    assert {len(window) for window in plain[:-1]} == {128}


def test_of_a_long_text_windows_are_spread_over_it() -> None:
    windows = cut(range(2560), parse_config(BASE), tokens=512)
    assert [window[0] for window in windows] == [0, 640, 1280, 1920]
    config = parse_config(BASE | {"rope_scaling": longrope(16)})
    for tokens in (100, 256, 300, 511):  # fewer than windows of both lengths, and more
        windows = cut(range(2560), config, tokens)
        assert tokens - 256 < sum(map(len, windows)) <= tokens
    assert [len(window) for window in cut(range(2560), config, 200)] == [32, 32, 32, 32, 72]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "int4", "--calibrate", "nothing.txt"], "nothing.txt: no such file"),
        (["--quantize", "int4", "--calibrate", "."], "is no file; expected a text in UTF-8"),
        (["--quantize", "int4", "--calibrate", "latin.txt"], "latin.txt: is not UTF-8 (byte 2 is 0xe9)"),
        (["--quantize", "int4", "--calibrate", "short.txt"], "tokens, at least 256 are"),
        (["--quantize", "int4", "--calibration-tokens", "1000"], "--calibrate reads, which is not given; add it"),
        (["--quantize", "int4", "--calibrate", "--calibration-tokens", "9"], "is 9, expected a whole number"),
        (["--calibration-tokens", "9", "--calibrate", "--plan"], "is 9, expected a whole number"),
        (["--calibrate"], "--calibrate is for weights that are rounded to integers, and none are asked for"),
        (["--quantize", "fp16", "--calibrate"], "none are asked for; use --quantize int4"),
        (["--quantize", "int4", "--rounding", "rtn", "--calibrate"], "but --rounding rtn is asked for"),
        (["--quantize", "int4", "--rounding", "calibrated"], "rounding is 'calibrated', which needs --calibrate"),
        (["--quantize", "int4", "--calibrate", "--block-size", "64"], "--block-size is 64"),
        (["--quantize", "int4", "--calibrate", "--target", "cuda"], "but with activations in float16"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(
    tmp_path: Path,
    checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9"[1:] * 400)
    Path("short.txt").write_text("Too short.", encoding="utf-8")
    assert main([str(checkpoint("plain")), "-o", "bundle", *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(os.listdir()) == ["latin.txt", "short.txt"]


@pytest.mark.parametrize("kind", ["a file", "a folder", "beside the mark", "a link"])
def test_what_no_export_made_is_left_alone(tmp_path: Path, checkpoint: Checkpoint, kind: str) -> None:
    folder, own = tmp_path / ".bundle.calibration", tmp_path / "mine.txt"
    own.write_text("mine")
    if kind == "a file":
        folder.write_text("mine")
    elif kind == "a folder":
        folder.mkdir()
        (folder / "head").write_text("mine")
    else:
        CalibrationFolder(tmp_path / "bundle").begin("a plan")
        (folder / "0.states").symlink_to(own) if kind == "a link" else (folder / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="which no export made"):
        export(checkpoint("plain"), tmp_path / "bundle", quantize="int4", calibrate=True)
    with pytest.raises(ExportError, match="which no export made"):
        CalibrationFolder(tmp_path / "bundle").begin("another plan")
    assert sorted(tmp_path.rglob("*")) == before
    assert own.read_text() == "mine"
