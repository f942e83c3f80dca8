"""The folder in which a bundle grows: locked while it does, resumable after a kill, renamed when it is complete.

What belongs to the user is left alone. An export removes, follows and overwrites only what an export made, and a mark
shows that: the first line of the journal for an unfinished bundle, the manifest for a whole one. Beside these marks
only the files that they stand for are an export's: those that it writes, or those that the manifest lists, as plain
files. Whatever else is found is named in an error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from phimoe_onnx import bundle
from phimoe_onnx.checkpoint.source import COPIED
from phimoe_onnx.errors import BundleError, ExportError
from phimoe_onnx.exporter.rename import exchange, rename_new
from phimoe_onnx.text.template import TOOL_USE

JOURNAL = ".journal"
MARK = b"phimoe-export, an unfinished bundle;"  # how a journal begins
BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux alone has it
_DRAFTS = (f"{JOURNAL}.draft", f".{bundle.MANIFEST}")
# what an export writes, and graphs and weights:
_WRITTEN = frozenset({*COPIED, TOOL_USE, "genai_config.json", bundle.MANIFEST, JOURNAL, *_DRAFTS})
_GRAPH_OR_DATA = re.compile(r"(model|sampling)(\.\w+)*\.(onnx|data)")

logger = logging.getLogger(__name__)


class AppearedError(ExportError):
    """Something came to the output while the export ran; it is left alone, and the finished bundle stays, too."""


def check_output(output: Path, overwrite: bool) -> None:
    """Raises ExportError where the export would not be able to write `output` at its end, before it does any work.

    That is: the folder cannot be made here, another export is writing it, it exists and may not be replaced, or what no
    export made stands where the export needs a name beside it.
    """
    try:
        output = named(output)
        look(beside(output, "replaced"))  # the longest name
        parent = next(folder for folder in beside(output, "partial").parents if look(folder))
        if not parent.is_dir():
            raise ExportError(f"{output}: cannot be written ({parent} is no folder)")
        if parent != beside(output, "partial").parent:
            with tempfile.TemporaryFile(dir=parent):  # whether anything can be made here
                return
        with _locked(output):
            _settle_and_check(output, overwrite)
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise ExportError(f"{output}: cannot be written ({_reason(error)})") from None


@contextlib.contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its name, and its place if it exists, at the end of the block.

    What an earlier, killed export left there of the weights is still in it. An error removes it, an interrupt or a kill
    leaves it for the next run to go on with. The last step replaces nothing: a new bundle gets its name only where
    nothing has it, and an old one changes names with the new one before it is removed. Where the system has no such
    exchange, the old one is first moved aside, so for a moment there is none; a kill in that moment is made good by the
    next run's `check_output`.

    Raises:
        ExportError: another export is writing the output, it exists by now, it cannot be written, or what no export
            made is in the way.
    """
    output = named(output)
    staging = beside(output, "partial")
    with _locked(output):
        _settle_and_check(output, overwrite)
        try:
            _prepare(staging)
            yield staging
            _finish(staging)
            old = _put(output, staging, overwrite)
        except AppearedError:
            raise
        except Exception as error:
            with contextlib.suppress(OSError):
                _remove(staging)
            if isinstance(error, OSError):
                raise ExportError(f"{output}: cannot be written ({_reason(error)})") from None
            raise
        try:
            if old is not None:
                _remove(old)
        except OSError as error:
            logger.warning("%s: is what is left of the old bundle, and could not be removed (%s)", old, _reason(error))


class Journal:
    """Which jobs of a plan are done, one number a line; one of another plan, or a damaged one, counts for nothing.

    Nor does one from before the machine was started: what was written then may never have reached the disk. Nor one
    whose data files are gone or have other sizes.

    Args:
        folder: the staging folder.
        plan: a hash of everything that decides what the jobs write.
        sizes: of the data files, in bytes, by name.
    """

    def __init__(self, folder: Path, plan: str, sizes: Mapping[str, int] | None = None) -> None:
        path = folder / JOURNAL
        boot = BOOT.read_text(encoding="ascii").strip() if BOOT.exists() else ""
        head = MARK + f" {plan} {boot}\n".encode()
        self.done = _jobs(path.read_bytes(), head) if path.exists() else set()
        for name, size in (sizes or {}).items():
            status = look(folder / name)
            if status is None or status.st_size != size:
                self.done = set()
        if not self.done:
            for stale in folder.glob("*.data"):
                stale.unlink()
        draft = folder / _DRAFTS[0]
        write_new(draft, head + b"".join(b"%d\n" % job for job in sorted(self.done)))
        draft.replace(path)
        self._file = path.open("ab")

    def add(self, job: int) -> None:
        """Notes that a job's outputs are written."""
        self._file.write(b"%d\n" % job)
        self._file.flush()

    def close(self) -> None:
        """Ends the journal; it stays on disk."""
        self._file.close()


