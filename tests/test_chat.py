"""phimoe-chat in a terminal: what is typed, pasted and pressed, its commands, and what it keeps between sessions."""

from __future__ import annotations

import io
import json
import os
import re
import select
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from phimoe_onnx.cli import _chat_commands, _chat_file, _chat_terminal, chat
from phimoe_onnx.cli._chat_commands import Chat
from phimoe_onnx.cli._chat_input import is_whole, parse
from phimoe_onnx.cli._word_wrap import WordWrap
from phimoe_onnx.errors import GenerationError, PhiMoEError
from phimoe_onnx.runtime import PhiMoE
from tests.toy_bundle import CONTEXT, TEMPLATE, write_bundle

CTRL_C, CTRL_D, ALT_ENTER, ENTER = "\x03", "\x04", "\x1b\r", "\r"
READY = "\x1b[?2004h"  # the prompt takes pasted texts from here on
USER, ANSWER = {"role": "user", "content": "the"}, {"role": "assistant", "content": "a stop"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("chat") / "bundle"
    write_bundle(folder)
    return str(folder)


@pytest.fixture
def type_in(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[str], str]]:
    """type_in(keys, *arguments) -> the contents of all messages at the end, and standard error."""
    monkeypatch.setattr(chat, "is_terminal", lambda: True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    talks: list[Chat] = []
    monkeypatch.setattr(_chat_commands, "Chat", lambda *fields: talks.append(Chat(*fields)) or talks[-1])

    def run(keys: str, *arguments: str) -> tuple[list[str], str]:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            assert chat.main([bundle, "--max-new-tokens", "4", *arguments]) == 0
        return [message["content"] for message in talks[-1].conversation.messages], capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def model(bundle: str) -> PhiMoE:
    return PhiMoE.load(bundle)


@pytest.fixture
def talk(model: PhiMoE) -> Chat:
    """A chat with nothing said."""
    options: dict[str, Any] = {name: option.default for name, option in _chat_commands.GENERATION.items()}
    return Chat(model, model.chat(), options | {"max_new_tokens": 4})  # type: ignore[arg-type]


def said(chat: Chat, line: str) -> str:
    """What a command says, a table's cells with a space between."""
    with io.StringIO() as file:
        from rich.console import Console

        Console(file=file, width=200).print(_chat_commands.run(chat, line), markup=False)
        return re.sub(r" +", " ", file.getvalue()).rstrip()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("the stop" + ENTER, "the stop"),
        ("\x1b[200~the\n  stop\r\n/reset\x1b[201~" + ENTER, "the\n  stop\n/reset"),
        ("the" + ALT_ENTER + "stop" + ENTER, "the\nstop"),
        ('"""the' + ENTER + "stop" + ENTER + '"""' + ENTER, "the\nstop"),
        ('"""/reset"""' + ENTER, "/reset"),
        ("nothing" + CTRL_C + "the" + ENTER, "the"),
        (CTRL_C + "n" + "the" + ENTER, "the"),
        (ENTER + "  the " + ENTER, "the"),
    ],
)
def test_what_is_typed_is_one_message(type_in: Callable[..., tuple[list[str], str]], keys: str, message: str) -> None:
    contents, notes = type_in(keys + "/bye" + ENTER)
    assert len(contents) == 2
    assert contents[0] == message
    assert notes.startswith(f"phimoe-onnx {chat.phimoe_onnx.__version__}, bundle, a context of {CONTEXT} tokens\n/help")
    assert notes.count("tokens of the context]") == 1


@pytest.mark.parametrize("keys", ["/bye" + ENTER, "/quit" + ENTER, CTRL_D, CTRL_C + "y", CTRL_C + CTRL_C])
def test_ways_to_leave(type_in: Callable[..., tuple[list[str], str]], keys: str) -> None:
    assert type_in("/system a" + ENTER + keys + "the" + ENTER)[0] == ["a"]


def test_an_unknown_command_is_not_a_message(type_in: Callable[..., tuple[list[str], str]]) -> None:
    contents, notes = type_in("/rest" + ENTER + "/" + ENTER + "/what is this" + ENTER + CTRL_D)
    assert contents == []
    assert "error: /rest is no command; did you mean /reset?" in notes
    assert "error: / is no command; /help lists them" in notes
    assert "error: /what is no command" in notes


def test_the_history_outlives_the_session(type_in: Callable[..., tuple[list[str], str]], tmp_path: Path) -> None:
    type_in("the" + ALT_ENTER + "stop" + ENTER + "/bye" + ENTER)
    kept = _chat_terminal.open_history(tmp_path / "state")
    assert list(kept.load_history_strings()) == ["/bye", "the\nstop"]
    file = tmp_path / "state" / "phimoe-onnx" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("home", ["file", "missing", "pipe"])
