"""Writes golden/ beside this file: a golden file of the small model, and what checks with it find (golden.md).

    python -m spec.make_golden

Both come out the same on the same machine; elsewhere PyTorch may add in another order, and last digits differ.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

from phimoe_onnx import verify, verify_golden
from phimoe_onnx.bundle import Manifest, read_manifest
from phimoe_onnx.parity.golden import read_golden
from phimoe_onnx.parity.report import Report
from phimoe_onnx.parity.thresholds import default_thresholds
from phimoe_onnx.parity.verify import SAMPLE
from tests.checkpoints import MODEL

FOLDER = Path(__file__).parent / "golden"
BUNDLE = Path(__file__).parent / "bundle"
FILE, CASES = FOLDER / "austen.golden", FOLDER / "cases.json"
# The windows of `verify` have 256 tokens, which are 270 kB. These are enough for all that a reader does: the first is
# longer than the prompt of the greedy continuation, and the second begins in the middle of the file's arrays.
WINDOWS = (34, 6)
BEGINNING = "of steady age and character"  # of the text: no choice of experts is close there, and all releases agree
NEW_TOKENS = 12
TOLERANCE = 1e-3  # relative, of a figure; releases of ONNX Runtime add in other orders
DTYPES = (["float32"], ["float32", "float16"], ["float32", "int8"], ["float32", "int8", "int4"])
CACHES = ("float32", "int8", "uint8")


def write_file() -> None:
    """Saves the golden file with the repository's bundle."""

    def windows(token_ids: Sequence[int], config: object) -> list[list[int]]:
        first, second = WINDOWS
        return [list(token_ids[:first]), list(token_ids[first : first + second])]

    sample = SAMPLE.read_text(encoding="utf-8")
    text = sample[sample.index(BEGINNING) :]
    with mock.patch("phimoe_onnx.parity.verify.cut", windows):
        verify(BUNDLE, MODEL, text=text, tokens=sum(WINDOWS), new_tokens=NEW_TOKENS, save_golden=FILE)


def changed(data: bytes, changes: Sequence[Sequence[Any]]) -> bytes:
    """A golden file's bytes with changes, done one after the other, as golden.md says."""
    for step, *values in changes:
        if step == "replace":
            old, new = (text.encode() for text in values)
            assert old in data, old
            length = struct.unpack("<Q", data[:8])[0] + len(new) - len(old)
            data = struct.pack("<Q", length) + data[8:].replace(old, new, 1)
        elif step == "truncate":
            data = data[: values[0]]
        elif step == "invert":
            place = values[0]
            data = data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]
        elif step == "sign":
            end = 8 + struct.unpack("<Q", data[:8])[0]
            metadata = json.loads(data[8:end])["__metadata__"]
            digest = hashlib.sha256(metadata["golden"].encode() + data[end:]).hexdigest()
            data = data.replace(metadata["sha256"].encode(), digest.encode(), 1)
        else:
            raise ValueError(step)
    return data


def expected(report: Report) -> dict[str, Any]:
    """What of a report every language must find."""
    found = asdict(report)
    names = ("tokens", "windows", "bundle_to_reference", "bundle_to_stored", "stored_to_reference", "perplexity")
    greedy = {name: report.greedy[name] for name in ("agreeing", "new_tokens")}
    checks = [asdict(check) for check in report.checks]
    return {name: found[name] for name in names} | {"greedy": greedy, "checks": checks}


def cases() -> list[dict[str, Any]]:
    """Each with its changes of the file, and its error or `expected`, which is still to be found out."""
    header, data = read_golden(FILE).header, FILE.read_bytes()
    assert header.stored is not None
    sha256 = next(iter(header.stored.files.values()))
    first_sum = data.index(b'"logsumexp"')  # the first array: of 8 bytes a number
    end = 8 + struct.unpack("<Q", data[:8])[0]
    assert data[first_sum:].split(b"[", 2)[2].startswith(b"0,")
    return [
        {"name": "as it is", "changes": []},
        {"name": "in chunks", "changes": [], "bundle": [["set", "/decoding/prefill_chunk", 8]]},
        {
            "name": "saved with other stored weights",
            "changes": [["replace", sha256[:8], sha256[7::-1]], ["sign"]],
            "notes": ["not checked: kernel_kl; the golden file was saved with a bundle of other stored weights"],
        },
        {
            "name": "a reference of a third of the perplexity",
            "changes": [_set("perplexity", header.perplexity, (header.perplexity or 0) / 3), ["sign"]],
        },
        {"name": "a reference that was another at one token", "changes": [["invert", end + 8 * 20 + 7], ["sign"]]},
        *damaged(header.scales, len(data)),
    ]


