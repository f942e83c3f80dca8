"""OpenVINO's side of compare_openvino.py: runs in OpenVINO's environment, and needs nothing of phimoe-onnx.

    python openvino_peer.py exact '{"export": FOLDER, "prompts": FILE, "new": 100, "hints": {}, "answers": FILE}'
    python openvino_peer.py speed '{"export": FOLDER, "prompt": [3, 51, ...], "new": 32, "threads": 2}'

`speed` prints one line of JSON with the fields of phimoe_onnx.bench.candidates.Speed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray


def exact(export: str, prompts: str, new: int, hints: dict[str, Any], answers: str) -> None:
    """Writes, for each of the prompts, int64 [S]: the logits after every token, float32 [S, V], as `NAME logits`, and
    the `new` most likely tokens that follow, through the model's own cache, int64 [new], as `NAME tokens`.
    """
    model = openvino.Core().compile_model(Path(export) / "openvino_model.xml", "CPU", hints)
    request = model.create_infer_request()
    names = {value.get_any_name() for value in model.inputs}

    def run(ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        length = past + len(ids)
        feed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(past, length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits: NDArray[np.float32] = request.infer({name: feed[name] for name in feed if name in names})[0][0]
        return logits

    results: dict[str, NDArray[Any]] = {}
    for name, ids in np.load(prompts).items():
        request.reset_state()
        logits = results[f"{name} logits"] = run(ids, 0)
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < new:
            tokens.append(int(run(np.array(tokens[-1:]), len(ids) + len(tokens) - 1)[-1].argmax()))
        results[f"{name} tokens"] = np.array(tokens)
    np.savez(answers, **results)


def speed(export: str, prompt: list[int], new: int, threads: int) -> None:
    """Times openvino_genai's pipeline, whose own clocks these are, after a warm-up on another text: the pipeline keeps
    the cache of texts that it has seen.
    """
    import openvino_genai as genai

    start = time.perf_counter()
    pipeline = genai.LLMPipeline(export, "CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY")
    load = time.perf_counter() - start

    def generate(ids: list[int], new_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        tensor = openvino.Tensor(np.array([ids], np.int64))
        mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
        return pipeline.generate(genai.TokenizedInputs(tensor, mask), config)

    generate(prompt[::-1], 3)
    result = generate(prompt, new)
    metrics = result.perf_metrics
    status = Path("/proc/self/status").read_text().splitlines()
    print(
        json.dumps(
            {
                "load": load,
                "prefill": len(prompt) / metrics.get_ttft().mean * 1e3,
                "decode": 1e3 / metrics.get_tpot().mean,
                "memory": next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM")),
                "token_ids": [list(map(int, result.tokens[0]))],
            }
        )
    )


if __name__ == "__main__":
    {"exact": exact, "speed": speed}[sys.argv[1]](**json.loads(sys.argv[2]))