def test_a_chat_needs_no_history(
    type_in: Callable[..., tuple[list[str], str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    if home == "missing":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
        assert _chat_terminal.state_folder() is None
    if home == "pipe":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        (tmp_path / "phimoe-onnx").mkdir()
        os.mkfifo(tmp_path / "phimoe-onnx" / "chat_history")
    assert type_in("the" + ENTER + "a" + ENTER + CTRL_D)[0][::2] == ["the", "a"]
    assert not (tmp_path / "nowhere").exists()


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # to be ignored, says the specification
    assert _chat_terminal.state_folder() == tmp_path / ".local" / "state"
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert _chat_terminal.state_folder() == Path("/somewhere")


def test_ctrl_c_stops_an_answer_and_keeps_what_came(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces: list[str] = []

    def put(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "put", put)
    monkeypatch.setattr("sys.stdin", io.StringIO("the\na\n"))
    assert chat.main([bundle, "--max-new-tokens", "6"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("[stopped]\n")
    stopped = "".join(pieces[:3])
    conversation = PhiMoE.load(bundle).chat()
    conversation.messages = [USER, {"role": "assistant", "content": stopped}]
    assert "".join(pieces[4:]) == conversation.send("a", max_new_tokens=6).text + "\n"


def test_a_full_context_says_what_to_do(
    bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reset = "/reset makes room: it forgets the conversation."
    monkeypatch.setattr("sys.stdin", io.StringIO(("a " * 40 + "\n") * 2))
    assert chat.main([bundle, "--max-new-tokens", "20"]) == 0
    answer, cut, error, hint = capsys.readouterr().err.splitlines()
    assert answer.startswith("[20 tokens, ")
    assert "max_new_tokens" in cut
    assert error.startswith("error: the conversation has")
    assert hint.startswith(reset)
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
    assert chat.main([bundle]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"{CONTEXT} of {CONTEXT} tokens of the context]")
    assert reset in second
    monkeypatch.setattr("sys.stdin", io.StringIO("the " * 99 + "\n"))
    assert chat.main([bundle]) == 0
    assert reset not in capsys.readouterr().err  # which would not help


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "top_p is 2.0, expected more than 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-new-tokens", "5000"], "max_new_tokens is 5000"),
        (["--stop", ""], "stop holds an empty string"),
        (["--system", "no"], "refuses the messages: no systems"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}" + TEMPLATE
    write_bundle(tmp_path / "bundle", tokenizer_config=json.dumps({"chat_template": refusing}))
    monkeypatch.setattr(PhiMoE, "load", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n"))
    assert chat.main([str(tmp_path / "bundle"), *arguments]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert message in errors


def test_a_bundle_without_a_template_is_no_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "bundle", tokenizer_config="{}")
    assert chat.main([str(tmp_path / "bundle")]) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_set(talk: Chat) -> None:
    listed = said(talk, "/set")
    assert [line.split()[:2] for line in listed.splitlines()] == [
        ["max_new_tokens", "4"],
        ["temperature", "0.0"],
        ["top_k", "0"],
        ["top_p", "1.0"],
        ["min_p", "0.0"],
        ["repetition_penalty", "1.0"],
        ["seed", "none"],
        ["stop", "none"],
    ]
    assert said(talk, "/set temperature 0.7").startswith("temperature 0.7 ")
    assert said(talk, "/set temperature").startswith("temperature 0.7 ")
    assert said(talk, "/set top-k 5").startswith("top_k 5 ")
    assert said(talk, "/set seed 12345678901").startswith("seed 12345678901 ")
    assert said(talk, "/set stop . 'the end'").startswith("stop . 'the end' ")
    expected = {"temperature": 0.7, "top_k": 5, "seed": 12345678901, "stop": (".", "the end"), "max_new_tokens": 4}
    assert talk.options.items() >= expected.items()
    sent = talk.conversation.send("the", **talk.options).text
    assert sent == PhiMoE.generate(talk.model, [USER], **expected).text  # type: ignore[call-overload]
    said(talk, "/set seed none")
    said(talk, "/set stop none")
    assert (talk.options["seed"], talk.options["stop"]) == (None, ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temprature 1", "temprature is no option; did you mean temperature?"),
        ("/set tools x", "tools is no option"),
        ("/set temperature hot", "temperature is 'hot', expected a number or none"),
        ("/set temperature -1", "temperature is -1.0, expected 0"),
        ("/set top_k 1.5", "top_k is '1.5', expected an integer or none"),
        ("/set max_new_tokens 0", "max_new_tokens is 0"),
        ("/set max_new_tokens 5000", "max_new_tokens is 5000"),
        ("/set stop 'a", 'stop is "\'a", expected texts'),
        ("/set stop ''", "stop holds an empty string"),
    ],
)
def test_a_bad_option_changes_nothing(talk: Chat, line: str, message: str) -> None:
    before = dict(talk.options)
    with pytest.raises(GenerationError, match=re.escape(message)):
        _chat_commands.run(talk, line)
    assert talk.options == before


def test_system_and_reset(talk: Chat) -> None:
    assert said(talk, "/system") == "There is no system message."
    talk.conversation.messages = [USER, ANSWER]
    assert said(talk, "/system a, the") == "The system message is set."
    assert said(talk, "/system") == "a, the"
    assert talk.conversation.messages == [{"role": "system", "content": "a, the"}, USER, ANSWER]
    said(talk, "/system the")
    assert said(talk, "/reset") == "The conversation is forgotten. The system message stays."
    assert talk.conversation.messages == [{"role": "system", "content": "the"}]
    said(talk, "/system none")
    assert talk.conversation.messages == []
    assert said(talk, "/reset") == "The conversation is forgotten."


def test_a_system_message_that_the_template_refuses_is_not_taken(talk: Chat, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}" + TEMPLATE
    write_bundle(tmp_path / "bundle", tokenizer_config=json.dumps({"chat_template": refusing}))
    model = PhiMoE.load(tmp_path / "bundle")
    other = Chat(model, model.chat(), {})
    with pytest.raises(GenerationError, match="no systems"):
        _chat_commands.run(other, "/system a")
    assert other.conversation.messages == []


def test_help_names_every_command(talk: Chat) -> None:
    listed = said(talk, "/help")
    for name in (*_chat_commands.COMMANDS, *_chat_commands.LEAVE):
        assert name in listed


def test_a_conversation_is_saved_and_taken_up_again(
    talk: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    talk.conversation.messages = [USER, ANSWER]
    assert said(talk, "/save talk.json") == "talk.json: 2 messages saved."
    said(talk, "/reset")
    assert said(talk, "/load talk.json").startswith("talk.json: 2 messages, ")
    assert talk.conversation.messages == [USER, ANSWER]
    talk.conversation.send("a", **talk.options)
    assert said(talk, "/save talk.json") == "talk.json: 4 messages saved."  # nothing is lost
    assert _chat_file.load("talk.json") == talk.conversation.messages
    assert os.listdir() == ["talk.json"]


@pytest.mark.parametrize("theirs", ["notes", "", "{}", '{"messages": []}', "[" * 100_000])
def test_somebody_elses_file_stays(talk: Chat, tmp_path: Path, theirs: str) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text(theirs)
    link.symlink_to(file)
    for name in (file, link):
        with pytest.raises(PhiMoEError, match=re.escape(str(name))):
            _chat_commands.run(talk, f"/save {name}")
        with pytest.raises(PhiMoEError, match=re.escape(str(name))):
            _chat_commands.run(talk, f"/load {name}")
    assert file.read_text() == theirs
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_another_conversation_stays(talk: Chat, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk.conversation.messages = [USER, ANSWER]
    said(talk, f"/save {file}")
    before = file.read_text()
    talk.conversation.messages = [USER]
    with pytest.raises(PhiMoEError, match="holds another conversation, which stays; name another file"):
        _chat_commands.run(talk, f"/save {file}")
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("save", "", "a file's name is missing"),
        ("load", "", "a file's name is missing"),
        ("save", "no/where", "no/where: cannot be written"),
        ("save", "a\0b", "cannot be written"),
        ("save", ".", "cannot be read"),
        ("load", "nowhere", "nowhere: no such file"),
        ("load", "~nobody-of-this-name/x", "cannot be read"),
        ("load", "a\0b", "cannot be read"),
        ("load", "pipe", "no regular file"),
        ("save", "pipe", "no regular file"),
    ],
)
def test_files_that_cannot_be(
    talk: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    talk.conversation.messages = [USER]
    with pytest.raises(PhiMoEError, match=message):
        _chat_commands.run(talk, f"/{command} {name}")
    assert os.listdir() == ["pipe"]
    assert talk.conversation.messages == [USER]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("the", "is no conversation"),
        (["the"], "message 0 is damaged"),
        ([USER, {"role": "user"}], "message 1 is damaged"),
        ([USER | {"content": None}], "message 0 is damaged"),
        ([USER | {"role": "tool"}], "refuses the messages: no tools"),
        ([USER | {"content": "\ud800"}], "half a character"),
        ([USER | {"content": "a " * 99}], "context"),
    ],
)
def test_a_damaged_conversation_is_not_loaded(talk: Chat, tmp_path: Path, messages: object, message: str) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps({"written_by": "phimoe-chat", "messages": messages}))
    with pytest.raises(PhiMoEError, match=message):
        _chat_commands.run(talk, f"/load {file}")
    assert talk.conversation.messages == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_full_disk_loses_nothing(talk: Chat, tmp_path: Path) -> None:
    import resource

    talk.conversation.messages = [USER]
    said(talk, f"/save {tmp_path / 'old'}")
    before = (tmp_path / "old").read_text()
    talk.conversation.messages = [USER, ANSWER | {"content": "a" * 10_000}]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        for name in ("old", "new"):
            with pytest.raises(PhiMoEError, match=f"{name}: cannot be written"):
                _chat_commands.run(talk, f"/save {tmp_path / name}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == before


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (" the ", ("the", False)),
        ("/reset ", ("/reset", True)),
        ("/a\nb", ("/a\nb", False)),
        ('"""\n  the\n"""', ("  the", False)),
        ('"""', ("", False)),
    ],
)
def test_what_is_a_command(text: str, parsed: tuple[str, bool]) -> None:
    assert parse(text) == parsed


def test_quotes_hold_lines_together() -> None:
    assert [is_whole(text) for text in ("the", '"""', '"""a', '"""a"""', '"""\na\n"""', '""""""', '""""')] == [
        True, False, False, True, True, True, False
    ]  # fmt: skip


def test_lines_of_a_pipe(bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('\ufeff"""the\nstop"""\n/set seed x\n"""a\nb'))
    assert chat.main([bundle, "--max-new-tokens", "5"]) == 0
    output, errors = capsys.readouterr()
    conversation = PhiMoE.load(bundle).chat()
    first, second = (conversation.send(text, max_new_tokens=5).text for text in ("the\nstop", "a\nb"))
    assert output == f"> {first}\n> > {second}\n> \n"
    assert "error: seed is 'x', expected an integer or none" in errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", "one two \nthree"),
        ("12345678 90", "12345678\n90"),
        ("1234567 890", "1234567 \n890"),
        ("a\nb c", "a\nb c"),
        ("one 123456789012 x yz", "one \n123456789012 x \nyz"),
        ("漢字漢字漢字", "漢字漢字\n漢字"),
        ("", ""),
    ],
)
def test_lines_are_broken_between_words(text: str, expected: str) -> None:
    for size in (1, 2, 3, 100):
        written: list[str] = []
        wrap = WordWrap(written.append, 8)
        for start in range(0, len(text), size):
            wrap.add(text[start : start + size])
        wrap.add("\n")
        assert "".join(written) == expected + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_in_a_terminal(bundle: str, tmp_path: Path) -> None:
    """A process of its own with a terminal before it, as somebody would use it."""
    with Terminal(bundle, tmp_path) as terminal:
        terminal.until("Ctrl-D leaves")
        terminal.until(READY)
        terminal.send("the" + ENTER)
        terminal.until("tokens of the context]")
        terminal.until(READY)
        terminal.send("/set top_k 3" + ENTER)
        terminal.until("draw from the K")
        terminal.until(READY)
        terminal.send(CTRL_C)
        terminal.until("Leave the chat?")
        terminal.send("y")
        assert terminal.process.wait(300) == 0
    assert b"Traceback" not in terminal.shown
    assert b"+the\n" in (tmp_path / "phimoe-onnx" / "chat_history").read_bytes()


class Terminal:
    """phimoe-chat behind a pseudo-terminal of 80 columns."""

    def __init__(self, bundle: str, state: Path) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.shown, self._seen = b"", 0
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [sys.executable, "-m", "phimoe_onnx.cli.chat", bundle, "--max-new-tokens", "5"]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def send(self, keys: str) -> None:
        """Presses keys."""
        os.write(self._ours, keys.encode())

    def until(self, words: str) -> None:
        """Waits until these are shown behind those before."""
        end = time.monotonic() + 300
        while True:
            shown = self.shown.decode(errors="replace")
            if (found := shown.find(words, self._seen)) >= 0:
                self._seen = found + len(words)
                return
            assert time.monotonic() < end, shown
            if select.select([self._ours], [], [], 1)[0]:
                self.shown += os.read(self._ours, 4096)
