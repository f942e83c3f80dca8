"""embed/rust, a greedy reader of bundles, writes what `PhiMoE` does and what spec/cases.json says; `nox -s rust` builds
it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from phimoe_onnx import operators
from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.runtime import PhiMoE
from tests.checkpoints import MODEL
from tests.test_conformance import BUNDLE, CASES, change
from tests.user_environment import user_environment

PROGRAM = Path(__file__).parent.parent / "embed" / "rust" / "target" / "release" / "phimoe-generate"
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
pytestmark = pytest.mark.skipif(not PROGRAM.exists() or LIBRARY is None, reason="nox -s rust builds it, on Linux")

BUNDLES = {
    "cpu": {},
    "int4": {"quantize": "int4", "operators": "stock"},
    "int8 cache": {"kv_cache": "int8"},
    "portable": {"target": "portable"},
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's model as a bundle."""
    return export(MODEL, tmp_path_factory.mktemp("rust") / "bundle", **BUNDLES[request.param])


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY)} | environment
    return subprocess.run([PROGRAM, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("prompt", "new"),
    [
        ("It was a fine morning, and Elizabeth", 300),  # across the rope boundary of 256
        ("And the LORD said unto Moses. " * 80, 40),  # from beyond it, in two chunks
        (" café, 日本 🙂 and\n\n", 20),
    ],
)
def test_a_text_continues_alike(bundle: Path, prompt: str, new: int) -> None:
    expected = PhiMoE.load(bundle).generate(prompt, max_new_tokens=new)
    done = run(bundle, prompt, new)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr) == expected.token_ids
    assert done.stdout == f"{expected.text}\n"


def test_a_chat_is_answered_alike(bundle: Path) -> None:
    expected = PhiMoE.load(bundle).generate([{"role": "user", "content": "Who is Anne?"}], max_new_tokens=60)
    done = run("--chat", bundle, "Who is Anne?", 60)
    assert (json.loads(done.stderr), done.stdout) == (expected.token_ids, f"{expected.text}\n")


def greedy_cases(cases: list[dict[str, Any]]) -> Iterator[Any]:
    """Each prompt of the cases that are greedy and end at an end token or a number of tokens; rows go one by one."""
    for case in cases:
        if "expected" in case and "bundle" not in case and case["options"].keys() <= {"max_new_tokens"}:
            batch = "batch" in case
            prompts, results = (case["batch"], case["expected"]) if batch else ([case["prompt"]], [case["expected"]])
            for row, (prompt, expected) in enumerate(zip(prompts, results, strict=True)):
                yield pytest.param(
                    prompt, case["options"], expected, id=f"{case['name']} {row}" if batch else case["name"]
                )


@pytest.mark.parametrize(("prompt", "options", "expected"), [*greedy_cases(CASES["cases"])])
def test_generation(prompt: Any, options: dict[str, int], expected: dict[str, Any]) -> None:
    check_generation(BUNDLE, prompt, options, expected)


def check_generation(
    folder: Path, prompt: Any, options: dict[str, int], expected: dict[str, Any], *words: object
) -> None:
    new = options.get("max_new_tokens", len(expected["token_ids"]))
    done = run(*words, "--json", folder, json.dumps(prompt), new)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stderr), done.stdout) == (expected["token_ids"], f"{expected['text']}\n")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case["name"]) for case in CASES["cases"] if "bundle" in case and not case["load"]],
)
def test_changed_bundles(tmp_path: Path, case: dict[str, Any]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    for step, *arguments in case["bundle"]:
        change(folder, step, *arguments)
    if "expected" in case:
        check_generation(folder, case["prompt"], case["options"], case["expected"])
        return
    check_error(run(folder, "Emma", 3), case["error"], *case["names"])


def check_error(done: subprocess.CompletedProcess[str], kind: str, *words: str) -> None:
    """One line that begins with the kind and has the words."""
    assert done.returncode == 1
    assert done.stderr.startswith(f"{kind}: ")
    assert [word for word in words if word not in done.stderr] == []
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", 3), ("the prompt", "empty")),
        (("a", 0), ("max_new_tokens", "0")),
        (("a", "many"), ("max_new_tokens", "many")),
        (("a", 5000), ("max_new_tokens", "5000", "1024")),
        (("[5, 2048]", 3), ("2048", "2047")),
        (("[5, -1]", 3), ("-1",)),
        (("{", 3), ("JSON",)),
        (('[{"role": "wizard", "content": "a"}]', 3), ("role", "wizard")),
    ],
)
def test_bad_prompts_and_options(arguments: tuple[str, object], words: tuple[str, ...]) -> None:
    form = ["--json"] if arguments[0][:1] in ("[", "{") else []
    check_error(run(*form, BUNDLE, *arguments), "GenerationError", *words)


