"""What stands behind a parity report, and the page that shows it: the figures, the words, and that it needs nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phimoe_onnx import layered, reference, verify_golden
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.checkpoint.tensors import parameters, read_headers
from phimoe_onnx.cli.verify import main
from phimoe_onnx.config import read_config
from phimoe_onnx.parity.bits import matrices, mean_bits, stored_bits, together
from phimoe_onnx.parity.evidence import (
    BINS,
    Divergence,
    Evidence,
    Passage,
    Routing,
    Token,
    Tokens,
    agreement,
    divergence,
    passages,
    shares,
)
from phimoe_onnx.parity.page import page
from phimoe_onnx.parity.products import Products
from phimoe_onnx.parity.report import Report
from phimoe_onnx.parity.stored import stored_weights
from phimoe_onnx.parity.verify import SAMPLE
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.checkpoints import MODEL

BUNDLE = Path(__file__).parent.parent / "spec" / "bundle"  # the small model in int4
TOKENS = 256  # one window, and as many rows as errors are measured on


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with r.json, r.html and r.golden of one run of the command."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(BUNDLE, folder / "<b>undle")
    files = [part for kind in ("json", "html") for part in (f"--{kind}", str(folder / f"r.{kind}"))]
    files += ["--save-golden", str(folder / "r.golden"), "--tokens", str(TOKENS), "--new-tokens", "24"]
    files += ["--max-perplexity-ratio", "1.2"]
    assert main([str(folder / "<b>undle"), "--reference", str(MODEL), *files]) == 0
    return folder


@pytest.fixture
def report(written: Path) -> Report:
    values = json.loads((written / "r.json").read_text())
    del values["written_by"]
    return msgspec.convert(values, Report)


class Reader(HTMLParser):
    """Notes what is on a page: its words, and the tables by their names; each tag must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: D102
        values = dict(attrs)
        if tag == "meta":
            return
        self.open.append(tag)
        if "aria-label" in values and tag == "div":
            self.rows = self.tables.setdefault(values["aria-label"], [])
            assert values["tabindex"] == "0"  # can be scrolled by keys
        elif tag == "svg":
            assert values.get("aria-hidden") == "true" or values["aria-label"]
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:  # noqa: D102
        pass

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:  # noqa: D102
        self.words.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


# the page


def test_the_page_has_the_figures_of_the_json(written: Path, report: Report) -> None:
    html = (written / "r.html").read_text()
    found, evidence = Reader(html), report.evidence
    assert html == page(report)  # all that it shows is in the JSON
    assert evidence is not None
    spread = evidence.divergence
    assert spread is not None
    text = "".join(found.words)
    assert "Passed: 3 of 3 limits hold" in text
    ratio = report.perplexity["bundle"] / report.perplexity["reference"]
    for figure in (
        f"{ratio - 1:+.2%}",
        *(f"{value:.3g}" for value in (spread.mean, spread.median, spread.q999, spread.largest)),
        f"{report.bundle_to_reference.top1_agreement:.2%}",
        f"{report.routing_agreement:.2%}",
        f"{report.greedy['agreeing']} of 24",
    ):
        assert figure in text
    limits = {row[0]: row[1:5] for row in found.tables["Limits"][1:]}
    assert limits == {
        check.name: ["passed", f"{check.measured:.3g}", f"{check.limit:.3g}", unit]
        for check, unit in zip(report.checks, ("nats", "nats", "ratio"), strict=True)
    }
    heads, *rows, bits = found.tables["Error by layer and kind of weight"]
    cells = {(int(row[0]), kind): cell for row in rows for kind, cell in zip(heads[1:], row[1:], strict=True)}
    assert cells == {(e.layer, e.kind): f"{e.error:.2%}" for e in evidence.weights if e.layer is not None}
    assert bits == ["bits", *["5.00"] * 6]
    for name, shown in (
        ("Experts, checkpoint", evidence.routing.reference),
        ("Experts, weights as the bundle stores them", evidence.routing.stored),
    ):
        assert [row[1:] for row in found.tables[name][1:]] == [[f"{100 * v:.0f}" for v in row] for row in shown or []]
    counts = [int(row[1]) for row in found.tables["KL of the tokens"][1:]]
    assert counts == [count for count in spread.counts if count]
    assert sum(counts) == TOKENS


