"""Token ids and rendered prompts against transformers 4.57, over what a checkpoint's tokenizer files may say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from phimoe_onnx.config import read_config
from phimoe_onnx.errors import GenerationError, PhiMoEError
from phimoe_onnx.exporter.manifest.decoding import read_decoding
from phimoe_onnx.exporter.recipe import recipe_for
from phimoe_onnx.exporter.target import target_named
from phimoe_onnx.exporter.tokenizer import all_hidden_tokens, tokenizer_files
from phimoe_onnx.text.template import ChatTemplate
from phimoe_onnx.text.tokenizer import Tokenizer
from tests.checkpoints import MODEL

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
if not transformers.__version__.startswith("4."):
    pytest.skip("transformers 4.57 is the oracle", allow_module_level=True)

CONFIG = json.loads((MODEL / "tokenizer_config.json").read_text())
TEXTS = [
    "Anne was happy .",
    "",
    "  two  spaces\n\n日本 🙂",
    "<|user|>\nHi<|end|>\n<|assistant|>\n",
    "a<extra> b <|late|>c<pad>",
    "</s><s> it 's , n't ?",
]
EXTRA = {"content": "<extra>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


def added(**tokens: Any) -> dict[str, Any]:
    return CONFIG | {"added_tokens_decoder": CONFIG["added_tokens_decoder"] | tokens}


CONFIGS: dict[str, dict[str, Any] | None] = {
    "as it is": CONFIG,
    "none": None,
    "empty": {},
    "bos": CONFIG | {"add_bos_token": True},
    "bos by default": without("add_bos_token"),
    "eos": CONFIG | {"add_eos_token": True},
    "both": CONFIG | {"add_bos_token": True, "add_eos_token": True},
    "both the same": CONFIG | {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|endoftext|>"},
    "bos is null": CONFIG | {"add_bos_token": True, "bos_token": None},
    "bos is null and not added": CONFIG | {"bos_token": None},
    "bos null": CONFIG | {"add_bos_token": None},
    "bos is new": CONFIG | {"add_bos_token": True, "bos_token": "<new>"},
    "another class": CONFIG | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
    "another class, nothing else": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "fast class": without("add_bos_token") | {"tokenizer_class": "LlamaTokenizerFast"},
    "no class": without("tokenizer_class") | {"add_bos_token": True},
    "a token more": added(**{"2048": EXTRA | {"special": False}}),
    "a special token more": added(**{"2048": EXTRA | {"special": True}}),
    "two tokens more": added(
        **{"2050": EXTRA | {"special": True}, "2048": EXTRA | {"content": "<|late|>", "special": False}}
    ),
    "a token of other flags": added(
        **{"2046": CONFIG["added_tokens_decoder"]["2046"] | {"rstrip": False, "special": False}}
    ),
    "a special one that strips": added(**{"2048": EXTRA | {"special": True, "lstrip": True, "rstrip": True}}),
    "a word as token": added(**{"2048": EXTRA | {"content": "was", "special": False, "single_word": True}}),
    "a normalized token": added(**{"2048": EXTRA | {"special": False, "normalized": True}}),
    "a pad token": CONFIG | {"pad_token": "<pad>"},
    "additional tokens": CONFIG | {"additional_special_tokens": ["<extra>", "<|late|>"]},
    "extra tokens": CONFIG | {"extra_special_tokens": {"image_token": "<extra>"}},
    "a pad token that is there": CONFIG | {"pad_token": "<|end|>", "added_tokens_decoder": {}},
    "a pad token with flags": CONFIG
    | {"added_tokens_decoder": {}, "pad_token": EXTRA | {"__type": "AddedToken", "content": "<|end|>"}},
    "no decoder": without("added_tokens_decoder"),
    "no decoder, no tokens": without("added_tokens_decoder", "bos_token", "eos_token", "unk_token", "pad_token"),
}


def folder_of(tmp_path: Path, config: dict[str, Any] | None) -> Path:
    shutil.copytree(MODEL, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def written(folder: Path, bundle: Path) -> Path:
    """The tokenizer's part of a bundle."""
    shutil.copytree(folder, bundle, ignore=shutil.ignore_patterns("additional_chat_templates"))
    for name, text in tokenizer_files(folder).items():
        (bundle / name).write_text(text, encoding="utf-8")
    return bundle


