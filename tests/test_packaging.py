"""What is installed: the wheel's contents, the pins, and that the shipped spaces are found in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from search.definition.starting import KINDS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SPACES = sorted(path.stem for path in (ROOT / "spaces").glob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The build backend without pip around it: no build environment, so no package index either.
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_site_packages_get_one_package(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"search"}


def test_everything_that_runs_is_in_the_wheel(wheel: Path) -> None:
    inside = {name for name in names(wheel) if name.startswith("search/")}
    engine = {path.relative_to(ROOT).as_posix() for path in (ROOT / "search").rglob("*.py")}
    shipped = {f"search/shipped/{path.relative_to(ROOT / 'spaces')}" for path in (ROOT / "spaces").rglob("*.py")}
    assert inside == engine | shipped | {"search/py.typed"}
    assert {f"search/shipped/starting/{kind}.py" for kind in KINDS} <= inside
    assert "search/shipped/digits_mlp.py" in inside


def test_an_installed_space_is_found_by_its_short_name(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import search.definition.problem as p, search; print(p.find('digits_mlp').path); print(*p.shipped())"
    code += "; print(search.init('mine', 'text'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, shipped, written = done.stdout.splitlines()
    assert (tmp_path / written).read_text().startswith('"""Short texts')
    assert Path(path) == (site / "search" / "shipped" / "digits_mlp.py").resolve()
    assert shipped.split() == SPACES


def test_pins_are_names_and_versions_and_cover_what_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", line), (
                f"not a name and a version: {line!r}"
            )
            pins[normal(line.split("==")[0])] = line
    asked = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    missing = {name for name in map(normal, asked) if name not in pins}
    assert not missing, f"constraints.txt must pin what pyproject.toml asks for, but lacks {missing}"


def normal(requirement: str) -> str:
    """The requirement's name as package indexes compare it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()