def test_the_page_needs_nothing_else(written: Path) -> None:
    html = (written / "r.html").read_text()
    assert html.startswith("<!doctype html>\n<!-- phimoe-verify -->")
    assert not any(word in html for word in ("http", "<script", "src=", "href=", "url(", "@import", "<link", "<b>"))
    assert "&lt;b&gt;undle" in html
    assert html.count("prefers-color-scheme: dark") == 2
    assert "color-scheme: light dark" in html
    colors = [dict(re.findall(r"(--[a-z]+): ([^;]+);", part)) for part in html.split("prefers-color-scheme: dark")[:2]]
    assert {"--page", "--card", "--ink", "--heat"} <= colors[0].keys() & colors[1].keys()
    assert all(colors[0][name] != colors[1][name] for name in ("--page", "--card", "--ink", "--heat"))
    assert len(html) < 100_000


def test_text_is_escaped_and_tokens_are_coloured_by_their_divergence(report: Report) -> None:
    tokens = [Token("<script>", 0.9, "&", '"'), Token("a", 0.0, "a", "a"), Token(" b\n", 0.1, "<i>", "c")]
    evidence = Evidence(Routing([[0.5, 0.5]]), passages=[Passage(1, 7, 1 / 3, tokens)])
    greedy = {"prompt": "<p>", "reference": "a <u>", "bundle": "a b</u>", "agreeing": 1, "new_tokens": 5}
    html = page(dataclasses.replace(report, evidence=evidence, greedy=greedy, notes=["<note>"]))
    assert not any(tag in html for tag in ("<script", "<i>", "<u>", "<note>"))
    # six levels, by the root: 0.9 of 0.9 is the last, 0.1 the second, 0 none
    assert '<span class="k6" title="KL 0.9; checkpoint: “&amp;”, bundle: “&quot;”">&lt;script&gt;</span>a<span' in html
    assert '<span class="k2" title="KL 0.1; checkpoint: “&lt;i&gt;”, bundle: “c”"> b\n</span></p>' in html
    assert "a <mark>&lt;u&gt;</mark>…" in html
    assert "a <mark>b&lt;/u&gt;</mark></p>" in html
    assert Reader(html).tables["The largest KL"][1] == ["“<script>”", "0.9", "“&”", '“"”']


def test_a_failure_and_numbers_that_are_none(report: Report) -> None:
    check = dataclasses.replace(report.checks[0], measured=math.nan, passed=False)
    spread = divergence([np.array([math.nan, 1.0])])
    tokens = [Token("a", math.nan, "b", "c")]
    evidence = Evidence(Routing([[0.5, 0.5]]), divergence=spread, passages=[Passage(0, 1, math.nan, tokens)])
    failed = dataclasses.replace(report, checks=[check], failures=["kl is <nan>"], evidence=evidence)
    text = "".join(Reader(page(failed)).words)
    assert "Failed: 0 of 1 limits hold" in text
    assert "kl is <nan>" in text


def test_a_task_without_tokens_shows_what_it_has(report: Report) -> None:
    values = dataclasses.replace(report.bundle_to_reference, kl=None, top1_agreement=None)
    evidence = Evidence(Routing([[0.25, 0.75]]), report.evidence.weights if report.evidence else [])
    other = dataclasses.replace(
        report, task="feature-extraction", bundle_to_reference=values, perplexity={}, greedy={}, evidence=evidence
    )
    found = Reader(page(other))
    assert [row[1:] for row in found.tables["Experts, checkpoint"][1:]] == [["25", "75"]]
    text = "".join(found.words)
    assert "feature-extraction" in text
    assert not any(words in text for words in ("KL token by token", "Greedy", "Same best token", "Perplexity"))


