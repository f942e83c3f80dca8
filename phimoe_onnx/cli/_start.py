"""Where every command begins. Nothing heavy is imported here, so that an early Ctrl-C finds somebody who is quiet."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from importlib import import_module
from types import FrameType

INTERRUPTED = 130  # the exit code of what Ctrl-C ended, as shells have it


def export() -> int:
    """phimoe-export; this and the rest return the exit code."""
    return _start("export")


def generate() -> int:
    """phimoe-generate."""
    return _start("generate")


def chat() -> int:
    """phimoe-chat."""
    return _start("chat")


def classify() -> int:
    """phimoe-classify."""
    return _start("classify")


def verify() -> int:
    """phimoe-verify."""
    return _start("verify")


def bench() -> int:
    """phimoe-bench."""
    return _start("bench")


def experts() -> int:
    """phimoe-experts."""
    return _start("experts")


def _start(command: str) -> int:
    try:
        with imports():
            module = import_module(f"phimoe_onnx.cli.{command}")
        code: int = module.main()
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process at once: no work has begun, and a KeyboardInterrupt in the
    middle of foreign modules may be printed or swallowed there.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()  # which alone is interrupted
    if not main or before in (signal.SIG_IGN, None):  # ignored, as in the background, or not Python's
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\n")  # behind the terminal's ^C
    os._exit(INTERRUPTED)
