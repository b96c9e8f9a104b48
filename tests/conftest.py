"""What every test shares: a ledger and a workspace of its own, and quiet libraries."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search import secrecy

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script: what tests start would be deaf to Ctrl-C as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

Heldout = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own ledger, workspace or tracking server."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setenv("HELDOUT_LEDGER", str(folder / "ledger.jsonl"))
    monkeypatch.setenv("HELDOUT_CACHE", str(folder / "cache"))
    monkeypatch.setenv("HELDOUT_WORKSPACE", str(folder / "workspace"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, empty in (("_known", {}), ("_values", {}), ("_texts", None)):  # secrets of other tests
        monkeypatch.setattr(secrecy, name, empty)
    return folder


def run_heldout(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "search.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
    )


@pytest.fixture
def heldout() -> Heldout:
    """The command line, as ``heldout(*arguments, **environment)``."""
    return run_heldout


@pytest.fixture(scope="session")
def private_ray() -> Iterator[Any]:
    """A Ray of the tests' own, with room for six slots; started once, since that takes a while."""
    from search.cluster.connecting import LOCAL, connected

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        yield stack.enter_context(connected(os.environ.get("HELDOUT_TEST_RAY", LOCAL), 6))
        warnings.simplefilter("ignore", ResourceWarning)  # Ray lets go of its processes while they end
        stack.close()
        gc.collect()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Any]:
    """A PostgreSQL of the module's own, with the databases and roles of a service; a ``tests.team.Team``."""
    from tests.team import database

    with database() as found:
        yield found
