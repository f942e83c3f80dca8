"""The folder in which a bundle grows: locked while it does, resumable after a kill, renamed when it is complete."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from phimoe_onnx import bundle
from phimoe_onnx.errors import ExportError

JOURNAL = ".journal"
BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux alone has it

logger = logging.getLogger(__name__)


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ExportError where `output` exists and may not be replaced; only bundles ever are."""
    if _beside(output, "replaced").exists():
        with _locked(output):
            _settle(output)
    _check_free(output, overwrite)


@contextlib.contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its name, and its place if it exists, at the end of the block.

    What an earlier, killed export left there of the weights is still in it. An error removes it, an interrupt or a kill
    leaves it for the next run to go on with. A bundle that is replaced is first moved aside, so for a moment there is
    none; a kill in that moment is made good by the next run's `check_output`.

    Raises:
        ExportError: another export is writing the output, it exists by now, or it cannot be written.
    """
    staging, replaced = _beside(output, "partial"), _beside(output, "replaced")
    with _locked(output):
        _settle(output)
        _check_free(output, overwrite)
        try:
            _prepare(staging)
            yield staging
            _flush(staging)
            (staging / JOURNAL).unlink(missing_ok=True)  # from here on the folder counts as complete
            _replace(output, staging, replaced)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError):
                raise ExportError(f"{output}: cannot be written ({error.strerror or error})") from None
            raise
        shutil.rmtree(replaced, ignore_errors=True)


class Journal:
    """Which jobs of a plan are done, one number a line; a journal of another plan counts for nothing.

    Nor does one from before the machine was started: what was written then may never have reached the disk.

    Args:
        folder: the staging folder.
        plan: a hash of everything that decides what the jobs write.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        path = folder / JOURNAL
        lines = path.read_text(encoding="ascii").splitlines(keepends=True) if path.exists() else []
        head = f"{plan} {BOOT.read_text(encoding='ascii').strip() if BOOT.exists() else ''}\n"
        self.done: set[int] = set()
        if lines[:1] == [head]:
            self.done = {int(line) for line in lines[1:] if line.endswith("\n")}  # a kill may cut the last line short
        else:
            for stale in folder.glob("*.data"):
                stale.unlink()
        self._file: TextIO = path.open("w", encoding="ascii")
        self._file.write(head + "".join(f"{entry}\n" for entry in sorted(self.done)))
        self._file.flush()

    def add(self, job: int) -> None:
        """Notes that a job's outputs are written."""
        self._file.write(f"{job}\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the journal; it stays on disk."""
        self._file.close()


def _beside(output: Path, state: str) -> Path:
    return output.parent / f".{output.name}.{state}"


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    path = _beside(output, "lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(
            f"{output}: another export is writing this bundle; wait for it or name another --output"
        ) from None
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does so on release
            path.unlink(missing_ok=True)
        lock.release()


def _check_free(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise ExportError(f"{output}: exists already; name another --output, or pass --overwrite")
    if output.exists() and not (output / bundle.MANIFEST).exists():
        raise ExportError(f"{output}: exists and is no bundle, so --overwrite leaves it alone; name another --output")


def _settle(output: Path) -> None:
    """Ends what a kill cut short at the end of `staged`."""
    staging, replaced = _beside(output, "partial"), _beside(output, "replaced")
    complete = (staging / bundle.MANIFEST).exists() and not (staging / JOURNAL).exists()
    if replaced.exists() and complete and not output.exists():
        staging.rename(output)
        logger.warning("%s: an export was killed while it replaced this bundle; the new one is now in place", output)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)


def _prepare(staging: Path) -> None:
    """Makes the folder, or removes from it all that is not worth keeping."""
    staging.mkdir(exist_ok=True)
    (staging / bundle.MANIFEST).unlink(missing_ok=True)  # first: without it the folder never counts as complete
    for path in staging.iterdir():
        if path.name != JOURNAL and path.suffix != ".data":
            path.unlink()


def _replace(output: Path, staging: Path, replaced: Path) -> None:
    """Gives the new folder the name and an old one another; an error leaves the old one where it was."""
    old = output.exists()
    if old:
        output.rename(replaced)
    try:
        staging.rename(output)
    except OSError:
        if old:
            replaced.rename(output)
        raise


def _flush(folder: Path) -> None:
    """Brings the files to the disk, so that the rename cannot overtake them."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
