"""Chat templates: where one comes from, what it may do, and how it is said as plain strings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phimoe_onnx.errors import BundleError, ConfigError, GenerationError
from phimoe_onnx.exporter.manifest.chat_format import chat_format, why_no_format
from phimoe_onnx.text import sandbox
from phimoe_onnx.text.template import TOOL_USE, ChatTemplate
from tests.checkpoints import MODEL

USER = [{"role": "user", "content": "a"}]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ALTERNATING = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
ALTERNATING += "{{ raise_exception('in turns') }}{% endif %}{% endfor %}"
LOOP_CONTROL = "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}" + PLAIN.split("%}", 1)[1]


def write(folder: Path, config: object, jinja: str | None = None) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def template(folder: Path, config: object, jinja: str | None = None) -> ChatTemplate:
    return ChatTemplate(write(folder, config, jinja))


def named(**templates: str) -> dict[str, Any]:
    return {"chat_template": [{"name": name, "template": source} for name, source in templates.items()]}


def test_where_a_chat_template_comes_from(tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    assert template(tmp_path, {"chat_template": source, "bos_token": "<s>"}).render(USER) == "<s>a"
    config = named(tool_use="no", default="{{ eos_token }}") | {"eos_token": {"content": "</s>"}}
    assert template(tmp_path, config).render(USER) == "</s>"
    assert template(tmp_path, {"chat_template": "no"}, jinja="yes").render(USER) == "yes"
    (tmp_path / "tokenizer_config.json").unlink()
    assert ChatTemplate(tmp_path).render(USER) == "yes"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"chat_template": ""},
        {"chat_template": None},
        {"chat_template": []},
        named(tool_use="no"),
    ],
)
def test_no_chat_template(tmp_path: Path, config: object) -> None:
    with pytest.raises(GenerationError, match="has no chat template"):
        template(tmp_path, config).render(USER)
    assert chat_format(tmp_path) is None


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": 5},
        {"chat_template": "\ud800"},
        {"chat_template": ["a"]},
        {"chat_template": [{"name": "default"}]},
        {"bos_token": {}},
        {"eos_token": 5},
        {"additional_special_tokens": [5]},
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, config: object) -> None:
    with pytest.raises(BundleError, match=r"tokenizer_config\.json: .* expected"):
        template(tmp_path, config)


def test_tools_take_their_own_template(tmp_path: Path) -> None:
    config = named(tool_use="{{ tools | tojson }}", default="{{ tools is none }}{{ documents is none }}")
    both = template(tmp_path, config)
    assert both.render(USER) == "TrueTrue"
    assert both.render(USER, tools=[{"name": "<é>"}]) == '[{"name": "<é>"}]'
    assert template(tmp_path, named(default="{{ tools | length }}")).render(USER, tools=[{}]) == "1"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("folder")
    files = template(tmp_path, {"chat_template": "config"}, jinja="file")
    assert (files.render(USER), files.render(USER, tools=[])) == ("file", "folder")
    (tmp_path / TOOL_USE).write_text("bundle")
    assert ChatTemplate(tmp_path).render(USER, tools=[{}]) == "bundle"
    with pytest.raises(GenerationError, match="tools holds 'x', expected a JSON schema"):
        files.render(USER, tools=["x"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "message",
    [
        "a",
        {},
        {"content": "a"},
        {"role": 5},
        {"role": "user", "content": 5},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": "image", "url": "a"}]},
    ],
)
def test_a_malformed_message_is_named(tmp_path: Path, message: Any) -> None:
    with pytest.raises(GenerationError, match=r"message .*expected"):
        template(tmp_path, {"chat_template": PLAIN}).render([message])


def test_blocks_are_trimmed_as_in_transformers(tmp_path: Path) -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    assert template(tmp_path, {"chat_template": source}).render(USER) == "a\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "refuses"),
        ("{{ messages[0].nothing.nothing }}", "refuses"),
    ],
)
def test_what_a_template_may_not_do(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        template(tmp_path, {"chat_template": source}).render(USER)
    assert chat_format(tmp_path) is None


@pytest.mark.parametrize("source", ["{% if %}", "{% for", "{{" + 5000 * "9" + "}}", "{{" + 4000 * "(" + "}}"])
def test_a_template_that_does_not_parse_is_an_error_where_it_is_used(tmp_path: Path, source: str) -> None:
    broken = template(tmp_path, {"chat_template": source})
    with pytest.raises(BundleError, match="does not parse"):
        broken.render(USER)
    assert chat_format(tmp_path) is None


# what has no end, or makes what no memory holds
DOUBLE = "{%% set ns = namespace(x=%s) %%}{%% for a in range(99) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x }}"
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99) %}" + 1000 * "x" + "{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [1] * 10**10 }}",
    "{{ 'a'.encode() * 10**10 }}",
    "{{ (10**9)**(10**9) }}",
    DOUBLE % ("'a'", "ns.x ~ ns.x"),
    DOUBLE % ("'a'", "ns.x + ns.x"),
    DOUBLE % ("[1]", "ns.x + ns.x"),
    DOUBLE % ("[1]", "[ns.x, ns.x]"),
    DOUBLE % ("2", "ns.x * ns.x"),
    DOUBLE.replace("{%% set ns.x", "{%% set y %%}{{ ns.x }}{{ ns.x }}{%% endset %%}{%% set ns.x") % ("'a'", "y"),
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10000000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | join('b' * 1000000) }}",
    "{{ ('b' * 1000000).join('a' * 1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "{{ ('a\n' * 99999) | indent(99999) }}",
    "{{ ([[1] * 1000] * 100) | tojson(indent=99999) }}",
    "{{ (0).to_bytes(10**10, 'big') }}",
    "{{ lipsum(n=10**9) }}",
]


@pytest.mark.parametrize("source", [*ENDLESS, "{{ 1 / 0 }}", "{% include 'x' %}", "{{ none.x.y }}", "{{ '\\ud800' }}"])
def test_a_template_ends_and_its_faults_are_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    endless = template(tmp_path, {"chat_template": source})
    with pytest.raises(GenerationError, match="refuses the messages: "):
        endless.render(USER)
    monkeypatch.setattr(sandbox, "STEPS", sandbox.STEPS // 10)  # for each of several renderings
    assert chat_format(tmp_path) is None


def test_a_long_conversation_stays_within_the_budget() -> None:
    messages = [{"role": "user", "content": 9_000 * "long "}] * 1_000
    assert len(ChatTemplate(MODEL).render(messages)) > 45_000_000


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(("data", "message"), [(b"\xff", "cannot be read"), (b"version https://git-lfs", "git lfs")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name}.*{message}"):
        ChatTemplate(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name}.*{message}"):
        chat_format(tmp_path)


def test_the_chat_format_is_the_template() -> None:
    chat = chat_format(MODEL)
    assert chat is not None
    template = json.loads((MODEL / "tokenizer_config.json").read_text())["chat_template"]
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    assert chat.skipped_when_empty == ("system",)
    for contents in (["Be\nbrief. ", "", "hi\n", "a"], ["", "b", "", "c"]):
        messages = [
            {"role": role, "content": text}
            for role, text in zip(("system", "user", "assistant", "user"), contents, strict=True)
        ]
        rendered = compiled.render(messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
        turns = [(chat.turns[m["role"]], m["content"]) for m in messages if m["content"] or m["role"] != "system"]
        assert "".join(prefix + content + suffix for (prefix, suffix), content in turns) + chat.generation == rendered


@pytest.mark.parametrize(
    ("config", "jinja"),
    [
        ({"chat_template": PLAIN}, None),
        ({"chat_template": "no"}, PLAIN),
        (named(tool_use="no", default=PLAIN), None),
        ({"chat_template": LOOP_CONTROL}, None),
    ],
)
def test_the_chat_format_is_that_of_the_template_that_the_runtime_takes(
    tmp_path: Path, config: object, jinja: str | None
) -> None:
    chat = chat_format(write(tmp_path, config, jinja))
    assert chat is not None
    assert chat.turns == {role: (f"<|{role}|>", "<|end|>") for role in ("system", "user", "assistant")}
    assert chat.generation == "<|assistant|>"
    assert chat.turns["user"][0] + "a" + chat.turns["user"][1] + chat.generation == ChatTemplate(tmp_path).render(USER)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}",
        "{{ messages[3].content }}",
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}",
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}",
        "{{ strftime_now('%d') }}" + PLAIN,
        PLAIN + "{% if messages[0].role != 'user' %}{{ raise_exception('first the user') }}{% endif %}",
        ALTERNATING + PLAIN,
        PLAIN.replace("m.content", "m.content.split('</think>')[-1]"),
        PLAIN.replace("in messages", "in messages[-9:]"),
    ],
)
def test_a_template_that_plain_strings_cannot_say(tmp_path: Path, source: str) -> None:
    assert chat_format(write(tmp_path, {"chat_template": source})) is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "the checkpoint has no chat template"),
        ("{{ strftime_now('%d') }}" + PLAIN, "its chat template asks for the date (strftime_now)"),
        ("{% if %}", "its chat template fails: "),
        ("{{ messages | length }}", "its chat template does not show a first message of the role user as it is"),
        (PLAIN.replace("m.content", "m.content[:1]"), "its chat template does not show a first message"),
        (ALTERNATING + PLAIN, "its chat template refuses a first message of the role assistant (in turns)"),
        (PLAIN.replace("in messages", "in messages[-9:]"), "its chat template changes a message by what it holds or"),
        ("{% if add_generation_prompt %}?{% endif %}" + PLAIN, "its chat template asks for an answer by other means"),
        (
            PLAIN + "{% if messages[1] and messages[1].role == 'system' %}{{ raise_exception('late') }}{% endif %}",
            "its chat template takes roles in some orders alone (late)",
        ),
        (PLAIN, ""),
    ],
)
def test_why_there_are_no_plain_strings(tmp_path: Path, source: str | None, reason: str) -> None:
    found = why_no_format(write(tmp_path, {"chat_template": source}))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    assert "\n" not in found
