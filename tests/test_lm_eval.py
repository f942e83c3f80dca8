"""Bundles in lm-evaluation-harness, on tasks over local files; noxfile.py installs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from phimoe_onnx import reference  # noqa: E402
from phimoe_onnx.errors import GenerationError  # noqa: E402
from phimoe_onnx.exporter.pipeline import export  # noqa: E402
from phimoe_onnx.lm_eval import PhiMoELM  # noqa: E402
from tests.checkpoints import MODEL  # noqa: E402

PAIRS = [
    ("It is a truth universally", " acknowledged, that a single man"),
    ("And the LORD said unto", " Moses"),
    ("And the LORD said unto", " Aaron"),  # with its neighbour one input, if each is one token
    ("", "Emma was not"),
    ("She was ", "happy"),  # lm-eval moves the space
    ("And it came to pass, " * 40, " that he went"),  # past the rope boundary
]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "num_fewshot": 0,
}
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(MODEL, tmp_path_factory.mktemp("bundles") / "austen")


@pytest.fixture(scope="module")
def lm(bundle: Path) -> PhiMoELM:
    return PhiMoELM(bundle, batch_size=4, threads=1)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def reference_value(ids: list[int], count: int) -> tuple[float, bool]:
    """The sum over the last `count` tokens in PyTorch, and whether each is the most likely one."""
    model = reference.load_reference(MODEL)
    logprobs = torch.from_numpy(reference.logits(model, ids[:-1])).log_softmax(-1)[-count:]
    targets = torch.tensor(ids[-count:])
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


def test_loglikelihoods_are_pytorchs_and_the_sums_of_score(lm: PhiMoELM) -> None:
    results = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, results, strict=True):
        if context:
            before, after = lm._encode_pair(context, continuation)
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
        assert after
        assert (value, greedy) == (pytest.approx(reference_value(before + after, len(after))[0], abs=1e-3), greedy)
        assert greedy == reference_value(before + after, len(after))[1]
        assert value == pytest.approx(lm.model.score(before + after).logprobs[-len(after) :].sum(), abs=1e-4)


def test_what_greedy_decoding_writes_is_greedy(lm: PhiMoELM) -> None:
    context = lm.model.encode("It was a fine morning, and")
    new = lm.model.generate(context, max_new_tokens=8).token_ids
    other = [*new[:-1], new[-1] - 1]
    results = lm._loglikelihood_tokens([(None, context, new), (None, context, other)], disable_tqdm=True)
    assert [greedy for _, greedy in results] == [True, False]
    assert results[0][0] > results[1][0]


def test_requests_with_one_input_are_one_pass(lm: PhiMoELM, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    score = lm._score
    monkeypatch.setattr(lm, "_score", lambda ids, rest: passes.append(len(rest)) or score(ids, rest))
    results = lm._loglikelihood_tokens([(None, [1, 5, 9], [each]) for each in range(40, 44)], disable_tqdm=True)
    assert passes == [4]
    expected = [reference_value([1, 5, 9, each], 1)[0] for each in range(40, 44)]
    assert [value for value, _ in results] == pytest.approx(expected, abs=1e-3)


def test_rolling_windows_score_each_token_once(bundle: Path, lm: PhiMoELM) -> None:
    text = "It is a truth universally acknowledged, that a single man must be in want of a wife."
    ids = [lm.prefix_token_id, *lm.tok_encode(text, add_special_tokens=False)]
    (value,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert value == pytest.approx(lm.model.score(ids).logprobs.sum(), abs=1e-3)
    assert value == pytest.approx(reference_value(ids, len(ids) - 1)[0], abs=1e-2)
    short = PhiMoELM(bundle, threads=1, max_length=10)
    (windows,) = short.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    # each window but the last: 10 tokens that stand behind the one before them; the last sees 10 tokens, too
    total, done = 0.0, 1
    while done < len(ids):
        new = min(10, len(ids) - done)
        total += reference_value(ids[max(0, done + new - 11) : done + new], new)[0]
        done += new
    assert windows == pytest.approx(total, abs=1e-2)


def test_generation_is_phimoes(lm: PhiMoELM) -> None:
    prompts = ["It was a fine morning, and", "And the LORD said", "Emma", "He was", "A long walk"]
    options = {"until": [".", "\n\n"], "max_gen_toks": 20}
    drawn = {"do_sample": True, "temperature": 0.8, "seed": 3, "max_gen_toks": 10, "until": []}
    requests = [(prompt, options) for prompt in prompts] + [("Emma", drawn)]
    texts = lm.generate_until(instances("generate_until", requests), disable_tqdm=True)
    for prompt, text in zip(prompts, texts[:-1], strict=True):
        alone = lm.model.generate(prompt, max_new_tokens=20, stop=[".", "\n\n"]).text
        assert text == alone.removeprefix(" ")
        assert "." not in text
    alone = lm.model.generate("Emma", max_new_tokens=10, temperature=0.8, seed=3).text
    assert texts[-1] == alone.removeprefix(" ")
    assert texts[-1] != texts[2]


def test_a_chat_is_prompted_as_by_generate(lm: PhiMoELM) -> None:
    messages = [{"role": "user", "content": "Who is Emma?"}]
    prompt = lm.apply_chat_template(messages)
    assert lm.tok_encode(prompt) == lm.model.encode(messages)
    answer = {"role": "assistant", "content": "She is"}
    assert lm.apply_chat_template([*messages, answer], add_generation_prompt=False) == prompt + "She is"
    assert lm.chat_template(True)
    assert lm.chat_template(False) is None
    assert lm.tokenizer_name == "austen"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "bundle=FOLDER"),
        ({"max_length": 0}, ""),
        ({"max_length": 10**9}, "max_length is 1000000000"),
        ({"dtype": "float32"}, "has dtype"),
    ],
)
def test_bad_arguments(bundle: Path, arguments: dict[str, Any], words: str) -> None:
    given = arguments if words == "bundle=FOLDER" else {"bundle": bundle, **arguments}
    if not words:  # as if it were not given
        assert PhiMoELM(**given).max_length == PhiMoELM(bundle).max_length
        return
    with pytest.raises(GenerationError, match=words):
        PhiMoELM(**given)


def test_an_option_that_phimoe_has_not(lm: PhiMoELM) -> None:
    with pytest.raises(GenerationError, match="num_beams is no option"):
        lm.generate_until(instances("generate_until", [("Emma", {"num_beams": 4})]), disable_tqdm=True)


def write_tasks(folder: Path, lm: PhiMoELM) -> None:
    text = lm.model.generate("Emma", max_new_tokens=12, stop=["."]).text.removeprefix(" ")
    documents = [
        {"question": "It is a truth universally", "choices": ["acknowledged", "zebra"], "answer": 0, "text": "no"},
        {"question": "Emma", "choices": ["zebra", "was"], "answer": 1, "text": text},
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        # YAML reads JSON
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **TASK, **task, "dataset_kwargs": files}))


def test_tasks(tmp_path: Path, lm: PhiMoELM) -> None:
    write_tasks(tmp_path, lm)
    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    assert found["choices"]["acc,none"] == 1.0
    assert found["writing"]["exact_match,none"] == 0.5
    texts = ["It is a truth universally", "Emma"]
    total = sum(lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0] for text in texts)
    words = sum(len(text.split()) for text in texts)
    assert found["rolling"]["word_perplexity,none"] == pytest.approx(2.718281828459045 ** (-total / words))


def test_the_command(tmp_path: Path, lm: PhiMoELM, bundle: Path) -> None:
    write_tasks(tmp_path, lm)
    command = [sys.executable, "-m", "phimoe_onnx.lm_eval", "run", "--model", "phimoe_onnx", "--model_args"]
    options = ["--tasks", "choices,writing", "--include_path", str(tmp_path), "--batch_size", "2"]
    result = subprocess.run(
        [*command, f"bundle={bundle},threads=1", *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "|choices|" in result.stdout
    bad = subprocess.run([*command, f"bundle={tmp_path}", *options], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stderr.splitlines()[-1].startswith(f"error: not a bundle of phimoe-export: {tmp_path}")
