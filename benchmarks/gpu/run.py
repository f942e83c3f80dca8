"""Everything that is to be measured on an NVIDIA card, in one run: speed beside the peers, parity, memory, errors.

    benchmarks/gpu/setup.sh [WHEELS]
    .venv-gpu/bin/python benchmarks/gpu/run.py                        # some 20 minutes; writes docs/gpu/CARD-DATE.json
    and .md python benchmarks/gpu/run.py --dry-run --output FOLDER            # tiny shapes on the CPU: shows that the
    script itself works

A step that fails is written down with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shapes import BASE, LONGROPE, SHAPES, write_checkpoint  # noqa: E402

import phimoe_onnx  # noqa: E402

MODEL = ROOT / "models/phimoe-austen"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
}
FACTORS = {"short_factor": LONGROPE["short_factor"][:32], "long_factor": LONGROPE["long_factor"][:32]}
SHAPES["tiny"] = BASE | TINY | {"max_position_embeddings": 4096}
SHAPES["tiny, longrope"] = SHAPES["tiny"] | {
    "rope_scaling": LONGROPE | FACTORS | {"original_max_position_embeddings": 128}
}
SHAPES["tiny, window"] = SHAPES["tiny"] | {"sliding_window": 50}
PACKAGES = (
    "phimoe-onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-genai-cuda",
    "onnxruntime-genai",
    "torch",
    "transformers",
)


def main() -> None:
    """Runs every step and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/gpu", metavar="FOLDER", help="default: docs/gpu")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="for checkpoints and bundles, 60 GB (default: a temporary one)"
    )
    parser.add_argument(
        "--large", action="store_true", help="also Phi-3.5-MoE's full shape in int4: 24 GB of disk and of the card"
    )
    arguments = parser.parse_args()
    device = "cpu" if arguments.dry_run else "cuda"
    shape, layers = ("tiny", 2) if arguments.dry_run else ("Phi-mini-MoE", 32)
    result: dict[str, Any] = {"machine": machine(device), "command": " ".join(sys.argv)}

    def step(name: str, run: Callable[[], Any]) -> None:
        start = time.monotonic()
        print(f"{name} ...", flush=True)
        try:
            result[name] = run()
        except (phimoe_onnx.PhiMoEError, subprocess.CalledProcessError, OSError, RuntimeError) as error:
            said = getattr(error, "stderr", None) or str(error)
            result[name] = {"error": f"{type(error).__name__}: {said.strip()[-2000:]}"}
        print(f"{name}: {time.monotonic() - start:.0f} s: {json.dumps(result[name])[:300]}", flush=True)
        write(result, arguments.output)  # whatever comes later, this is kept

    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        work = Path(scratch)
        step("parity", lambda: parity(work / "parity", device))
        checkpoint, bundles = work / "checkpoint", {form: work / form for form in ("int4", "int8", "none")}
        step("checkpoint", lambda: write_checkpoint(checkpoint, shape, layers, layers))
        for form, bundle in bundles.items():
            step(f"export {form}", lambda form=form, bundle=bundle: export(checkpoint, bundle, form))
        batches = ["1", "2"] if arguments.dry_run else ["1", "8", "32"]
        short, long = (("32", "8"), ("64", "4")) if arguments.dry_run else (("512", "128"), ("2048", "32"))
        for form, bundle in bundles.items():
            peers = ["--peers", "--reference", str(checkpoint)] if form == "int4" else []
            step(f"speed {form}", lambda b=bundle, p=peers: bench(b, device, batches, short, p))
            step(f"speed {form}, prompt of {long[0]}", lambda b=bundle, p=peers: bench(b, device, ["1"], long, p))
        step("memory", lambda: memory(bundles["int4"], bundles["none"], device))
        if arguments.large:
            step("Phi-3.5-MoE, int4", lambda: large(work, device))


def machine(device: str) -> dict[str, Any]:
    """The card, the driver, the releases and the day."""
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "python": platform.python_version()}
    if device == "cuda":
        fields = "name,memory.total,driver_version,clocks.max.memory"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        found |= dict(zip(("card", "memory", "driver", "memory clock"), answer.split(", "), strict=True))
    else:
        found["card"] = "dry-run"
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def export(checkpoint: Path, bundle: Path, form: str) -> dict[str, float]:
    """Exports for CUDA; seconds and GB."""
    start = time.monotonic()
    phimoe_onnx.export(checkpoint, bundle, target="cuda", quantize=form)
    return {"seconds": time.monotonic() - start, "GB": sum(file.stat().st_size for file in bundle.iterdir()) / 1e9}


