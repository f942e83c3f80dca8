"""Writes bundle/ and cases.json beside this file: what a runtime in any language must give, token for token.

    python -m spec.make_cases

Releases of ONNX Runtime, processors and kernels round differently, and where two tokens, or two experts, are nearly as
likely that decides. So a case is kept only if every token in it was chosen with a margin, `GAP` and `DISTANCE`, by
every witness: both of the bundle's graphs, and copies whose float32 numbers are off by `NOISE`, which moves the logits
about twice as far as another release does. The candidates of a case are tried until one holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from phimoe_onnx import PhiMoE, export, parity
from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.runtime.generate import Generation
from phimoe_onnx.runtime.sampling import Sampling, draw, penalize, sample, uniform
from spec.manifests import Steps, refused, taken
from tests.checkpoints import MODEL

HERE = Path(__file__).parent
BUNDLE, CASES = HERE / "bundle", HERE / "cases.json"
TEXT = Path(parity.__file__).with_name("persuasion.txt").read_text(encoding="utf-8")

GAP = 0.1  # between the chosen token's logit and the nearest other one
DISTANCE = 0.01  # of a draw's random number from where it would choose another token
NOISE = 1e-3  # relative, in standard deviations, of every scale, norm, bias and router weight of a copy
COPIES = 6

Candidate = tuple[Any, dict[str, Any]]  # a prompt or a batch, and options
Fields = dict[str, Any]
Wanted = Callable[[Generation], bool]


class NearTieError(Exception):
    """A token was chosen without the margin."""


def sample_with_margin(logits: NDArray[np.float32], sampling: Sampling, step: int, seen: Collection[int]) -> int:
    """As `sample`; raises NearTieError where a small difference of the logits may choose another token."""
    chosen = sample(logits, sampling, step, seen)
    logits = penalize(logits, seen, sampling.repetition_penalty)
    if np.partition(np.abs(logits - logits[chosen]), 1)[1] < GAP:
        raise NearTieError
    if sampling.temperature > 0:
        u = uniform(sampling.seed, step)
        if {draw(logits, sampling, float(v)) for v in np.clip([u - DISTANCE, u + DISTANCE], 0, 1 - 2**-53)} != {chosen}:
            raise NearTieError
    return chosen


def witnesses(folder: Path) -> list[PhiMoE]:
    """The bundle on each of its graphs, and the copies with noise."""
    manifest = read_manifest(BUNDLE)
    copies = [(graph, None) for graph in manifest.graphs] + [(manifest.graphs[-1], seed) for seed in range(COPIES)]
    models = []
    for number, (graph, seed) in enumerate(copies):
        copy = folder / str(number)
        shutil.copytree(BUNDLE, copy)
        if seed is not None:
            add_noise(copy / graph.file, np.random.default_rng(seed))
        dataclasses.replace(manifest, graphs=(graph,), files=describe_files(copy)).write(copy)
        models.append(PhiMoE.load(copy, threads=1))
    return models


def add_noise(path: Path, random: np.random.Generator) -> None:
    """Changes every float32 number of a graph a little."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
            array = value.const_value.numpy()
            value.const_value = ir.tensor(
                (array * random.normal(1, NOISE, array.shape)).astype(np.float32), name=value.name
            )
    path.unlink()
    ir.save(model, path)


