"""verify(): a bundle's outputs and text against the PyTorch reference, on real text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from phimoe_onnx import layered
from phimoe_onnx.bundle import Manifest, check_files, read_manifest
from phimoe_onnx.checkpoint.adapter import read_adapter
from phimoe_onnx.checkpoint.source import task_for
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.layered import Ran, Read, Text
from phimoe_onnx.parity.bits import matrices, stored_bits
from phimoe_onnx.parity.comparison import Comparison, surprise
from phimoe_onnx.parity.evidence import (
    Evidence,
    Routing,
    Tokens,
    agreement,
    divergence,
    passages,
    shares,
    weight_errors,
)
from phimoe_onnx.parity.outputs import PROMPT, bundle_outputs, continuation, greedy, is_distribution
from phimoe_onnx.parity.products import ROWS, Errors, Products
from phimoe_onnx.parity.report import Report, empty_report, judge
from phimoe_onnx.parity.save_golden import Kept
from phimoe_onnx.parity.stored import is_rounded, stored_attention, stored_weights
from phimoe_onnx.parity.texts import cut_texts
from phimoe_onnx.parity.thresholds import Thresholds, default_thresholds
from phimoe_onnx.progress import Progress
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.scratch import Scratch
from phimoe_onnx.text.tokenizer import Tokenizer

SAMPLE = Path(__file__).with_name("persuasion.txt")  # Jane Austen, Persuasion, chapters 1 and 2
Outputs = NDArray[np.float32]


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
    save_golden: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares a bundle with the checkpoint that it came from.

    The bundle runs first and is then given up; PyTorch runs layer by layer (layered.py). So the most memory that is
    needed at once is what the bundle takes to run, or some 4 GB for the largest PhiMoE.

    Args:
        bundle: its folder.
        reference: the checkpoint's folder.
        adapter: the folder of the LoRA adapter that the export merged into it.
        text: what to run; two chapters of Persuasion if not given.
        tokens: how many tokens of it at the most.
        new_tokens: length of the greedy continuations.
        device: where the bundle runs; the reference always runs in PyTorch on the CPU in float32.
        thresholds: the most that is allowed; by default those of the bundle's precision.
        save_golden: a file to keep in it what `verify_golden` needs of the reference; it is written over.
        progress: called with what is being done, and how much is done and to do of it: windows, or matrices.

    Raises:
        PhiMoEError: as for loading either, the text is too short, a threshold is given for what the task does not
            have, or the golden file or intermediate results cannot be written.
    """
    folder, checkpoint = Path(bundle), Path(reference)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hash_everything=True)
    config = read_config(checkpoint)
    task = task_for(config, manifest.task, checkpoint)
    merged = None if adapter is None else read_adapter(Path(adapter))
    read = layered.checkpoint_weights(config, parameters(config, read_headers(checkpoint), task, merged))
    if read_config(folder) != config:
        raise PhiMoEError(
            f"{bundle}: its config.json is not that of {reference}, so it is not this checkpoint's bundle"
        )
    report_progress = progress or (lambda what, done, total: None)
    scratch = Scratch()
    answers = _ask(folder, device, text, tokens, new_tokens, scratch, report_progress)
    limits, rounded = thresholds or default_thresholds(manifest), is_rounded(manifest)
    report = empty_report(bundle, reference, manifest, answers.windows, limits, stored=rounded)
    passes, errors = _run(folder, manifest, config, read, answers, scratch, report_progress)
    kept = None if save_golden is None else Kept()
    report.evidence = Evidence(_routing(passes, config.num_local_experts))
    report.evidence.weights = weight_errors(errors, stored_bits(manifest, config), matrices(config, task))
    seen = _compare(report, answers, passes, is_distribution(manifest), kept)
    expected = _expected_continuation(passes["greedy"], answers)
    if task == "text-generation":
        decode = answers.tokenizer.decode
        report.greedy = greedy(decode, answers.prompt, expected, answers.continuation, answers.new)
        report.evidence.divergence = divergence(seen.kl)
        report.evidence.passages = passages(answers.tokenizer, answers.windows, seen)
    if save_golden is not None and kept is not None:
        kept.arrays["token_ids"] = [np.array(window, np.int32) for window in answers.windows]
        kept.arrays["routing"] = [torch.stack(each.routing)[:, 0].short().numpy() for each in passes["reference"].ran]
        if task == "text-generation":
            kept.arrays["greedy"] = [np.array(expected, np.int32)]
        kept.golden(report, manifest, checkpoint, merged, answers.new, report_progress).write(Path(save_golden))
    judge(report)
    return report