@pytest.mark.parametrize("name", CONFIGS)
def test_ids(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "checkpoint", CONFIGS[name])
    try:
        oracle = transformers.AutoTokenizer.from_pretrained(folder)
    except ValueError:
        with pytest.raises(PhiMoEError):
            tokenizer_files(folder)
        return
    bundle = written(folder, tmp_path / "bundle")
    ours = Tokenizer(bundle, all_hidden_tokens(folder).values())
    for text in TEXTS:
        ids = oracle(text).input_ids
        assert ours.encode(text) == ids, text
        assert ours.encode(text, special=False) == oracle(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    again = transformers.AutoTokenizer.from_pretrained(bundle)  # the bundle itself, as optimum opens it
    assert [again(text).input_ids for text in TEXTS] == [oracle(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("value", [True, False, None])
def test_spaces_before_punctuation(tmp_path: Path, value: bool | None) -> None:
    folder = folder_of(tmp_path / "checkpoint", CONFIG | {"clean_up_tokenization_spaces": value})
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    config = read_config(folder)
    decoding = read_decoding(config, folder, recipe_for(config, target_named("cpu")))
    ours = Tokenizer(folder, decoding.hidden_tokens.values(), decoding.clean_up_tokenization_spaces)
    for text in (*TEXTS, "a . b ? c ! d , e ' f n't 'm 's 've 're", "  ' s  . ' '  ' ve n ' t ", "it is n ' t ."):
        ids = oracle(text).input_ids
        expected = oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == expected
        stream = ours.stream()
        assert "".join(stream.add(id) for id in ids) + stream.finish() == expected


def test_a_byte_level_tokenizers_first_space(tmp_path: Path) -> None:
    for wanted in (None, True, False):
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | (
            {} if wanted is None else {"add_prefix_space": wanted}
        )
        folder = folder_of(tmp_path / f"checkpoint{wanted}", config)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = None
        tokenizer["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        oracle = transformers.AutoTokenizer.from_pretrained(folder)
        ours = Tokenizer(written(folder, tmp_path / f"bundle{wanted}"), ())
        assert [ours.encode(text) for text in TEXTS] == [oracle(text).input_ids for text in TEXTS]


def test_the_small_models_files_stay_as_they_are() -> None:
    assert tokenizer_files(MODEL) == {}
    assert Library.from_file(str(MODEL / "tokenizer.json"))


USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "<add>", "description": "é & 'x'", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief.\n"}, USER, {"role": "assistant", "content": " yes "}, USER],
    [USER, CALL, {"role": "tool", "content": "3", "name": "add"}],
    [PARTS],
    [USER, USER],
]
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "tojson": LOOP + "{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}{{ tools | tojson }}",
    "tojson's keywords": "{{ messages | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
    "tools": "{% if tools is defined %}defined{% endif %}{% if tools is none %}none{% endif %}"
    "{% if documents is defined and documents is none %}none{% endif %}{{ documents }}{{ unknown is defined }}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ sep_token is defined }}",
    "controls": LOOP + "{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{% endfor %}",
    "generation": LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}",
    "generation that trims": LOOP + "\n  {%- generation -%}\n {{ m.role }} \n{%- endgeneration %}\n{% endfor %}",
    "raise": LOOP + "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.role }}{% endfor %}",
    "clock": "{{ strftime_now('%d %b %Y') }}",
    "clock where there is one": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
    "parts": LOOP + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{% endif %}{% endfor %}",
    "calls": LOOP + "{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}"
    "{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(last=-1, texts=[]) %}" + LOOP + "{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% set ns.texts = ns.texts + [m.content] %}{% endif %}{% endfor %}{{ ns.last }}"
    "{{ ns.texts | length }}",
    "slices": "{% set rest = messages[1:] %}{% for m in rest %}{{ m.role ~ loop.index ~ loop.last ~ loop.length }}"
    "{% if loop.nextitem is defined %}{{ loop.nextitem.role }}{% endif %}{% else %}none{% endfor %}",
    "filters": LOOP + "{{ m.role | upper | replace('U', 'V') }}{{ m.content | default('x', true) | trim }}"
    "{{ m | items | list | length }}{% endfor %}{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | groupby('role') | length }}",
    "macros": "{% macro turn(m, end='|') %}<{{ m.role }}>{{ caller() if caller else m.content }}{{ end }}{% endmacro %}"
    + LOOP
    + "{{ turn(m) }}{% call turn(m, end='!') %}x{% endcall %}{% endfor %}",
    "blocks": "{% set text %}{{ messages[0].content }}{% endset %}{% filter upper %}{{ text }}{% endfilter %}"
    "{% with a = 1, b = 'c' %}{{ a + 1 }}{{ b * 2 }}{% endwith %}",
    "strings": LOOP + "{{ m.role.upper() ~ m.role[0] ~ m.role.split('s') ~ ('%s-%d' % (m.role, 3)) ~ '{}!'.format(1) }}"
    "{{ m.role in ['user'] }}{{ m.role.startswith('u') }}{% endfor %}",
    "recursive": "{% for x in [[1, [2]], [3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{% endif %}{% endfor %}",
    "html": LOOP + "{{ m.content }}<&>{{ '<' | e }}{{ '<a>' | safe }}{% endfor %}",
    "white space": "  {% for m in messages %}\n    {{ m.role }}\n  {% endfor %}\n\n",
    "does not parse": "{% if %}",
    "undefined": "{{ messages[0].nothing.more }}",
    "unsafe": "{{ ''.__class__.__mro__ }}",
    "changes its input": "{{ messages.append(1) }}",
    "the checkpoint's own": CONFIG["chat_template"],
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [], [TOOL]])
def test_prompts(tmp_path: Path, name: str, tools: list[dict[str, Any]] | None) -> None:
    compare_prompts(folder_of(tmp_path / "checkpoint", CONFIG | {"chat_template": TEMPLATES[name]}), tmp_path, tools)


