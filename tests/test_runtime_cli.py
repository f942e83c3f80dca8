"""phimoe-generate and phimoe-chat as processes would see them: streams, exit codes, no traceback."""

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from phimoe_onnx.cli import chat, generate
from phimoe_onnx.runtime import PhiMoE
from tests.toy_bundle import write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    write_bundle(folder)
    return str(folder)


def test_generate_streams_the_text_and_then_its_speed(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "9", "--temperature", "0.9", "--top-k", "40", "--seed", "3"]
    assert generate.main([bundle, "the stop", *options]) == 0
    output, errors = capsys.readouterr()
    expected = PhiMoE.load(bundle).generate("the stop", max_new_tokens=9, temperature=0.9, top_k=40, seed=3)
    assert output == expected.text + "\n"
    assert f"[{expected.prompt_tokens} prompt tokens, {len(expected.token_ids)} new" in errors
    assert "tokens/s, first token after" in errors
    assert f"ended by {expected.finish_reason}]" in errors


def test_generate_reads_standard_input_and_answers_messages(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the"))
    assert generate.main([bundle, "-", "--system", "a", "--max-new-tokens", "5", "--stop", "zz", "--stop", "qq"]) == 0
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "the"}]
    assert capsys.readouterr().out == PhiMoE.load(bundle).generate(messages, max_new_tokens=5).text + "\n"


@pytest.mark.parametrize("text", [b"the stop", b"the stop\n", b"\xef\xbb\xbfthe stop\r\n"])
def test_standard_input_loses_its_mark_and_its_last_lines_end(bundle: str, text: bytes) -> None:
    expected = PhiMoE.load(bundle).generate("the stop", max_new_tokens=5).text
    result = command("generate", [bundle, "-", "--max-new-tokens", "5"], text)
    assert (result.returncode, result.stdout.decode()) == (0, expected + "\n")


@pytest.mark.parametrize(("argument", "text"), [(b"caf\xe9", b""), (b"-", b"caf\xe9"), (b"\xed\xa0\x80", b"")])
def test_what_is_not_utf_8_is_named(bundle: str, argument: bytes, text: bytes) -> None:
    result = command("generate", [bundle, argument], text)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"error: ")
    assert b"half a character; expected Unicode, and as bytes UTF-8" in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_chat_survives_what_is_not_utf_8(bundle: str) -> None:
    result = command("chat", [bundle, "--max-new-tokens", "2"], b"caf\xe9\nthe\n")
    assert result.returncode == 0
    assert result.stderr.count(b"half a character") == 1
    assert result.stderr.count(b"tokens of the context]") == 1
    assert b"Traceback" not in result.stderr


def test_a_terminal_that_cannot_show_a_character_shows_a_question_mark(bundle: str) -> None:
    expected = PhiMoE.load(bundle).generate("the", max_new_tokens=60, temperature=2.0, seed=1).text
    assert not expected.isascii()
    arguments = [bundle, "the", "--max-new-tokens", "60", "--temperature", "2", "--seed", "1"]
    result = command("generate", arguments, encoding="ascii")
    assert result.returncode == 0
    assert result.stdout == expected.encode("ascii", "replace") + b"\n"


def test_closed_and_full_streams_are_said(bundle: str) -> None:
    arguments = [bundle, "the", "--max-new-tokens", "2"]
    assert command("generate", arguments, redirect=">&-").returncode == 0
    for name, words in (("generate", [bundle, "-"]), ("chat", [bundle])):
        result = command(name, words, redirect="<&-")
        assert (result.returncode, result.stderr.split(b";")[0]) == (1, b"error: standard input is closed")
    if Path("/dev/full").exists():
        result = command("generate", arguments, redirect=">/dev/full")
        assert result.returncode == 1
        assert b"No space left" in result.stderr
        assert b"Traceback" not in result.stderr


def command(
    name: str, arguments: Sequence[str | bytes], text: bytes = b"", encoding: str = "utf-8", redirect: str = ""
) -> subprocess.CompletedProcess[bytes]:
    """A command as a shell runs it."""
    words = [sys.executable, "-m", f"phimoe_onnx.cli.{name}", *arguments]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", *words]
    return subprocess.run(shell, input=text, capture_output=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a"], "not a bundle"),
        (["BUNDLE", ""], "the prompt is empty"),
        (["BUNDLE", "", "--chat"], "the message is empty"),
        (["BUNDLE", "a", "--max-new-tokens", "5000"], "max_new_tokens is 5000"),
        (["BUNDLE", "a", "--top-p", "2"], "top_p is 2"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    bundle: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert generate.main([bundle if argument == "BUNDLE" else argument for argument in arguments]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert message in errors


def test_ctrl_c_ends_generate_cleanly(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "show", interrupted)
    assert generate.main([bundle, "a"]) == 130


def test_chat(bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["the", "", "a", "/reset", "the", "a " * 90, "/quit", "stop"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert chat.main([bundle, "--max-new-tokens", "6"]) == 0
    output, errors = capsys.readouterr()
    conversation = PhiMoE.load(bundle).chat()
    first, second = (conversation.send(text, max_new_tokens=6).text for text in ("the", "a"))
    assert output == f"> {first}\n> > {second}\n> > {first}\n> > "
    assert errors.count("tokens/s") == 3
    assert "error: the conversation has" in errors


def test_chat_ends_with_its_input(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main([bundle]) == 0
    assert capsys.readouterr() == ("> \n", "")


def test_chat_names_what_is_wrong_with_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: not a bundle")
