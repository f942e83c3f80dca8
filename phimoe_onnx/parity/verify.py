"""verify(): a bundle's logits and text against the PyTorch reference, on real text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phimoe_onnx import reference as pytorch
from phimoe_onnx.bundle import Manifest, check_files, read_manifest
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import GenerationError, PhiMoEError
from phimoe_onnx.modeling import PhiMoEForCausalLM
from phimoe_onnx.parity.comparison import Comparison, log_softmax
from phimoe_onnx.parity.report import Check, Report
from phimoe_onnx.parity.stored import is_rounded, stored_model
from phimoe_onnx.parity.texts import compare_texts, cut_texts
from phimoe_onnx.parity.thresholds import Thresholds, default_thresholds
from phimoe_onnx.runtime.generate import generate
from phimoe_onnx.runtime.model import PhiMoE

SAMPLE = Path(__file__).with_name("persuasion.txt")  # Jane Austen, Persuasion, chapters 1 and 2


def verify(
    bundle: str | Path,
    reference: str | Path,
    *,
    adapter: str | Path | None = None,
    text: str | None = None,
    tokens: int = 4096,
    new_tokens: int = 64,
    device: str = "cpu",
    thresholds: Thresholds | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compares a bundle with the checkpoint that it came from.

    Args:
        bundle: its folder.
        reference: the checkpoint's folder.
        adapter: the folder of the LoRA adapter that the export merged into it.
        text: what to run; two chapters of Persuasion if not given.
        tokens: how many tokens of it at the most.
        new_tokens: length of the greedy continuations.
        device: where the bundle runs; the reference always runs in PyTorch on the CPU in float32.
        thresholds: the most that is allowed; by default those of the bundle's precision.
        progress: called with the windows done and the windows to do.

    Raises:
        PhiMoEError: as for loading either, the text is too short, or a threshold is given for what the task does not
            have.
    """
    folder, checkpoint = Path(bundle), Path(reference)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hash_everything=True)
    exact = pytorch.load_reference(checkpoint, manifest.task, None if adapter is None else Path(adapter))
    runtime = PhiMoE.load(folder, device=device)
    if read_config(folder) != exact.config:
        raise PhiMoEError(
            f"{bundle}: its config.json is not that of {reference}, so it is not this checkpoint's bundle"
        )
    token_ids = runtime.tokenizer.encode(text if text is not None else SAMPLE.read_text(encoding="utf-8"))[:tokens]
    windows = list((cut if manifest.task == "text-generation" else cut_texts)(token_ids, exact.config))
    report = _empty_report(bundle, reference, manifest, windows, thresholds or default_thresholds(manifest))
    if isinstance(exact, PhiMoEForCausalLM):
        stored = stored_model(exact, folder, manifest) if is_rounded(manifest) else None
        _compare_tokens(report, runtime, exact, stored, windows, progress)
        report.greedy = _greedy(runtime, exact, windows[0], new_tokens)
    else:
        stored_text = stored_model(exact, folder, manifest) if is_rounded(manifest) else None
        compare_texts(report, runtime, exact, stored_text, windows, progress)
    report.checks = list(_checks(report, report.thresholds))
    report.failures = [check.failure() for check in report.checks if not check.passed]
    return report


def _empty_report(
    bundle: object, reference: object, manifest: Manifest, windows: list[list[int]], thresholds: Thresholds
) -> Report:
    rounded = is_rounded(manifest)
    return Report(
        bundle=str(bundle),
        reference=str(reference),
        task=manifest.task,
        quantize=manifest.quantize,
        target=manifest.target,
        tokens=sum(len(window) for window in windows),
        windows=[len(window) for window in windows],
        thresholds=thresholds,
        bundle_to_reference=Comparison(),
        bundle_to_stored=Comparison() if rounded else None,
        stored_to_reference=Comparison() if rounded else None,
        routing_agreement=None,
        perplexity={},
    )


