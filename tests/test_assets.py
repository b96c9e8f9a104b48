"""What a module needs beside its rows: made once, known by its digest, put back when gone, refused when changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from search import Study, cache_folder
from search.definition import assets
from search.definition.problem import SpaceModule, find
from search.errors import DataError, RequestError, SpaceError
from search.harness import worker
from tests.conftest import Heldout
from tests.tiny import write_space

WORDS = """
from search import cache_folder

WORDS = cache_folder("words") / "words.txt"
assets = [WORDS]


def prepare():
    with open(WORDS.with_name("prepared"), "a") as file:
        file.write("once ")
    if not WORDS.exists():
        WORDS.write_text("yes no")


def callbacks(hp):
    print("READ", WORDS.read_text())
    return []
"""


def module(folder: Path, rest: str) -> SpaceModule:
    return SpaceModule(find(write_space(folder, "tiny", rest=rest)))


def test_the_cache_folder_is_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELDOUT_CACHE", str(tmp_path / "cache"))
    assert cache_folder("words") == cache_folder("words") == tmp_path / "cache" / "words"
    assert cache_folder("words").is_dir()
    for wrong in ("", "a/b", "..", ".hidden"):
        with pytest.raises(RequestError, match="plain name"):
            cache_folder(wrong)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HELDOUT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match="set HELDOUT_CACHE"):
        cache_folder("words")
    monkeypatch.delenv("HELDOUT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(cache_folder("words")).startswith(str(tmp_path))


def test_prepare_runs_before_assets_are_recorded(tmp_path: Path) -> None:
    (asset,) = assets.made(module(tmp_path, WORDS))
    path = Path(asset["path"])
    assert path.read_text() == "yes no" and asset["bytes"] == 6
    assert json.loads(json.dumps(asset)) == asset
    assets.check([asset])
    os.utime(path, (1, 1))  # another time of change is no other content
    assets.check([asset])
    assert assets.changed([asset]) == []
    path.write_text("no yes")
    assert assets.changed([asset]) == [str(path)]
    with pytest.raises(DataError, match=r"words\.txt must be as the study recorded it, but was changed"):
        assets.check([asset])
    path.unlink()
    assert assets.changed([asset]) == []
    with pytest.raises(DataError, match=r"words\.txt cannot be read"):
        assets.check([asset])


def test_a_folder_is_an_asset_by_its_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "tokeniser"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("1")
    (folder / "deep" / "b").write_text("2")
    before = assets.digest(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert assets.digest(tmp_path / "copy") == before
    (folder / "deep" / "b").rename(folder / "b")
    assert assets.digest(folder) != before
    (tmp_path / "copy" / "a").write_text("12")
    (tmp_path / "copy" / "deep" / "b").write_text("")
    assert assets.digest(tmp_path / "copy") != before


def test_copies_put_back_what_is_gone_and_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("one")
    folder.mkdir()
    (folder / "two").write_text("two")
    known = [
        {"path": str(path), "digest": assets.digest(path), "bytes": 3, "stamp": assets._stamp(path)}
        for path in (file, folder)
    ]
    for _ in range(2):
        assets.keep(known, tmp_path / "study")
    file.write_text("changed")
    shutil.rmtree(folder)
    assets.restore(known, tmp_path / "study")
    assert file.read_text() == "changed" and (folder / "two").read_text() == "two"
    assets.check(known[1:])
    shipped = assets.ship(known, tmp_path / "study", tmp_path)
    assert [asset["file"] for asset in shipped] == ["assets/file", "assets/folder"]
    assert (tmp_path / "assets" / "file").read_text() == "one"
    assert not list(tmp_path.rglob(".tmp*"))
    assert "`assets/file`" in assets.lines(shipped)[1] and assets.lines([]) == []


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("assets = ['/nowhere/backbone']", ["/nowhere/backbone cannot be read", "let prepare() make it"]),
        ("assets = '/nowhere/backbone'", ["must be a list of paths"]),
        ("assets = [3]", ["must be a list of paths"]),
        ("prepare = 3", ["prepare must be a function"]),
        ("decode = 3", ["decode must be a function"]),
        ("def prepare():\n    raise OSError('no network')", ["tiny.py:", "prepare() raised OSError: no network"]),
    ],
)
def test_assets_that_are_none_get_one_line(tmp_path: Path, rest: str, words: list[str]) -> None:
    with pytest.raises(SpaceError) as caught:
        assets.made(module(tmp_path, rest))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_module_without_assets_has_none(tmp_path: Path) -> None:
    asked = {"problem": find(write_space(tmp_path)).to_json(), "workspace": str(tmp_path), "folder": str(tmp_path)}
    found = worker.load({**asked, "split_seed": 0, "budget": 1 << 30}, lambda body: None)
    assert found["assets"] == []
    assert "heldout" not in os.listdir(tmp_path)


def test_what_prepare_imports_is_not_preloaded(tmp_path: Path) -> None:
    path = write_space(tmp_path, rest="def prepare():\n    import sklearn.datasets")
    assert "sklearn.datasets" not in find(path).imports()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_assets_of_a_study_from_launch_to_export(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path, rest=WORDS)
    where = ("--workspace", str(tmp_path / "ws"))
    asked = ("--trials", "2", "--confirm", "0", "--evaluate", "no", "--study", "s")
    ran = heldout("launch", space, *asked, *where)
    assert ran.returncode == 0, ran.stderr
    words = cache_folder("words") / "words.txt"
    assert words.with_name("prepared").read_text() == "once "
    study = Study("s", tmp_path / "ws")
    (known,) = study.meta("prepared")["assets"]
    assert known["path"] == str(words)
    assert "READ yes no" in (study.folder / "trials" / "0001" / "log.txt").read_text()

    words.write_text("no yes")
    refused = heldout("resume", "s", "--trials", "+1", *where)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "words.txt was changed" in refused.stderr and "--accept-changes" in refused.stderr

    shutil.rmtree(words.parent)  # as a cache may be cleared
    resumed = heldout("resume", "s", "--trials", "+1", *where)
    assert resumed.returncode == 0, resumed.stderr
    assert words.read_text() == "yes no" and len(study.trials) == 3
    assert not words.with_name("prepared").exists()  # put back, not prepared again

    words.write_text("no yes")
    accepted = heldout("resume", "s", "--trials", "+1", "--accept-changes", *where)
    assert accepted.returncode == 0, accepted.stderr
    assert "an asset of the space module has changed" in accepted.stderr
    assert study.meta("prepared")["assets"][0]["digest"] != known["digest"]
    assert "READ no yes" in (study.folder / "trials" / "0003" / "log.txt").read_text()

    out = heldout("export", "s", "--out", str(tmp_path / "best"), *where)
    assert out.returncode == 0, out.stderr
    assert (tmp_path / "best" / "assets" / "words.txt").read_text() == "no yes"
    lineage = json.loads((tmp_path / "best" / "lineage.json").read_text())
    assert lineage["assets"][0]["file"] == "assets/words.txt"
