"""verify() passes good bundles, fails doctored ones by the right names, and writes down what it measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest

from phimoe_onnx import export, reference, verify
from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.cli.verify import main
from phimoe_onnx.config import parse_config
from phimoe_onnx.errors import BundleError, PhiMoEError
from phimoe_onnx.parity.comparison import Comparison, log_softmax
from phimoe_onnx.parity.report import junit, markdown
from phimoe_onnx.parity.stored import stored_model
from phimoe_onnx.parity.thresholds import DEFAULTS, MEASURES, Thresholds
from phimoe_onnx.parity.verify import SAMPLE, Answers, continued, cut
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import BASE, MODEL, SHAPES, longrope

Bundle = Callable[[str, str, str], Path]
Checkpoint = Callable[[str], Path]
SHAPE = "longrope-window"
# A random model's logits say little, so the weights' rounding moves its distribution far more than a trained one's.
LOOSE = Thresholds(kl=0.5, kernel_kl=0.1, perplexity_ratio=1.2)


def doctored(original: Path, folder: Path, name: str = "lm_head.weight.transposed", scale: float = 1.5) -> Path:
    """A copy of a float32 bundle with one weight scaled, its manifest telling the new hashes."""
    shutil.copytree(original, folder)
    tensor = ir.load(folder / "model.onnx").graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    data = np.memmap(folder / "model.data", np.float32, "r+", tensor.offset or 0, tuple(tensor.shape.numpy()))
    data *= scale
    data.flush()
    rehash(folder)
    return folder


def rehash(folder: Path) -> None:
    dataclasses.replace(read_manifest(folder), files=describe_files(folder)).write(folder)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_float32_passes_its_default_thresholds(bundle: Bundle, checkpoint: Checkpoint, target: str) -> None:
    progress: list[tuple[str, int, int]] = []
    folder = bundle(SHAPE, target, "none")
    report = verify(folder, checkpoint(SHAPE), tokens=200, new_tokens=20, progress=lambda *call: progress.append(call))
    assert report.failures == []
    assert report.thresholds == DEFAULTS[32]
    assert (report.tokens, report.windows, report.target, report.quantize) == (200, [100, 100], target, "none")
    assert 0 < report.bundle_to_reference.mean_difference <= 1e-5
    assert report.bundle_to_reference.mean_difference <= report.bundle_to_reference.max_difference <= 1e-3
    assert report.bundle_to_reference.top1_agreement >= 0.99
    assert report.bundle_to_stored is report.stored_to_reference is report.routing_agreement is None
    assert report.greedy["agreeing"] == report.greedy["new_tokens"] == 20
    assert report.greedy["bundle"] == report.greedy["reference"]
    steps = [f"PyTorch over the checkpoint, layer {n} of 2, " for n in (1, 2)]
    steps = [step + part for step in steps for part in ("attention", *(f"expert {n} of 16" for n in range(1, 17)))]
    expected = [("running the bundle", done, 2) for done in range(3)]
    assert progress == expected + [(step, done, 34) for done, step in enumerate(steps)]


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp16"])
def test_rounded_weights_are_told_apart_from_kernels(bundle: Bundle, checkpoint: Checkpoint, quantize: str) -> None:
    report = verify(bundle(SHAPE, "cpu", quantize), checkpoint(SHAPE), tokens=150, new_tokens=4, thresholds=LOOSE)
    assert report.failures == []
    assert report.bundle_to_stored is not None
    assert report.stored_to_reference is not None
    assert report.routing_agreement is not None
    assert 0.5 < report.routing_agreement <= 1
    assert set(report.perplexity) == {"reference", "stored", "bundle"}
    assert report.bundle_to_stored.tokens == report.stored_to_reference.tokens == 150
    if quantize == "fp16":
        assert report.bundle_to_stored.mean_difference <= 1e-4
    assert report.stored_to_reference.mean_difference > (1e-2 if quantize == "int4" else 1e-5)


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_a_report_is_that_of_whole_models(bundle: Bundle, checkpoint: Checkpoint, quantize: str) -> None:
    """To the last bit; the greedy continuation of one that steps, past the rope boundary of 32."""
    folder = bundle(SHAPE, "cpu", quantize)
    report = verify(folder, checkpoint(SHAPE), tokens=130, new_tokens=24, thresholds=Thresholds())
    runtime, exact = PhiMoE.load(folder), reference.load_reference(checkpoint(SHAPE))
    stored = stored_model(exact, folder, read_manifest(folder))
    expected, same = [Comparison() for _ in range(3)], []
    windows = list(cut(runtime.tokenizer.encode(SAMPLE.read_text())[:130], exact.config))
    for window in windows:
        (recording, routing), (storing, own) = reference.recorded(exact), reference.recorded(stored)
        logits = [runtime.logits(window), *(reference.logits(model, window) for model in (recording, storing))]
        replayed = reference.logits(reference.replayed(stored, routing), window)
        for comparison, pair in zip(expected, [logits[:2], (logits[0], logits[2]), (replayed, logits[1])], strict=True):
            comparison.add(*pair)
        same += [(a == b).all(dim=-1).numpy() for a, b in zip(routing, own, strict=True)]
    assert report.bundle_to_reference == expected[0]
    if quantize != "none":
        assert [report.bundle_to_stored, report.stored_to_reference] == expected[1:]
        assert report.routing_agreement == pytest.approx(np.concatenate(same, axis=1).mean())
    prompt = windows[0][:32]
    stepped = reference.greedy(exact, prompt, 24)
    got = runtime.generate(prompt, max_new_tokens=24).token_ids
    agreeing = next((n for n, (a, b) in enumerate(zip(stepped, got, strict=False)) if a != b), 24)
    assert (agreeing == 24) == (quantize == "none")
    assert report.greedy == {
        "prompt": runtime.tokenizer.decode(prompt),
        "reference": runtime.tokenizer.decode(stepped[: agreeing + 1]),
        "bundle": runtime.tokenizer.decode(got),
        "agreeing": agreeing,
        "new_tokens": 24,
    }


@pytest.mark.parametrize("boundary", [None, 3, 4, 5, 6, 7, 20])
def test_the_texts_that_tell_a_continuation(boundary: int | None) -> None:
    """Each token is told by a text on the side of the boundary on which it was chosen."""
    raw = BASE | ({} if boundary is None else {"rope_scaling": longrope(16, boundary)})
    answers = Answers([], [], [10, 11, 12, 13], 3, [14, 15, 16], str)
    texts = [len(text.token_ids) for text in continued(parse_config(raw), answers)]
    position, told = 3, []  # of the prompt's last token, after which the first is chosen
    for length in texts:
        told += [(length, n) for n in range(position, length)]
        position = length
    assert [n for _, n in told][:3] == [3, 4, 5]
    assert all(boundary is None or (length > boundary) == (n + 1 > boundary) for length, n in told[:3])


def test_the_perplexity_is_the_runtimes_score(bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = bundle(SHAPE, "cpu", "none")
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune "
    text += "must be in want of a wife."
    report = verify(folder, checkpoint(SHAPE), text=text, new_tokens=1)
    assert len(report.windows) == 1
    assert report.perplexity["bundle"] == pytest.approx(PhiMoE.load(folder).score(text).perplexity, rel=1e-5)
    assert report.perplexity["reference"] == pytest.approx(report.perplexity["bundle"], rel=1e-4)


def test_a_doctored_bundle_fails_by_name(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = doctored(bundle(SHAPE, "cpu", "none"), tmp_path / "bundle")
    everything = Thresholds(mean_difference=1e-4, max_difference=1e-3, kl=1e-6, kernel_kl=1e-6, perplexity_ratio=1.0001)
    report = verify(folder, checkpoint(SHAPE), tokens=80, new_tokens=4, thresholds=everything)
    assert [failure.split()[0] for failure in report.failures] == [
        "mean_difference",
        "max_difference",
        "kl",
        "perplexity_ratio",
    ]
    assert (
        report.failures[0] == f"mean_difference is {report.bundle_to_reference.mean_difference:.3g}, allowed is 0.0001"
    )
    cases = list(ElementTree.fromstring(junit(report)))
    assert [case.get("name") for case in cases if case.find("failure") is not None] == [
        "mean_difference <= 0.0001",
        "max_difference <= 0.001",
        "kl <= 1e-06",
        "perplexity_ratio <= 1.0001",
    ]
    assert [case.get("name") for case in cases if case.find("failure") is None] == ["kernel_kl <= 1e-06"]


def test_nan_logits_fail(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = doctored(bundle(SHAPE, "cpu", "none"), tmp_path / "bundle", scale=np.nan)
    report = verify(folder, checkpoint(SHAPE), tokens=40, new_tokens=2)
    assert [failure.split()[0] for failure in report.failures] == ["mean_difference", "max_difference"]


def test_kernel_errors_of_a_quantized_bundle_fail(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    """The same weights under a graph that computes something else: the rope's tables are scaled."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(SHAPE, "cpu", "int4"), folder)
    tensor = ir.load(folder / "model.onnx").graph.initializers["cos_cache"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    table = np.memmap(folder / "model.data", np.float32, "r+", tensor.offset or 0, tuple(tensor.shape.numpy()))
    table *= 3
    table.flush()
    rehash(folder)
    tight = Thresholds(kernel_kl=LOOSE.kernel_kl)
    report = verify(folder, checkpoint(SHAPE), tokens=100, new_tokens=2, thresholds=tight)
    assert [failure.split()[0] for failure in report.failures] == ["kernel_kl"]


def test_a_changed_file_is_refused(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = Path(shutil.copytree(bundle(SHAPE, "cpu", "none"), tmp_path / "bundle"))
    with (folder / "model.data").open("r+b") as data:
        data.seek(1000)
        data.write(b"\x00\x01")
    with pytest.raises(BundleError, match=r"model\.data: its SHA-256"):
        verify(folder, checkpoint(SHAPE))


def test_another_checkpoints_bundle_is_refused(bundle: Bundle, checkpoint: Checkpoint) -> None:
    with pytest.raises(PhiMoEError, match=r"config\.json is not that of .*window"):
        verify(bundle("plain", "cpu", "none"), checkpoint("window"))


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_that_is_too_short(bundle: Bundle, checkpoint: Checkpoint, text: str) -> None:
    with pytest.raises(PhiMoEError, match=r"the text has [01] tokens, at least 2 are needed"):
        verify(bundle("plain", "cpu", "none"), checkpoint("plain"), text=text, tokens=1)


@pytest.mark.parametrize("length", [2, 100, 128, 129, 130, 200, 256, 257, 512, 1000, 4096])
@pytest.mark.parametrize("context", [128, 1024])
def test_windows_are_consecutive_and_cross_the_boundary(length: int, context: int) -> None:
    raw = BASE | SHAPES["longrope"] | {"max_position_embeddings": context}
    windows = list(cut(range(length), parse_config(raw)))
    joined = list(itertools.chain.from_iterable(windows))
    assert joined == list(range(len(joined)))
    assert len(joined) >= min(length, context) // 2
    assert all(0 < len(window) <= context for window in windows)
    if length >= 100:
        assert max(map(len, windows)) > 32
    if length >= 2 * context:
        assert len(windows[-1]) == context
        assert len(joined) == length // 2 + context


def test_the_defaults_cover_every_precision() -> None:
    assert set(DEFAULTS) == {32, 16, 8, 4, 3, 2}
    assert DEFAULTS[32] == Thresholds(mean_difference=1e-4, max_difference=1e-3)
    assert all(DEFAULTS[bits].kl and DEFAULTS[bits].kernel_kl for bits in (16, 8, 4, 3, 2))


def test_every_threshold_has_a_unit_and_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(MEASURES) == [field.name for field in dataclasses.fields(Thresholds)]
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, (unit, meaning) in MEASURES.items():
        defaults = [getattr(DEFAULTS[bits], name) for bits in DEFAULTS]
        values = ", ".join(
            f"{limit:g} for {kind}"
            for limit, kind in zip(defaults, ("float32", "float16", "int8", "int4", "int3", "int2"), strict=True)
            if limit is not None
        )
        words = f"--max-{name.replace('_', '-')} {unit.upper()} {meaning} (default: {values or 'not checked'})"
        assert words in shown


def test_a_comparison_is_the_formulas_over_all_windows() -> None:
    random = np.random.default_rng(0)
    pairs = [
        (random.normal(size=(n, 50)).astype(np.float32), random.normal(size=(n, 50)).astype(np.float32)) for n in (3, 8)
    ]
    comparison = Comparison()
    for logits, expected in pairs:
        comparison.add(logits, expected)
    differences = [np.abs(logits - expected) / expected.std() for logits, expected in pairs]
    kl = []
    for logits, expected in pairs:
        p, q = (np.exp(log_softmax(values)) for values in (expected, logits))
        kl += [float((row_p * np.log(row_p / row_q)).sum()) for row_p, row_q in zip(p, q, strict=True)]
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    assert comparison.tokens == 11
    assert comparison.max_difference == pytest.approx(max(difference.max() for difference in differences))
    assert comparison.mean_difference == pytest.approx(np.concatenate(differences).mean(), rel=1e-5)
    assert comparison.kl == pytest.approx(np.mean(kl), rel=1e-4)
    same = np.concatenate([logits.argmax(axis=1) == expected.argmax(axis=1) for logits, expected in pairs])
    assert comparison.top1_agreement == pytest.approx(same.mean())


def test_markdown_has_a_row_a_comparison_and_escapes_the_texts(bundle: Bundle, checkpoint: Checkpoint) -> None:
    report = verify(
        bundle(SHAPE, "cpu", "int4"), checkpoint(SHAPE), tokens=60, new_tokens=4, thresholds=Thresholds(kl=0.0)
    )
    report.greedy["bundle"] = "<b> & `"
    lines = markdown(report).splitlines()
    assert lines[0] == f"### phimoe-verify: `{report.bundle}` (cpu, int4) failed"
    assert f"**{report.failures[0]}**" in lines
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    assert [len(row) for row in table] == [5, 5, 5, 5, 5, 5, 5, 5]
    table = [[cell.strip() for cell in row] for row in table]
    assert table[2] == ["kl", f"{report.bundle_to_reference.kl:.3g}", "0", "nats", "**failed**"]
    assert table[5][0] == "bundle to reference"
    assert table[5][3] == f"{report.bundle_to_reference.kl:.2e}"
    assert f"- perplexity: reference {report.perplexity['reference']:.4f}" in markdown(report)
    assert "<pre>&lt;b&gt; &amp; `</pre>" in lines


def run(bundle: Path, checkpoint: Path, folder: Path, *arguments: str) -> int:
    options = [
        "--tokens",
        "60",
        "--new-tokens",
        "5",
        "--json",
        str(folder / "r.json"),
        "--junit",
        str(folder / "r.xml"),
    ]
    return main([str(bundle), "--reference", str(checkpoint), *options, *arguments])


def test_the_command_writes_its_reports(
    tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(bundle(SHAPE, "cpu", "none"), tmp_path / "bundle"))
    assert run(folder, checkpoint(SHAPE), tmp_path) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    report = verify(folder, checkpoint(SHAPE), tokens=60, new_tokens=5)
    assert max(map(len, output.splitlines())) <= 80
    cells = [line.split() for line in output.splitlines()]
    for check in report.checks:
        assert [check.name, f"{check.measured:.3g}", f"{check.limit:.3g}", "std", "passed"] in cells
    assert cells[-1] == ["passed"]
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored == json.loads(json.dumps({"written_by": "phimoe-verify", **report.as_dict()}))
    assert stored["bundle_to_reference"]["tokens"] == 60
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")
    for check, case in zip(report.checks, suite, strict=True):
        properties = {each.get("name"): each.get("value") for each in case.iter("property")}
        assert properties == {"measured": repr(check.measured), "limit": repr(check.limit), "unit": "std"}
        words = f"{check.name} is {check.measured:.3g} std, allowed is {check.limit:.3g}: "
        assert case.findtext("system-out", "").startswith(words)
    parity = read_manifest(folder).parity
    assert parity is not None
    assert parity["passed"] is True
    assert parity["bundle_to_reference"] == stored["bundle_to_reference"]
    assert parity["perplexity"] == stored["perplexity"]
    PhiMoE.load(folder)  # the manifest is still a manifest


def test_the_command_fails_past_a_threshold(
    tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = doctored(bundle(SHAPE, "cpu", "none"), tmp_path / "bundle")
    assert run(folder, checkpoint(SHAPE), tmp_path) == 1
    output, errors = capsys.readouterr()
    assert [line.split()[-1] for line in output.splitlines() if "_difference" in line] == ["FAILED", "FAILED"]
    assert output.endswith("\nFAILED\n")
    assert errors.startswith(f"error: {folder}: mean_difference is ")
    assert errors.count("\n") == 1
    assert json.loads((tmp_path / "r.json").read_text())["failures"][0].startswith("mean_difference is ")
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    parity = read_manifest(folder).parity
    assert parity is not None
    assert parity["passed"] is False


def test_the_commands_thresholds_replace_the_defaults(tmp_path: Path, bundle: Bundle, checkpoint: Checkpoint) -> None:
    folder = Path(shutil.copytree(bundle(SHAPE, "cpu", "int4"), tmp_path / "bundle"))
    loose = ["--max-kl", "0.5", "--max-kernel-kl", "0.1", "--max-perplexity-ratio", "1.2"]
    assert run(folder, checkpoint(SHAPE), tmp_path, *loose) == 0
    assert run(folder, checkpoint(SHAPE), tmp_path, *loose, "--max-kl", "1e-9") == 1
    failed = json.loads((tmp_path / "r.json").read_text())
    assert [failure.split()[0] for failure in failed["failures"]] == ["kl"]
    assert (
        run(
            folder, checkpoint(SHAPE), tmp_path, *loose, "--max-mean-difference", "1e-9", "--max-max-difference", "1e-9"
        )
        == 1
    )
    failed = json.loads((tmp_path / "r.json").read_text())
    assert [failure.split()[0] for failure in failed["failures"]] == ["mean_difference", "max_difference"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--reference", "CHECKPOINT"], "not a bundle"),
        (["BUNDLE", "--reference", "nowhere"], "config.json: no such file"),
        (["BUNDLE", "--reference", "CHECKPOINT", "--text", "nowhere.txt"], "--text nowhere.txt: cannot be read"),
        (["BUNDLE", "--reference", "CHECKPOINT", "--tokens", "1"], "the text has 1 tokens"),
        (
            ["BUNDLE", "--reference", "CHECKPOINT", "--tokens", "9", "--json", "no/where.json"],
            "no/where.json: cannot be written",
        ),
        (
            ["BUNDLE", "--reference", "CHECKPOINT", "--json", "bundle/manifest.json"],
            "bundle/manifest.json: exists and is no earlier report; name another file, or pass --overwrite",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    bundle: Bundle,
    checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(bundle("plain", "cpu", "none"), tmp_path / "bundle")
    named = {"BUNDLE": str(folder), "CHECKPOINT": str(checkpoint("plain"))}
    assert main([named.get(argument, argument) for argument in arguments]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_the_reference_is_the_checkpoint() -> None:
    """The small model, bf16 in two shards: its perplexity on text like its own is far below that of chance."""
    model = reference.load_reference(MODEL)
    assert {parameter.dtype.is_floating_point and parameter.element_size() for parameter in model.parameters()} == {4}
    ids = [int(token) for token in np.random.default_rng(0).integers(3, 2000, 40)]
    logits = reference.logits(model, ids)
    assert logits.shape == (40, 2048)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("shape", ["tiles", "tiles-xqa"])
def test_cuda_bundles_pass_on_the_cpu(bundle: Bundle, checkpoint: Checkpoint, shape: str) -> None:
    report = verify(bundle(shape, "cuda", "int8"), checkpoint(shape), tokens=256, new_tokens=16)
    assert report.failures == []


def test_the_small_models_cuda_bundle_passes_on_the_cpu(tmp_path: Path) -> None:
    """Its float16, past the rope boundary of 256, with the thresholds of float16 weights."""
    report = verify(export(MODEL, tmp_path / "bundle", target="cuda"), MODEL, tokens=1024, new_tokens=32)
    assert report.failures == []
    assert report.thresholds == DEFAULTS[16]
    assert 1e-4 < report.bundle_to_reference.mean_difference < 1e-2  # float16, and no more than that
    assert report.greedy["agreeing"] == 32