class Maker:
    """Finds cases."""

    def __init__(self, models: list[PhiMoE]) -> None:
        self.models = models
        self.model = models[0]
        self.cases: list[Fields] = []
        self.ids = self.model.encode(TEXT)

    def add(self, name: str, candidates: Iterable[Candidate], wanted: Wanted = lambda generation: True) -> Fields:
        """Adds the first candidate that has the margin and leads to what is `wanted`."""
        prompt, options, generations = next(self.found(candidates, wanted))
        if isinstance(generations, list):
            fields: Fields = {"batch": prompt, "options": options, "expected": [result(each) for each in generations]}
        else:
            fields = {"prompt": prompt, "options": options, "expected": result(generations)}
        self.cases.append({"name": name, **fields})
        print(name, json.dumps(fields["expected"], ensure_ascii=False)[:200])
        return fields

    def found(
        self, candidates: Iterable[Candidate], wanted: Wanted = lambda generation: True
    ) -> Iterator[tuple[Any, Fields, Any]]:
        """The candidates that have the margin, and with each prompt lead to what is `wanted`, with the generations."""
        for prompt, options in itertools.islice(candidates, 50000):
            agreed = self.agreed(prompt, options)
            if agreed and all(map(wanted, rows(agreed))):
                yield prompt, options, agreed
        raise SystemExit("no candidate has the margin; give more of them, or fewer tokens")

    def agreed(self, prompt: Any, options: Fields) -> Generation | list[Generation] | None:
        """What every witness makes of a prompt or a batch; None where one has no margin or makes another of it."""
        first = None
        for model in self.models:
            try:
                with patch("phimoe_onnx.runtime.generate.sample", sample_with_margin):
                    generation = model.generate(prompt, **options)
            except NearTieError:
                return None
            first = first or generation
            if list(map(result, rows(generation))) != list(map(result, rows(first))):
                return None
        return first

    def windows(self, *lengths: int) -> Iterator[list[int]]:
        """Token ids of the sample text, of the lengths in turn, from anywhere in it."""
        places = random.Random(0)
        while True:
            for length in lengths:
                start = places.randrange(len(self.ids) - length)
                yield self.ids[start : start + length]

    def prompts(self, lengths: Iterable[int], **options: Any) -> list[list[int]]:
        """One prompt of each length that has the margin alone."""
        return [next(self.found((ids, options) for ids in self.windows(length)))[0] for length in lengths]


def openings(words: int) -> Iterator[str]:
    """So many words of the sample text, from anywhere in it."""
    places, text = random.Random(1), TEXT.split(" ")
    while True:
        start = places.randrange(len(text) - words)
        yield " ".join(text[start : start + words])


def questions() -> Iterator[str]:
    """Questions of the kind that the model has seen in its training, and others."""
    names = (
        "Elizabeth",
        "Emma",
        "Anne",
        "Mr. Darcy",
        "Fanny",
        "Edmund",
        "Moses",
        "David",
        "Catherine",
        "Elinor",
        "Marianne",
        "the king",
    )
    for form in ("Tell me about {}.", "Who is {}?", "Where did {} go?", "What did {} say?", "Why was {} angry?"):
        yield from map(form.format, names)
    for opening in openings(9):
        yield f"Continue this passage: {opening}"


def user(content: str) -> Fields:
    return {"role": "user", "content": content}


def result(generation: Generation) -> Fields:
    """What a case expects of one prompt; the pieces of a stream put together are the text."""
    return {name: getattr(generation, name) for name in ("prompt_tokens", "token_ids", "text", "finish_reason")}


def rows(generations: Generation | list[Generation]) -> list[Generation]:
    return generations if isinstance(generations, list) else [generations]


def ends(reason: str) -> Wanted:
    return lambda generation: generation.finish_reason == reason