def test_help() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: phimoe-generate")
    assert all(f"  {option} " in done.stdout for option in ("--chat", "--json", "--threads", "--operators", "--help"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([BUNDLE, "a"], "2 arguments, expected BUNDLE, PROMPT and MAX_NEW_TOKENS"),
        ([BUNDLE, "a", 3, "more"], "4 arguments, expected"),
        (["--threads"], "--threads has no value"),
        (["--operators"], "--operators has no value"),
        (["--thread", 2, BUNDLE, "a", 3], "--thread is no option; known ones are --chat, --json, --threads, "),
        ([BUNDLE, os.fsdecode(b"caf\xe9"), 3], 'PROMPT is "caf\\xE9", which is no Unicode'),
    ],
)
def test_usage(arguments: list[object], words: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(words)
    assert "\nusage: phimoe-generate" in done.stderr


def test_words_behind_two_dashes_are_no_options() -> None:
    assert run("--threads", 1, "--", BUNDLE, "--chat", 3).returncode == 0


@pytest.mark.parametrize("threads", ["0", "-1", "two", "1.5", "10000", "9" * 30])
def test_bad_threads(threads: str) -> None:
    check_error(run("--threads", threads, BUNDLE, "a", 3), "DeviceError", "threads", threads, "1 to")


def test_threads_leave_the_tokens_as_they_are(bundle: Path) -> None:
    """Small passes run in a session of one thread, but for a given number."""
    prompt = "It was a fine morning, and Elizabeth " * 10
    assert {run(*words, bundle, prompt, 20).stderr for words in ([], ["--threads", 1], ["--threads", 2])} == {
        run(bundle, prompt, 20).stderr
    }


def test_output_that_cannot_be_written() -> None:
    environment = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PROGRAM, BUNDLE, "a", "3"], stdout=full, stderr=subprocess.PIPE, env=environment, text=True
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("standard output cannot be written")


@pytest.mark.parametrize(("setting", "leaves"), [(None, []), ("0", [".cache"])])
def test_telemetry_leaves_nothing(tmp_path: Path, setting: str | None, leaves: list[str]) -> None:
    """0 is the user's own wish, and shows that something would be left."""
    environment = user_environment(tmp_path, setting) | {"ORT_DYLIB_PATH": str(LIBRARY)}
    for _ in range(20):  # it is written in the background, and a run may end before
        assert subprocess.run([PROGRAM, BUNDLE, "a", "3"], env=environment, capture_output=True).returncode == 0
        if [path.name for path in tmp_path.iterdir()] == leaves:
            break
    assert [path.name for path in tmp_path.iterdir()] == leaves


@pytest.mark.parametrize("space", [" ,", " ' ", " n't", "  's", " .  ' m"])
def test_spaces_before_punctuation(tmp_path: Path, space: str) -> None:
    """As Python cleans them up, in text where each space stands beside punctuation."""
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    replace = tokenizer["decoder"]["decoders"][0]
    assert replace["content"] == " "
    replace["content"] = space
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    change(folder, "list", "tokenizer.json")
    change(folder, "set", "/decoding/clean_up_tokenization_spaces", True)
    expected = PhiMoE.load(folder, threads=1).generate("It was", max_new_tokens=30)
    done = run(folder, "It was", 30)
    assert (json.loads(done.stderr), done.stdout) == (expected.token_ids, f"{expected.text}\n")


@pytest.mark.parametrize("changes", [True, False])
def test_a_bundle_that_changes_while_it_is_read(tmp_path: Path, changes: bool) -> None:
    """The library that is to be loaded is a pipe, at which the program waits while the bundle changes."""
    folder, pipe = tmp_path / "bundle", tmp_path / "library"
    shutil.copytree(BUNDLE, folder)
    os.mkfifo(pipe)
    environment = os.environ | {"ORT_DYLIB_PATH": str(pipe)}
    with subprocess.Popen(
        [PROGRAM, folder, "a", "3"], stderr=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
    ) as process:
        with open(pipe, "wb"):  # waits until the program is there
            if changes:
                (folder / "other").write_bytes((folder / "config.json").read_bytes())
                (folder / "other").replace(folder / "config.json")
        assert process.stderr
        said = process.stderr.read()
    assert process.returncode == 1
    kind, words = ("BundleError", "was changed while it was read") if changes else ("DeviceError", "no library")
    assert said.startswith(f"{kind}: ")
    assert words in said


