"""Files on their way between the driver and a node that does not see them: which, under which names, and their bytes.

A node keeps what it is sent under its own folder, the *home*, each file at the home followed by the absolute path that
it has where the driver runs. So one prefix leads there and back. What all trials read is written once per node,
whichever of the node's agents comes first; what a trial leaves in its folder is sent back and removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

CHUNK = 32 << 20  # bytes of one object or answer
MOST_BYTES = 16 << 30  # that a trial may leave in its folder
MOST_FILES = 10_000
_PART = ".heldout-part"
_DONE = ".placed"

Entry = Sequence[Any]  # of one file: its name below the root ("." for the root itself), size, time of change


def listed(root: Path) -> list[Entry]:
    """The regular files below a folder, or the file itself; links and what else there may be are left out.

    Raises:
        ValueError: If they are too many or too large to be sent.
    """
    if not root.is_dir():
        return [_entry(root, ".")] if root.is_file() else []
    found, total = [], 0
    for folder, _, names in os.walk(root):
        for name in sorted(names):
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a trial may still be at work
                if name != _PART and stat.S_ISREG(path.lstat().st_mode):
                    found.append(_entry(path, path.relative_to(root).as_posix()))
                    total += found[-1][1]
        if len(found) > MOST_FILES or total > MOST_BYTES:
            raise ValueError(
                f"a folder that travels must hold at most {MOST_FILES} files and {MOST_BYTES >> 30} GiB, but {root} "
                "holds more; put such files on storage that every node sees"
            )
    return found


def _entry(path: Path, name: str) -> Entry:
    known = path.lstat()
    return [name, known.st_size, known.st_mtime_ns]


def at(root: Path, name: str) -> Path:
    """The file of this name below a root.

    Raises:
        ValueError: If the name leads out of it.
    """
    if name == ".":
        return root
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/") or "\0" in name:
        raise ValueError(f"a file that travels must lie below {root}, but is called {name!r}")
    return root.joinpath(*parts)


def chunks(root: Path, files: Sequence[Entry]) -> Iterator[bytes]:
    """All files, one after the other, in parts of at most ``CHUNK`` bytes.

    Raises:
        OSError: If one cannot be read, or is shorter than it was.
    """
    part = bytearray()
    for name, size, _ in files:
        left = size
        with at(root, name).open("rb") as file:
            while left:
                data = file.read(min(left, CHUNK - len(part)))
                if not data:
                    raise OSError(f"{root}/{name} must stay as it is while it is sent, but has become shorter")
                left -= len(data)
                part += data
                if len(part) == CHUNK:
                    yield bytes(part)
                    part.clear()
    if part:
        yield bytes(part)


def write(root: Path, files: Sequence[Entry], parts: Iterable[Any], mode: int = 0o644) -> None:
    """Write what ``chunks`` read, with its times of change.

    Args:
        parts: Bytes, or whatever shares its memory with some.
    """
    stream, part = iter(parts), memoryview(b"")
    for name, size, changed in files:
        path, left = at(root, name), size
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # what was begun and not finished may not be written to
        with path.open("wb") as file:
            while left:
                if not part:
                    part = memoryview(next(stream)).cast("B")
                file.write(part[:left])
                left, part = left - len(part[:left]), part[left:]
        os.chmod(path, mode)
        os.utime(path, ns=(changed, changed))


def place(home: Path, root: str, files: Sequence[Entry], parts: Iterable[Any]) -> None:
    """Write files that trials read, once, whole or not at all; the caller holds the node's lock.

    Args:
        root: Where they lie where the driver runs.
    """
    mark = home / _DONE / hashlib.sha256(json.dumps([root, *files]).encode()).hexdigest()
    if mark.exists():
        return
    to = Path(f"{home}{root}")
    # Never a folder in place of another: what was sent for other roots may lie in it.
    write(to, files, parts, 0o444)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def digest(path: Path) -> str | None:
    """SHA-256 of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def is_same(root: Path, files: Sequence[Entry], digests: Mapping[str, str]) -> bool:
    """Whether these files are here as well, where they lie, with these contents."""
    return all(digest(at(root, name)) == digests[name] for name, _, _ in files)


def there(tree: Any, roots: Mapping[str, str]) -> Any:
    """A payload for a node: texts that begin with a root get the prefix that the root has there.

    Args:
        roots: Prefixes, "" for what the node sees where it is; the longest root counts.
    """
    if isinstance(tree, str):
        under = [root for root in roots if tree == root or tree.startswith(f"{root}/")]
        return roots[max(under, key=len)] + tree if under else tree
    if isinstance(tree, Mapping):
        return {key: there(value, roots) for key, value in tree.items()}
    return [there(value, roots) for value in tree] if isinstance(tree, list | tuple) else tree


def back(tree: Any, home: str) -> Any:
    """What a node says, with its files named as where the driver runs."""
    if isinstance(tree, str):
        return tree.replace(home, "")
    if isinstance(tree, dict):
        return {key: back(value, home) for key, value in tree.items()}
    return [back(value, home) for value in tree] if isinstance(tree, list) else tree


def receive(root: Path, name: str, offset: int, data: bytes, changed: int | None) -> None:
    """Take in a part of a file that comes back; with the last part, which has its time of change, it is there.

    Raises:
        ValueError: If its name leads out of the root.
        OSError: If it cannot be written.
    """
    to, part = at(root, name), root / _PART
    root.mkdir(parents=True, exist_ok=True)
    with part.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)
    if changed is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        os.utime(part, ns=(changed, changed))
        os.replace(part, to)


def forget(root: Path, names: Iterable[str]) -> None:
    """Remove files that a trial has removed on its node."""
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            at(root, name).unlink()


def held(path: Path) -> IO[str]:
    """A lock that is held, beside others, for as long as this process lives: what nobody holds, ``sweep`` removes."""
    import fcntl

    while True:
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # it was swept away a moment ago


def sweep(base: Path, own: str) -> None:
    """Remove the homes that agents left which were killed: those that no living process holds locked."""
    import fcntl

    for lock in base.glob("heldout-node-*.lock"):
        if lock.stem == own:
            continue
        with contextlib.suppress(OSError), lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(base / lock.stem, ignore_errors=True)
            lock.unlink()
