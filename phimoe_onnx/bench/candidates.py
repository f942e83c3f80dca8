"""This runtime's own candidate; its peers are in peer.py.

    python -m phimoe_onnx.bench.candidates '{"bundle": ..., "work": {...}, ...}'

does its work in a process of its own, so that its memory is its own too, and prints one line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Iterator

from phimoe_onnx._version import __version__
from phimoe_onnx.bench.peer import Speed, Work, timed
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.memory import peak_memory


def ours(work: Work, bundle: str, cuda_graphs: bool = False) -> Speed:
    """The bundle in this runtime: what `PhiMoE.generate` does, but no end token ends it."""
    from phimoe_onnx.runtime.generate import generate
    from phimoe_onnx.runtime.model import PhiMoE

    start = time.perf_counter()
    model = PhiMoE.load(bundle, device=work.device, threads=work.threads, cuda_graphs=cuda_graphs)
    load = time.perf_counter() - start
    prompts = work.rows()

    def run(new_tokens: int) -> Iterator[list[int]]:
        requests = [model.request(prompt, max_new_tokens=new_tokens, speculate=False) for prompt in prompts]
        requests = [dataclasses.replace(request, eos=frozenset()) for request in requests]
        ahead: list[deque[int]] = [deque() for _ in prompts]  # a row may begin while others are in their prompts
        for piece in generate(model.engine, requests):
            ahead[piece.row].append(piece.token_id)
            if all(ahead):
                yield [tokens.popleft() for tokens in ahead]

    result = timed(work, run, load, model.decoding.cache.dtype)
    memory = peak_memory() if work.device == "cpu" else result.memory  # also where there is no /proc
    return dataclasses.replace(result, memory=memory, versions=f"phimoe-onnx {__version__}")


def main() -> None:
    """Runs the bundle that the command line names."""
    options = json.loads(sys.argv[1])
    try:
        speed = ours(Work(**options.pop("work")), **options)
    except PhiMoEError as error:
        sys.exit(str(error))
    print(json.dumps(dataclasses.asdict(speed)))


if __name__ == "__main__":
    main()
