"""Keeps the pages of a bundle's scales out of resident memory while ONNX Runtime loads it (Linux)."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# madvise(2): reclaim these pages. Unlike MADV_DONTNEED it can never lose data, whatever lies at the addresses by now.
_PAGEOUT = 21
_INTERVAL = 0.02  # seconds


@contextmanager
def released(folder: Path) -> Iterator[None]:
    """Drops, again and again during the block and once after it, the mapped pages of the files that hold `folder`'s
    scales.

    ONNX Runtime maps external weights and copies quantised ones into a layout of its own. It unmaps the codes then, but
    the scales stay mapped and resident although nothing reads them again. A page that is read after all comes back from
    the file. Without Linux 5.4 this does nothing.
    """
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()
    # a bundle may be reached through links, but the kernel names the files themselves
    files = frozenset(str(path.resolve()) for path in folder.glob("*.scales*.data"))

    def keep_dropping() -> None:
        while not done.wait(_INTERVAL):
            _drop(files)

    thread = threading.Thread(target=keep_dropping, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _drop(files)


def _drop(files: frozenset[str]) -> None:
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        if path in files:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGEOUT)
