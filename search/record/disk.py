"""Room on disk: how much there is, how much must stay free, and sizes as people write them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from search.errors import DiskFull, RequestError, StudyFailed

MIN_FREE = "HELDOUT_MIN_FREE"
_RESERVE = 256 << 20  # the journal, a report and one large model, so that a study can end in order
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str, what: str = "a size") -> int:
    """Bytes of a size such as ``20G`` or ``512M``; units are powers of 1,024.

    Args:
        what: Whose size it is, for the message.

    Raises:
        RequestError: If it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise RequestError(f"{what} must be a size such as 500M or 20G, but got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def shown(size: int) -> str:
    """A number of bytes for people: ``1.5 GB``."""
    amount, unit = float(size), ""
    for unit in _UNITS:
        if amount < 1024 or unit == "T":
            break
        amount /= 1024
    return f"{size} bytes" if not unit else f"{amount:.1f} {unit}B"


def reserve() -> int:
    """Bytes that must stay free: ``HELDOUT_MIN_FREE``, or 256 MiB.

    Raises:
        RequestError: If the variable holds no size.
    """
    given = os.environ.get(MIN_FREE)
    return _RESERVE if not given else parse_size(given, MIN_FREE)


def free(path: Path) -> int:
    """Bytes that we may still write where ``path`` is, or is going to be.

    Raises:
        OSError: If the disk does not say.
    """
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def is_full(path: Path) -> bool:
    """Whether less than the reserve is free; False where the disk does not say."""
    try:
        return free(path) < reserve()
    except OSError:
        return False


def lack(path: Path) -> str | None:
    """Why nothing more may be written, in one line; None while there is room."""
    if not os.access(path, os.W_OK):
        return f"{path} cannot be written at present"
    if not is_full(path):
        return None
    return f"only {shown(free(path))} are free where {path} is, of {shown(reserve())} that must stay free ({MIN_FREE})"


def failure(path: Path, error: OSError) -> StudyFailed:
    """The error for a write that a study cannot do without: one to wait for where the disk takes nothing at present."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return DiskFull(f"{path} could not be written ({error.strerror})")
    return StudyFailed(
        f"{path} must be written, but: {error.strerror}; see to its disk and permissions, then `heldout resume`"
    )


def check(path: Path) -> None:
    """See that there is room to begin.

    Raises:
        RequestError: If less than the reserve is free.
    """
    if is_full(path):
        raise RequestError(
            f"{shown(reserve())} must be free where {path} is, but {shown(free(path))} are; make room (`heldout gc` "
            f"removes what nothing needs), choose another --workspace, or set {MIN_FREE}"
        )


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what vanishes meanwhile, or is not there, counts as nothing."""
    total, waiting = 0, [path]
    while waiting:
        here = waiting.pop()
        with contextlib.suppress(OSError):
            if not here.is_dir() or here.is_symlink():
                total += here.lstat().st_size
                continue
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    else:
                        with contextlib.suppress(OSError):
                            total += entry.stat(follow_symlinks=False).st_size
    return total
