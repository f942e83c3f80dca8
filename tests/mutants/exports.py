"""Mutated checkpoints and adapters, exported: refused in words of ours, or the bundle is what the files say."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from safetensors.torch import load_file

from phimoe_onnx import PhiMoE, reference
from phimoe_onnx.bundle import Manifest, read_manifest
from phimoe_onnx.checkpoint.data import read_rows
from phimoe_onnx.config import PhiMoEConfig, read_config
from phimoe_onnx.errors import PhiMoEError
from phimoe_onnx.exporter import pipeline
from phimoe_onnx.exporter.weights import Parameter, parts_of
from phimoe_onnx.text.template import ChatTemplate
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.captures import keep_captures
from tests.checkpoints import _spell
from tests.mutants.inputs import CONVERSATION, NEW_TOKENS, PROMPT, write_inputs
from tests.mutants.mutator import Mutator

# how deep a mutant got, by the last of these functions that was at work when it was refused
STEPS = {
    "resolve": "read",
    "read_config": "config",
    "read_adapter": "weights",
    "task_for": "config",
    "recipe_for": "config",
    "check_tokens": "tokenizer",
    "read_decoding": "tokenizer",
    "check_text": "tokenizer",
    "read_templates": "template",
    "read_headers": "weights",
    "parameters": "weights",
    "write_graphs": "weights",
    "_write_files": "template",
    "_manifest": "template",
    "load": "load",
    "generate": "run",
}
READS = ("read_text", "read_json")
DEPTHS = ("read", "config", "tokenizer", "template", "weights", "accepted", "run")
# the inputs, as often as they are drawn; the first part of a path is the folder that is exported, or the adapter
FILES = [
    *["config.json"] * 5,
    *["tokenizer.json"] * 4,
    *["tokenizer_config.json"] * 5,
    *["chat template"] * 6,
    "special_tokens_map.json",
    "generation_config.json",
    "model.safetensors.index.json",
    *["*.safetensors"] * 3,
    *["adapter_config.json"] * 2,
    "adapter_model.safetensors",
]
WHOLE = 0.05  # of the mutants with a graph that was traced before are exported whole, run, and held against PyTorch
Judge = Callable[[str, Path, Path | None, Path, Manifest], None]


class Exports:
    """A campaign: `run` makes one mutant in a new folder, exports it, and returns how deep it got.

    `judge` is called with the file that was changed, an accepted mutant's checkpoint and adapter, its bundle, which may
    lack graphs, and the manifest.
    """

    def __init__(self, folder: Path, judge: Judge | None = None) -> None:
        self._folder = folder / "inputs"
        write_inputs(self._folder)
        self._judge = judge
        self._traced: dict[tuple[Any, ...], ir.Model] = {}
        self._original = {name: getattr(pipeline, name) for name in ("trace", "build_graphs", "write_graphs")}
        self._rows: dict[str, Any] = {}
        keep_captures()
        pipeline.trace = self._trace
        for name in ("plain", "named"):
            pipeline.export(self._folder / name, folder / f"sound-{name}")

    def run(self, mutator: Mutator, folder: Path) -> tuple[str, PhiMoEError | None]:
        """How deep the mutant got, and what it was refused with.

        Raises:
            Exception: any is a fault.
        """
        pick = mutator.pick
        base, file = pick.choice(("plain", "plain", "named")), pick.choice(FILES)
        adapted = "adapter" in file or pick.random() < 0.05
        checkpoint, adapter = folder / base, folder / "adapter" if adapted else None
        shutil.copytree(self._folder / base, checkpoint)
        if adapter:
            shutil.copytree(self._folder / "adapter", adapter)
        self._change(mutator, file, checkpoint, adapter)
        target, quantize = pick.choice((("cpu", "none"), ("portable", "none"), ("cpu", "int4")))
        whole = pick.random() < WHOLE
        output = folder / "bundle"
        for name, function in self._original.items():
            setattr(pipeline, name, self._trace if name == "trace" else function if whole else getattr(self, name))
        try:
            pipeline.export(checkpoint, output, target=target, quantize=quantize, operators="stock", adapter=adapter)
        except PhiMoEError as error:
            _check_error(error, folder, checkpoint, adapter)
            assert [path.name for path in folder.iterdir() if "bundle" in path.name] == [".bundle.lock"] or not any(
                "bundle" in path.name for path in folder.iterdir()
            ), sorted(folder.iterdir())
            return _depth(error), error
        except _UntracedError:
            return "accepted", None
        manifest = read_manifest(output)
        _check_weights(checkpoint, adapter, read_config(checkpoint), self._rows)
        _check_text(output, manifest)
        if whole:
            _check_tokens(checkpoint, adapter, output, manifest)
        if self._judge:
            self._judge(file, checkpoint, adapter, output, manifest)
        return ("run" if whole else "accepted"), None

    def _change(self, mutator: Mutator, file: str, checkpoint: Path, adapter: Path | None) -> None:
        pick = mutator.pick
        if file == "chat template":
            return _change_template(mutator, checkpoint)
        if file.startswith("*"):
            path = pick.choice(sorted(checkpoint.glob(file)))
        else:
            path = (adapter if "adapter" in file and adapter else checkpoint) / file
        mutator.said.append(f"{path.parent.name}/{path.name}:")
        if not path.exists():
            path.write_text("{}")
        if pick.random() < 0.02:
            path.unlink()
            if pick.random() < 0.5:
                path.mkdir()
            mutator.said.append("gone")
        elif path.suffix == ".json":
            path.write_bytes(mutator.json_file(path.read_text()))
        else:
            path.write_bytes(mutator.safetensors(path.read_bytes()))

    def _trace(self, config: PhiMoEConfig, rows: dict[str, Any], dtype: ir.DataType, task: str) -> ir.Model | None:
        """The traced graph of a shape that was traced before, over these rows."""
        self._rows = rows
        plain = dataclasses.replace(config, bos_token_id=None, pad_token_id=None, eos_token_id=(), task=None, labels=())
        key = dataclasses.replace(plain, problem_type=None), dtype, task
        if key not in self._traced:
            if len(self._traced) == 2 and pipeline.build_graphs is self._original["build_graphs"]:
                raise _UntracedError
            if len(self._traced) < 2:
                self._traced[key] = self._original["trace"](config, rows, dtype, task)
        if pipeline.build_graphs is not self._original["build_graphs"]:
            return None
        traced = self._traced[key].clone()
        for name, value in traced.graph.initializers.items():
            if isinstance(value.const_value, Parameter):
                shape = value.shape.numpy()
                value.const_value = Parameter(name, value.dtype, shape, parts_of(name, shape, rows[name]))
        return traced

    def build_graphs(self, *_: Any) -> list[str]:
        """Stands for the pipeline's, of which only the files' names are wanted."""
        return ["model.onnx"]

    def write_graphs(self, graphs: list[str], staging: Path, recipe: Any, *_: Any) -> int:
        """Stands for the pipeline's: the files are there, with nothing in them."""
        for name in recipe.graphs():
            (staging / name).touch()
        return 0