def _set(key: str, old: Any, new: Any) -> list[str]:
    """The change of one value of `golden`, which is JSON in a string of JSON."""
    before, after = (json.dumps({key: value}, separators=(",", ":"))[1:-1] for value in (old, new))
    return ["replace", json.dumps(before)[1:-1], json.dumps(after)[1:-1]]


def damaged(scales: Sequence[float], size: int) -> list[dict[str, Any]]:
    """Files that are refused, with words of the error."""
    windows, quoted = [*WINDOWS], r"\"perplexity\":"
    spoilt: dict[str, tuple[list[list[Any]], list[str]]] = {
        "an empty file": ([["truncate", 0]], ["is no golden file", "--save-golden"]),
        "the beginning of a header": ([["truncate", 300]], ["is damaged", "--save-golden"]),
        "the end is missing": ([["truncate", size - 100]], ["is damaged", "--save-golden"]),
        "one byte is another": ([["invert", size - 5]], ["is damaged", "SHA-256", "--save-golden"]),
        "another file of the kind": ([["replace", "phimoe-verify", "phimoe-visible"]], ["is no golden file"]),
        "a newer format": (
            [_set("format_version", 1, 2), ["sign"]],
            ["format_version is 2, this release reads 1", "upgrade"],
        ),
        "a dtype that is none": ([["replace", '"I16"', '"Q16"']], ["is damaged"]),
        "an array that is missing": ([["replace", '"logsumexp"', '"logsummax"']], ["is damaged", "logsumexp"]),
        "a key that is missing": ([["replace", "windows", "widows"], ["sign"]], ["is damaged", "windows"]),
        "more windows than tokens": ([_set("windows", windows, [*WINDOWS, 1]), ["sign"]], ["is damaged", "token_ids"]),
        "a window of no number": ([_set("windows", windows, ["a", 6]), ["sign"]], ["is damaged"]),
        "a scale of 0": ([_set("scales", [*scales], [scales[0], 0.0]), ["sign"]], ["is damaged", "scales"]),
        "a perplexity below 0": ([["replace", quoted, f"{quoted}-"], ["sign"]], ["is damaged", "perplexity"]),
        "a smaller vocabulary": ([_set("vocab_size", 2048, 99), ["sign"]], ["is damaged", "vocabulary of 99"]),
        "another checkpoint's": (
            [_set("vocab_size", 2048, 2050), ["sign"]],
            ["is of the checkpoint phimoe-austen", "vocab_size 2050, not 2048", "give the golden file of"],
        ),
    }
    return [{"name": name, "changes": changes, "error": words} for name, (changes, words) in spoilt.items()]


def limits(manifest: Manifest) -> list[dict[str, Any]]:
    """The thresholds of bundles by the dtypes of their matrices and of their caches."""
    found = []
    for dtypes in DTYPES:
        for cache in CACHES:
            weights = tuple(replace(manifest.weights[0], dtype=dtype) for dtype in dtypes)
            decoding = replace(manifest.decoding, cache=replace(manifest.decoding.cache, dtype=cache))
            thresholds = default_thresholds(replace(manifest, weights=weights, decoding=decoding))
            given = {name: limit for name, limit in asdict(thresholds).items() if limit is not None}
            found.append({"dtypes": dtypes, "cache": cache, "limits": given})
    return found


def main() -> None:
    """Writes the file and the cases."""
    write_file()
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if "error" not in case:
                path = Path(folder) / "golden"
                path.write_bytes(changed(FILE.read_bytes(), case["changes"]))
                case["expected"] = expected(verify_golden(BUNDLE, path))
            written.append(json.dumps(case))
    sections = {"limits": [json.dumps(each) for each in limits(read_manifest(BUNDLE))], "cases": written}
    parts = [f'"tolerance": {TOLERANCE}']
    parts += ["".join((f'"{name}": [\n', ",\n".join(lines), "\n]")) for name, lines in sections.items()]
    CASES.write_text("".join(("{\n", ",\n".join(parts), "\n}\n")), encoding="utf-8")


if __name__ == "__main__":
    main()
