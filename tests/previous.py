"""What the release before this one wrote (see tests/data/previous/README.md), unpacked where it was not written."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

PACKED = Path(__file__).resolve().parent / "data" / "previous" / "workspace.tar.gz"


@dataclass
class Previous:
    """The unpacked files; the journals in them name a folder that is not there."""

    folder: Path

    @property
    def workspace(self) -> Path:
        """With the studies ``complete`` and ``interrupted``."""
        return self.folder / "workspace"

    @property
    def ledger(self) -> Path:
        """With one opening of their test rows."""
        return self.folder / "ledger.jsonl"


def unpack(folder: Path) -> Previous:
    """Everything, into an empty or new folder."""
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    (folder / "workspace" / "sealed").chmod(0o700)
    return Previous(folder)