@dataclass(frozen=True)
class Answers:
    """What the bundle gave: outputs of each window (of other tasks one array for all texts), and a continuation of up
    to `new` tokens.
    """

    windows: list[list[int]]
    outputs: list[Outputs]
    prompt: list[int]
    new: int
    continuation: list[int]
    tokenizer: Tokenizer


def _ask(
    folder: Path, device: str, text: str | None, tokens: int, new_tokens: int, scratch: Scratch, progress: Progress
) -> Answers:
    """Loads the bundle, runs it, and gives it up."""
    runtime, config = PhiMoE.load(folder, device=device), read_config(folder)
    token_ids = runtime.tokenizer.encode(text if text is not None else SAMPLE.read_text(encoding="utf-8"))[:tokens]
    generates = runtime.manifest.task == "text-generation"
    windows = list((cut if generates else cut_texts)(token_ids, config))
    outputs = []
    number = len(windows) if generates else 1
    progress("running the bundle", 0, number)
    for output in bundle_outputs(runtime, windows, scratch.empty):
        outputs.append(output)
        progress("running the bundle", len(outputs), number)
    prompt = windows[0][:PROMPT]
    new = min(new_tokens, runtime.decoding.context - len(prompt)) if generates else 0
    said = continuation(runtime, prompt, new) if new else []
    return Answers(windows, outputs, prompt, new, said, runtime.tokenizer)


@dataclass(frozen=True)
class _Pass:
    """Hidden states of the windows, and what makes outputs of them."""

    ran: list[Ran]
    head: Callable[[torch.Tensor], torch.Tensor]


def _run(
    folder: Path,
    manifest: Manifest,
    config: PhiMoEConfig,
    read: Read,
    answers: Answers,
    scratch: Scratch,
    progress: Progress,
) -> tuple[dict[str, _Pass], dict[str, float]]:
    """PyTorch over the checkpoint: "reference" and "greedy"; where the bundle rounds, over what it stores: "stored" and
    "replayed", with the reference's choice of experts. With them the errors of the stored weights, by name.
    """
    rounded = is_rounded(manifest)
    windows = [Text(window) for window in answers.windows]
    total, done = layered.steps(config) * (1 + rounded), 0

    def step(of: str, where: str) -> None:
        nonlocal done
        progress(f"PyTorch over the {of}, {where}", done, total)
        done += 1

    texts = [*windows, *continued(config, answers)]
    stored = stored_weights(read, folder, manifest, config) if rounded else read
    errors = Errors(stored, matrices(config, manifest.task))
    products = Products(read, errors.look)
    watched = products.read if rounded else read
    with products if rounded else nullcontext():
        ran = layered.run(config, watched, texts, scratch=scratch, step=partial(step, "checkpoint"))
        head = layered.head(config, manifest.task, watched)
        head(ran[0].hidden[:, :ROWS])
    count = len(windows)
    passes = {"reference": _Pass(ran[:count], head), "greedy": _Pass(ran[count:], head)}
    if rounded:
        texts = [*windows, *(Text(text.token_ids, each.routing) for text, each in zip(windows, ran, strict=False))]
        attention = stored_attention(folder, manifest)
        ran = layered.run(
            config, stored, texts, attention=attention, scratch=scratch, step=partial(step, "stored weights")
        )
        head = layered.head(config, manifest.task, stored)
        passes |= {"stored": _Pass(ran[:count], head), "replayed": _Pass(ran[count:], head)}
    return passes, errors.by_name()


