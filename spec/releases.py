"""Real releases of ONNX Runtime as witnesses of make_cases.py, each in an environment and a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console

from phimoe_onnx.files import sha256
from spec.witness import Result

ROOT = Path(__file__).parent.parent
ENVIRONMENTS = ROOT / "build" / "witnesses"
RELEASES = ("1.32.0", "1.30.0", "1.29.0")  # of ONNX Runtime; the first one also runs the copies
NOISE = 1e-3  # relative, in standard deviations, of every scale, norm, bias and router weight of a copy
COPIES = 6

Fields = dict[str, Any]

console = Console(stderr=True)


def environment(release: str) -> Path:
    """The Python of an environment with a release of ONNX Runtime and, for the rest, the packages of this one."""
    folder = ENVIRONMENTS / release
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    shared = packages / "shared.pth"  # written last: with it pip would take an installed release for this one
    if not shared.exists():
        console.print(f"installing ONNX Runtime {release} into {folder}")
        venv.create(folder, clear=True, with_pip=True)
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"onnxruntime=={release}"]
        subprocess.run(command, check=True)
        shared.write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


class Witness:
    """A process with one release of ONNX Runtime, see witness.py; it ends with the `with` block."""

    def __init__(self, release: str, bundles: list[Path], copies: list[Path]) -> None:
        command = [environment(release), "-m", "spec.witness", *bundles, "--copies", *copies]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        count = self._answer()
        if not count:
            raise SystemExit(f"ONNX Runtime {release} runs no graph of the bundle")
        console.print(f"ONNX Runtime {release}: {count} of {len(bundles)} graphs, {len(copies)} copies with noise")

    def continued(self, prompts: list[Any], options: Fields) -> list[Result] | None:
        """What each prompt of a batch leads to; None where the witness is not sure of it."""
        assert self._process.stdin
        print(json.dumps({"prompts": prompts, "options": options}), file=self._process.stdin)
        results: list[Result] | None = self._answer()
        return results

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{' '.join(map(str, self._process.args))}: ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def witnesses(bundle: Path, folder: Path) -> Iterator[Witness]:
    """Each release with `bundle` on each of its graphs, and the first one with the copies with noise too; all of them
    are made in `folder`.
    """
    graphs = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["graphs"]
    plain = [copy_bundle(bundle, folder / graph["file"], graph) for graph in graphs]
    noisy = [copy_bundle(bundle, folder / f"noise-{seed}", graphs[-1], seed) for seed in range(COPIES)]
    for release in RELEASES:
        yield Witness(release, plain, noisy if release == RELEASES[0] else [])


def copy_bundle(bundle: Path, folder: Path, graph: Fields, seed: int | None = None) -> Path:
    """The bundle with one of its graphs, and with noise if a seed is given."""
    shutil.copytree(bundle, folder)
    path, manifest = folder / "manifest.json", json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["graphs"] = [graph]
    if seed is not None:
        noisy = folder / graph["file"]
        add_noise(noisy, np.random.default_rng(seed))
        manifest["files"][noisy.name] = {"size": noisy.stat().st_size, "sha256": sha256(noisy)}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def add_noise(path: Path, random: np.random.Generator) -> None:
    """Changes every float32 number of a graph a little."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            array = value.const_value.numpy()
            value.const_value = ir.tensor(
                (array * random.normal(1, NOISE, array.shape)).astype(np.float32), name=value.name
            )
    path.unlink()
    ir.save(model, path)
