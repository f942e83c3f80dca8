"""Text to ids and back: whole characters in a stream, first space, special tokens, and stop strings across pieces."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimoe_onnx.errors import BundleError, ConfigError, GenerationError
from phimoe_onnx.runtime.stop import StopStrings
from phimoe_onnx.text.clean_up import CleanUp, clean_up
from phimoe_onnx.text.tokenizer import Tokenizer, hidden_tokens
from tests.toy_bundle import SPECIAL, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return Tokenizer(folder, hidden_tokens(folder).values())


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = tokenizer.stream(prompt or [])
    return [stream.add(id) for id in ids]


@given(st.text(alphabet="ab the\n😀é漢�", max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_stream_is_the_whole_text_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    if text.endswith("�"):
        text += "."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids)) == text


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b")
    assert pieces(tokenizer, ids) == ["a", "", "", "", "😀", "b"]
    assert "".join(pieces(tokenizer, ids[:4])) == "a"


def test_two_characters_of_byte_tokens_do_not_spoil_each_other(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀😀")[1:]  # without the first space
    assert pieces(tokenizer, ids[:5], prompt=tokenizer.encode("a")) == ["", "", "", "😀", ""]


def test_invalid_bytes_followed_by_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    lonely, a = tokenizer.token_id("<0xF0>"), tokenizer.token_id("a")
    assert lonely is not None
    assert a is not None
    assert pieces(tokenizer, [lonely, a]) == ["", "�a"]


def test_the_space_between_prompt_and_answer_survives(tokenizer: Tokenizer) -> None:
    the = tokenizer.encode("the")
    assert pieces(tokenizer, the, prompt=tokenizer.encode("stop")) == [" the"]
    assert pieces(tokenizer, the, prompt=tokenizer.encode("<|assistant|>")) == ["the"]
    assert pieces(tokenizer, the + the) == ["the", " the"]


def test_a_prompt_may_end_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b")
    for cut in range(1, len(ids)):
        assert "".join(pieces(tokenizer, ids[cut:], prompt=ids[:cut])) == ("b" if cut > 4 else "😀b")


def test_byte_tokens_marked_as_special_are_kept_and_chat_tokens_hidden(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|user|>a\n😀<|end|>")
    assert tokenizer.decode(ids) == "a\n😀"
    assert "".join(pieces(tokenizer, ids)) == "a\n😀"
    assert tokenizer.token_id("<|end|>") in tokenizer.hidden
    assert tokenizer.token_id("<0x0A>") not in tokenizer.hidden


@pytest.mark.parametrize("text", ["\ud800", "ab\udce9", "\udfff!"])
def test_half_a_character_is_named(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(GenerationError, match="half a character; expected Unicode"):
        tokenizer.encode(text)


@given(st.text(alphabet=" '.,?!ntmsver a", max_size=20), st.lists(st.integers(1, 5), min_size=20, max_size=20))
@settings(max_examples=2000, deadline=None)
def test_a_stream_of_cleaned_text_is_the_whole_text_cleaned(text: str, sizes: list[int]) -> None:
    stream, given, rest = CleanUp(), "", text
    for size in sizes:
        given += stream.add(rest[:size])
        rest = rest[size:]
        assert clean_up(text).startswith(given)
    assert given + stream.finish() == clean_up(text)


def test_cleaned_text_comes_as_soon_as_it_is_certain(tmp_path: Path) -> None:
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path, hidden_tokens(tmp_path).values(), clean_up=True)
    ids = tokenizer.encode("the a .")
    assert tokenizer.decode(ids) == "the a."
    stream = tokenizer.stream()
    texts = [stream.add(id) for id in ids]
    assert "".join(texts) + stream.finish() == "the a."
    assert " " not in texts[-1]
    assert CleanUp().add("the word") == "the word"
    assert CleanUp().add("the word ") == "the word"


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, hidden=())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, hidden=())


def test_a_tokenizer_at_which_the_library_panics_is_named(tmp_path: Path) -> None:
    tokenizer = json.loads(make_tokenizer().to_str())
    tokenizer["model"]["merges"][1] = ["\N{LOWER ONE EIGHTH BLOCK}", "a"]
    tokenizer["model"]["continuing_subword_prefix"] = "abcdef"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer(tmp_path, hidden=())


def test_byte_tokens_marked_as_special_are_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_added_tokens_decoder()[3].content == "<0x00>"
    assert hidden_tokens(tmp_path) == {token: tokenizer.token_to_id(token) for token in SPECIAL}


def test_a_checkpoint_without_a_tokenizer_hides_nothing(tmp_path: Path) -> None:
    assert hidden_tokens(tmp_path) == {}


@pytest.mark.parametrize(
    "added",
    [
        [{"id": 1}],
        ["<s>"],
        None,
        5,
        [{"content": 1, "id": 1, "special": True}],
        [{"content": "<s>", "id": "1", "special": True}],
        [{"content": "<s>", "id": True, "special": True}],
    ],
)
def test_damaged_special_tokens_are_named(tmp_path: Path, added: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: its added_tokens are damaged.*download"):
        hidden_tokens(tmp_path)


@pytest.mark.parametrize(
    ("stops", "texts", "expected", "stopped"),
    [
        (["stop"], ["a st", "op b"], "a ", True),
        (["stop"], ["a st", "ay"], "a stay", False),
        (["stop"], ["s", "s", "t", "o", "p"], "s", True),
        (["abab"], ["aba", "bab"], "", True),
        (["aab"], ["aaa", "ab"], "aa", True),
        (["long one", "on"], ["a long", " one"], "a l", True),
        (["b", "a b"], ["a", " b"], "", True),
        ([], ["a", "b"], "ab", False),
    ],
)
def test_stop_strings(stops: list[str], texts: list[str], expected: str, stopped: bool) -> None:
    filter = StopStrings(stops)
    given = ""
    for text in texts:
        certain, met = filter.add(text)
        given += certain
        if met:
            break
    assert met == stopped
    assert given + filter.finish() == expected


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_give_what_the_whole_text_gives(texts: list[str], stops: list[str]) -> None:
    filter = StopStrings(stops)
    given = ""
    for text in texts:
        certain, met = filter.add(text)
        given += certain
        if met:
            break
    else:
        given += filter.finish()
    whole = "".join(texts)
    # the stop string that ends first ends the text; of several that end in one piece, the one that begins first
    assert whole.startswith(given)
    assert not any(stop in given for stop in stops)
    assert (given == whole) == (not any(stop in whole for stop in stops))
