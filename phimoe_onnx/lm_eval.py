"""A bundle in lm-evaluation-harness: `python -m phimoe_onnx.lm_eval` is its command `lm_eval`, which then knows the
model `phimoe_onnx`.

lm-eval finds models of its own alone. In Python, `import phimoe_onnx.lm_eval` registers this one for
`lm_eval.simple_evaluate(model="phimoe_onnx", model_args={"bundle": ...}, ...)`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phimoe_onnx.errors import BundleError, GenerationError, PhiMoEError
from phimoe_onnx.runtime.model import PhiMoE
from phimoe_onnx.text.special_tokens import token_texts
from phimoe_onnx.text.template import parse, read_templates, render

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if __name__ == "__main__":
        raise SystemExit(f"error: lm-evaluation-harness cannot be used ({error}); pip install lm-eval") from None
    raise
from tqdm import tqdm

Continuation = tuple[tuple[str, str] | None, list[int], list[int]]  # lm-eval's: texts, token ids of both


@register_model("phimoe_onnx")
class PhiMoELM(TemplateLM):
    """A text-generation bundle as lm-eval's model.

    Log-likelihoods are those of `PhiMoE.score`, one input at a time; requests with the same input, as the letters of a
    multiple choice, are answered by one pass. Generation runs `batch_size` prompts at once.

    Args:
        bundle: its folder.
        device: "cpu" or "cuda"; "cuda:0" is what lm-eval says where nobody named a device, and is "cpu" here.
        batch_size: how many prompts generate at once; "auto" is 64.
        max_batch_size: the most of these.
        threads: see `PhiMoE.load`.
        max_length: the most tokens of an input, where that is to be less than the context; longer ones lose their
            beginning.
        max_gen_toks: how many tokens are generated where a task does not say it.
        unknown: other names, which are refused.

    Raises:
        BundleError: the folder is no bundle for text-generation.
        GenerationError: an argument is unknown or out of range.

    """

    def __init__(
        self,
        bundle: str | Path | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if bundle is None:
            raise GenerationError("no bundle is given; expected --model_args bundle=FOLDER")
        if unknown:
            raise GenerationError(
                f"--model_args has {', '.join(unknown)}, expected bundle, threads, max_length, max_gen_toks"
            )
        slots = 64 if str(batch_size).startswith("auto") else int(batch_size)
        device = "cpu" if device in (None, "cuda:0") else device
        self.model = PhiMoE.load(bundle, device, threads, slots=min(slots, max_batch_size or slots))
        if self.model.manifest.task != "text-generation":
            raise BundleError(f"{bundle} is for {self.model.manifest.task}, expected a bundle for text-generation")
        context = self.model.decoding.context
        if not 1 <= (max_length or context) <= context:
            raise GenerationError(f"max_length is {max_length}, expected 1 to {context} (the context)")
        self.max_length = max_length or context
        self.max_gen_toks = max_gen_toks
        folder = Path(bundle)
        self._name = folder.resolve().name
        self._template = read_templates(folder).get("default", "")
        self._tokens = token_texts(folder)

    @property
    def tokenizer_name(self) -> str:
        """The bundle's name, for lm-eval's cache of requests."""
        return self._name

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end a text."""
        return self.model.decoding.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the tokenizer's first token, or else the last."""
        bos = self._tokens.get("bos_token")
        first = self.model.tokenizer.token_id(bos) if isinstance(bos, str) else None
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The text's token ids. Unless told otherwise, a text that begins with a special token, as a rendered chat,
        gets no more of them.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tuple(self.model.decoding.hidden_tokens))
        return self.model.tokenizer.encode(string, special=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the bundle's template; None where none is to be applied."""
        if not chat_template:
            return None
        if not self._template:
            raise GenerationError(f"the bundle {self._name} has no chat template; leave out --apply_chat_template")
        if isinstance(chat_template, str) and chat_template != "default":
            raise GenerationError(f"--apply_chat_template is {chat_template!r}, the bundle's one template is 'default'")
        return self._template

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one prompt; without `add_generation_prompt` the last of them is left open, to be continued.

        Raises:
            GenerationError: there is no template, or it changes the message that is to be continued.
            jinja2.TemplateError: it refuses the messages.

        """
        template = parse(self.chat_template(True) or "")
        text = render(template, chat_history, self._tokens, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        before, found, _ = text.rpartition(last)
        if not found:
            raise GenerationError("the bundle's chat template changes the last message, which cannot be continued then")
        return before + last

    def _loglikelihood_tokens(
        self, requests: Sequence[Continuation], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each request the continuation's log-probability, and whether greedy decoding would write it."""
        same: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_texts, context, continuation) in enumerate(requests):
            same[tuple((context + continuation)[:-1][-self.max_length :])].append(number)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for ids in sorted(same, key=len, reverse=True):  # the longest first: the time left is not underestimated
                numbers = same[ids]
                continuations = [requests[number][2][-len(ids) :] for number in numbers]
                for number, result in zip(numbers, self._score(ids, continuations), strict=True):
                    results[number] = result
                    if (texts := requests[number][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, result)
                bar.update(len(numbers))
        return results

    def _score(self, ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """The sums of log-probabilities of the continuations' tokens, the last of each behind all of `ids`."""
        sums, greedy = [0.0] * len(continuations), [True] * len(continuations)
        start = 0
        for logits in self.model.decoder(1, len(ids)).logits(ids):
            for number, continuation in enumerate(continuations):
                first = len(ids) - len(continuation)  # the position that the continuation's first token follows
                rows = np.arange(max(first, start), start + len(logits))
                if not len(rows):
                    continue
                targets = np.asarray(continuation)[rows - first]
                x = logits[rows - start].astype(np.float64)
                greedy[number] &= bool((x.argmax(axis=-1) == targets).all())
                x -= x.max(axis=-1, keepdims=True)
                chosen = x[np.arange(len(rows)), targets] - np.log(np.exp(x).sum(axis=-1))
                sums[number] += float(chosen.sum())
            start += len(logits)
        return list(zip(sums, greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of `max_length` tokens that do not overlap in what they
        score.
        """
        results = []
        for (text,) in tqdm([request.args for request in requests], desc="rolling", disable=disable_tqdm):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop string; requests with the same options run together."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(request.args[1])].append(number)
        results = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as bar:
            for numbers in alike.values():
                options, room = self._options(requests[numbers[0]].args[1])
                prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
                for piece in self.model.generate(prompts, stream=True, **options):
                    if piece.result is None:
                        continue
                    number = numbers[piece.row]
                    results[number] = self._text(piece.result.text, piece.result.token_ids)
                    self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
                    bar.update()
        return results

    def _options(self, gen_kwargs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The options of `PhiMoE.generate`, and the most tokens that a prompt may have."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        options.pop("do_sample", None)  # the temperature says it
        stop = handle_stop_sequences(options.pop("until", None), eos=None)
        new = options["max_new_tokens"] = options.pop("max_gen_toks")
        if new >= self.max_length:
            raise GenerationError(f"max_gen_toks is {new}, which leaves no room for a prompt in {self.max_length}")
        return options | {"stop": [each for each in stop if each]}, self.max_length - new

    def _text(self, text: str, ids: Sequence[int]) -> str:
        """As lm-eval has it from transformers: decoded alone, where a tokenizer may drop the space before a word."""
        return text if self.model.tokenizer.decode(ids).startswith(" ") else text.removeprefix(" ")


def main() -> None:
    """lm-eval's command."""
    try:
        cli_evaluate()
    except PhiMoEError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