def parity(work: Path, device: str) -> dict[str, Any]:
    """phimoe-verify's figures past rope boundary and window, and a batch of uneven prompts against each one alone."""
    cases = {"phimoe-austen none": (MODEL, "none")}
    for shape in ("tiny, longrope", "tiny, window"):
        write_checkpoint(work / shape, shape, 2, 2)
        cases |= {f"{shape} {form}": (work / shape, form) for form in ("none", "int8", "int4")}
    found = {}
    for name, (checkpoint, form) in cases.items():
        bundle = phimoe_onnx.export(checkpoint, work / f"bundle {name}", target="cuda", quantize=form)
        report = phimoe_onnx.verify(bundle, checkpoint, device=device, tokens=1024, new_tokens=32)
        model = phimoe_onnx.PhiMoE.load(bundle, device=device)
        prompts = [[3 + (17 * n + 5 * row) % 1000 for n in range(length)] for row, length in enumerate((3, 140, 60))]
        together = [row.token_ids for row in model.generate(prompts, max_new_tokens=20)]
        alone = [model.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
        seeded = [
            model.generate(prompts[0], max_new_tokens=20, temperature=0.8, top_p=0.9, seed=1).token_ids
            for _ in range(2)
        ]
        kernels = report.bundle_to_stored or report.bundle_to_reference
        found[name] = {
            "failures": report.failures,
            "mean difference": report.bundle_to_reference.mean_difference,
            "kernels' KL, nats": kernels.kl,
            "greedy": report.greedy["agreeing"] if report.greedy else None,
            "rows as if alone": sum(a == b for a, b in zip(together, alone, strict=True)) / len(alone),
            "one seed, one text": seeded[0] == seeded[1],
        }
    return found


def bench(bundle: Path, device: str, batches: list[str], lengths: tuple[str, str], more: list[str]) -> Any:
    """phimoe-bench's rows."""
    file = bundle.with_suffix(".json")
    command = [
        sys.executable,
        "-c",
        "import sys; from phimoe_onnx.cli.bench import main; sys.exit(main())",
        str(bundle),
    ]
    command += [
        "--device",
        device,
        "--batch",
        *batches,
        "--prompt",
        lengths[0],
        "--new-tokens",
        lengths[1],
        "--json",
        str(file),
        *more,
    ]
    file.unlink(missing_ok=True)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not file.exists():  # it is there although a batch did not run; its row says why
        raise RuntimeError(done.stderr)
    found = json.loads(file.read_text())
    for row in found["rows"]:
        if row["speed"]:
            del row["speed"]["token_ids"]
    return found


def memory(int4: Path, none: Path, device: str) -> dict[str, Any]:
    """Two models on one card under limits, and what is said where a limit is too low."""
    if device == "cpu":
        return {"two models": "on a card only"}
    models = [phimoe_onnx.PhiMoE.load(int4, device=device, memory_limit=9 << 30) for _ in range(2)]
    texts = [model.generate([5, 6, 7], max_new_tokens=20).token_ids for model in models]
    found: dict[str, Any] = {"two models": "agree" if texts[0] == texts[1] else "differ"}
    for name, run in {
        "weights over the limit": lambda: phimoe_onnx.PhiMoE.load(none, device=device, memory_limit=4 << 30),
        "a cache over the limit": lambda: models[0].decoder(256, 4096),
    }.items():
        try:
            run()
            found[name] = "no error"
        except phimoe_onnx.OutOfMemoryError as error:
            found[name] = str(error)
    return found


def large(work: Path, device: str) -> Any:
    """Phi-3.5-MoE's full shape, one layer of noise: exported, loaded, timed."""
    parameters = write_checkpoint(work / "large", "Phi-3.5-MoE", 32, 1)
    found = {"parameters": parameters} | export(work / "large", work / "large-int4", "int4")
    return found | {"speed": bench(work / "large-int4", device, ["1"], ("512", "64"), [])}


def write(result: dict[str, Any], output: Path) -> None:
    """The JSON, and its tables in Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    about = result["machine"]
    stem = output / f"{about['card'].replace(' ', '-')}-{about['date']}"
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    lines = [f"# {about['card']}, {about['date']}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [f"`{result['command']}`", ""]
    for name, value in result.items():
        if name.startswith("speed") and "rows" in value:
            lines += [f"## {name}", "", value["title"], "", *speed_table(value["rows"]), ""]
        elif name not in ("machine", "command"):
            lines += [f"## {name}", "", "```json", json.dumps(value, indent=2), "```", ""]
    stem.with_name(stem.name + ".md").write_text("\n".join(lines), encoding="utf-8")


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
    """phimoe-bench's rows as Markdown."""
    lines = [
        "| candidate | batch | load, s | prefill, tokens/s | decode, tokens/s | of the limit | memory, GB | same "
        "tokens |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        speed = row["speed"]
        if speed is None:
            lines.append(f"| {row['candidate']} | {row['batch']} | {row['problem']} | | | | | |")
            continue
        share, same = (("" if row[key] is None else f"{row[key]:.0%}") for key in ("share", "same"))
        speeds = f"{speed['load']:.1f} | {speed['prefill']:.0f} | {speed['decode']:.1f}"
        figures = f"{speeds} | {share} | {speed['memory'] / 1e9:.2f} | {same}"
        lines.append(f"| {row['candidate']} | {row['batch']} | {figures} |")
    return lines


if __name__ == "__main__":
    main()