def texts(maker: Maker) -> None:
    """Greedy and sampled continuations of texts."""
    add = maker.add

    def greedy(prompts: Iterable[Any], count: int = 16, **options: Any) -> Iterator[Candidate]:
        return ((prompt, {"max_new_tokens": count, **options}) for prompt in prompts)

    def seeds(**options: Any) -> Iterator[Candidate]:
        return ((text, {"max_new_tokens": 10, "seed": seed, **options}) for seed, text in enumerate(openings(6)))

    add("greedy", greedy(openings(6), 24))
    add("one new token", greedy(openings(6), 1))
    add("a prompt of one token", greedy([id] for id in range(259, 2000)))
    add("newlines", greedy(f"CHAPTER II\n\n\n{text}\n" for text in openings(4)))
    add("emoji", greedy(f"😀👩‍👩‍👧 {text} 🎉" for text in openings(3)))
    add("CJK", greedy(f"東京 日本語。{text}" for text in openings(3)))
    add("white space", greedy(f"  \t{text}  \r\n " for text in openings(3)))
    add("special tokens in a text", greedy(f"<|user|>\n{text}<|end|>\n<|assistant|>\n" for text in questions()))
    add("half a character at the end", greedy([*maker.model.encode(f"{text} 😀")[:-2]] for text in openings(3)))
    add("greedy with a repetition penalty", greedy(openings(6), repetition_penalty=1.3))

    add("temperature", seeds(temperature=0.8))
    add("top_k", seeds(temperature=1.0, top_k=5))
    add("top_k of one is greedy", greedy(openings(6), temperature=1.0, top_k=1, seed=0))
    add("top_p", seeds(temperature=1.0, top_p=0.7))
    add("min_p", seeds(temperature=1.0, min_p=0.15))
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1}
    add("all ways to sample", seeds(**options))
    add("a hot draw from three", seeds(temperature=5.0, top_k=3))
    add("a negative seed", greedy(openings(6), 8, temperature=0.8, top_p=0.8, seed=-1))
    add("the largest seed of a double", greedy(openings(6), 8, temperature=0.8, top_p=0.8, seed=2**53 - 1))


def stops(maker: Maker) -> None:
    """Texts that end at a stop string, or hold it back in vain."""
    varied = maker.found(
        ((text, {"max_new_tokens": 24}) for text in openings(6)), lambda generation: len(set(generation.token_ids)) > 19
    )
    prompt, _, generation = next(varied)
    text = generation.text

    def stop(name: str, *strings: str, reason: str = "stop") -> None:
        given = strings[0] if len(strings) == 1 else list(strings)
        maker.add(name, [(prompt, {"max_new_tokens": 24, "stop": given})], ends(reason))

    middle = len(text) // 2
    stop("a stop string over several tokens", text[middle - 6 : middle + 6])
    stop(
        "the stop string that comes first",
        text[middle + 9 : middle + 14],
        text[middle : middle + 20],
        "never",
        text[middle + 3 : middle + 8],
    )
    stop("stop strings that begin and never come", text[middle : middle + 9] + "¶", text[-5:] + "¶", reason="length")
    stop("one character", text[3])
    stop("the first characters", text[:4])
    stop("the last characters", text[-3:])
    stop("a special token that does not come", "<|user|>", reason="length")


def rope(maker: Maker) -> None:
    """Prompts on both sides of the rope boundary of 256 and across it, and up to the end of the context."""
    for length, count in ((243, 20), (255, 6), (256, 6), (257, 6), (300, 16), (512, 6), (513, 6), (700, 12)):
        name = f"{length} tokens and {count} new ones"
        maker.add(name, ((ids, {"max_new_tokens": count}) for ids in maker.windows(length)), ends("length"))
    sampled = {"max_new_tokens": 7, "temperature": 0.8, "top_p": 0.8, "seed": 3}
    maker.add("sampled across the boundary", ((ids, sampled) for ids in maker.windows(252)), ends("length"))
    maker.add("to the end of the context", ((ids, {}) for ids in maker.windows(1012)), ends("length"))


def batches(maker: Maker) -> None:
    """Several rows, each as if it were alone."""
    greedy = {"max_new_tokens": 10}
    maker.add("a batch of uneven prompts", [(maker.prompts((3, 40, 1, 17), **greedy), greedy)])
    maker.add("a batch around the boundary", [(maker.prompts((5, 250, 256, 300, 246, 600), **greedy), greedy)])
    sampled = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.8, "seed": 11}
    maker.add("a sampled batch", [(maker.prompts((9, 253, 30), **sampled), sampled)])
    equal = maker.prompts((20,), **sampled)
    maker.add("equal prompts have equal texts", [(equal * 2, sampled)])
    ending = {"max_new_tokens": 24, "stop": [",", "."]}
    varied = maker.found((ids, ending) for ids in maker.windows(249, 12, 30, 280, 8))
    by_length = {len(generation.token_ids): ids for ids, _, generation in itertools.islice(varied, 12)}
    assert len(by_length) > 4
    maker.add("rows that end at different steps", [(list(by_length.values())[:6], ending)])
    text = next(maker.found((opening, greedy) for opening in openings(5)))[0]
    chat = next(maker.found(([user(question)], greedy) for question in questions()))[0]
    maker.add("a batch of every kind of prompt", [([text, chat, *maker.prompts((7,), **greedy)], greedy)])


