"""Writes bundle/ and cases.json beside this file: what a runtime in any language must give, token for token.

    python -m spec.make_cases             both
    python -m spec.make_cases --bundle    the bundle, for which every case of cases.json must still hold
    python -m spec.make_cases --cases     the cases, for the bundle that is there

Releases of ONNX Runtime, processors and kernels round differently, and where two tokens, or two experts, are nearly as
likely that decides. So a case is kept only if every token in it was chosen with a margin (witness.py) by each of the
bundle's graphs on real releases of ONNX Runtime, and is the same in copies whose float32 numbers are off a little,
which moves the logits about twice as far as another release does (releases.py).

A case that is in cases.json stays as it is where all witnesses hold to it; take its line out to have another chosen.
Else the candidates of a case are tried until one holds. The releases are installed into environments of their own
under build/witnesses.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from phimoe_onnx import PhiMoE, export, parity
from phimoe_onnx.runtime.sampling import Sampling, sample
from spec.manifests import Steps, refused, taken
from spec.releases import Fields, Witness, console, witnesses
from spec.witness import Result
from tests.checkpoints import MODEL

HERE = Path(__file__).parent
BUNDLE, CASES = HERE / "bundle", HERE / "cases.json"
TEXT = Path(parity.__file__).with_name("persuasion.txt").read_text(encoding="utf-8")

Candidate = tuple[Any, dict[str, Any]]  # a prompt or a batch, and options
Wanted = Callable[[Result], bool]


class Maker:
    """Finds cases; keeps those of `old` that hold."""

    def __init__(self, witnesses: list[Witness], old: Iterable[Fields]) -> None:
        self.witnesses = witnesses
        self.model = PhiMoE.load(BUNDLE, threads=1)
        self.old = {case["name"]: case for case in old if "expected" in case and "bundle" not in case}
        self.cases: list[Fields] = []
        self.ids = self.model.encode(TEXT)

    def add(self, name: str, candidates: Iterable[Candidate], wanted: Wanted = lambda result: True) -> None:
        """Adds the old case of this name or the first candidate that has the margin and leads to what is `wanted`."""
        old = self.old.get(name)
        if old and self.agreed(old) == old["expected"] and all(map(wanted, rows(old["expected"]))):
            self.cases.append(old)
            console.print(f"stays  {name}")
            return
        with console.status(name):
            prompt, options, results = next(self.found(candidates, wanted))
        self.cases.append({"name": name, **asked(prompt), "options": options, "expected": results})
        console.print(f"[bold]{'other' if old else 'new':7}[/]{name}")

    def found(
        self, candidates: Iterable[Candidate], wanted: Wanted = lambda result: True
    ) -> Iterator[tuple[Any, Fields, Any]]:
        """The candidates that have the margin, and with each prompt lead to what is `wanted`, with the results."""
        for prompt, options in itertools.islice(candidates, 50000):
            results = self.agreed({**asked(prompt), "options": options})
            if results and all(map(wanted, rows(results))):
                yield prompt, options, results
        raise SystemExit("no candidate has the margin; give more of them, or fewer tokens")

    def agreed(self, case: Fields) -> Result | list[Result] | None:
        """What every witness makes of a case's prompt or batch; None where one is not sure or makes another of it."""
        prompts = case["batch"] if "batch" in case else [case["prompt"]]
        first: list[Result] | None = None
        for witness in self.witnesses:
            results = witness.continued(prompts, case["options"])
            if results is None or results != (first or results):
                return None
            first = results
        assert first
        return first if "batch" in case else first[0]

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


def once(candidate: Callable[[], Candidate]) -> Iterator[Candidate]:
    """One candidate, which is made only where the old case does not hold."""
    yield candidate()


def user(content: str) -> Fields:
    return {"role": "user", "content": content}


def asked(prompt: Any) -> Fields:
    """A prompt or a batch under its key in a case."""
    batch = isinstance(prompt, list) and isinstance(prompt[0], str | list)
    return {"batch" if batch else "prompt": prompt}


def rows(results: Result | list[Result]) -> list[Result]:
    return results if isinstance(results, list) else [results]


