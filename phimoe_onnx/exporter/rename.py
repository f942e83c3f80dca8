"""Renames that replace nothing, and the exchange of two names, by what each system has for it."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD: names are relative to the working directory
_NOT_OFFERED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # by this kernel or this file system


def rename_new(source: Path, target: Path) -> None:
    """Renames the folder `source` to `target`, where nothing is yet.

    Linux has renameat2 with RENAME_NOREPLACE for this, macOS renamex_np with RENAME_EXCL, and on Windows no rename
    replaces a folder. Elsewhere, and on file systems that offer neither (NFS, some of FUSE), a look comes before a
    plain rename. That is weaker: a folder's rename fails over a file, a link or a folder with something in it, but an
    empty folder that appears after the look is replaced.

    Raises:
        FileExistsError: something is at `target`; both are left as they were.
        OSError: the rename failed otherwise.
    """
    if _rename(source, target, linux=1, macos=4):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def exchange(first: Path, second: Path) -> bool:
    """Gives each of two folders the other's name in one step; False where the system or the file system cannot.

    Linux: renameat2 with RENAME_EXCHANGE; macOS: renamex_np with RENAME_SWAP.
    """
    return _rename(first, second, linux=2, macos=2)


def _rename(source: Path, target: Path, *, linux: int, macos: int) -> bool:
    """The system's rename with these flags; False where there is none."""
    names = os.fsencode(source), os.fsencode(target)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            failed = libc.renameat2(_HERE, names[0], _HERE, names[1], ctypes.c_uint(linux))
        elif sys.platform == "darwin":
            failed = libc.renamex_np(*names, ctypes.c_uint(macos))
        else:
            return False
    except (AttributeError, TypeError):  # a C library without it; Windows has no CDLL(None)
        return False
    if failed and (code := ctypes.get_errno()) not in _NOT_OFFERED:
        raise OSError(code, os.strerror(code), str(target))
    return not failed
