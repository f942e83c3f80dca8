"""phimoe-export --plan against what exports really write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from phimoe_onnx import export
from phimoe_onnx.cli import plan
from phimoe_onnx.cli.export import main
from phimoe_onnx.config import parse_config, read_config
from phimoe_onnx.exporter import recipe
from phimoe_onnx.exporter.kinds import stored_sizes
from phimoe_onnx.exporter.plan import CALIBRATION_ROWS, count_parameters, requirements
from phimoe_onnx.exporter.quantize.gptq import ROWS
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import TARGETS
from tests.checkpoints import MODEL

FORMS = [
    ("cpu", "none"),
    ("cpu", "fp16"),
    ("cpu", "int8"),
    ("cpu", "int4"),
    ("cuda", "none"),
    ("cuda", "int8"),
    ("cuda", "int4"),
    ("portable", "none"),
    ("portable", "fp16"),
]


@pytest.mark.parametrize(
    ("target", "quantize", "operators"), [*((*form, "stock") for form in FORMS), ("cpu", "int4", "native")]
)
@pytest.mark.parametrize("shape", ["model", "tied", "tiles"])
def test_bundle_is_as_large_as_planned(
    tmp_path: Path, checkpoint: Callable[[str], Path], shape: str, target: str, quantize: str, operators: str
) -> None:
    if (target == "cuda" and quantize != "none") != (shape == "tiles"):
        pytest.skip("QMoE on CUDA takes the last shape alone, which serves only for that")
    source = MODEL if shape == "model" else checkpoint(shape)
    config = read_config(source)
    need = requirements(config, recipe_for(config, TARGETS[target], quantize, operators=operators))
    bundle = export(source, tmp_path / "bundle", target=target, quantize=quantize, operators=operators)
    weights = sum(path.stat().st_size for path in bundle.glob("*.data"))
    graphs = sum(path.stat().st_size for path in bundle.glob("*.onnx"))
    # tiny shapes are all graph
    assert need.bundle == pytest.approx(weights + graphs, rel=0.02 if shape == "model" else 0.2)
    assert sum(stored_sizes(bundle).values()) == pytest.approx(weights, rel=1e-3)


@pytest.mark.parametrize(("target", "quantize"), [("cpu", "int8"), ("cuda", "none"), ("portable", "fp16")])
@pytest.mark.parametrize("task", ["text-classification", "feature-extraction"])
def test_other_tasks_have_no_cache_and_other_heads(
    checkpoint: Callable[..., Path], bundle: Callable[..., Path], task: str, target: str, quantize: str
) -> None:
    source = checkpoint("plain", task)
    config = read_config(source)
    need = requirements(config, recipe_for(config, TARGETS[target], quantize, task=task, operators="stock"))
    assert need.cache_per_token == 0
    folder = bundle("plain", target, quantize, task)
    written = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".data", ".onnx"))
    assert need.bundle == pytest.approx(written, rel=0.2)


def test_parameters_are_counted_by_kind() -> None:
    config = read_config(MODEL)
    counts = count_parameters(config)
    h, i, v, layers = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    assert counts["experts"] == layers * 16 * 3 * h * i
    assert counts["router"] == layers * 16 * h
    assert counts["embeddings"] == v * h
    assert counts["lm_head"] == v * h + v
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_plan_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(MODEL), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{MODEL}: PhiMoE, 4.7 M parameters\n")
    assert "experts 3.5 M" in printed
    for target, quantize in FORMS:
        refused = f"{target} {quantize}: --target cuda has no {quantize} for hidden_size 192 and intermediate_size 96"
        planned = any(line.split()[:2] == [target, quantize] for line in printed.splitlines())
        assert (refused in printed) != planned
        assert planned or target == "cuda"
    assert not list(tmp_path.iterdir())


def rows(printed: str) -> dict[tuple[str, str], list[str]]:
    """The table's rows by target and form."""
    lines = [line.split() for line in printed.splitlines()]
    return {(line[0], line[1]): line[2:] for line in lines if line and line[0] in TARGETS and not line[1].endswith(":")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--quantize", "int4", "--target", "cpu"], {("cpu", "int4")}),
        (["--quantize", "fp16"], {("cpu", "fp16"), ("cuda", "fp16"), ("portable", "fp16")}),
        (["--target", "portable"], {("portable", form) for form in ("none", "fp16", "int8", "int4")}),
        (
            ["--kv-cache", "int8", "--operators", "stock"],
            {("cpu", form) for form in ("none", "fp16", "int8", "int4", "int2")} | {("cuda", "none")},
        ),
        (["--operators", "native", "--quantize", "int3"], {("cpu", "int3")}),
        (["--dtype", "bfloat16"], {("cuda", "none")}),
    ],
)
def test_plan_shows_what_the_options_leave(
    capsys: pytest.CaptureFixture[str], options: list[str], expected: set[tuple[str, str]]
) -> None:
    assert main([str(MODEL), "--plan", *options]) == 0
    assert rows(capsys.readouterr().out).keys() == expected


