"""What is read of a graph's inside, held against PyTorch; the figures made of it; phimoe-experts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from phimoe_onnx import modeling, operators
from phimoe_onnx.analytics.page import page
from phimoe_onnx.analytics.report import Report, lines
from phimoe_onnx.analytics.routing import BINS, apart, own_experts, top_pairs, usage
from phimoe_onnx.bundle import describe_files, read_manifest
from phimoe_onnx.cli.experts import main
from phimoe_onnx.errors import BundleError, DeviceError, GenerationError
from phimoe_onnx.exporter.pipeline import export
from phimoe_onnx.parity.stored import stored_model
from phimoe_onnx.reference import load_reference
from phimoe_onnx.runtime import PhiMoE, Routing
from phimoe_onnx.runtime.ort.protobuf import fields, message
from phimoe_onnx.runtime.ort.taps import tap
from phimoe_onnx.runtime.probe import Probe, sparse_mixer
from tests.checkpoints import random_ids

Make = Callable[..., Path]


# SparseMixer in numpy


@pytest.mark.parametrize("jitter", [0.0, 0.01, 0.1, 0.6])
@pytest.mark.parametrize("experts", [2, 5, 16])
def test_sparse_mixer_is_pytorchs(experts: int, jitter: float) -> None:
    generator = np.random.default_rng((experts, int(100 * jitter)))
    scores = generator.normal(size=(400, experts)).astype(np.float32)
    scores[100:200] = 1 + 0.05 * scores[100:200]  # near each other
    scores[200:300] = -1 + 0.05 * scores[200:300]  # all below 0
    scores[300:] = np.round(scores[300:])  # many are equal, and many 0
    chosen, weights, margins = sparse_mixer(scores, jitter)
    expected_weights, expected = modeling.sparse_mixer(torch.from_numpy(scores), jitter)
    assert chosen.dtype == np.int64
    assert weights.dtype == margins.dtype == np.float32
    np.testing.assert_array_equal(chosen, expected.numpy())
    np.testing.assert_allclose(weights, expected_weights.numpy(), rtol=1e-6)
    np.testing.assert_allclose(margins, [_margins(row, jitter) for row in scores.astype(float)], atol=1e-5)


def _margins(scores: Sequence[float], jitter: float) -> list[float]:
    """The definition in `Routing`, one token, in Python's floats."""
    first, second = sorted(range(len(scores)), key=lambda e: -scores[e])[:2]
    found = []
    for chosen, rivals in (
        (first, set(range(len(scores))) - {first}),
        (second, set(range(len(scores))) - {first, second}),
    ):
        best = scores[chosen]
        distances = [0.0 if scores[j] == best else (best - scores[j]) / max(abs(scores[j]), best) for j in rivals]
        found.append(min(distances, default=np.inf) - 2 * jitter)
    return found


def test_a_weight_is_below_1_exactly_where_the_margin_says_that_a_rival_counts() -> None:
    scores = np.random.default_rng(5).normal(size=(2000, 16)).astype(np.float32)
    _, weights, margins = sparse_mixer(scores, 0.05)
    assert 0.05 < (margins <= 0).mean() < 0.95
    np.testing.assert_array_equal(weights < 1, margins <= 0)


# the graph's inside


