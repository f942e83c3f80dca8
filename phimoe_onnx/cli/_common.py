"""What the commands share: how their options are read, one way to fail, and the options of generation."""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from phimoe_onnx._version import __version__
from phimoe_onnx.cli._start import INTERRUPTED
from phimoe_onnx.cli._streams import abandon_output, forgive
from phimoe_onnx.errors import BundleError, PhiMoEError

if TYPE_CHECKING:
    from phimoe_onnx.runtime.request import Options
    from phimoe_onnx.runtime.row import Generation, Piece

DEVICES = ("cpu", "cuda")


class Parser(argparse.ArgumentParser):
    """A command's options, with --version, examples behind the help, and errors of one line."""

    def __init__(self, name: str, description: str, *examples: str) -> None:
        super().__init__(
            name,
            description=wrapped(description),
            epilog="examples:\n" + "\n".join(f"  {name} {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and ONNX Runtime's, and exit")

    def error(self, message: str) -> Any:
        """Says it in one line and exits with code 2."""
        self.exit(2, f"error: {message}; {self.prog} --help says more\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import packages_distributions, version

        packages = packages_distributions().get("onnxruntime", ())  # of several names, and not imported for this
        runtimes = ", ".join(f"{name} {version(name)}" for name in sorted(set(packages)))
        print(f"{parser.prog} {__version__} ({runtimes or 'onnxruntime is not installed'})")
        parser.exit()


def wrapped(text: str) -> str:
    """For a terminal of 80 columns; argparse leaves descriptions as they are, for the examples' sake."""
    return textwrap.fill(text, 78)


def positive(text: str) -> int:
    """An option's integer of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where a bundle runs, and on how many threads."""
    parser.add_argument("--device", default="cpu", choices=DEVICES, help="where the bundle runs (default: cpu)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads for one operator (default: ONNX Runtime's choice)"
    )


def run(command: Callable[[argparse.Namespace], None], parser: Parser, argv: Sequence[str] | None) -> int:
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
        return INTERRUPTED
    return 0


class Option(NamedTuple):
    """An option of generation: how its value is read, what stands for it in a help, its default and its help."""

    read: Callable[[str], Any]
    metavar: str
    default: Any
    help: str


GENERATION = {
    "max_new_tokens": Option(int, "N", None, "end after N tokens (default: 1024, or where the context ends)"),
    "temperature": Option(float, "T", 0.0, "0 takes the most likely token, more draws one (default: 0)"),
    "top_k": Option(int, "K", 0, "draw from the K most likely tokens (default: 0, from all)"),
    "top_p": Option(float, "P", 1.0, "draw from the most likely tokens that together reach P (default: 1, from all)"),
    "min_p": Option(float, "P", 0.0, "draw from tokens at least P times as likely as the first (default: 0, from all)"),
    "repetition_penalty": Option(float, "X", 1.0, "divide the logits of tokens seen before by X (default: 1, off)"),
    "seed": Option(int, "N", None, "the same seed gives the same text (default: a fresh one)"),
    "stop": Option(str, "TEXT", (), "end the text before TEXT; may be repeated (default: none)"),
}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """The options that phimoe-generate and phimoe-chat share."""
    parser.add_argument("--system", metavar="TEXT", help="a system message (default: none)")
    for name, option in GENERATION.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(option.default, tuple):
            parser.add_argument(flag, action="append", default=[], metavar=option.metavar, help=option.help)
        else:
            parser.add_argument(
                flag, type=option.read, default=option.default, metavar=option.metavar, help=option.help
            )
    add_device_options(parser)


def generation_options(arguments: argparse.Namespace) -> Options:
    """The parsed options as keywords of `PhiMoE.generate`."""
    return cast("Options", {name: getattr(arguments, name) for name in GENERATION})


def check_options(bundle: str, options: Options) -> None:
    """Raises what `PhiMoE.generate` would of these options, before the model is loaded.

    Raises:
        BundleError: there is no bundle, or it serves another task.
        GenerationError: an option is out of range, or does not fit the bundle's context.
    """
    from phimoe_onnx.bundle import read_manifest
    from phimoe_onnx.runtime.request import make_request

    manifest = read_manifest(Path(bundle))
    if manifest.task != "text-generation":
        raise BundleError(f"{bundle}: a text needs a bundle for text-generation, this one is for {manifest.task}")
    others: Any = options
    make_request([0], manifest.decoding.context, **others)


def put(text: str) -> None:
    """Shows a piece of text at once."""
    print(text, end="", flush=True)


def stream(pieces: Iterable[Piece], write: Callable[[str], object] = put) -> Generation:
    """Writes a stream as it comes and ends its line, also where it is broken off; returns its result."""
    result, begun = None, False
    try:
        for piece in pieces:
            begun = True
            write(piece.text)
            result = piece.result
    finally:
        if begun:
            write("\n")
    assert result is not None
    return result


def show(pieces: Iterable[Piece]) -> None:
    """Prints a stream as it comes, then its speed on stderr."""
    result = stream(pieces)
    drafts = f", {result.accepted} of {result.drafted} tokens run ahead accepted" if result.drafted else ""
    print(
        f"[{result.prompt_tokens} prompt tokens, {len(result.token_ids)} new, {speed(result)}, "
        f"first token after {result.first_token_seconds:.2f} s, ended by {result.finish_reason}{drafts}]",
        file=sys.stderr,
    )


def speed(result: Generation) -> str:
    """In tokens a second, where there are enough to say."""
    return f"{result.tokens_per_second:.1f} tokens/s" if len(result.token_ids) > 1 else "1 token"
