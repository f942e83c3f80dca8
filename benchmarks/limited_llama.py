"""What llama.cpp does in larger_than_memory.py's control group. It runs in the interpreter of llama.cpp's environment
(set_up_peers.py), and imports nothing of this package:

    PYTHON limited_llama.py '{"model": FILE, "prompts": [[...], ...], "steps": ..., "threads": ...}'

The file stays mapped: mlock is off, and so is `use_extra_bufts`, llama.cpp's `--no-repack`. Repacked weights would be a
copy of all of them that no file stands behind.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import gguf
import llama_cpp
import numpy as np
from marks import between, mark


def step_bytes(model: str) -> int:
    """Bytes of weights that a step reads; of embeddings it reads a row, of the experts two."""
    reader = gguf.GGUFReader(model)
    used = reader.get_field("phimoe.expert_used_count").contents() / reader.get_field("phimoe.expert_count").contents()
    shares = {"token_embd.weight": 0.0}
    return sum(
        int(each.n_bytes * shares.get(each.name, used if "_exps." in each.name else 1.0)) for each in reader.tensors
    )


def load(model: str, context: int, threads: int) -> tuple[Any, Any]:
    """llama.cpp's model and context."""
    of_model = llama_cpp.llama_model_default_params()
    of_model.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    of_model.use_extra_bufts = False
    of_model.n_gpu_layers = 0
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), of_model)
    if not loaded:
        sys.exit(f"llama.cpp cannot load {model}")
    of_context = llama_cpp.llama_context_default_params()
    of_context.n_ctx = context
    of_context.n_batch = of_context.n_ubatch = max(512, context)
    of_context.n_threads = of_context.n_threads_batch = threads
    return loaded, llama_cpp.llama_init_from_model(loaded, of_context)


def logits_of(context: Any, ids: list[int], vocab: int) -> np.ndarray:
    """The last token's, float64 [vocab], after `ids` were added to the context."""
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    if status := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
        sys.exit(f"llama_decode gave {status}")
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocab,)).astype(np.float64)
    if not np.isfinite(found).all():
        sys.exit("llama.cpp's logits are not finite")
    return found


def main() -> None:
    """Prints a list of turns, each with what its prompt and its steps took."""
    work = json.loads(sys.argv[1])
    prompts, steps = work["prompts"], work["steps"]
    needed = step_bytes(work["model"])
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    begun = mark()
    model, context = load(work["model"], max(map(len, prompts)) + steps + 1, work["threads"])
    loaded = mark()
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    turns = []
    for turn, prompt in enumerate(prompts):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        random = np.random.default_rng(turn)
        marks, ids, given = [mark()], [], prompt
        for _ in range(steps + 1):
            logits = logits_of(context, given, vocab)
            given = [int((logits + random.gumbel(size=vocab)).argmax())]  # a draw at temperature 1
            ids += given
            marks.append(mark())
            print(f"turn {turn + 1}: {len(ids)} of {steps + 1} tokens", file=sys.stderr, end="\r", flush=True)
        turns.append(between(marks) | {"ids": ids})
    print(file=sys.stderr)
    print(json.dumps({"turns": turns, "load": between([begun, loaded]), "needed": needed}))


if __name__ == "__main__":
    main()