def chats(maker: Maker) -> None:
    """Messages, put together by the chat format."""

    def ask(*before: Fields, **options: Any) -> Iterator[Candidate]:
        return (([*before, user(question)], {"max_new_tokens": 16, **options}) for question in questions())

    system = {"role": "system", "content": "You are a novelist.\nBe brief. "}
    turns = (user("Who are you? 😀"), {"role": "assistant", "content": "I am nobody.\n\nAnd you? "})
    maker.add("a chat", ask())
    maker.add("a chat that ends by itself", ask(max_new_tokens=60), ends("eos"))
    maker.add(
        "a sampled chat that ends by itself",
        ask(max_new_tokens=60, temperature=0.5, top_p=0.7, seed=3, stop=["<|end|>"]),
        ends("eos"),
    )
    maker.add("a chat with a system message", ask(system))
    maker.add("a chat of several turns", ask(system, *turns))
    maker.add(
        "an empty system message and an empty answer",
        ask({"role": "system", "content": ""}, user("No?"), {"role": "assistant", "content": ""}),
    )
    maker.add("a sampled chat", ask(*turns, temperature=0.8, top_p=0.8, min_p=0.1, seed=11, max_new_tokens=9))
    near = ask(user(" ".join(TEXT.split()[:88])), {"role": "assistant", "content": "Yes."}, max_new_tokens=12)
    maker.add(
        "a chat across the boundary",
        ((chat, options) for chat, options in near if 246 < len(maker.model.encode(chat)) < 256),
    )


def errors(context: int) -> Iterator[Fields]:
    """What must fail, as which kind of error, and what its message must name.

    `bundle` changes a copy of the bundle and `load` are options of `load`, as embedding.md says.
    """

    def generation(name: str, *names: str, prompt: Any = "Emma", **options: Any) -> Fields:
        return {"name": name, "prompt": prompt, "options": options, "error": "GenerationError", "names": names}

    yield generation("an empty prompt", "the prompt", "empty", prompt="")
    yield generation("no tokens", "the prompt", "empty", prompt=[])
    yield {"name": "an empty batch", "batch": [], "options": {}, "error": "GenerationError", "names": ["empty"]}
    yield {
        "name": "an empty prompt in a batch",
        "batch": ["Emma", ""],
        "options": {},
        "error": "GenerationError",
        "names": ["prompt 1", "empty"],
    }
    yield generation("a token id above the vocabulary", "2048", "2047", prompt=[5, 2048])
    yield generation("a negative token id", "-1", prompt=[5, -1])
    yield generation("a prompt as long as the context", f"{context}", prompt=[5] * context)
    yield generation("a prompt longer than the context", f"{context + 76}", prompt=[5] * (context + 76))
    yield generation("more new tokens than fit", "1000", "max_new_tokens", "25", prompt=[5] * 1000, max_new_tokens=25)
    yield {
        "name": "a row of a batch that does not fit", "batch": ["Emma", [5] * context], "options": {},
        "error": "GenerationError", "names": ["prompt 1", f"{context}"],
    }  # fmt: skip
    bad = {
        "max_new_tokens": (0, -1),
        "temperature": (-0.5,),
        "top_k": (-1,),
        "top_p": (0, 1.5),
        "min_p": (-0.1, 1.5),
        "repetition_penalty": (0, -1),
    }
    for option, values in bad.items():
        for value in values:
            yield generation(f"{option} {value}", option, **{option: value})
    yield generation("an empty stop string", "stop", "empty", stop=["a", ""])

    def bundle(name: str, *names: str, steps: Steps, error: str = "BundleError", **load: Any) -> Fields:
        return {"name": name, "bundle": steps, "load": load, "error": error, "names": names}

    yield bundle("no bundle", "manifest.json", steps=[["delete", "manifest.json"]])
    yield bundle("a manifest that is not JSON", "manifest.json", steps=[["replace", "manifest.json", "{", "["]])
    for file in ("tokenizer.json", "model.data", "model.onnx", "config.json"):
        yield bundle(f"no {file}", file, "missing", steps=[["delete", file]])
    yield bundle(
        "a file of another size", "config.json", "bytes", steps=[["replace", "config.json", "phimoe", "phimoe "]]
    )
    yield bundle("a changed file", "config.json", "SHA-256", steps=[["replace", "config.json", "phimoe", "phimoE"]])
    for name, (error, names, steps) in refused().items():
        yield bundle(name, *names, steps=steps, error=error)
    yield bundle("no threads", "threads", "0", steps=[], error="DeviceError", threads=0)


