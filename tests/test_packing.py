"""What of a space module's folder goes along when the module is sent elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from search.definition.packing import pack
from search.definition.problem import find
from search.errors import SpaceError

SPACE = 'objective = "val_accuracy"\ndef load(): ...\ndef build(hp): ...\n'


def written(folder: Path, **files: str) -> Path:
    """A folder with these files; ``__`` in a name is a slash, and ``.py`` is added."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def packed(folder: Path):  # type: ignore[no-untyped-def]
    return pack(find(str(folder / "space.py")))


def test_what_is_imported_comes_along_and_nothing_else(tmp_path: Path) -> None:
    written(
        tmp_path,
        space="import helper\nimport numpy as np\n" + SPACE,
        helper="from blocks.dense import Dense\ndef later():\n    import deep\n",
        deep="import math",
        blocks__dense="from . import other\nimport shared",
        blocks__other="",
        shared="",
        unused="import nothing_like_it",
    )
    (tmp_path / "blocks" / "__init__.py").write_text("")
    (tmp_path / "blocks" / "words.txt").write_text("data of the package")
    (tmp_path / "blocks" / ".hidden").write_text("")
    (tmp_path / "blocks" / "__pycache__").mkdir()
    (tmp_path / "blocks" / "__pycache__" / "dense.cpython-311.pyc").write_bytes(b"")
    (tmp_path / "rows.csv").write_text("1,2,3")
    found = packed(tmp_path)
    blocks = ("blocks/__init__.py", "blocks/dense.py", "blocks/other.py", "blocks/words.txt")
    assert found.files == (*blocks, "deep.py", "helper.py", "shared.py")
    assert found.module == "space.py" and found.needs == ("numpy",)
    assert found.size == sum((tmp_path / name).stat().st_size for name in (*found.files, "space.py"))


def test_what_was_packed_runs_without_the_folder(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    written(
        home,
        space="from helper import name\nfrom kit.parts import part\n" + SPACE + "print(name, part)\n",
        helper="name = 'helped'",
        kit__parts="part = 'äöü'",
    )
    away.mkdir()
    path = packed(home).write(away)
    (home / "helper.py").unlink()
    ran = subprocess.run([sys.executable, "-I", "-c", RUN, str(path)], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "helped äöü\n", ran.stderr


RUN = "import sys, runpy; sys.path.insert(0, sys.argv[1].rpartition('/')[0]); runpy.run_path(sys.argv[1])"


def test_an_encoding_that_the_module_declares_is_kept(tmp_path: Path) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir(), away.mkdir()
    (home / "space.py").write_bytes(("# -*- coding: latin-1 -*-\nname = 'äöü'\n" + SPACE).encode("latin-1"))
    assert packed(home).write(away).read_bytes() == (home / "space.py").read_bytes()


def test_needed_is_what_cannot_be_done_without(tmp_path: Path) -> None:
    text = """
import contextlib
import json
import search
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import only_for_types
try:
    import faster
except ImportError:
    import slower as faster
try:
    import surely.parts
finally:
    pass
with contextlib.suppress(ImportError):
    import perhaps
def build_more():
    from wanted.too import late
"""
    found = packed(written(tmp_path, space=text + SPACE))
    assert found.needs == ("surely", "wanted") and found.files == ()


def test_a_folder_of_the_name_of_an_installed_package_is_not_meant(tmp_path: Path) -> None:
    written(tmp_path, space="import numpy\nimport parts.one\n" + SPACE, numpy__notes="", parts__one="")
    found = packed(tmp_path)
    assert found.files == ("parts/one.py",) and found.needs == ("numpy",)


def test_a_circle_of_imports_and_an_import_of_itself_end(tmp_path: Path) -> None:
    written(tmp_path, space="import one\n" + SPACE, one="import two, space", two="import one")
    assert packed(tmp_path).files == ("one.py", "two.py")


def test_a_helper_that_does_not_parse_is_named(tmp_path: Path) -> None:
    written(tmp_path, space="import helper\n" + SPACE, helper="def (")
    with pytest.raises(SpaceError, match=r"helper\.py: what a space module imports must be valid Python"):
        packed(tmp_path)