def test_a_bundle_of_links(tmp_path: Path) -> None:
    """As a hub's cache has it."""
    for path in BUNDLE.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    assert run(tmp_path, "Emma", 5).stderr == run(BUNDLE, "Emma", 5).stderr


NATIVE = BUNDLE.parent / "native"
NATIVE_CASES = json.loads((NATIVE / "cases.json").read_text(encoding="utf-8"))["cases"]
OPERATORS = operators.library()
needs_operators = pytest.mark.skipif(OPERATORS is None, reason="the native operators are not built here")


@needs_operators
@pytest.mark.parametrize(("prompt", "options", "expected"), [*greedy_cases(NATIVE_CASES)])
def test_native_operators(prompt: Any, options: dict[str, int], expected: dict[str, Any]) -> None:
    check_generation(NATIVE / "bundle", prompt, options, expected, "--operators", OPERATORS)


@needs_operators
def test_native_operators_without_optional_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(NATIVE / "bundle", folder)
    change(folder, "remove", "/graphs/0")
    case = next(case for case in NATIVE_CASES if case["name"] == "greedy")
    check_generation(folder, case["prompt"], case["options"], case["expected"], "--operators", OPERATORS)


@needs_operators
def test_native_operators_beside_the_program(tmp_path: Path) -> None:
    assert OPERATORS
    program = shutil.copy(PROGRAM, tmp_path)
    words = [program, str(NATIVE / "bundle"), "Emma", "5"]
    environment = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    check_error(done, "DeviceError", "the bundle needs the native operators", "--operators stock")
    shutil.copy(OPERATORS, tmp_path / "libphimoe_operators.so")
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, run("--operators", OPERATORS, *words[1:]).stderr)


def test_a_library_of_operators_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    for path, words in {
        tmp_path / "text.so": ("no library of the native operators", "docs/native.md"),
        tmp_path / "nowhere.so": ("--operators is", "no file", "libphimoe_operators.so"),
        tmp_path: ("--operators is", "no file"),
        LIBRARY: ("no library of the native operators",),
    }.items():
        check_error(run("--operators", path, NATIVE / "bundle", "Emma", 3), "DeviceError", *words)
    # a bundle of other operators needs none
    assert run("--operators", tmp_path / "text.so", BUNDLE, "Emma", 3).returncode == 0


MUTANTS = 100
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    1e9,
    2**31 - 1,
    2**31,
    2**63,
    10**400,
    1e308,
    "",
    "1",
    "cpu",
    "cuda",
    "int8",
]
VALUES += ["cuda", "int8"]
VALUES += ["bfloat16", "1.0", "99.9", "\0", "x" * 10_000, "0" * 64, "..", "../model.data", "/etc/passwd", "config.json"]
VALUES += [[], {}, [[]], [None], ["x"], [0, 1, 2], {"x": 1}, [[[[[[]]]]]]]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each object or list inside a value with each of its keys or places."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutated(text: str, choose: random.Random) -> str:
    """A manifest with a value changed, gone or of another place, or with characters changed."""
    if choose.random() < 0.2:
        start = choose.randrange(len(text))
        word = choose.choice(["", "{", "]", '"', "9" * 5000, "[" * 100_000, "NaN", "1e999", "\ufffd"])
        return text[:start] + word + text[start + choose.choice([0, 1, 20]) :]
    manifest = json.loads(text)
    parent, key = choose.choice(list(places(manifest)))
    if choose.random() < 0.2:
        del parent[key]
    elif choose.random() < 0.3:
        other, place = choose.choice(list(places(json.loads(text))))
        parent[key] = other[place]
    else:
        parent[key] = choose.choice(VALUES)
    return json.dumps(manifest)


def test_mutated_manifests(tmp_path: Path) -> None:
    """Whatever stands in the manifest, a bundle gives its own tokens or one of our errors."""
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    text = (BUNDLE / "manifest.json").read_text(encoding="utf-8")
    expected = run("--json", BUNDLE, "[5, 600, 700]", 5)
    found = {"tokens": 0, "BundleError": 0, "DeviceError": 0, "GenerationError": 0}
    for seed in range(MUTANTS):
        mutant = mutated(text, random.Random(seed))
        (folder / "manifest.json").write_text(mutant, encoding="utf-8")
        done = run("--json", "--threads", 1, folder, "[5, 600, 700]", 5)
        what = f"mutant {seed}: {mutant[:2000]}\n{done}"
        if done.returncode == 0:
            found["tokens"] += 1
            assert done.stderr == expected.stderr, what
        else:
            kind = done.stderr.partition(":")[0]
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), what
            assert kind in found, what
            found[kind] += 1
    assert found["tokens"] > MUTANTS // 10, found
    assert found["BundleError"] > MUTANTS // 4, found