def _jobs(journal: bytes, head: bytes) -> set[int]:
    """The jobs that a journal with this head names; none if it has another, or a line that no export wrote."""
    whole = journal[: journal.rfind(b"\n") + 1]  # a kill may cut the last line short
    numbers = whole.removeprefix(head).splitlines()
    if not whole.startswith(head) or not all(re.fullmatch(rb"[0-9]{1,9}", number) for number in numbers):
        return set()
    return {int(number) for number in numbers}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def look(path: Path) -> os.stat_result | None:
    """What is at this very path, a link and not what it leads to; None for nothing."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def named(output: Path) -> Path:
    """The output by a name that can be given to another folder, which "." cannot."""
    return output if output.name not in ("", "..") else output.resolve()


def beside(output: Path, state: str) -> Path:
    """A hidden name beside the output."""
    return output.parent / f".{output.name}.{state}"


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    path = beside(output, "lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = look(path)
        if found is not None and not (stat.S_ISREG(found.st_mode) and found.st_size == 0):  # a lock of ours is empty
            raise ExportError(in_the_way(path))
        lock.acquire(timeout=0)
    except Timeout:
        raise ExportError(
            f"{output}: another export is writing this bundle; wait for it or name another --output"
        ) from None
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({_reason(error)})") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does so on release
            path.unlink(missing_ok=True)
        lock.release()


def _few(names: list[str]) -> str:
    """The first names of a list, which a sentence can hold."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _check_own(folder: Path) -> None:
    """Raises ExportError where this is there and is no export's, or not all of it."""
    if look(folder) is not None and not is_folder(folder):
        raise ExportError(in_the_way(folder))
    if is_folder(folder) and (strangers := _strangers(folder)):
        raise ExportError(in_the_way(folder, strangers))


def in_the_way(path: Path, strangers: list[str] | None = None) -> str:
    """What an error says of something that no export made."""
    holds = f"holds {_few(strangers)}" if strangers else "is in the way"
    return f"{path}: {holds}, which no export made; move that elsewhere, or name another --output"


def _settle_and_check(output: Path, overwrite: bool) -> None:
    """Under the lock: ends what a killed export left, and raises ExportError where one may not go on."""
    try:
        _settle(output)
        _check_free(output, overwrite)
    except OSError as error:
        raise ExportError(f"{output}: cannot be written ({_reason(error)})") from None


def _check_free(output: Path, overwrite: bool) -> None:
    if look(output) is not None:
        if not overwrite:
            raise ExportError(f"{output}: exists already; name another --output, or pass --overwrite")
        if problem := _not_replaceable(output):
            raise ExportError(f"{output}: {problem}")
    _check_own(beside(output, "partial"))


def _not_replaceable(output: Path) -> str | None:
    """Why --overwrite leaves this alone; None for a bundle with nothing of the user's own in it."""
    if not is_folder(output) or bundle.MANIFEST not in _own(output):
        return "exists and is no bundle, so --overwrite leaves it alone; name another --output, or remove it"
    if os.path.ismount(output):
        return "is where a file system is mounted, and cannot be replaced; name a folder in it"
    if strangers := _strangers(output):
        return (
            f"holds {_few(strangers)}, which its manifest does not list, so --overwrite leaves it alone; "
            "move that elsewhere, or name another --output"
        )
    return None


