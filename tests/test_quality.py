"""benchmarks/quality.py: its figures against the formulas, the Pareto front against all pairs, and its page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import quality, quality_page, quality_peers
from benchmarks.quality import HTML_MARK, Base, Quality, Result, earlier, markdown, paired, phi35, spread, windows
from phimoe_onnx.config import read_config
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.exporter.places import places
from phimoe_onnx.exporter.quantize.strips import Strips
from phimoe_onnx.exporter.target import TARGETS
from phimoe_onnx.exporter.widths import Widths
from phimoe_onnx.parity.bits import matrices, together
from phimoe_onnx.parity.comparison import Comparison
from tests.checkpoints import MODEL
from tests.test_page import Reader

GOOD = Quality(510, 40.0, 0.01, 0.002, 0.03, 0.01, 0.9, 0.93)
RESULTS = [
    Result("int4", "phimoe-onnx", 5.0, 5.1, {"<a>.txt": GOOD}),
    Result("Q4_K", "llama.cpp", 4.5, 4.5, {"<a>.txt": dataclasses.replace(GOOD, kl=0.02, kl_q999=0.5)}),
    Result("GPTQ", "nncf", reason="no <module>"),
]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_that_of_all_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    points = [(float(a), float(b)) for a, b in random.integers(0, 6, (random.integers(1, 25), 2))]  # many are equal
    better = [
        {m for m, o in enumerate(points) if o != p and o[0] <= p[0] and o[1] <= p[1]} for n, p in enumerate(points)
    ]
    assert quality_page.pareto(points) == {n for n, others in enumerate(better) if not others}


def test_windows_are_whole_and_spread_evenly() -> None:
    ids = list(range(1003))
    assert windows(ids, 100, None) == [ids[start : start + 100] for start in range(0, 1000, 100)]
    assert [each[0] for each in windows(ids, 100, 5)] == [0, 200, 400, 600, 800]
    assert windows(ids, 100, 50) == windows(ids, 100, None)
    with pytest.raises(PhiMoEError, match="a text has 99 tokens, a window 100"):
        windows(ids[:99], 100, None)


def test_a_bound_is_that_of_the_paired_differences() -> None:
    base, losses = np.array([3.0, 4.0, 3.5]), np.array([3.1, 4.0, 3.7])
    change, bound = paired(losses, base)
    assert change == pytest.approx(math.exp(losses.mean()) / math.exp(base.mean()) - 1)
    assert bound == pytest.approx(1.96 * 0.1 / math.sqrt(3) * math.exp(0.1))
    assert math.isnan(paired(losses[:1], base[:1])[1])


def test_quality_is_that_of_a_comparison() -> None:
    random = np.random.default_rng(0)
    texts = [list(random.integers(0, 30, 9)) for _ in range(4)]
    logits = {tuple(ids): random.normal(size=(2, 9, 30)).astype(np.float32) for ids in texts}
    base = Base.of(texts, lambda ids: logits[tuple(ids)][0])
    found = base.quality(lambda ids: logits[tuple(ids)][1], "")
    comparison = Comparison()
    kl = [comparison.add(second[:-1], first[:-1]) for first, second in logits.values()]
    assert found.tokens == comparison.tokens == 32
    assert found.kl == pytest.approx(comparison.kl, rel=1e-5)
    assert found.top1 == pytest.approx(comparison.top1_agreement)
    assert found.kl_median == pytest.approx(np.median(np.concatenate(kl)), rel=1e-4)
    assert found.kl_q999 == pytest.approx(np.quantile(np.concatenate(kl), 0.999), rel=1e-4)
    assert found.perplexity / base.perplexity - 1 == pytest.approx(found.change)
    same = base.quality(lambda ids: logits[tuple(ids)][0], "")
    assert (same.change, same.bound, same.kl, same.top1) == (0, 0, 0, 1)


def test_bits_are_weighted_as_in_either_model() -> None:
    config = read_config(MODEL)
    large, kinds = phi35(config), {"experts": 2.0, "attention": 8.0, "lm_head": 8.0}
    experts = 32 * 16 * 3 * 4096 * 6400
    others = 32 * 4096 * 128 * (2 * 32 + 2 * 8) + 32064 * 4096
    assert together(kinds, large) == pytest.approx((2 * experts + 8 * others) / (experts + others))
    assert 2 < together(kinds, large) < 2.4 < together(kinds, config)


def test_a_calibration_text_is_taken_from_all_its_parts() -> None:
    ids = list(range(1000))
    found = spread(ids, 100, 500)
    assert sorted(found) == [id for start in range(0, 1000, 200) for id in range(start, start + 100)]
    assert found != sorted(found)


def test_strips_count_with_all_that_lies_beside_their_codes() -> None:
    wide, name = MODEL.with_name("phimoe-austen-256"), "model.layers.0.block_sparse_moe.experts.down_proj"
    stored = 8 * sum(Strips(4).nbytes(256, 256)) / 256**2
    assert quality.strip_bits(read_config(wide), name, "int4") == stored == 4.25
    joined = 8 * sum(Strips(4).nbytes(192, 768)) / (192 * 768)  # eight rows of 96
    assert quality.strip_bits(read_config(MODEL), name, "int4") == joined


@pytest.mark.parametrize("model", ["phimoe-austen", "phimoe-austen-256"])
def test_chosen_widths_take_no_more_than_a_rival(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = MODEL.with_name(model)
    config = read_config(folder)
    widths = Widths(config, TARGETS["cpu"], quality.NATIVE)
    widths.costs = {place: {bits: 4.0**-bits for bits in widths.recipes} for place in places(config)}
    monkeypatch.setattr(quality, "measured_widths", lambda checkpoint: widths)
    monkeypatch.setattr(quality_peers, "preset_bits", lambda config, rival: dict.fromkeys(matrices(config), 3.6))
    store = quality.chosen(quality_peers.Setting(folder, config, [], 256, None), "any")
    own = {name: quality.strip_bits(config, name, dtype) for name, dtype in store.items()}
    assert set(store.values()) >= {"int3", "int4"}
    assert 3.4 < quality.both_means(own, config)[0] <= 3.6
    monkeypatch.setattr(quality_peers, "preset_bits", lambda config, rival: dict.fromkeys(matrices(config), 2.0))
    with pytest.raises(PhiMoEError, match=r"any has 2\.00 and 2\.00 bits"):
        quality.chosen(quality_peers.Setting(folder, config, [], 256, None), "any")


def test_a_peer_rounds_each_expert_of_a_stack_by_its_own_inputs() -> None:
    name = "model.layers.0.block_sparse_moe.experts.down_proj"
    ids = list(np.random.default_rng(0).integers(3, 2000, 300))
    setting = quality_peers.Setting(MODEL, read_config(MODEL), [int(id) for id in ids], 150, None)
    assert setting.inputs["lm_head.weight", None].shape == (300, 192)
    assert sum(len(x) for key, x in setting.inputs.items() if key[0] == name) == 600
    stack = torch.nn.Parameter(torch.ones(16, 192, 96))

    def rounds(matrix: np.ndarray, x: np.ndarray | None) -> tuple[np.ndarray, int]:
        assert x is not None
        return matrix * len(x), matrix.size // 2

    assert quality_peers.each_matrix(setting, rounds, calibrated=True)(name, stack) == 4.0
    assert stack[:, 0, 0].tolist() == [len(setting.inputs[name, expert]) for expert in range(16)]
    without = dataclasses.replace(setting, calibration=[])
    with pytest.raises(PhiMoEError, match="give --calibration FILE"):
        quality_peers.each_matrix(without, rounds, calibrated=True)(name, stack)
    with pytest.raises(PhiMoEError, match="libggml-base"):
        quality_peers.by_preset(setting, "Q4_0", imatrix=False)(name, stack)


def test_the_page_and_the_table_show_the_figures() -> None:
    settings = {"checkpoint": "<m>", "length": 256, "windows": {"<a>.txt": 2}}
    html = quality_page.page(HTML_MARK, settings, RESULTS)
    assert html.startswith(HTML_MARK)
    assert not any(word in html for word in ("http", "<script", "src=", "href=", "url(", "<a>", "<m>", "<module>"))
    tables = Reader(html).tables
    ours = ["phimoe-onnx int4", "", "5.00", "5.10", "+1.00 ± 0.20 %", "0.0300", "0.0100", "0.900", "93.00%"]
    theirs = ["llama.cpp Q4_K", "yes", "4.50", "4.50", "+1.00 ± 0.20 %", "0.0200", "0.0100", "0.500", "93.00%"]
    assert tables["Figures of <a>.txt"][1:] == [ours, theirs]
    assert tables["Not run"][1:] == [["nncf GPTQ", "no <module>"]]
    assert html.count("<title>") == 3  # the page's and two points'
    assert "<title>Q4_K: 4.50 bits, KL 0.0200, on the front</title>" in html
    lines = list(markdown(RESULTS, "<a>.txt"))
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| phimoe-onnx int4", "| llama.cpp Q4_K *"]
    assert lines[2].strip("| ").split(" | ")[1:] == [cell for cell in ours[2:] if cell]


def test_results_are_kept_and_others_settings_refused(tmp_path: Path) -> None:
    file, settings = tmp_path / "r.json", {"checkpoint": "m", "windows": {"a": 2}}
    assert earlier(str(file), settings) == []
    values = {"written_by": "quality", **settings, "results": [dataclasses.asdict(each) for each in RESULTS]}
    file.write_text(json.dumps(values))
    assert earlier(str(file), settings) == RESULTS
    with pytest.raises(PhiMoEError, match=r"r\.json: is of .*; name another file"):
        earlier(str(file), settings | {"windows": {"a": 3}})
