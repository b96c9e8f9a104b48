"""What a module needs beside its rows, such as a backbone or a tokeniser: made once, digested, kept as copies."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.definition.problem import SpaceModule
from search.errors import DataError, RequestError, SpaceError

COPIES = "assets"
_READ_BYTES = 1 << 20

Asset = Mapping[str, Any]


def cache_folder(name: str) -> Path:
    """A folder for what a module makes or downloads once and needs again: the same in every process and study.

    It lies in ``HELDOUT_CACHE``, or in the user's cache folder, and is there when this returns.

    Args:
        name: A plain name, such as that of the module.

    Raises:
        RequestError: If the name is none, or the folder cannot be made.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise RequestError(f"cache_folder(name) takes a plain name, but got {name!r}")
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"the cache folder {folder} cannot be made ({error.strerror or error}); set HELDOUT_CACHE to another place"
        ) from error
    return folder


def cache_root() -> Path:
    """The folder that ``cache_folder`` makes its folders in."""
    if given := os.environ.get("HELDOUT_CACHE"):
        return Path(given).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("heldout"))


def made(module: SpaceModule) -> list[dict[str, Any]]:
    """Run the module's ``prepare()``, one process at a time, and tell of its assets.

    Returns:
        For each: ``path``, absolute; ``digest``, SHA-256; ``bytes``; ``stamp``, by which a change is noticed cheaply.

    Raises:
        SpaceError: If ``prepare()`` raises, or leaves out an asset.
    """
    if module.prepare is not None:
        import fcntl

        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
        with (root / f".{module.problem.name}.lock").open("a") as lock, module.blaming("prepare()"):
            fcntl.flock(lock, fcntl.LOCK_EX)
            module.prepare()
    out = []
    for given in module.assets:
        path = Path(os.path.abspath(given))
        try:
            out.append({"path": str(path), "digest": digest(path), "bytes": _size(path), "stamp": _stamp(path)})
        except OSError as error:
            raise SpaceError(
                f"{module.problem.path}: every asset must be there once prepare() has run, but {path} cannot be read "
                f"({error.strerror or error}); let prepare() make it"
            ) from error
    return out


def check(assets: Sequence[Asset] | None) -> None:
    """See that assets are as the study recorded them, before a model is built with them.

    Raises:
        DataError: If one is gone or was changed.
    """
    for asset in assets or ():
        path = Path(asset["path"])
        try:
            same = _stamp(path) == asset["stamp"] or digest(path) == asset["digest"]
        except OSError as error:
            raise DataError(
                f"the asset {path} cannot be read ({error.strerror or error}); put it back, or launch a new study"
            ) from error
        if not same:
            raise DataError(f"the asset {path} must be as the study recorded it, but was changed; put it back")


def changed(assets: Sequence[Asset] | None) -> list[str]:
    """Paths of assets that are not as they were recorded; those that are gone do not count, see ``restore``."""
    there = [asset for asset in assets or () if Path(asset["path"]).exists()]
    return [asset["path"] for asset in there if digest(Path(asset["path"])) != asset["digest"]]


def keep(assets: Sequence[Asset] | None, folder: Path) -> None:
    """Copy assets into ``folder``, under ``assets/``.

    Raises:
        RequestError: The disk is full or the folder cannot be written.
    """
    for asset in assets or ():
        if not (to := _copy_of(asset, folder)).exists():
            _copied(Path(asset["path"]), to)


def restore(assets: Sequence[Asset] | None, folder: Path) -> None:
    """Put back from the copies in ``folder`` what is gone, as after a cache was cleared; changes nothing that is there.

    Raises:
        RequestError: The disk is full or the place cannot be written.
    """
    for asset in assets or ():
        path, copy = Path(asset["path"]), _copy_of(asset, folder)
        if not path.exists() and copy.exists():
            _copied(copy, path)


def ship(assets: Sequence[Asset] | None, folder: Path, out: Path) -> list[dict[str, Any]]:
    """Copy a study's assets beside an exported model; of each its ``file`` there, ``path`` here and ``digest``."""
    shipped = []
    for asset in assets or ():
        source, name = _copy_of(asset, folder), Path(COPIES) / Path(asset["path"]).name
        if (out / name).exists():  # two of one name
            name = name.with_name(f"{asset['digest'][:8]}-{name.name}")
        _copied(source if source.exists() else Path(asset["path"]), out / name)
        shipped.append({"file": str(name), "path": asset["path"], "digest": asset["digest"]})
    return shipped


def lines(shipped: Sequence[Asset]) -> list[str]:
    """Of a model card: what ``ship`` put beside the model; nothing if that is nothing."""
    if not shipped:
        return []
    named = ", ".join(f"`{asset['file']}` (`{asset['digest'][:16]}`)" for asset in shipped)
    return ["", f"Beside it, as the space had it: {named}. Weights are inside the model; a tokeniser, say, is not."]


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files below a folder.

    Raises:
        OSError: If it cannot be read.
    """
    out = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            out.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as reader:
            while part := reader.read(_READ_BYTES):
                out.update(part)
    return out.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _stamp(path: Path) -> list[list[int]]:
    return [[found.st_size, found.st_mtime_ns] for found in (file.stat() for file in _files(path))]


def _copy_of(asset: Asset, folder: Path) -> Path:
    name: str = Path(asset["path"]).name
    return folder / COPIES / str(asset["digest"][:16]) / name


def _copied(source: Path, to: Path) -> None:
    """Copy a file or a folder, its times too, so that it is there whole or not at all."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=to.parent) as temporary:
            part = Path(temporary) / to.name
            shutil.copytree(source, part) if source.is_dir() else shutil.copy2(source, part)
            os.rename(part, to)
    except OSError as error:
        raise RequestError(
            f"the asset {source} must be copied to {to}, but {error.strerror or error}; make room or give access there"
        ) from error