def ends(reason: str) -> Wanted:
    return lambda result: result["finish_reason"] == reason


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

    @functools.cache
    def varied() -> tuple[str, str]:
        """A prompt, and the text of many different tokens that follows."""
        found = maker.found(
            ((text, {"max_new_tokens": 24}) for text in openings(6)), lambda result: len(set(result["token_ids"])) > 19
        )
        prompt, _, results = next(found)
        return prompt, results["text"]

    def stop(name: str, strings: Callable[[str], list[str]], reason: str = "stop") -> None:
        def candidate() -> Candidate:
            prompt, text = varied()
            given = strings(text)
            return prompt, {"max_new_tokens": 24, "stop": given[0] if len(given) == 1 else given}

        maker.add(name, once(candidate), ends(reason))

    def half(text: str, start: int, end: int) -> str:
        """Characters counted from the text's middle."""
        return text[len(text) // 2 + start : len(text) // 2 + end]

    stop("a stop string over several tokens", lambda text: [half(text, -6, 6)])
    stop(
        "the stop string that comes first",
        lambda text: [half(text, 9, 14), half(text, 0, 20), "never", half(text, 3, 8)],
    )
    stop(
        "stop strings that begin and never come",
        lambda text: [half(text, 0, 9) + "¶", text[-5:] + "¶"],
        reason="length",
    )
    stop("one character", lambda text: [text[3]])
    stop("the first characters", lambda text: [text[:4]])
    stop("the last characters", lambda text: [text[-3:]])
    stop("a special token that does not come", lambda text: ["<|user|>"], reason="length")


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

    def batch(name: str, lengths: Iterable[int], times: int = 1, **options: Any) -> None:
        maker.add(name, once(lambda: (maker.prompts(lengths, **options) * times, options)))

    greedy = {"max_new_tokens": 10}
    sampled = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.8, "seed": 11}
    batch("a batch of uneven prompts", (3, 40, 1, 17), **greedy)
    batch("a batch around the boundary", (5, 250, 256, 300, 246, 600), **greedy)
    batch("a sampled batch", (9, 253, 30), **sampled)
    batch("equal prompts have equal texts", (20,), times=2, **sampled)
    ending = {"max_new_tokens": 24, "stop": [",", "."]}

    def uneven() -> Candidate:
        varied = maker.found((ids, ending) for ids in maker.windows(249, 12, 30, 280, 8))
        by_length = {len(result["token_ids"]): ids for ids, _, result in itertools.islice(varied, 12)}
        assert len(by_length) > 4
        return list(by_length.values())[:6], ending

    def mixed() -> Candidate:
        text = next(maker.found((opening, greedy) for opening in openings(5)))[0]
        chat = next(maker.found(([user(question)], greedy) for question in questions()))[0]
        return [text, chat, *maker.prompts((7,), **greedy)], greedy

    maker.add("rows that end at different steps", once(uneven))
    maker.add("a batch of every kind of prompt", once(mixed))


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
    near = ask(user(" ".join(TEXT.split()[:112])), {"role": "assistant", "content": "Yes."}, max_new_tokens=12)
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


def make(witnesses: list[Witness], old: Fields) -> Fields:
    """All sections of cases.json; a case of `old` that holds stays."""
    maker = Maker(witnesses, old["cases"])
    for part in (texts, stops, rope, batches, chats):
        part(maker)
    return {
        "encodings": list(encodings(maker.model)),
        "streams": list(streams(maker.model)),
        "draws": list(draws()),
        "cases": [*maker.cases, *taken(maker.cases[0]), *errors(maker.model.decoding.context)],
    }


def write(sections: Fields) -> None:
    """Writes cases.json, a line for each case, so that a change is seen where it is."""
    lines = {
        name: ",\n".join(json.dumps(each, ensure_ascii=False) for each in section) for name, section in sections.items()
    }
    text = ",\n".join(f'"{name}": [\n{each}\n]' for name, each in lines.items())
    CASES.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


def broken(witnesses: list[Witness], cases: Fields) -> list[str]:
    """The names of what does not hold for the bundle that is there; tests/test_conformance.py holds errors and changes
    of the bundle.
    """
    maker = Maker(witnesses, [])
    made = {"encodings": encodings(maker.model), "streams": streams(maker.model), "draws": draws()}
    names = [section for section, each in made.items() if list(each) != cases[section]]
    for case in cases["cases"]:
        if "expected" in case and "bundle" not in case:
            holds = maker.agreed(case) == case["expected"]
            console.print(f"{'holds' if holds else '[bold red]BROKEN[/]':6} {case['name']}")
            names += [] if holds else [case["name"]]
    return names


def main() -> None:
    """Writes bundle, cases or both."""
    parser = argparse.ArgumentParser(description="Writes spec/bundle and spec/cases.json.")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--bundle", action="store_true", help="write the bundle alone, and hold the cases against it")
    only.add_argument("--cases", action="store_true", help="write the cases alone, for the bundle that is there")
    arguments = parser.parse_args()
    if not arguments.cases:
        export(MODEL, BUNDLE, quantize="int4", operators="stock", overwrite=True)
    old = json.loads(CASES.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        opened = [stack.enter_context(witness) for witness in witnesses(BUNDLE, Path(folder))]
        if not arguments.bundle:
            write(make(opened, old))
        elif names := broken(opened, old):
            raise SystemExit(f"no longer hold: {', '.join(names)}; python -m spec.make_cases --cases chooses others")


if __name__ == "__main__":
    main()