def encodings(model: PhiMoE) -> Iterator[Fields]:
    """Texts and their token ids."""
    for text in (
        "It was", " leading", "  two  spaces  ", "a\nb\r\n\tc", "\n", " ",
        "😀👩‍👩‍👧", "日本語。", "e\u0301é", "ΑΒΓ ☃", "\u0000\u007f",
        "<|user|>\n hi<|end|>", "<s>", "<|end|> <|end|>\n\n", "don't “quote” — it", "�", "x" * 100, TEXT[:1500],
    ):  # fmt: skip
        yield {"text": text, "token_ids": model.encode(text)}


def streams(model: PhiMoE) -> Iterator[Fields]:
    """Prompts, the tokens after them, and the text that becomes certain with each of these."""

    def stream(prompt: list[int], ids: list[int]) -> Fields:
        characters = model.tokenizer.stream(prompt)
        return {"prompt": prompt, "token_ids": ids, "pieces": [characters.add(id) for id in ids]}

    encode = model.tokenizer.encode
    byte = {value: model.tokenizer.token_id(f"<0x{value:02X}>") for value in range(256)}
    text, chat = encode("It was"), encode("<|assistant|>\n")
    mixed = encode("a 😀\n日本<|end|> b")
    for prompt in ([], text, chat, [2044], mixed[:4]):
        yield stream(prompt, mixed)
    smile = [byte[value] for value in "😀".encode()]
    for cut in range(1, 4):
        yield stream([*text, *smile[:cut]], [*smile[cut:], *text])
    yield stream(smile, [*smile[:2], *text, *smile])  # broken in the middle
    yield stream(text, [byte[0xF0], byte[0xFF], *text])
    yield stream(text, [byte[0xE6], byte[0x97]])  # half a character at the end
    yield stream([], [2046, 1, *text, 2046, *text])


def draws() -> Iterator[Fields]:
    """Logits of few values, so that there are ties, options, seeds, and the tokens of the first steps."""
    for number, options in enumerate(
        (
            {},
            {"top_k": 7},
            {"top_p": 0.8},
            {"min_p": 0.2},
            {"temperature": 0.1},
            {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        )
    ):
        logits = np.random.default_rng(number).integers(-12, 12, 50).astype(np.float32) / 4
        fields = {"temperature": 1.0, "seed": 1234567 + number, **options}
        tokens = [sample(logits, Sampling(**fields), step) for step in range(16)]
        yield {"logits": logits.tolist(), "options": fields, "token_ids": tokens}


def main() -> None:
    """Exports the bundle and writes the cases."""
    export(MODEL, BUNDLE, quantize="int4", overwrite=True)
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(witnesses(Path(folder)))
        for part in (texts, stops, rope, batches, chats):
            part(maker)
    sections = {
        "encodings": encodings(maker.model),
        "streams": streams(maker.model),
        "draws": draws(),
        "cases": [
            *maker.cases,
            *taken(maker.cases[0]),
            *errors(maker.model.decoding.context),
        ],
    }
    # one line each, so that a change is seen where it is
    lines = {
        name: ",\n".join(json.dumps(each, ensure_ascii=False) for each in section) for name, section in sections.items()
    }
    text = ",\n".join(f'"{name}": [\n{each}\n]' for name, each in lines.items())
    CASES.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