def test_equal_continuations_are_not_marked(report: Report) -> None:
    greedy = {"prompt": "It", "reference": " was so", "bundle": " was so", "agreeing": 2, "new_tokens": 2}
    html = page(dataclasses.replace(report, greedy=greedy))
    assert "<mark>" not in html
    assert html.count("It</span> was so</p>") == 2


def test_a_golden_file_shows_what_it_knows(written: Path, report: Report) -> None:
    again = verify_golden(written / "<b>undle", written / "r.golden")
    tables = Reader(page(again)).tables
    assert "Error by layer and kind of weight" not in tables
    assert "Experts, weights as the bundle stores them" not in tables
    assert again.evidence is not None
    assert report.evidence is not None
    assert again.evidence.routing.reference == report.evidence.routing.reference
    full, estimate = report.evidence.divergence, again.evidence.divergence
    assert full is not None
    assert estimate is not None
    assert estimate.mean == pytest.approx(full.mean, rel=0.2)
    assert estimate.median == pytest.approx(full.median, rel=0.2)
    places = [[(each.window, each.start) for each in found.evidence.passages] for found in (report, again)]
    assert len(set(places[0]) & set(places[1])) >= 1


def test_the_command_leaves_other_files_alone(written: Path, tmp_path: Path, capsys: Any) -> None:
    letter = tmp_path / "letter.html"
    letter.write_text("<!doctype html>\nDear Emma")
    arguments = [
        str(written / "<b>undle"),
        "--golden",
        str(written / "r.golden"),
        "--max-perplexity-ratio",
        "1.2",
        "--html",
    ]
    assert main([*arguments, str(letter)]) == 1
    assert f"{letter}: exists and is no earlier report" in capsys.readouterr().err
    assert letter.read_text() == "<!doctype html>\nDear Emma"
    again = tmp_path / "again.html"
    again.write_text((written / "r.html").read_text())
    assert main([*arguments, str(again)]) == 0
    assert "golden file keeps 64 top" in unescape(again.read_text())


# what stands behind it


def test_shares_sum_to_1_and_agreement_is_by_layer(report: Report) -> None:
    routing = report.evidence.routing if report.evidence else None
    assert routing is not None
    assert routing.stored is not None
    assert routing.agreement is not None
    for layer in (*routing.reference, *routing.stored):
        assert sum(layer) == pytest.approx(1)
    assert len(routing.reference) == len(routing.stored) == len(routing.agreement) == 4
    assert np.mean(routing.agreement) == pytest.approx(report.routing_agreement, abs=1e-6)
    chosen = np.array([[[0, 1], [1, 2]], [[2, 2], [0, 2]]])
    assert shares(chosen, 4) == [[0.25, 0.5, 0.25, 0], [0.25, 0, 0.75, 0]]
    other = chosen.copy()
    other[1, 0, 1] = 0
    assert agreement(chosen, other) == [1.0, 0.5]


def test_the_errors_of_the_weights_are_those_of_whole_models(report: Report) -> None:
    """Of the first layer's Q and V and of the head, by modeling.py as a whole."""
    assert report.evidence is not None
    errors = {(each.layer, each.kind): each.error for each in report.evidence.weights}
    config, model = read_config(MODEL), reference.load_reference(MODEL)
    read = layered.checkpoint_weights(config, parameters(config, read_headers(MODEL)))
    stored = stored_weights(read, BUNDLE, read_manifest(BUNDLE), config)
    ids = torch.tensor([Tokenizer(BUNDLE, ()).encode(SAMPLE.read_text())[:TOKENS]])
    assert report.windows == [TOKENS]

    def error(name: str, x: torch.Tensor) -> float:
        weight = read(name, None)
        return float(F.linear(x, stored(name, None) - weight).norm() / F.linear(x, weight).norm())

    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        for kind in ("q_proj", "v_proj"):
            assert errors[0, kind] == pytest.approx(error(f"model.layers.0.self_attn.{kind}.weight", x), rel=1e-4)
        x = model.model.whole(ids, torch.ones_like(ids))
        assert errors[None, "lm_head"] == pytest.approx(error("lm_head.weight", x), rel=1e-4)
    assert all(0.01 < error < 0.2 for error in errors.values())


