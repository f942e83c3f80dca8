"""What is timed: a bundle in this runtime, the same bundle in onnxruntime-genai, the checkpoint in transformers.

    python -m phimoe_onnx.bench.candidates NAME '{"bundle": ..., "work": {...}, ...}'

does the work of one candidate in a process of its own, so that its memory is its own too, and prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.memory import peak_memory


@dataclass(frozen=True)
class Work:
    """Greedy generation: `batch` prompts of `prompt` tokens each, then `new_tokens` more, on `device` with so many
    threads.
    """

    batch: int
    prompt: int
    new_tokens: int
    device: str
    threads: int | None

    def rows(self, vocab_size: int) -> list[list[int]]:
        """The prompts: the same for every candidate, and all different."""
        return [
            [3 + (7919 * row + 31 * n * n + 17 * n) % (vocab_size - 3) for n in range(self.prompt)]
            for row in range(self.batch)
        ]


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        load: seconds.
        prefill: the batch's prompt tokens a second, to the first new token.
        decode: new tokens a second of the whole batch, after the first.
        memory: bytes at the peak, of the process on the CPU, of the card on CUDA; None where the system does not say.
        token_ids: the new tokens of each row, so that two candidates can be compared.
    """

    load: float
    prefill: float
    decode: float
    memory: int | None
    token_ids: list[list[int]]


def ours(work: Work, bundle: str, cuda_graphs: bool = False) -> Speed:
    """The bundle in this runtime: what `PhiMoE.generate` does, but no end token ends it."""
    from phimoe_onnx.runtime.generate import generate
    from phimoe_onnx.runtime.model import PhiMoE

    start = time.perf_counter()
    model = PhiMoE.load(bundle, device=work.device, threads=work.threads, cuda_graphs=cuda_graphs)
    load = time.perf_counter() - start
    prompts = work.rows(model.decoding.vocab_size)

    def run(new_tokens: int) -> Iterator[list[int]]:
        requests = [model.request(prompt, max_new_tokens=new_tokens, speculate=False) for prompt in prompts]
        requests = [dataclasses.replace(request, eos=frozenset()) for request in requests]
        ahead: list[deque[int]] = [deque() for _ in prompts]  # a row may begin while others are in their prompts
        for piece in generate(model.engine, requests):
            ahead[piece.row].append(piece.token_id)
            if all(ahead):
                yield [tokens.popleft() for tokens in ahead]

    return _time(work, run, load)


def genai(work: Work, bundle: str) -> Speed:
    """The bundle in onnxruntime-genai."""
    import onnxruntime_genai as og

    from phimoe_onnx.bundle import read_manifest

    start = time.perf_counter()
    config = og.Config(bundle)
    config.clear_providers()
    if work.device == "cuda":
        config.append_provider("cuda")
    if work.threads:
        session = {"model": {"decoder": {"session_options": {"intra_op_num_threads": work.threads}}}}
        config.overlay(json.dumps(session))
    model = og.Model(config)
    load = time.perf_counter() - start
    prompts = work.rows(read_manifest(Path(bundle)).decoding.vocab_size)

    def run(new_tokens: int) -> Iterator[list[int]]:
        import numpy as np

        parameters = og.GeneratorParams(model)
        length = work.prompt + new_tokens
        parameters.set_search_options(batch_size=work.batch, max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield generator.get_next_tokens().tolist()

    return _time(work, run, load)


def transformers(work: Work, checkpoint: str, attention: str, experts: str) -> Speed:
    """The checkpoint in transformers 5, float16 on CUDA and bfloat16 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    dtype = torch.float16 if work.device == "cuda" else torch.bfloat16
    if work.threads:
        torch.set_num_threads(work.threads)
    start = time.perf_counter()
    options = {"dtype": dtype, "attn_implementation": attention, "experts_implementation": experts}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options).to(work.device).eval()
    load = time.perf_counter() - start
    prompts = torch.tensor(work.rows(model.config.vocab_size), device=work.device)

    @torch.inference_mode()
    def run(new_tokens: int) -> Iterator[list[int]]:
        cache = DynamicCache(config=model.config)
        ids = prompts
        for _ in range(new_tokens):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            yield ids[:, 0].tolist()

    return _time(work, run, load)


CANDIDATES: dict[str, Callable[..., Speed]] = {"ours": ours, "genai": genai, "transformers": transformers}


def _time(work: Work, run: Callable[[int], Iterator[list[int]]], load: float) -> Speed:
    """Times `run(new_tokens)`, which yields the batch's next tokens, after a short warm-up."""
    for _ in run(3):
        pass
    start = time.perf_counter()
    steps: list[list[int]] = []
    first = start
    for step in run(work.new_tokens):
        if not steps:
            first = time.perf_counter()
        steps.append(step)
    end = time.perf_counter()
    tokens = work.batch * (work.new_tokens - 1)
    rows = [[step[row] for step in steps] for row in range(work.batch)]
    return Speed(
        load, work.batch * work.prompt / (first - start), tokens / max(end - first, 1e-9), _memory(work.device), rows
    )


def _memory(device: str) -> int | None:
    """Bytes: the process's peak, or what the card has in use now, which for a caching allocator is the peak."""
    if device == "cpu":
        return peak_memory()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


def main() -> None:
    """Runs the candidate that the command line names."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    try:
        speed = CANDIDATES[name](Work(**options.pop("work")), **options)
    except PhiMoEError as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(speed)))


if __name__ == "__main__":
    main()
