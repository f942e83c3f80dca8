"""The folder in which a bundle grows: locked while it does, resumable after a kill, renamed only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from phimoe_onnx import bundle
from phimoe_onnx.errors import ExportError

JOURNAL = ".journal"
LOCK = ".lock"


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ExportError where `output` exists and may not be replaced; only bundles ever are."""
    if output.exists() and not overwrite:
        raise ExportError(f"{output}: exists already; name another --output, or pass --overwrite")
    if output.exists() and not (output / bundle.MANIFEST).exists():
        raise ExportError(f"{output}: exists and is no bundle, so --overwrite leaves it alone; name another --output")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its name, and its place if it exists, at the end of the block.

    What an earlier, killed export left there is still in it. An error removes it, an interrupt or a kill leaves it for the
    next run to go on with.

    Raises:
        ExportError: another export is writing the output, or it cannot be written.
    """
    staging, replaced = (output.parent / f".{output.name}.{state}" for state in ("partial", "replaced"))
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = FileLock(staging / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(f"{output}: another export is writing this bundle; wait for it or name another --output") from None
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        yield staging
        _flush(staging)
        (staging / JOURNAL).unlink(missing_ok=True)
        (staging / LOCK).unlink(missing_ok=True)
        if output.exists():  # two renames: whatever stands under the final name is whole at every moment
            shutil.rmtree(replaced, ignore_errors=True)
            output.rename(replaced)
        staging.rename(output)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise ExportError(f"{output}: cannot be written ({error.strerror or error})") from None
        raise
    finally:
        lock.release()
        shutil.rmtree(replaced, ignore_errors=True)


class Journal:
    """Which jobs of a plan are done, one number a line; a journal of another plan counts for nothing.

    Args:
        folder: the staging folder.
        plan: a hash of everything that decides what the jobs write.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        path = folder / JOURNAL
        lines = path.read_text(encoding="ascii").splitlines(keepends=True) if path.exists() else []
        self.done: set[int] = set()
        if lines[:1] == [f"{plan}\n"]:
            self.done = {int(line) for line in lines[1:] if line.endswith("\n")}  # a kill may cut the last line short
        else:
            for stale in folder.glob("*.data"):
                stale.unlink()
        self._file: TextIO = path.open("w", encoding="ascii")
        self._file.write("".join(f"{entry}\n" for entry in (plan, *sorted(self.done))))
        self._file.flush()

    def add(self, job: int) -> None:
        """Notes that a job's outputs are written."""
        self._file.write(f"{job}\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the journal; it stays on disk."""
        self._file.close()


def _flush(folder: Path) -> None:
    """Brings the files to the disk, so that the rename cannot overtake them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