def test_all_products_of_a_pass_are_seen() -> None:
    config = read_config(MODEL)
    rows: dict[str, int] = {}

    def look(name: str, expert: int | None, weight: torch.Tensor, x: torch.Tensor) -> None:
        assert x.shape[1] == weight.shape[1]
        rows[name] = rows.get(name, 0) + len(x)

    read = layered.checkpoint_weights(config, parameters(config, read_headers(MODEL)))
    products = Products(read, look)
    with products:
        (ran,) = layered.run(config, products.read, [layered.Text(range(3, 43))])
        layered.head(config, "text-generation", products.read)(ran.hidden)
    assert rows.keys() == {*matrices(config), *(f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(4))} - {
        "model.embed_tokens.weight"
    }
    assert all(count == (80 if "experts" in name else 40) for name, count in rows.items())


def test_bits_count_scales() -> None:
    config = read_config(BUNDLE)
    bits = stored_bits(read_manifest(BUNDLE), config)
    assert bits.keys() == matrices(config).keys()
    kinds = mean_bits(bits, config)
    assert kinds == {"experts": 5.0, "attention": 5.0, "lm_head": 5.0, "embeddings": 9.0}
    large = dataclasses.replace(config, hidden_size=4096)
    mixed = {"experts": 2.0, "attention": 8.0, "lm_head": 4.0}
    sizes = {"experts": 4 * 16 * 3 * 96 * 4096, "attention": 4 * 4096 * (2 * 192 + 2 * 64), "lm_head": 2048 * 4096}
    expected = sum(mixed[kind] * size for kind, size in sizes.items()) / sum(sizes.values())
    assert together(mixed, large) == pytest.approx(expected)


def test_a_divergence_is_that_of_numpy() -> None:
    random = np.random.default_rng(0)
    kl = [10 ** random.uniform(-9, 2, size) for size in (700, 300)]
    found, each = divergence(kl), np.concatenate(kl)
    assert isinstance(found, Divergence)
    assert found.mean == pytest.approx(each.mean())
    assert found.median == pytest.approx(np.median(each))
    assert found.largest == each.max()
    assert (each > found.q999).sum() == 1
    edges = [-math.inf, *BINS, math.inf]
    assert found.counts == [int(((each >= a) & (each < b)).sum()) for a, b in itertools.pairwise(edges)]


def test_the_worst_passages_do_not_overlap() -> None:
    tokenizer = Tokenizer(BUNDLE, ())
    ids = tokenizer.encode(SAMPLE.read_text())[:400]
    windows = [ids[:150], ids[150:400]]
    random = np.random.default_rng(1)
    seen = Tokens()
    for window in windows:
        best = np.array([*window[1:], 5])
        seen.add(random.gamma(0.3, size=len(window)), best, best)
    found = passages(tokenizer, windows, seen)
    means = {
        (number, start): seen.kl[number][start - 1 : start + 47].mean()
        for number, window in enumerate(windows)
        for start in range(1, len(window) - 47)
    }
    first = max(means, key=lambda place: means[place])
    assert (found[0].window, found[0].start) == first
    assert found[0].kl == pytest.approx(means[first])
    assert [each.kl for each in found] == sorted((each.kl for each in found), reverse=True)
    spans = sorted((each.window, each.start) for each in found)
    assert all(a[0] != b[0] or b[1] - a[1] >= 48 for a, b in itertools.pairwise(spans))
    for each in found:
        ids = windows[each.window]
        text = tokenizer.decode(ids[: each.start + 48]).removeprefix(tokenizer.decode(ids[: each.start]))
        assert "".join(token.text for token in each.tokens) == text
        assert [token.kl for token in each.tokens] == list(seen.kl[each.window][each.start - 1 : each.start + 47])
        assert [token.reference for token in each.tokens] == [token.text for token in each.tokens]
