"""phimoe-generate and phimoe-chat as processes would see them: streams, exit codes, no traceback."""

import io
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a"], "not a bundle"),
        (["BUNDLE", ""], "the prompt is empty"),
        (["BUNDLE", "", "--chat"], "the message is empty"),
        (["BUNDLE", "a", "--device", "tpu"], "device is 'tpu'"),
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