def _compare_tokens(
    report: Report,
    runtime: PhiMoE,
    exact: PhiMoEForCausalLM,
    stored: PhiMoEForCausalLM | None,
    windows: Sequence[list[int]],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fills in the comparisons of a report on text generation; `stored` rounds weights, keys and values as the bundle
    does.
    """
    nll: dict[str, list[NDArray[np.float32]]] = {}
    same_routing: list[float] = []
    for done, window in enumerate(windows):
        if progress:
            progress(done, len(windows))
        recording, routing = pytorch.recorded(exact)
        expected = pytorch.logits(recording, window)
        got = runtime.logits(window)
        outputs = {"reference": expected, "bundle": got}
        report.bundle_to_reference.add(got, expected)
        if stored and report.bundle_to_stored and report.stored_to_reference:
            recording, stored_routing = pytorch.recorded(stored)
            outputs["stored"] = pytorch.logits(recording, window)
            report.stored_to_reference.add(pytorch.logits(pytorch.replayed(stored, routing), window), expected)
            report.bundle_to_stored.add(got, outputs["stored"])
            same_routing.append(pytorch.agreement(routing, stored_routing))
        for name, output in outputs.items():
            nll.setdefault(name, []).append(
                -np.take_along_axis(log_softmax(output[:-1]), np.array(window[1:])[:, None], axis=-1)
            )
    report.perplexity = {
        name: float(np.exp(np.concatenate(values).mean(dtype=np.float64))) for name, values in nll.items()
    }
    if same_routing:
        report.routing_agreement = float(np.average(same_routing, weights=report.windows))


def cut(token_ids: Sequence[int], config: PhiMoEConfig) -> Iterator[list[int]]:
    """Windows of a text: up to 256 tokens for its first half, then one up to the context's end, past rope boundary and
    window.

    Raises:
        PhiMoEError: the text has fewer than two tokens.
    """
    if len(token_ids) < 2:
        raise PhiMoEError(f"the text has {len(token_ids)} tokens, at least 2 are needed to compare anything")
    short = min(256, config.max_position_embeddings)
    half = len(token_ids) // 2 if len(token_ids) > short else len(token_ids)
    for start in range(0, half - 1, short):
        yield list(token_ids[start : min(start + short, half)])
    if rest := list(token_ids[half : half + config.max_position_embeddings]):
        yield rest


def _greedy(runtime: PhiMoE, exact: Any, window: list[int], new_tokens: int) -> dict[str, Any]:
    prompt = window[: min(32, len(window))]
    new = min(new_tokens, runtime.decoding.context - len(prompt))
    expected = pytorch.greedy(exact, prompt, new)
    got: list[int] = []
    with suppress(GenerationError):  # logits that are not finite fail the comparison as it is
        request = dataclasses.replace(runtime.request(prompt, max_new_tokens=new), eos=frozenset())  # none ends it
        got.extend(piece.token_id for piece in generate(runtime.engine, [request]))
    agreeing = next(
        (n for n, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
    )
    decode = runtime.tokenizer.decode
    return {
        "prompt": decode(prompt),
        "reference": decode(expected),
        "bundle": decode(got),
        "agreeing": agreeing,
        "new_tokens": new,
    }


def _checks(report: Report, limits: Thresholds) -> Iterator[Check]:
    measured = {
        "mean_difference": report.bundle_to_reference.mean_difference,
        "max_difference": report.bundle_to_reference.max_difference,
        "kernel_difference": report.bundle_to_stored.mean_difference if report.bundle_to_stored else 0.0,
        "kl": report.bundle_to_reference.kl,
        "kernel_kl": report.bundle_to_stored.kl if report.bundle_to_stored else 0.0,
        "perplexity_ratio": report.perplexity["bundle"] / report.perplexity["reference"] if report.perplexity else None,
    }
    for name, value in measured.items():
        limit = getattr(limits, name)
        if limit is None:
            continue
        if value is None:
            raise PhiMoEError(f"there is no {name} to check of a bundle for {report.task}")
        yield Check(name, value, limit, bool(value <= limit))  # False of a NaN
