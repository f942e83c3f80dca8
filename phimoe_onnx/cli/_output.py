"""The files that a command writes where it is told to, and what it does not write over.

The rule: a file that is not there yet is made, an empty one is filled, and one that the same command wrote before is
replaced; its beginning shows that. Any other file is left alone unless --overwrite is given. A pipe or a device, such
as /dev/stdout, is written to.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from phimoe_onnx.errors import PhiMoEError

_BEGINNING = 200  # bytes in which a mark stands


def check_file(file: str, mark: str, overwrite: bool) -> None:
    """Raises PhiMoEError where `file` may not be written, or can't be; to be asked before the work that it is for.

    Args:
        file: the path as it was given.
        mark: what stands in the beginning of every file that the command writes there.
        overwrite: whether any file may be replaced.
    """
    path = Path(file)
    try:
        if not path.exists():
            if not os.access(path.parent, os.W_OK):
                path.parent.stat()  # says what is wrong with it, if it is not there
                raise PhiMoEError(f"{file}: cannot be written (Permission denied)")
        elif path.is_dir():
            raise PhiMoEError(f"{file}: is a folder, expected the name of a file")
        elif not (overwrite or _is_ours(path, mark)):
            raise PhiMoEError(f"{file}: exists and is no earlier report; name another file, or pass --overwrite")
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise _unwritable(file, error) from None


def write_file(file: str, text: str, mark: str, overwrite: bool) -> None:
    """Writes `text`, in whose beginning `mark` stands, under the rule of `check_file`, which is asked again."""
    assert mark in text[:_BEGINNING]
    check_file(file, mark, overwrite)
    try:
        with open(file, "w" if Path(file).exists() else "x", encoding="utf-8") as opened:
            opened.write(text)
    except (OSError, ValueError) as error:
        raise _unwritable(file, error) from None


def _is_ours(path: Path, mark: str) -> bool:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        return True
    with path.open("rb") as opened:
        return mark.encode() in opened.read(_BEGINNING)


def _unwritable(file: str, error: Exception) -> PhiMoEError:
    return PhiMoEError(f"{file}: cannot be written ({getattr(error, 'strerror', None) or error})")