@pytest.mark.parametrize("built", [True, False])
def test_plan_says_which_rows_have_native_operators(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    for module in (plan, recipe):
        monkeypatch.setattr(module, "library", lambda: Path("library") if built else None)

    def show(*options: str) -> str:
        assert main([str(MODEL), "--plan", "--target", "cpu", *options]) == 0
        return capsys.readouterr().out

    forms = ("int8", "int4", "int3", "int2") if built else ("int8", "int4", "int2")
    by_default = show()
    assert rows(by_default).keys() == {("cpu", form) for form in ("none", "fp16", *forms)}
    line = f"with native operators: {', '.join(f'cpu {form}' for form in forms)}; --operators stock is without\n"
    assert (line in by_default, recipe.NO_LIBRARY in by_default) == (built, not built)
    stock = show("--operators", "stock")
    assert "native" not in stock
    assert (rows(by_default)["cpu", "int4"] == rows(stock)["cpu", "int4"]) is not built


def test_plan_counts_what_the_options_change(capsys: pytest.CaptureFixture[str]) -> None:
    int4 = ("--quantize", "int4", "--target", "cpu", "--operators", "stock")

    def row(*options: str) -> list[str]:
        assert main([str(MODEL), "--plan", *int4, *options]) == 0
        return rows(capsys.readouterr().out)["cpu", "int4"]

    plain, cache, head = row(), row("--kv-cache", "int4"), row("--store", "lm_head.weight=int8")
    assert (plain[6:8], cache[6:8]) == (["2.05", "MB"], ["256.00", "kB"])
    assert row("--kv-cache", "fp16", "--operators", "native")[6:8] == ["1.02", "MB"]
    assert float(head[0]) - float(plain[0]) == pytest.approx(2048 * 192 / 2 / 1e6, abs=0.011)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--store", "head=int8"], "--store head=int8: no parameter is called so"),
        (["--target", "cpu", "--dtype", "bfloat16"], "--target cpu has no --dtype bfloat16"),
    ],
)
def test_plan_refuses_what_no_row_takes(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main([str(MODEL), "--plan", *options]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


EXTRA = (
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "huggingface_hub",
    "filelock",
    "psutil",
    "transformers",
)


def without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """phimoe-export in a process in which importing these packages fails."""
    code = f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
    code += "from importlib import util; found = util.find_spec\n"
    code += f"util.find_spec = lambda name, *rest: None if name in {packages} else found(name, *rest)\n"
    code += f"from phimoe_onnx.cli.export import main; sys.exit(main({list(arguments)}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_plan_needs_no_package_of_the_exports(capsys: pytest.CaptureFixture[str]) -> None:
    done = without(EXTRA, str(MODEL), "--plan", "--quantize", "int4")
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout).keys() == {("cpu", "int4"), ("portable", "int4")}


@pytest.mark.parametrize("package", ["torch", "onnx_ir", "onnxscript", "safetensors", "filelock"])
def test_an_export_says_in_a_line_what_it_lacks(tmp_path: Path, package: str) -> None:
    done = without((package,), str(MODEL), "-o", str(tmp_path / "bundle"))
    message = f"error: export needs the package {package}; pip install 'phimoe-onnx[export]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert not list(tmp_path.iterdir())


def test_a_calibration_of_the_largest_shape_takes_less_than_6_gib() -> None:
    config = parse_config(SHAPES["Phi-3.5-MoE"])
    recipe = recipe_for(config, TARGETS["cpu"], "int4", operators="native", calibrate=True)
    assert requirements(config, recipe).export_memory < 6 << 30
    assert CALIBRATION_ROWS == ROWS


@pytest.mark.parametrize("option", [[], ["--plan"]])
def test_a_hub_id_says_in_a_line_what_it_lacks(tmp_path: Path, option: list[str]) -> None:
    done = without(("huggingface_hub",), "owner/name", "-o", str(tmp_path / "bundle"), *option)
    message = (
        "error: owner/name is a hub id, which needs the package huggingface_hub; pip install 'phimoe-onnx[export]'\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
