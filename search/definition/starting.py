"""`heldout init`: a space module of your own to start from."""

from __future__ import annotations

import importlib.machinery
import keyword
import os
import sys
from pathlib import Path

from search.definition.problem import folders
from search.errors import RequestError

KINDS = {
    "table": "a table of numbers and words",
    "images": "images of several kinds",
    "text": "short texts of several kinds",
    "series": "readings over time",
}


def init(name: str, kind: str = "table") -> Path:
    """Write a commented space module that runs as it is, with what is to be replaced marked.

    Args:
        name: Of the file, with or without ``.py``; a path to a folder that exists may come before it.
        kind: One of ``KINDS``.

    Returns:
        The file's path, as given.

    Raises:
        RequestError: If there is such a file, or the name cannot be a module's.
    """
    if kind not in KINDS:
        raise RequestError(f"--kind must be one of {', '.join(KINDS)}, but got {kind!r}")
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if file.exists():
        raise RequestError(f"{file} is there already, and init writes over nothing; give another name")
    _check(file, name)
    text = _source(kind).read_text(encoding="utf-8").replace(f"{kind}.py", os.fspath(file))
    try:
        with file.open("x", encoding="utf-8") as out:  # "x": it may have come into being meanwhile
            out.write(text)
    except OSError as error:
        raise RequestError(f"{file} must be in a folder that can be written, but {error.strerror}") from None
    return file


def _check(file: Path, name: str) -> None:
    stem = file.stem
    if not stem.isidentifier() or keyword.iskeyword(stem):
        raise RequestError(
            f"a space is a Python module, so its name must be letters, digits and '_' and not begin with a digit, but "
            f"got {name!r}"
        )
    # The module's folder comes first where imports are looked for.
    if stem in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(stem, sys.path[1:]) is not None:
        raise RequestError(
            f"there is a Python module called {stem!r}, which {file.name} would hide from its own imports; give "
            "another name"
        )


def _source(kind: str) -> Path:
    for folder in folders():
        if (file := folder / "starting" / f"{kind}.py").is_file():
            return file
    raise RequestError(f"the module to start {kind} from is not installed; install Heldout again")