NAMED = [{"name": name, "template": name + "{{ tools is none }}"} for name in ("default", "tool_use", "rag")]
PLACES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "a list": (CONFIG | {"chat_template": NAMED}, {}),
    "a list without a default": (CONFIG | {"chat_template": NAMED[1:]}, {}),
    "a list of one": (CONFIG | {"chat_template": NAMED[:1]}, {}),
    "an empty list": (CONFIG | {"chat_template": []}, {}),
    "a file": (CONFIG, {"chat_template.jinja": "file"}),
    "a file over a list": (CONFIG | {"chat_template": NAMED}, {"chat_template.jinja": "file"}),
    "a folder": (CONFIG, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"}),
    "a folder alone": (CONFIG, {"additional_chat_templates/tool_use.jinja": "tools"}),
    "another's folder": (CONFIG, {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag"}),
    "none": (without("chat_template"), {}),
    "two defaults": (CONFIG | {"chat_template": [*NAMED, {"name": "default", "template": "later"}]}, {}),
    "special tokens elsewhere": (
        without("added_tokens_decoder", "pad_token") | {"chat_template": "{{ pad_token }}{{ bos_token }}"},
        {"special_tokens_map.json": json.dumps({"pad_token": {"content": "<pad>"}, "bos_token": "<bos>"})},
    ),
    "special tokens nowhere": ({"chat_template": "{{ pad_token }}{{ bos_token }}{{ additional_special_tokens }}"}, {}),
    "extra tokens": (
        CONFIG | {"chat_template": "{{ image_token }}", "extra_special_tokens": {"image_token": "<i>"}},
        {},
    ),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_places(tmp_path: Path, name: str, tools: list[dict[str, Any]] | None) -> None:
    config, files = PLACES[name]
    folder = folder_of(tmp_path / "checkpoint", config)
    for file, text in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    compare_prompts(folder, tmp_path, tools)


def compare_prompts(folder: Path, tmp_path: Path, tools: list[dict[str, Any]] | None) -> None:
    """Asserts that checkpoint and bundle give transformers' prompts, and errors where it has errors."""
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    bundle = written(folder, tmp_path / "bundle")
    tokenizer = Tokenizer(bundle, ())
    for ours in (ChatTemplate(folder), ChatTemplate(bundle)):
        for messages in CONVERSATIONS:
            try:
                expected = oracle.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
            except Exception:
                with pytest.raises(PhiMoEError):
                    ours.render(messages, tools)
                continue
            assert ours.render(messages, tools) == expected
            ids = oracle.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
            assert tokenizer.encode(expected, special=False) == ids


def test_an_unknown_content_is_ours_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="expected a string"):
        ChatTemplate(folder_of(tmp_path / "checkpoint", CONFIG)).render([{"role": "user", "content": 5}])