def _routing(passes: dict[str, _Pass], experts: int) -> Routing:
    def chosen(name: str) -> NDArray[np.int64]:
        parts = [torch.stack(each.routing)[:, 0].numpy() for each in passes[name].ran]
        return np.concatenate(parts, axis=1)

    reference = chosen("reference")
    if "stored" not in passes:
        return Routing(shares(reference, experts))
    stored = chosen("stored")
    return Routing(shares(reference, experts), shares(stored, experts), agreement(reference, stored))


def _compare(
    report: Report, answers: Answers, passes: dict[str, _Pass], distribution: bool, kept: Kept | None
) -> Tokens:
    """Fills in the comparisons of a report, and what is kept of the outputs; returns what is known of each token."""
    seen = Tokens()
    generates = report.task == "text-generation"
    losses: dict[str, list[Outputs]] = defaultdict(list)
    sources = {name: _outputs(each, generates) for name, each in passes.items() if name != "greedy"}
    add = partial(_add, distribution=distribution)
    for number, got in enumerate(answers.outputs):
        outputs = {"bundle": got} | {name: next(source) for name, source in sources.items()}
        expected, stored, replayed = outputs["reference"], outputs.get("stored"), outputs.get("replayed")
        kl = report.bundle_to_reference.add(got, expected, distribution=distribution)
        seen.add(kl, expected.argmax(axis=-1), got.argmax(axis=-1))
        add(report.bundle_to_stored, got, stored)
        add(report.stored_to_reference, replayed, expected)
        if generates:
            for name in ("reference", "stored", "bundle"):
                if name in outputs:
                    losses[name].append(surprise(outputs[name], answers.windows[number]))
        if kept is not None:
            (kept.logits if generates else kept.outputs)(expected, stored)
    report.perplexity = {
        name: float(np.exp(np.concatenate(parts).mean(dtype=np.float64))) for name, parts in losses.items()
    }
    if "stored" in passes:
        pairs = zip(passes["reference"].ran, passes["stored"].ran, strict=True)
        same = [layered.agreement(one.routing, other.routing) for one, other in pairs]
        report.routing_agreement = float(np.average(same, weights=report.windows))
    return seen


def _add(comparison: Comparison | None, got: Outputs | None, expected: Outputs | None, *, distribution: bool) -> None:
    if comparison is not None and got is not None and expected is not None:
        comparison.add(got, expected, distribution=distribution)


@torch.inference_mode()
def _outputs(each: _Pass, generates: bool) -> Iterator[Outputs]:
    """Of each window its logits; of other tasks one array for all texts."""
    if not generates:
        yield torch.cat([each.head(ran.hidden) for ran in each.ran]).numpy()
        return
    for ran in each.ran:
        yield each.head(ran.hidden).numpy()


def continued(config: PhiMoEConfig, answers: Answers) -> list[Text]:
    """The prompt with the bundle's continuation, once more up to the rope boundary if that lies between the two.

    A step rotates all positions by the factors of the length so far. So the logits at a position are those of a step
    if the text's end lies on the same side of the boundary.
    """
    if not answers.new:
        return []
    token_ids = [*answers.prompt, *answers.continuation]
    ends = [len(token_ids)]
    boundary = config.longrope.original_max_position_embeddings if config.longrope else None
    if boundary is not None and len(answers.prompt) <= boundary < len(token_ids):
        ends.insert(0, boundary)
    return [Text(token_ids[:end]) for end in ends]


@torch.inference_mode()
def _expected_continuation(each: _Pass, answers: Answers) -> list[int]:
    """The reference's own greedy continuation, as far as it is the bundle's, and the token with which it parts.

    As long as the two agree, a step of the reference has seen the bundle's tokens, so its choice is the best token at
    that position of one pass over them.
    """
    choices: list[int] = []
    for ran in each.ran:
        start = len(answers.prompt) - 1 + len(choices)
        choices += each.head(ran.hidden[:, start:]).argmax(dim=-1).tolist()
    choices = choices[: answers.new]
    pairs = enumerate(zip(choices, answers.continuation, strict=False))
    parting = next((n for n, (own, other) in pairs if own != other), len(choices))
    return choices[: parting + 1]


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