class _UntracedError(Exception):
    """A sound mutant of a shape whose tracing would take seconds."""


def _change_template(mutator: Mutator, checkpoint: Path) -> None:
    file = checkpoint / "chat_template.jinja"
    config_file = checkpoint / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    template = mutator.text(file.read_text() if file.exists() else config["chat_template"])
    place = mutator.pick.choice(("file", "string", "list", "folder"))
    mutator.said.append(f"as a {place}")
    if place == "file":
        data = template.encode("utf-8", "surrogatepass")
        file.write_bytes(mutator.raw(data) if mutator.pick.random() < 0.05 else data)
    elif place == "folder":
        (checkpoint / "additional_chat_templates").mkdir(exist_ok=True)
        (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text(template)
    else:
        named = [{"name": "default", "template": template}, {"name": "tool_use", "template": template + "x"}]
        config["chat_template"] = template if place == "string" else mutator.pick.choice((named, named[1:], named[:1]))
        config_file.write_text(json.dumps(config))


def _depth(error: BaseException) -> str:
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if names[-1] in READS:
        return "read"
    return next((STEPS[name] for name in reversed(names) if name in STEPS), "start")


def _check_error(error: PhiMoEError, folder: Path, checkpoint: Path, adapter: Path | None) -> None:
    """A message names a file, a tensor or an option, is no wall of text, and is no other library's."""
    text = str(error)
    files = {path.name for path in folder.rglob("*")} | {"config.json", "model.safetensors", "safetensors"}
    named = any(name in text for name in files) or "the tensor" in text or "--" in text
    assert named, f"names nothing: {text}"
    assert len(text) < 1200, f"{len(text)} characters: {text[:300]} ..."


def _check_weights(checkpoint: Path, adapter: Path | None, config: PhiMoEConfig, rows: dict[str, Any]) -> None:
    """Every parameter is the tensor of its name, as the library safetensors reads it, with the adapter's product."""
    single = checkpoint / "model.safetensors"
    files = [single]
    stored: dict[str, torch.Tensor] = {}
    if single.exists():
        stored = load_file(single)
    else:
        weight_map = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
        files = sorted({checkpoint / file for file in weight_map.values()})
        for file in files:
            loaded = load_file(file)
            stored |= {name: tensor for name, tensor in loaded.items() if weight_map.get(name) == file.name}
    if adapter:
        _merge(stored, adapter)
    for name, parts in rows.items():
        shape = (config.num_local_experts, -1, parts[0].shape[-1]) if ".experts." in name else parts[0].shape
        try:
            ours = read_rows(parts).reshape(shape)
        except PhiMoEError as error:  # numbers that are not finite, which an export says when it comes to them
            assert "finite" in str(error), error
            continue
        for spelt, tensor in _spell(name, ours, "hub").items():
            expected = stored.get(spelt, stored.get(spelt.removeprefix("model.")))
            assert expected is not None, f"{spelt} is not stored"
            torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7, equal_nan=True)


