"""What an export makes of a checkpoint's tokenizer and templates, and which of them it refuses before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phimoe_onnx import PhiMoE, export
from phimoe_onnx.bundle import read_manifest
from phimoe_onnx.errors import BundleError, ConfigError
from phimoe_onnx.exporter import pipeline
from phimoe_onnx.exporter.tokenizer import tokenizer_files
from phimoe_onnx.text.template import TOOL_USE
from tests.checkpoints import MODEL, write_checkpoint

CONFIG = json.loads((MODEL / "tokenizer_config.json").read_text())
TEMPLATE = CONFIG["chat_template"]
USER = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "plain")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "checkpoint"))


def configure(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def leave_the_slow_one(folder: Path) -> None:
    remove_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")


def renumber(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["id"] = 5
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def configured(**config: Any) -> Callable[[Path], Any]:
    return lambda folder: configure(folder, **config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tokenizer, r"tokenizer\.json: no such file; make it with the package transformers: AutoTokenizer"),
        (leave_the_slow_one, r"no such file; there is a tokenizer\.model, which is the slow tokenizer's; make it"),
        (write("tokenizer.json", b"{"), r"tokenizer\.json: .*download"),
        (write("tokenizer.json", b"{}"), r"tokenizer\.json: cannot be read as a tokenizer .*download"),
        (write("tokenizer.json", b"\xff"), r"tokenizer\.json: cannot be read"),
        (write("tokenizer.json", 100_000 * b"["), r"tokenizer\.json: "),
        (write("tokenizer_config.json", b"{"), r"tokenizer_config\.json: is not JSON"),
        (write("tokenizer_config.json", b"[]"), r"tokenizer_config\.json: expected a JSON object"),
        (write("chat_template.jinja", b"\xff"), r"chat_template\.jinja: cannot be read"),
        (configured(chat_template=5), r"tokenizer_config\.json: chat_template holds"),
        (configured(bos_token=None, add_bos_token=True), "add_bos_token is true, but there is no bos_token"),
        (configured(eos_token=5), "eos_token holds 5, expected a token's text"),
        (configured(added_tokens_decoder={"1": {"text": "a"}}), r"tokenizer_config\.json: its tokens are damaged"),
        (configured(added_tokens_decoder={"x": {"content": "a"}}), r"tokenizer_config\.json: its tokens are damaged"),
        (configured(added_tokens_decoder=[5]), r"tokenizer_config\.json: its tokens are damaged"),
        (configured(added_tokens_decoder=None), "added_tokens_decoder holds what is no object"),
        (configured(added_tokens_decoder={"0": "<unk>"}), "added_tokens_decoder holds what is no object"),
        (configured(added_tokens_decoder={"0": {"content": "<unk>", "special": None}}), "its tokens are damaged"),
        (
            configured(tokenizer_class="MyTokenizer"),
            "tokenizer_class is 'MyTokenizer', expected one of Llama",
        ),
        (configured(additional_special_tokens="<s>"), "additional_special_tokens is '<s>', expected a list"),
        (renumber, "its added token '<unk>' has the id 5, but its vocabulary makes it 0"),
        (configured(add_prefix_space=False), "add_prefix_space is False, for which transformers makes another"),
    ],
)
def test_a_text_part_that_the_runtime_cannot_take_is_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    monkeypatch.setattr(pipeline, "trace", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(pipeline, "fetch_weights", lambda *_: pytest.fail("the download began"))
    with pytest.raises(ConfigError, match=message):
        export(folder, folder.parent / "bundle")
    assert not (folder.parent / "bundle").exists()


def test_a_bundle_says_what_transformers_says(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "{{ tools | tojson }}"}, {"name": "default", "template": TEMPLATE}]
    configure(folder, chat_template=named, add_bos_token=True, clean_up_tokenization_spaces=True)
    bundle = export(folder, folder.parent / "bundle", quantize="int8")
    manifest = read_manifest(bundle)
    assert manifest.decoding.clean_up_tokenization_spaces
    assert {"tokenizer.json", "tokenizer_config.json", TOOL_USE} <= manifest.files.keys()
    assert manifest.chat is not None
    model = PhiMoE.load(bundle)
    assert model.encode("Hi")[0] == 1
    assert model.encode(USER)[0] != 1
    assert model.tokenizer.decode(model.tokenizer.encode("Anne was happy .")) == "Anne was happy."
    (entry,) = (path for path in bundle.iterdir() if path.name == "tokenizer_config.json")
    assert json.loads(entry.read_text())["chat_template"] == TEMPLATE
    assert tokenizer_files(bundle).keys() <= {"tokenizer_config.json", TOOL_USE}  # written once is written for good


def test_genai_opens_a_bundle_of_several_templates(folder: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    named = [{"name": "tool_use", "template": "{{ tools | tojson }}"}, {"name": "default", "template": TEMPLATE}]
    configure(folder, chat_template=named)
    bundle = export(folder, folder.parent / "bundle", quantize="int8", operators="stock")
    tokenizer = og.Tokenizer(og.Model(str(bundle)))
    expected = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(json.dumps(USER), add_generation_prompt=True) == expected


def test_a_template_that_does_not_parse_leaves_plain_prompts(folder: Path) -> None:
    bundle = export(configure(folder, chat_template="{% if %}"), folder.parent / "bundle", quantize="int8")
    model = PhiMoE.load(bundle)
    assert read_manifest(bundle).chat is None
    assert model.generate("Hi", max_new_tokens=2).token_ids
    with pytest.raises(BundleError, match="chat template does not parse"):
        model.generate(USER, max_new_tokens=2)


def test_the_small_models_files_stay_as_they_are(folder: Path) -> None:
    assert tokenizer_files(MODEL) == {}
    bundle = export(folder, folder.parent / "bundle", quantize="int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (bundle / name).read_bytes() == (MODEL / name).read_bytes()
    assert "clean_up_tokenization_spaces" not in (bundle / "manifest.json").read_text()


def test_flags_of_tomorrow_are_passed_over_in_silence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    token = CONFIG["added_tokens_decoder"]["0"] | {"tomorrow": True}
    assert tokenizer_files(configure(folder, added_tokens_decoder=CONFIG["added_tokens_decoder"] | {"0": token})) == {}
    assert capfd.readouterr() == ("", "")
