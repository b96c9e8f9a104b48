"""Names that people give, and that modules make up: none leads out of the workspace."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search.errors import RequestError, StudyError
from search.export import export
from search.record.journal import Journal
from search.record.lock import locked
from search.record.reserving import clear, never_began, reserve
from search.study import Study, check_name, make_workspace, names
from search.tracker.runs import Names
from tests.conftest import Heldout

ODD = st.text(st.sampled_from("./\\~:@%- _a0\n\0é")) | st.text()


@given(name=ODD)
@example(name="..")
@example(name="a/../../b")
@example(name="a\n")
@example(name="...")
def test_a_name_is_refused_or_is_that_of_a_folder_in_the_workspace(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder).resolve() / "ws"
        make_workspace(workspace)
        before = sorted(Path(folder).resolve().rglob("*"))
        try:
            made = reserve(workspace, name, "space")
        except StudyError:
            assert sorted(Path(folder).resolve().rglob("*")) == before
            with pytest.raises(StudyError):
                Study(name, workspace)
        else:
            assert made.resolve().parent == workspace / "studies" and made.name == name == check_name(name)


@given(space=ODD)
@example(space="../../x")
@example(space="..")
def test_a_study_named_for_its_space_lies_in_the_workspace(space: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder).resolve()
        make_workspace(workspace)
        made = reserve(workspace, None, space)
        assert made.resolve().parent == workspace / "studies" and check_name(made.name)


@given(given=st.lists(ODD, max_size=6))
def test_names_for_mlflow_are_no_paths_out_of_its_folder(given: list[str]) -> None:
    known = Names()
    root = Path("/store/artifacts")
    for name in given:
        # What the filesystem makes of it, without the filesystem.
        parts = (root / known.of(name)).parts
        assert parts[: len(root.parts)] == root.parts and len(parts) > len(root.parts) and ".." not in parts


@pytest.mark.parametrize("name", ["../escape", "a/b", "models:/x", "champion@x", "", ".", "x" * 200, "a b\n"])
def test_a_models_name_is_refused_before_anything_is_built(recorded: Path, name: str) -> None:
    with pytest.raises(RequestError, match="a model's name must be letters, digits"):
        export(Study("s", recorded), recorded / "out", register=name)
    assert not (recorded / "out").exists()


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    folder = tmp_path / "ws" / "studies" / "s"
    folder.mkdir(parents=True)
    Journal.create(folder / "journal.sqlite", {"state": "COMPLETE"}).close()
    return tmp_path / "ws"


def test_a_link_in_the_place_of_a_study_is_not_followed(recorded: Path) -> None:
    elsewhere = recorded.parent / "elsewhere"
    (recorded / "studies" / "s").rename(elsewhere)
    (recorded / "studies" / "s").symlink_to(elsewhere)
    with pytest.raises(StudyError, match="must lie in its workspace, but .* is a link; move the whole workspace"):
        Study("s", recorded)
    assert names(recorded) == []
    with pytest.raises(StudyError, match="there is a study called 's' already"):
        reserve(recorded, "s", "space")


@pytest.mark.parametrize("left", ["nothing", "locks", "rows", "journal", "study"])
def test_what_a_launch_left_before_its_study_began_is_taken_over(recorded: Path, left: str) -> None:
    """As a launch is killed between any two of its steps."""
    folder = recorded / "studies" / "early"
    folder.mkdir()
    if left != "nothing":
        with locked(folder):
            pass
    if left in ("rows", "journal", "study"):
        (folder / "logs").mkdir()
        (folder / "preprocess.keras").write_bytes(b"half")
    if left in ("journal", "study"):
        Journal.create(folder / "journal.sqlite", {"study": {"name": "early"}} if left == "study" else {}).close()
    assert never_began(folder) and reserve(recorded, "early", "space") == folder
    with locked(folder):
        clear(folder)
    assert {path.name for path in folder.iterdir()} == {"lock", "processes.lock"}
    Journal.create(folder / "journal.sqlite", {"study": {"name": "early"}, "state": "RUNNING"}).close()
    with pytest.raises(StudyError, match="there is a study called 'early' already; continue it with `heldout resume"):
        clear(folder)


def test_a_folder_of_somebody_elses_is_not_taken_over(recorded: Path) -> None:
    theirs = recorded / "studies" / "mine"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("x")
    with pytest.raises(StudyError, match="there is a study called 'mine' already"):
        reserve(recorded, "mine", "space")
    assert (theirs / "thesis.txt").exists()


def test_a_study_that_is_being_launched_is_not_taken_from_its_driver(
    recorded: Path, heldout: Heldout
) -> None:
    folder = recorded / "studies" / "early"
    folder.mkdir()
    with locked(folder):
        (folder / "preprocess.keras").write_bytes(b"half")
        ran = heldout("launch", "digits_mlp", "--study", "early", "--workspace", str(recorded))
        assert ran.returncode == 2 and "is being driven already" in ran.stderr, ran.stderr
        assert (folder / "preprocess.keras").exists()


def test_a_workspace_may_be_a_link(recorded: Path) -> None:
    (recorded.parent / "link").symlink_to(recorded)
    assert Study("s", recorded.parent / "link").name == "s" and names(recorded.parent / "link") == ["s"]


@pytest.mark.parametrize("words", [("show", "../s", "0"), ("status", "../s"), ("report", "/etc"), ("resume", "..")])
def test_commands_refuse_paths_as_names(recorded: Path, heldout: Heldout, words: tuple[str, ...]) -> None:
    ran = heldout(*words, "--workspace", str(recorded))
    assert ran.returncode == 2 and "a study's name must be letters" in ran.stderr, ran.stderr