def reference(model: Any, ids: Sequence[int], forced: Sequence[Any] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The experts, their weights and the hidden states of the PyTorch model, of which experts can be `forced`."""
    weights, chosen, hidden = [], [], []

    def record(scores: torch.Tensor, jitter: float) -> Any:
        both = modeling.sparse_mixer(scores, jitter)
        chosen.append(both[1][0])
        if len(forced):
            choice = torch.from_numpy(forced[len(chosen) - 1])[None]
            both = modeling.mixer_weights(scores, choice, jitter), choice
        weights.append(both[0][0])
        return both

    model = modeling.with_seams(model, dataclasses.replace(model.seams, sparse_mixer=record))
    body = model.model
    for module in (body.embed_tokens, *body.layers[:-1], body.norm):
        module.register_forward_hook(lambda _, __, out: hidden.append(out[0] if torch.is_tensor(out) else out[0][0]))
    with torch.inference_mode():
        body.whole(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))
    return torch.stack(chosen).numpy(), torch.stack(weights).numpy(), torch.stack(hidden).numpy()


def assert_is(model: PhiMoE, expected: Any, ids: list[int]) -> None:
    chosen, weights, hidden = reference(expected, ids)
    routing, states = model.routing(ids), model.hidden_states(ids)
    assert routing.token_ids == ids
    np.testing.assert_array_equal(routing.experts, chosen)
    np.testing.assert_allclose(routing.weights, weights, atol=1e-3)
    assert routing.weights.dtype == states.dtype == np.float32
    assert states.shape == hidden.shape
    assert np.abs(states - hidden).max() <= 1e-3 * hidden.std()


@pytest.mark.parametrize("target", ["cpu", "portable"])
@pytest.mark.parametrize("shape", ["longrope", "experts"])
def test_routing_and_hidden_states_are_pytorchs(checkpoint: Make, bundle: Make, shape: str, target: str) -> None:
    model, expected = PhiMoE.load(bundle(shape, target, "none"), threads=1), load_reference(checkpoint(shape))
    for ids in (random_ids(1), random_ids(20), random_ids(40)):  # longrope's boundary is 32
        assert_is(model, expected, ids)


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_in_chunks_the_numbers_are_the_same(bundle: Make, target: str) -> None:
    folder, ids = bundle("longrope", target, "none"), random_ids(40)
    manifest = read_manifest(folder)
    whole = Probe.open(folder, manifest, 1)
    small = dataclasses.replace(manifest, decoding=dataclasses.replace(manifest.decoding, prefill_chunk=7))
    chunked = Probe.open(folder, small, 1)
    steps: list[int] = []
    routing = chunked.routing(ids, steps.append)
    assert steps == [7, 7, 7, 7, 7, 5]
    np.testing.assert_array_equal(routing.experts, whole.routing(ids).experts)
    np.testing.assert_allclose(chunked.hidden_states(ids), whole.hidden_states(ids), atol=1e-5)


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification"])
def test_bundles_of_other_tasks(checkpoint: Make, bundle: Make, task: str) -> None:
    model = PhiMoE.load(bundle("plain", "cpu", "none", task), threads=1)
    expected = load_reference(checkpoint("plain", task))
    assert_is(model, expected, random_ids(30))
    if task == "feature-extraction":
        np.testing.assert_allclose(model.hidden_states(random_ids(9))[-1, -1], model.embed(random_ids(9)), atol=1e-5)


def values(folder: Path, names: list[str], ids: list[int]) -> list[np.ndarray]:
    """Values of a bundle's first graph, by a way of their own: onnx adds the outputs."""
    manifest = read_manifest(folder)
    model = onnx.load(folder / manifest.graphs[0].file, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if manifest.graphs[0].requires:
        options.register_custom_ops_library(str(operators.library()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    cache = manifest.decoding.cache
    nothing = np.zeros((1, cache.num_key_value_heads, 0, cache.head_dim), np.float32)
    feeds: dict[str, Any] = {each.name: nothing for each in session.get_inputs() if each.name.startswith("past")}
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    found: list[np.ndarray] = session.run(names, feeds | {"rope_length": np.array([len(ids)])})
    return found


def test_a_stock_graphs_own_choice_is_told(bundle: Make) -> None:
    folder, ids = bundle("experts", "cpu", "int4"), random_ids(60)
    routing = PhiMoE.load(folder, threads=1).routing(ids)
    prefixes = [f"model.layers.{layer}.block_sparse_moe/" for layer in range(3)]
    chosen = values(folder, [f"{prefix}TopK.1" for prefix in prefixes], ids)
    weights = values(folder, [f"{prefix}Reciprocal" for prefix in prefixes], ids)
    np.testing.assert_array_equal(routing.experts, np.concatenate(chosen))
    np.testing.assert_allclose(routing.weights, np.concatenate(weights), rtol=1e-6)
    assert routing.num_experts == 5


@pytest.fixture(scope="module")
def native(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if operators.library() is None:
        pytest.skip("the library of the native operators is not built here")
    folder = tmp_path_factory.mktemp("native") / "bundle"
    return export(checkpoint("experts"), folder, quantize="int8", operators="native")


def test_a_native_graphs_routing_is_that_of_its_inputs(checkpoint: Make, native: Path) -> None:
    """The router in double precision, over what the operator reads and the checkpoint's weights."""
    ids, parameters = random_ids(60), load_reference(checkpoint("experts")).state_dict()
    routing = PhiMoE.load(native, threads=1).routing(ids)
    inputs = values(native, [f"model.layers.{layer}.post_attention_layernorm" for layer in range(3)], ids)
    for layer, x in enumerate(inputs):
        gate = parameters[f"model.layers.{layer}.block_sparse_moe.gate.weight"].double()
        weights, chosen = modeling.sparse_mixer(torch.from_numpy(x[0]).double() @ gate.T, 0.1)
        np.testing.assert_array_equal(routing.experts[layer], chosen.numpy())
        np.testing.assert_allclose(routing.weights[layer], weights.numpy(), rtol=1e-4)


def test_a_native_graph_is_pytorch_over_the_stored_weights(checkpoint: Make, native: Path) -> None:
    """But for activations of 8 bits: they turn a choice now and then, so PyTorch takes the bundle's."""
    ids = random_ids(60)
    expected = stored_model(load_reference(checkpoint("experts")), native, read_manifest(native))
    model = PhiMoE.load(native, threads=1)
    routing, states = model.routing(ids), model.hidden_states(ids)
    chosen, _, hidden = reference(expected, ids, routing.experts)
    assert (routing.experts == chosen).mean() > 0.95
    distances = np.abs(states[:, None] - hidden).mean(axis=(2, 3))  # from each layer's to each
    own = np.diag(distances)
    assert (own < 0.1 * (distances + np.diag(np.full(len(own), np.inf))).min(axis=1)).all()
    np.testing.assert_array_equal(states[0], hidden[0])


@pytest.mark.parametrize("kind", ["stock", "native"])
def test_more_outputs_leave_the_logits_to_the_bit(bundle: Make, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue("native") if kind == "native" else bundle("experts", "cpu", "int4")
    ids = random_ids(60)
    manifest = read_manifest(folder)
    probe = Probe.open(folder, manifest, 1)
    cache = manifest.decoding.cache
    nothing = np.zeros((1, cache.num_key_value_heads, 0, cache.head_dim), np.float32)
    feeds: dict[str, Any] = dict.fromkeys(
        (f"past_key_values.{i}.{p}" for i in range(3) for p in ("key", "value")), nothing
    )
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    (logits,) = probe._session.run(["logits"], feeds)
    np.testing.assert_array_equal(logits[0], PhiMoE.load(folder, threads=1).logits(ids))


def test_a_tapped_model_is_sound_and_says_no_name_twice(bundle: Make) -> None:
    graph = bundle("plain", "cpu", "none", "feature-extraction") / "model.onnx"
    extended, taps = tap(graph, 2)
    model = onnx.load_model_from_string(extended)
    names = [value.name for value in model.graph.output]
    assert sorted(names) == sorted({*taps.scores, *taps.hidden, "last_hidden_state"})
    assert len(taps.scores) == 2
    assert len(taps.hidden) == 3
    assert len(model.graph.node) == len(onnx.load(graph, load_external_data=False).graph.node)


def test_a_message_is_read_as_it_was_written() -> None:
    long = "x" * 300  # a length of two bytes
    data = message((1, "é"), (12, long), (3000, b"\x00\xff"))
    assert [(number, data[a:b]) for number, a, b in fields(data, 0, len(data))] == [
        (1, "é".encode()),
        (12, long.encode()),
        (3000, b"\x00\xff"),
    ]


# what a caller may do wrong


def test_texts_that_cannot_be_read(bundle: Make) -> None:
    model = PhiMoE.load(bundle("longrope", "cpu", "none"), threads=1)
    for method in (model.routing, model.hidden_states):
        with pytest.raises(GenerationError, match="the text is empty"):
            method("")
        with pytest.raises(GenerationError, match=r"the text has 129 tokens, expected 1 to 128 \(the context\)"):
            method(random_ids(129))
        with pytest.raises(GenerationError, match="the text holds 99999, expected token ids"):
            method([99999])
    assert model.routing(random_ids(128)).experts.shape == (2, 128, 2)
    assert model.hidden_states("A").shape[::2] == (3, 64)


def test_on_another_device_it_says_so(bundle: Make) -> None:
    model = PhiMoE.load(bundle("longrope", "cpu", "none"), threads=1)
    on_a_card = PhiMoE(model._sessions, model.manifest, model.tokenizer, model._template)
    with pytest.raises(DeviceError, match="only on the CPU can the inside of a graph be read"):
        on_a_card.routing("Emma")


def test_a_bundle_that_was_changed_or_lacks_the_nodes(bundle: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle("longrope", "cpu", "none"), tmp_path / "bundle"))
    model = PhiMoE.load(folder, threads=1)
    for graph in folder.glob("model*.onnx"):
        graph.write_bytes(
            graph.read_bytes().replace(
                b"layers.1.block_sparse_moe.gate/MatMul", b"layers.1.block_sparse_moe.gate/MetMul"
            )
        )
    with pytest.raises(BundleError, match="SHA-256 is not the manifest's"):
        model.routing("Emma")
    manifest = dataclasses.replace(read_manifest(folder), files=describe_files(folder))
    with pytest.raises(BundleError, match=r"model\.onnx: has no node model\.layers\.1\.block_sparse_moe\.gate/MatMul"):
        Probe.open(folder, manifest, 1)


# the figures


def routing(first: list[int], second: list[int], margins: list[float] | None = None) -> Routing:
    """One layer of four experts, for a mask of the width 0.2."""
    experts = np.array([list(zip(first, second, strict=True))], np.int64)
    both = np.array([[(m, np.inf) for m in margins or [1.0] * len(first)]], np.float32)
    weights = np.full(experts.shape, 0.5, np.float32)
    weights[..., 0] = 1
    return Routing([1] * len(first), 4, experts, weights, both)


def test_figures_of_a_text_in_pieces() -> None:
    found = usage("a", [routing([0, 0, 1], [1, 2, 0], [-0.2, -0.01, 0.01]), routing([0], [1], [0.3])], 0.2)
    assert (found.tokens, found.pieces) == (4, 2)
    np.testing.assert_allclose(found.share, [[4 / 8, 3 / 8, 1 / 8, 0]])
    np.testing.assert_allclose(found.weight, [[3.5 / 4, 2 / 3, 0.5, 0]])
    assert found.pairs[0].tolist() == [[0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found.rival.tolist() == [[0.5, 0.0]]
    assert found.near.tolist() == [[0.5, 0.0]]
    assert found.distances[0].tolist() == [1, 1, 1, 0, 0, 1] + [0] * (BINS - 5)  # in widths: 0, 0.95, 1.05, 2.5
    assert found.distances[1].tolist() == [0] * BINS + [4]
    np.testing.assert_allclose(found.quantiles[0, 0, [0, 2, 4]], [-0.2, -0.01, 0.01], rtol=1e-6)
    pairs = top_pairs(found, 0, 5)
    assert [(pair.experts, pair.share) for pair in pairs] == [((0, 1), 0.75), ((0, 2), 0.25)]
    # 0 first 3/4 and 1 first 1/4; 1, 2 and 0 second 1/2, 1/4 and 1/4; without 0+0 and 1+1 that leaves 11/16
    by_chance = (3 / 4 * 1 / 2 + 1 / 4 * 1 / 4) / (11 / 16)
    assert pairs[0].lift == pytest.approx(0.75 / by_chance)


def test_choices_that_do_not_depend_on_each_other_have_a_lift_of_1() -> None:
    every = [(a, b) for a in range(4) for b in range(4) if a != b]
    found = usage("a", [routing([a for a, _ in every], [b for _, b in every])], 0.2)
    assert [pair.lift for pair in top_pairs(found, 0, 6)] == pytest.approx([1.0] * 6)


def test_texts_beside_each_other() -> None:
    texts = [usage(str(n), [routing([a], [b])], 0.2) for n, (a, b) in enumerate([(0, 1), (2, 3), (0, 2)])]
    assert apart(texts).tolist() == [[0, 1, 0.5], [1, 0, 0.5], [0.5, 0.5, 0]]
    assert own_experts(texts, 1, 1) == [(0, 3, 0.5, 0.0)]


def test_a_mask_of_no_width() -> None:
    found = usage("a", [routing([0, 0], [1, 1], [0.0, 0.5])], 0.0)
    assert found.rival.tolist() == [[0.5, 0.0]]
    assert found.distances.sum(axis=1).tolist() == [2, 2]


# the command


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    (tmp_path / "prose.txt").write_text("It was a fine morning, and Elizabeth walked to Meryton. " * 20)
    (tmp_path / "<i>code.py").write_text("def f(x):\n    return [y for y in x if y]\n" * 20)
    return [str(tmp_path / "prose.txt"), str(tmp_path / "<i>code.py")]


def test_a_table_json_and_a_page(bundle: Make, tmp_path: Path, texts: list[str], capsys: Any) -> None:
    folder = bundle("experts", "cpu", "none")
    reports = [str(tmp_path / "a.json"), str(tmp_path / "a.html")]
    command = [str(folder), "--text", texts[0], "--text", texts[1], "--json", reports[0], "--html", reports[1]]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 layers, 5 experts, two for each token; even use would be 20.0% each"
    assert max(map(len, out)) <= 80
    found = json.loads(Path(reports[0]).read_text())
    model = PhiMoE.load(folder, threads=1)
    for text, each in zip(texts, found["texts"], strict=True):
        ids = model.tokenizer.encode(Path(text).read_text())
        assert each["tokens"] == len(ids) > 128
        assert each["pieces"] == -(-len(ids) // 128)
        read = [model.routing(ids[start : start + 128]).experts for start in range(0, len(ids), 128)]
        counts = [np.bincount(layer.ravel(), minlength=5) for layer in np.concatenate(read, axis=1)]
        np.testing.assert_allclose(each["share"], np.stack(counts) / (2 * len(ids)))
        assert f"{each['name']}: {each['tokens']} tokens in {each['pieces']} pieces" in out
    assert main(command) == 0  # over its own reports


class Balanced(HTMLParser):
    """Notes the tags, and that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: D102
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:  # noqa: D102
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:  # noqa: D102
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(bundle: Make, tmp_path: Path, texts: list[str]) -> None:
    file = tmp_path / "a.html"
    arguments = [item for text in texts for item in ("--text", text)]
    assert main([str(bundle("experts", "cpu", "none")), *arguments, "--tokens", "50", "--html", str(file)]) == 0
    html = file.read_text()
    assert not any(word in html for word in ("http", "<script", "src=", "url(", "@import", "<link", "<i>"))
    assert "&lt;i&gt;code.py" in html
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert html.count("<title>layer ") == 2 * 2 * 3 * 5  # shares and differences, two texts, layers, experts
    assert "prefers-color-scheme: dark" in html


def test_one_token_alone(bundle: Make, texts: list[str], tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "a.html"
    command = [str(bundle("experts", "cpu", "none")), "--text", texts[0], "--tokens", "1", "--html", str(file)]
    assert main(command) == 0
    assert "prose.txt: 1 token\n" in capsys.readouterr().out
    assert "What sets the texts apart" not in file.read_text()


def test_texts_of_one_name_are_told_apart(bundle: Make, tmp_path: Path, capsys: Any) -> None:
    files = [tmp_path / "a" / "text", tmp_path / "b" / "text"]
    for file in files:
        file.parent.mkdir()
        file.write_text("Emma")
    assert main([str(bundle("experts", "cpu", "none")), *(f"--text={file}" for file in files)]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{file}: " in out for file in files)


def test_what_the_command_refuses(bundle: Make, tmp_path: Path, texts: list[str], capsys: Any) -> None:
    folder = str(bundle("experts", "cpu", "none"))
    empty, letter, half = tmp_path / "empty", tmp_path / "letter.html", tmp_path / "half"
    empty.write_text("")
    letter.write_text("Dear Emma")
    half.write_bytes(b"\xff")
    for arguments, error in {
        ("--text", str(empty)): f"--text {empty}: is empty; give at least one character",
        ("--text", str(half)): f"--text {half}: cannot be read ('utf-8' codec",
        ("--text", str(tmp_path / "none")): "cannot be read ([Errno 2]",
        ("--text", texts[0], "--html", str(letter)): f"{letter}: exists and is no earlier report",
    }.items():
        assert main([folder, *arguments]) == 1
        assert error in capsys.readouterr().err
    assert letter.read_text() == "Dear Emma"
    assert main([str(tmp_path), "--text", texts[0]]) == 1
    assert "not a bundle of phimoe-export" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([folder])


def test_many_experts_and_layers_stay_in_80_columns() -> None:
    experts = np.random.default_rng(0).permuted(np.tile(np.arange(40), (32, 500, 1)), axis=-1)[..., :2]
    found = usage("a text", [Routing([1] * 500, 40, experts, *np.ones((2, 32, 500, 2), np.float32))], 0.02)
    report = Report("bundle", "source", "cpu", "int4", 0.01, [found, dataclasses.replace(found, name="another")])
    assert max(map(len, lines(report))) <= 80
    assert page(report).count("<title>layer ") == 2 * 2 * 32 * 40
