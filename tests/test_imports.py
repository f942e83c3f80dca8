"""Who may import whom, and what a light installation never imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import phimoe_onnx
from tests.checkpoints import MODEL

PACKAGE = Path(phimoe_onnx.__file__).parent
COMMON = {"errors", "files", "memory", "progress", "scratch", "_version"}
# by part, what it may import beside itself and what is common to all; a part is a folder or a file of the package
ALLOWED = {
    "config": set(),
    "modeling": {"config"},
    "bundle_v1": set(),
    "bundle": {"bundle_v1"},
    "text": set(),
    "checkpoint": {"config"},
    "layered": {"checkpoint", "config", "modeling"},
    "reference": {"layered", "checkpoint", "config", "modeling"},
    "exporter": {"checkpoint", "text", "reference", "layered", "bundle", "config", "modeling"},
    "runtime": {"bundle", "config", "text"},
    "analytics": {"runtime"},
    "lm_eval": {"runtime", "text"},
    "bench": {"runtime", "bundle", "config"},
    "parity": {"exporter", "runtime", "layered", "reference", "checkpoint", "bundle", "config", "modeling"},
    "cli": {"analytics", "bench", "exporter", "checkpoint", "runtime", "parity", "text", "bundle", "config"},
}
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub")


def imported(file: Path) -> Iterator[str]:
    """The dotted names that a file of the package imports from it, those of `from` too, wherever they stand."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("phimoe_onnx."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module and node.module.split(".")[0] == "phimoe_onnx":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", ALLOWED)
def test_each_part_imports_only_what_it_may(part: str) -> None:
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    found = {(str(file.relative_to(PACKAGE)), name.split(".")[1]) for file in files for name in imported(file)}
    assert {(file, name) for file, name in found if name not in {part, *ALLOWED[part], *COMMON}} == set()


def test_the_common_modules_import_no_part() -> None:
    for name in COMMON:
        assert {name.split(".")[1] for name in imported(PACKAGE / f"{name}.py")} <= COMMON, name


def test_every_part_has_its_rule() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__init__"} == {*ALLOWED, *COMMON}


def test_no_circles() -> None:
    """Not within a part either, nor for a type checker's eyes alone."""
    files = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    graph = {
        name: {found if found in files else found.rpartition(".")[0] for found in imported(file)} - {"phimoe_onnx"}
        for name, file in files.items()
    }
    TopologicalSorter(graph).prepare()  # a CycleError names the modules of a circle


def test_one_module_sets_jinja2_up() -> None:
    naming = [file for file in PACKAGE.rglob("*.py") if "jinja2.sandbox" in file.read_text(encoding="utf-8")]
    assert naming == [PACKAGE / "text" / "sandbox.py"]


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import phimoe_onnx",
        "import phimoe_onnx.runtime",
        "import phimoe_onnx; phimoe_onnx.PhiMoE",
        "import phimoe_onnx.cli.generate, phimoe_onnx.cli.chat, phimoe_onnx.cli.classify, phimoe_onnx.cli.bench",
        "import phimoe_onnx.cli.experts, phimoe_onnx.analytics.page",
        "import phimoe_onnx.cli.export, phimoe_onnx.cli.verify",  # for a fast --help
        "import phimoe_onnx.cli.optimum_export",  # at every start of optimum-cli
    ],
)
def test_these_imports_are_light(statement: str) -> None:
    assert python(f"import sys\n{statement}\nprint([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_plan_needs_no_package_of_the_exporter() -> None:
    code = f"""
import sys
for name in ("torch", "psutil", "filelock", "safetensors", "onnx", "onnx_ir", "onnxscript"):
    sys.modules[name] = None  # importing it now raises ModuleNotFoundError
from phimoe_onnx.cli.export import main
print(main([{str(MODEL)!r}, "--plan"]))
"""
    assert python(code).splitlines()[-1] == "0"


def test_export_is_the_function_whatever_was_imported_before() -> None:
    code = "import phimoe_onnx\nbefore = phimoe_onnx.export\nimport phimoe_onnx.exporter.pipeline\n"
    code += "print(before is phimoe_onnx.export)"
    assert python(code) == "True"
    code = "import phimoe_onnx.exporter.pipeline as p\nimport phimoe_onnx\n"
    code += "print(callable(phimoe_onnx.export), phimoe_onnx.export is p.export)"
    assert python(code) == "True True"


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("PhiMoE", "onnxruntime", "cpu"),
        ("verify", "onnxruntime", "cpu"),
        ("export", "torch", "export"),
        ("export", "onnxscript", "export"),
        ("verify", "safetensors", "export"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(name: str, package: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None  # importing it now raises ModuleNotFoundError
import phimoe_onnx
try:
    phimoe_onnx.{name}
except phimoe_onnx.MissingPackageError as error:
    print(error)
"""
    assert python(code) == f"{name} needs the package {package}; pip install 'phimoe-onnx[{extra}]'"


def test_the_public_names_are_there_and_others_are_not() -> None:
    assert all(getattr(phimoe_onnx, name) is not None for name in phimoe_onnx.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        phimoe_onnx.nothing  # noqa: B018