def is_folder(path: Path) -> bool:
    """Whether this very path is a folder, and no link to one."""
    found = look(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _own(folder: Path) -> set[str]:
    """The files in `folder` that a mark shows to be an export's; links and folders never are."""
    if not is_folder(folder):
        return set()
    with os.scandir(folder) as entries:
        files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    if JOURNAL in files and _is_marked(folder / JOURNAL, alone=len(files) == 1):
        return {name for name in files if name in _WRITTEN or _GRAPH_OR_DATA.fullmatch(name)}
    if bundle.MANIFEST in files:
        with contextlib.suppress(BundleError):
            return files & {*bundle.read_manifest(folder).files, bundle.MANIFEST, *_DRAFTS}
    return set()


def _is_marked(journal: Path, alone: bool) -> bool:
    """Whether an export began this journal; a kill may have cut the mark short, before there was anything else."""
    with journal.open("rb") as file:
        text = file.read(len(MARK))
    return text == MARK or (alone and MARK.startswith(text))


def _strangers(folder: Path) -> list[str]:
    """All that is not an export's in `folder`."""
    return sorted(set(os.listdir(folder)) - _own(folder))


def _remove(folder: Path) -> None:
    """Removes what an export made of a folder, the marks last, and the folder itself unless something else is in it."""
    for name in sorted(_own(folder), key=lambda name: (name == JOURNAL, name == bundle.MANIFEST)):
        (folder / name).unlink()
    folder.rmdir()


def _is_complete(folder: Path) -> bool:
    """Whether this is a bundle at the end of its export."""
    if not is_folder(folder) or JOURNAL in (own := _own(folder)) or bundle.MANIFEST not in own:
        return False
    files = bundle.read_manifest(folder).files
    return all(name in own and (folder / name).stat().st_size == file.size for name, file in files.items())


def _settle(output: Path) -> None:
    """Ends what a kill cut short in `_put` between two renames."""
    staging, replaced = beside(output, "partial"), beside(output, "replaced")
    if look(replaced) is None:
        return
    _check_own(replaced)
    if look(output) is None:
        if not _is_complete(staging):
            rename_new(replaced, output)
            return
        rename_new(staging, output)
        logger.warning("%s: an export was killed while it replaced this bundle; the new one is now in place", output)
    elif _is_complete(staging):
        raise ExportError(
            f"{output}: has come here while an export was replacing the bundle; the old one is {replaced}, the new one "
            f"{staging}; move what you want to keep elsewhere"
        )
    _remove(replaced)


def _prepare(staging: Path) -> None:
    """Makes the folder and its mark, or removes from it all that is not worth keeping."""
    if look(staging) is not None and bundle.MANIFEST in (own := _own(staging)) and JOURNAL not in own:
        _remove(staging)  # a whole bundle
    staging.mkdir(exist_ok=True)
    for name in _own(staging) - {JOURNAL}:
        path = staging / name
        if path.suffix != ".data" or path.stat().st_nlink > 1:  # a second name: to write here would be to write there
            path.unlink()
    journal = staging / JOURNAL
    if not journal.exists() or not _is_marked(journal, alone=False):
        journal.unlink(missing_ok=True)
        write_new(journal, MARK + b"\n")


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that was not there, and brings it to the disk: the mark must be there before what it stands for."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _finish(staging: Path) -> None:
    """Makes a whole bundle of the folder: from the end of this on its manifest is its mark."""
    if strangers := _strangers(staging):
        raise ExportError(in_the_way(staging, strangers))
    _flush(staging)
    (staging / JOURNAL).unlink(missing_ok=True)


def _put(output: Path, staging: Path, overwrite: bool) -> Path | None:
    """Gives the new bundle its name; returns where the old one is now, if there was one.

    What is moved out of the way is looked at again then: the check before the export is long ago.

    Raises:
        AppearedError: something else has the name; it keeps it.
    """
    appeared = f"has come here while the export ran; the finished bundle is {staging}, move it where you want it"
    if not overwrite or look(output) is None:
        try:
            rename_new(staging, output)
        except FileExistsError:
            raise AppearedError(f"{output}: {appeared}") from None
        return None
    if exchange(staging, output):
        if _not_replaceable(staging):
            exchange(staging, output)
            raise AppearedError(f"{output}: {appeared}")
        return staging
    replaced = beside(output, "replaced")
    rename_new(output, replaced)
    try:
        if _not_replaceable(replaced):
            raise AppearedError(f"{output}: {appeared}")
        rename_new(staging, output)
    except (OSError, AppearedError):
        try:
            rename_new(replaced, output)
        except FileExistsError:
            raise AppearedError(f"{output}: {appeared}; what was here before is {replaced}") from None
        raise
    return replaced


def _flush(folder: Path) -> None:
    """Brings the files to the disk, so that the rename cannot overtake them."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
