"""What the commands share: one way to fail, and the options of generation."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from phimoe_onnx.cli._streams import abandon_output, forgive
from phimoe_onnx.errors import PhiMoEError

if TYPE_CHECKING:
    from phimoe_onnx.runtime.request import Options
    from phimoe_onnx.runtime.row import Piece


def run(
    command: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parses, runs and returns the exit code: 1 with the error's text on stderr if the package raised it, 130 on
    Ctrl-C.
    """
    arguments = parser.parse_args(argv)
    forgive()
    try:
        command(arguments)
        print(end="", flush=True)
    except PhiMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output left, as in `... | head`
        abandon_output()
        return 1
    except OSError as error:  # a full disk behind our output
        print(f"error: {error}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):
            abandon_output()
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """The options that phimoe-generate and phimoe-chat share."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help="a system message")
    add("--max-new-tokens", type=int, metavar="N", help="end after N tokens (default: 1024, or where the context ends)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the most likely token")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens; 0, the default, is off")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the most likely tokens that reach P; 1, the default, is off",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens at least P times as likely as the first; 0 is off",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divide the logits of seen tokens; 1, the default, is off",
    )
    add("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a fresh one)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the text before TEXT; may be repeated")
    add("--device", default="cpu", metavar="DEVICE", help="cpu (default) or cuda")
    add("--threads", type=int, metavar="N", help="threads for one operator (default: ONNX Runtime's choice)")


def generation_options(arguments: argparse.Namespace) -> Options:
    """The parsed options as keywords of `PhiMoE.generate`."""
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
        "stop": arguments.stop,
    }


def show(pieces: Iterable[Piece]) -> None:
    """Prints a stream as it comes, then its speed on stderr."""
    for piece in pieces:
        print(piece.text, end="", flush=True)
        if result := piece.result:
            print(flush=True)
            speed = f"{result.tokens_per_second:.1f} tokens/s" if len(result.token_ids) > 1 else "1 token"
            print(
                f"[{result.prompt_tokens} prompt tokens, {len(result.token_ids)} new, {speed}, "
                f"first token after {result.first_token_seconds:.2f} s, ended by {result.finish_reason}]",
                file=sys.stderr,
            )
