"""Packing: the files that a space module needs from its own folder, for machines that do not have that folder.

They are found in the syntax trees: the module is not executed for this. What is imported by a name that is only made
at run time (``importlib.import_module(name)``) is not seen, and neither are data: those lie where all machines reach
them.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import shutil
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from search.definition.problem import Problem
from search.errors import RequestError, SpaceError

_SUFFIXES = (*importlib.machinery.SOURCE_SUFFIXES, *importlib.machinery.EXTENSION_SUFFIXES)
_OWN_PACKAGES = {"search", "heldout"}
_LEFT_OUT = {"__pycache__"}


@dataclass(frozen=True)
class Packed:
    """What a machine needs to execute a space module.

    Attributes:
        module: Name of the module's file.
        source: Its text, as the study was asked for.
        folder: Where the module lies here.
        files: Everything else, by its place below that folder.
        needs: Packages that the files import from elsewhere and cannot do without, by their top names.
    """

    module: str
    source: str
    folder: Path
    files: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self.source.encode()) + sum((self.folder / name).stat().st_size for name in self.files)

    def write(self, folder: Path) -> Path:
        """Copy everything below ``folder``; the module's file there.

        Raises:
            RequestError: If a file cannot be read or written.
        """
        try:
            for name in self.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)
            # The text that was checked, in the encoding that Python expects of a file that declares none.
            path = folder / self.module
            path.write_bytes(self.source.encode(_declared(self.source)))
        except OSError as error:
            raise RequestError(
                f"the module and what it imports must be copied to be sent, but {error.filename}: {error.strerror}"
            ) from error
        return path


def pack(problem: Problem) -> Packed:
    """The space module and what it imports, directly or by way of others, from its own folder.

    Of a package the whole folder comes along, but for hidden files and compiled ones.

    Raises:
        SpaceError: If one of the files is no valid Python.
    """
    folder, module = Path(problem.path).parent, Path(problem.path).name
    files: dict[str, None] = {}
    needs: set[str] = set()
    waiting = [(Path(problem.path), problem.source)]
    while waiting:
        path, source = waiting.pop()
        for root, required in _imported(path, source):
            found = _local(folder, root)
            if not found:
                if required and root not in sys.stdlib_module_names and root not in _OWN_PACKAGES:
                    needs.add(root)
                continue
            for file in found:
                name = file.relative_to(folder).as_posix()
                if name in files or name == module:
                    continue
                files[name] = None
                if file.suffix == ".py":
                    waiting.append((file, _read(file)))
    return Packed(module, problem.source, folder, tuple(sorted(files)), tuple(sorted(needs)))


def _local(folder: Path, root: str) -> list[Path]:
    """The files by which Python would import ``root`` from ``folder``; none if it would look elsewhere."""
    if root in _OWN_PACKAGES:
        return []
    package = folder / root
    if (package / "__init__.py").is_file() or (package.is_dir() and not _is_elsewhere(folder, root)):
        return list(_walk(package))
    return [path for suffix in _SUFFIXES if (path := folder / f"{root}{suffix}").is_file()][:1]


def _is_elsewhere(folder: Path, root: str) -> bool:
    """Whether a plain folder of that name, a namespace, is hidden by a module that is installed."""
    if (folder / f"{root}.py").is_file() or root in sys.stdlib_module_names:
        return True
    path = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != folder]
    found = importlib.machinery.PathFinder.find_spec(root, path)
    return found is not None and found.origin is not None


def _walk(package: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(package):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_OUT)
        for name in sorted(names):
            path = Path(place) / name
            if not name.startswith(".") and path.suffix != ".pyc" and path.is_file():
                yield path


def _imported(path: Path, source: str) -> Iterator[tuple[str, bool]]:
    """Top names of all imports, and whether the module cannot do without."""
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError) as error:
        raise SpaceError(f"{path}: what a space module imports must be valid Python, but {error}") from None
    yield from _in(tree, True)


def _in(node: ast.AST, required: bool) -> Iterator[tuple[str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split(".")[0], required) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if child.module and not child.level:  # what is relative is in a package, which comes as a whole
                yield child.module.split(".")[0], required
        elif isinstance(child, ast.Try):
            # What is tried may be missing, if that is caught; whatever stands beside it need not be there either.
            optional = any(_catches_missing(handler) for handler in child.handlers)
            yield from _in(child, required and not optional)
        elif isinstance(child, ast.With):
            yield from _in(child, required and not any("suppress(" in ast.unparse(item) for item in child.items))
        elif isinstance(child, ast.If):
            yield from _in(child, required and "TYPE_CHECKING" not in ast.unparse(child.test))
        else:
            yield from _in(child, required)


def _catches_missing(handler: ast.ExceptHandler) -> bool:
    caught = "" if handler.type is None else ast.unparse(handler.type)
    return not caught or any(name in caught for name in ("ImportError", "ModuleNotFoundError", "Exception"))


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, ValueError) as error:
        raise SpaceError(f"{path}: what a space module imports must be readable Python, but {error}") from None


def _declared(source: str) -> str:
    """The encoding that the text itself says it has."""
    lines = iter(source.encode(errors="replace").splitlines(keepends=True))
    return tokenize.detect_encoding(lambda: next(lines, b""))[0]
