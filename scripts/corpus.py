"""The small model's data: cleans the texts, trains the Llama-style tokenizer and makes chat samples out of the texts.

The corpus is a folder of plain-text books. In kjv.txt every line is a verse; in the others blank lines part the
paragraphs.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

HELD_OUT = "persuasion.txt"
BOS, EOS = "<s>", "<|endoftext|>"
# the last ids of the vocabulary, in this order
CHAT_TOKENS = (
    EOS,
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
)

_HEADING = re.compile(r"(chapter|volume) [\divxl]+\.?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"""(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["'(A-Z])""")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]{2,})?")
_TITLES = {"Captain", "Colonel", "Lady", "Miss", "Mrs", "Sir"}
_WORD = r"'s|▁?\p{L}+|▁?\p{N}|▁?[^\p{L}\p{N}▁\n]+|▁+"
_VERSES_PER_DOCUMENT = 40


def read_documents(path: Path) -> list[list[str]]:
    """The chapters of a book (of the Bible: runs of verses), each a list of paragraphs without hard line breaks."""
    text = path.read_text(encoding="utf-8").replace("_", "")
    if path.name == "kjv.txt":
        verses = [line.strip() for line in text.splitlines() if line.strip()]
        return [verses[i : i + _VERSES_PER_DOCUMENT] for i in range(0, len(verses), _VERSES_PER_DOCUMENT)]
    documents: list[list[str]] = [[]]
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if _HEADING.fullmatch(paragraph):
            documents.append([])
        if paragraph:
            documents[-1].append(paragraph)
    return [document for document in documents if document]


def document_text(name: str, document: list[str]) -> str:
    """A document in one piece: verses on lines of their own, paragraphs with a blank line between."""
    return ("\n" if name == "kjv.txt" else "\n\n").join(document)


def read_corpus(corpus: Path) -> dict[str, list[list[str]]]:
    """Documents of every book but the held-out one, by file name."""
    return {path.name: read_documents(path) for path in sorted(corpus.glob("*.txt")) if path.name != HELD_OUT}


def held_out_text(corpus: Path) -> str:
    """The held-out book, cleaned like the others, in one piece."""
    return "\n\n".join(document_text(HELD_OUT, document) for document in read_documents(corpus / HELD_OUT))


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """BPE with byte fallback whose tokenizer.json has the layout of Phi-3's: no pre-tokenizer, "▁" for a space."""
    llama = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    base = ["<unk>", BOS, "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainee = Tokenizer(BPE())
    trainee.normalizer = llama
    # only for training: no merge crosses a word or a punctuation mark, and a newline stays a byte token as in Llama
    trainee.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CHAT_TOKENS), special_tokens=base, show_progress=False, max_token_length=16
    )
    trainee.train_from_iterator(texts, trainer)

    trained = json.loads(trainee.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(BPE(trained["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = llama
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([special_token(token) for token in ("<unk>", BOS, "</s>", *CHAT_TOKENS)])
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def special_token(token: str) -> AddedToken:
    """As in Phi-3: white space after a chat token belongs to it, so the template's newlines cost nothing."""
    return AddedToken(token, normalized=False, special=True, rstrip=token in CHAT_TOKENS[1:])


def chat_samples(books: dict[str, list[list[str]]], count: int, seed: int = 0) -> list[str]:
    """Conversations in the Phi template, each ended by <|endoftext|>: asked to continue a passage, or about somebody in
    it.
    """
    rng = random.Random(seed)
    names = Counter(
        name for book in books.values() for document in book for text in document for name in _NAME.findall(text)
    )
    known = {name for name, seen in names.items() if seen >= 20} - _TITLES
    sentences = {
        name: [[s for text in document for s in _SENTENCE_END.split(text)] for document in book]
        for name, book in books.items()
    }
    weights = [sum(len(document) for document in book) for book in sentences.values()]
    samples = []
    while len(samples) < count:
        title = rng.choices(list(sentences), weights)[0]
        document = rng.choice(sentences[title])
        if len(document) < 12:
            continue
        place = rng.randrange(len(document) - 8)
        messages = []
        if rng.random() < 0.15:
            style = "the King James Bible" if title == "kjv.txt" else "Jane Austen"
            messages.append(("system", rng.choice(("Write in the style of {}.", "You speak like {}.")).format(style)))
        for turn in range(rng.choice((1, 1, 2, 3))):
            reply = rng.randint(1, 3)
            name = next((n for n in _NAME.findall(document[place]) if n in known), None)
            if name and rng.random() < 0.7:
                question = rng.choice(
                    ("Tell me about {}.", "Who is {}?", "What do you know of {}?", "What of {}?")
                ).format(name)
            elif turn:
                question = rng.choice(("Go on.", "Continue.", "And then?", "What happened next?", "Tell me more."))
            else:
                question = rng.choice(("{}", "Continue: {}", "What comes after this? {}")).format(document[place])
                place += 1
            messages += [("user", question), ("assistant", " ".join(document[place : place + reply]))]
            place += reply
            if place >= len(document) - 3:
                break
        samples.append("".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in messages) + EOS)
    return samples
