"""Room on disk: sizes, the reserve, and a launch that has too little of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.errors import RequestError
from search.record import disk
from tests.conftest import Heldout
from tests.tiny import write_space


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0", 0), ("17", 17), ("64M", 64 << 20), ("20G", 20 << 30), ("1.5 GiB", 3 << 29), ("2kb", 2048), ("1T", 1 << 40)],
)
def test_sizes_as_people_write_them(text: str, wanted: int) -> None:
    assert disk.parse_size(text) == wanted


@pytest.mark.parametrize("text", ["", "G", "much", "-1G", "1,5G", "20 X", "1e9", "nan"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(RequestError, match=r"--max-disk must be a size such as 500M or 20G, but got"):
        disk.parse_size(text, "--max-disk")


def test_sizes_for_people() -> None:
    assert [disk.shown(n) for n in (0, 1023, 1024, 3 << 29, 5 << 50)] == [
        *("0 bytes", "1023 bytes", "1.0 KB", "1.5 GB", "5120.0 TB")
    ]


def test_the_size_of_a_folder_counts_files_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "a" / "other").write_bytes(b"x" * 10)
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    link = (tmp_path / "a" / "loop").lstat().st_size
    assert disk.size(tmp_path / "a") == 1010 + link and disk.size(tmp_path / "a" / "other") == 10
    assert disk.size(tmp_path / "nothing") == 0


def test_free_room_is_that_of_the_disk_where_a_folder_is_going_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk.free(tmp_path / "not" / "yet") > 0
    monkeypatch.setenv(disk.MIN_FREE, "0")
    assert disk.reserve() == 0 and not disk.is_full(tmp_path)
    monkeypatch.setenv(disk.MIN_FREE, "1000000T")
    assert disk.is_full(tmp_path)
    monkeypatch.delenv(disk.MIN_FREE)
    assert disk.reserve() == 256 << 20
    monkeypatch.setenv(disk.MIN_FREE, "some")
    with pytest.raises(RequestError, match="HELDOUT_MIN_FREE must be a size"):
        disk.reserve()


def test_a_disk_that_does_not_say_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> int:
        raise OSError("stale file handle")

    monkeypatch.setattr(disk, "free", fail)
    assert not disk.is_full(tmp_path)
    disk.check(tmp_path)


def test_a_launch_without_room_is_refused_and_leaves_nothing(tmp_path: Path, heldout: Heldout) -> None:
    space, workspace = write_space(tmp_path), tmp_path / "ws"
    ran = heldout("launch", space, "--workspace", str(workspace), HELDOUT_MIN_FREE="1000000T")
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1
    assert "1000000.0 TB must be free" in ran.stderr and "HELDOUT_MIN_FREE" in ran.stderr
    assert not workspace.exists()
