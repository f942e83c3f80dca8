"""OpenVINO's answers for compare_openvino.py: runs in OpenVINO's environment, and needs nothing of phimoe-onnx.

python openvino_peer.py '{"export": FOLDER, "prompts": FILE, "new": 100, "hints": {}, "answers": FILE}'
"""

from __future__ import annotations

import json
import sys
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


if __name__ == "__main__":
    exact(**json.loads(sys.argv[1]))
