"""verify_golden(): a bundle against what a golden file keeps of its checkpoint; needs neither that nor PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx.bundle import Manifest, check_files, read_manifest
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import GoldenError
from phimoe_onnx.parity.comparison import surprise
from phimoe_onnx.parity.evidence import Evidence, Routing, Tokens, divergence, passages, shares
from phimoe_onnx.parity.golden import (
    SAMPLED,
    TOP,
    Arrays,
    Golden,
    Header,
    as_object,
    compare,
    read_golden,
    weights_of,
)
from phimoe_onnx.parity.outputs import PROMPT, bundle_outputs, continuation, greedy, is_distribution
from phimoe_onnx.parity.report import Report, empty_report, judge
from phimoe_onnx.parity.thresholds import Thresholds, default_thresholds
from phimoe_onnx.progress import Progress
from phimoe_onnx.runtime.model import PhiMoE


def verify_golden(
    bundle: str | Path,
    golden: str | Path,
    *,
    device: str = "cpu",
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares a bundle with what `verify` kept of the checkpoint that it came from, on the same tokens.

    Of text-generation some figures are bounds or estimates then; `notes` of the report says which. What needs PyTorch
    over the stored weights is compared if the file was saved with a bundle of the same weights.

    Args:
        bundle: its folder.
        golden: the file that `verify(save_golden=...)` wrote, with this bundle or with another of the same checkpoint.
        device: where the bundle runs.
        thresholds: the most that is allowed; by default those of the bundle's precision.
        progress: called with what is being done, and the windows done and to do.

    Raises:
        GoldenError: the file is missing, damaged or another checkpoint's.
        PhiMoEError: as for loading the bundle; or a threshold is given for what the task does not have.
    """
    folder, path = Path(bundle), Path(golden)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hash_everything=True)
    file = read_golden(path)
    header, windows = file.header, file.windows()
    _check_same_model(folder, manifest, path, header)
    stored = header.stored if header.stored and header.stored.files == weights_of(manifest) else None
    limits = thresholds or default_thresholds(manifest)
    of = f"{header.checkpoint} in {golden}"
    report = empty_report(bundle, of, manifest, windows, limits, stored=stored is not None)
    report.notes = list(_notes(report, file, stored is not None))
    if stored is None:
        report.thresholds = dataclasses.replace(limits, kernel_kl=None, kernel_difference=None)
    report.evidence = Evidence(Routing(shares(file.arrays["routing"], header.config["num_local_experts"])))
    runtime = PhiMoE.load(folder, device=device)
    if header.task == "text-generation":
        _compare_tokens(report, runtime, file, stored is not None, progress or (lambda what, done, total: None))
    else:
        (outputs,) = bundle_outputs(runtime, windows, _empty)
        distribution = is_distribution(manifest)
        report.bundle_to_reference.add(outputs, file.arrays["outputs"], distribution=distribution)
        if report.bundle_to_stored is not None:
            report.bundle_to_stored.add(outputs, file.arrays["stored_outputs"], distribution=distribution)
    if stored is not None:
        report.stored_to_reference, report.routing_agreement = stored.to_reference, stored.routing_agreement
    judge(report)
    return report


def _check_same_model(folder: Path, manifest: Manifest, path: Path, header: Header) -> None:
    found, expected = as_object(read_config(folder)), header.config
    differing = [name for name in sorted(found.keys() | expected) if found.get(name) != expected.get(name)]
    what = [f"{name} {expected.get(name)!r}, not {found.get(name)!r}" for name in differing]
    if manifest.task != header.task:
        what.insert(0, f"the task {header.task}, not {manifest.task}")
    if what:
        shown = ", ".join(each if len(each) < 100 else each[:100] + "..." for each in what[:4])
        raise GoldenError(
            f"{path}: is of the checkpoint {header.checkpoint} (SHA-256 {header.checkpoint_sha256}), whose bundle has "
            f"{shown} as {folder} has; give the golden file of this bundle's checkpoint"
        )


def _notes(report: Report, file: Golden, stored: bool) -> list[str]:
    header = file.header
    adapter = f", with an adapter of SHA-256 {header.adapter_sha256}" if header.adapter_sha256 else ""
    notes = [f"the checkpoint's SHA-256 is {header.checkpoint_sha256}{adapter}"]
    if header.task == "text-generation":
        vocab = header.config["vocab_size"]
        notes.append(
            f"the golden file keeps {min(TOP, vocab)} top and {min(SAMPLED, vocab)} other logits of {vocab} a token: "
            f"KL and mean |d| are estimates, max |d| is a lower bound; perplexity and top-1 agreement are exact"
        )
    limits = dataclasses.asdict(report.thresholds)
    unchecked = [name for name in ("kernel_kl", "kernel_difference") if limits[name] is not None]
    if unchecked and not stored:
        notes.append(
            f"not checked: {' and '.join(unchecked)}; the golden file was saved with a bundle of other stored weights"
        )
    return notes


def _compare_tokens(report: Report, runtime: PhiMoE, file: Golden, stored: bool, progress: Progress) -> None:
    arrays, header, windows = file.arrays, file.header, file.windows()
    best = {"best": arrays["top_ids"][:, 0], "stored_best": arrays.get("stored_best", arrays["top_ids"][:, 0])}
    losses, first, seen = [], 0, Tokens()
    progress("running the bundle", 0, len(windows))
    for number, logits in enumerate(bundle_outputs(runtime, windows, _empty)):
        rows = slice(first, first + len(logits))

        def kept(prefix: str, rows: slice = rows) -> Arrays:
            names = ("top_logits", "sampled_logits", "logsumexp", "best")
            return {name: (arrays | best)[prefix + name][rows] for name in names}

        ids = arrays["top_ids"][rows]
        kl = compare(report.bundle_to_reference, logits, kept(""), ids, first, header.scales[number])
        seen.add(kl, best["best"][rows], logits.argmax(axis=-1))
        if stored and report.bundle_to_stored is not None and header.stored is not None:
            compare(report.bundle_to_stored, logits, kept("stored_"), ids, first, header.stored.scales[number])
        losses.append(surprise(logits, windows[number]))
        first += len(logits)
        progress("running the bundle", number + 1, len(windows))
    perplexity = {
        "reference": header.perplexity,
        "stored": header.stored.perplexity if stored and header.stored else None,
        "bundle": float(np.exp(np.concatenate(losses).mean(dtype=np.float64))),
    }
    report.perplexity = {name: value for name, value in perplexity.items() if value is not None}
    prompt, expected = windows[0][:PROMPT], arrays["greedy"].tolist()
    got = continuation(runtime, prompt, len(expected))
    report.greedy = greedy(runtime.tokenizer.decode, prompt, expected, got, len(expected))
    if report.evidence is not None:
        report.evidence.divergence = divergence(seen.kl)
        report.evidence.passages = passages(runtime.tokenizer, windows, seen)


def _empty(rows: int, columns: int) -> NDArray[np.float32]:
    return np.empty((rows, columns), np.float32)