def _merge(stored: dict[str, torch.Tensor], folder: Path) -> None:
    """The adapter's products, by LoRA's formula: alpha / r, or alpha / sqrt(r), times B A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    for name, a in factors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        module = module if module.startswith("model.") else f"model.{module}"
        patterns = (config.get("alpha_pattern") or {}).items()
        alpha = next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
        alpha = config.get("lora_alpha", 8) if alpha is None else alpha
        b, rank = factors[name.replace("lora_A", "lora_B")], a.shape[0]
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        key = f"{module}.weight" if f"{module}.weight" in stored else f"{module.removeprefix('model.')}.weight"
        stored[key] = stored[key] + (b.float() @ a.float()) * scale


def _check_text(bundle: Path, manifest: Manifest) -> None:
    """What the exporter wrote is what the runtime reads, and the strings of the manifest are the template's."""
    decoding = manifest.decoding
    tokenizer = Tokenizer(bundle, decoding.hidden_tokens.values(), decoding.clean_up_tokenization_spaces)
    ids = tokenizer.encode("a stop <|end|>\n\N{SLIGHTLY SMILING FACE}")
    assert all(0 <= id < decoding.vocab_size for id in ids)
    stream = tokenizer.stream()
    text = "".join(map(stream.add, ids)) + stream.finish()
    assert tokenizer.decode(ids).startswith(text)
    template, prompt = ChatTemplate(bundle), None
    with suppress(PhiMoEError):
        prompt = template.render(CONVERSATION)
    if manifest.chat:
        turns = [(manifest.chat.turns.get(message["role"]), message["content"]) for message in CONVERSATION]
        if all(turn for turn, _ in turns):
            joined = "".join(turn[0] + content + turn[1] for turn, content in turns if turn)
            assert joined + manifest.chat.generation == prompt


def _check_tokens(checkpoint: Path, adapter: Path | None, bundle: Path, manifest: Manifest) -> None:
    """The bundle's greedy tokens are PyTorch's, or all but: a token may be as likely as another."""
    model = PhiMoE.load(bundle, threads=1)
    reference_model = reference.load_reference(checkpoint, adapter=adapter)
    expected = torch.from_numpy(reference.logits(reference_model, PROMPT))
    if manifest.quantize == "none" and expected.isfinite().all():
        torch.testing.assert_close(torch.from_numpy(model.logits(PROMPT)), expected, rtol=1e-2, atol=1e-2)
    found = model.generate(PROMPT, max_new_tokens=NEW_TOKENS).token_ids
    assert len(found) <= NEW_TOKENS
    assert all(0 <= id < manifest.decoding.vocab_size for id in found)
