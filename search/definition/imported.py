"""The files of a space module's own folder that it imports, found in the syntax tree; nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path


def files(path: Path, source: str, folders: Sequence[Path]) -> list[Path]:
    """Python files that the module needs beside itself, itself included.

    Args:
        path: The module's file; source: its text as the study has it.
        folders: Where its imports are looked for, in this order, if they are no installed packages; of a package, all
            files come along.
    """
    found: dict[Path, None] = {path: None}
    waiting = [(path, source)]
    while waiting:
        _, text = waiting.pop()
        for name in _names(text):
            for file in _located(name, folders):
                if file not in found:
                    found[file] = None
                    waiting.append((file, file.read_text(encoding="utf-8", errors="replace")))
    return list(found)


def _names(text: str) -> Iterator[str]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # told where it is imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def _located(name: str, folders: Sequence[Path]) -> list[Path]:
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return [folder / f"{name}.py"]
        package = folder / name
        if package.is_dir() and name not in ("search", "heldout"):
            if inside := sorted(package.rglob("*.py")):
                return inside
    return []
