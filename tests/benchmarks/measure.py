"""What the benchmarks share: running commands by the clock, resident memory, and tables of medians."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent.parent
SPACE = ROOT / "spaces" / "digits_mlp.py"

# What the `heldout` script does; needs no installation of the checkout, only its dependencies.
HELDOUT = (sys.executable, "-c", "import sys; from search.cli import main; sys.exit(main())")


@dataclass(frozen=True)
class Run:
    """A finished command.

    Attributes:
        began: Seconds since the Unix epoch.
        seconds: Wall clock, from before the process existed until it was gone.
    """

    began: float
    seconds: float
    stdout: str


def environment(scratch: Path) -> dict[str, str]:
    """The caller's environment, with everything that heldout writes under `scratch`."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {
        "HELDOUT_WORKSPACE": str(scratch / "workspace"),
        "HELDOUT_LEDGER": str(scratch / "ledger.jsonl"),
        "PYTHONPATH": path,
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    # Imports without stored bytecode take twice as long, and nobody runs a search like that.
    left_out = {"PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI"}
    return {key: value for key, value in os.environ.items() if key not in left_out} | own


def run(command: Sequence[str], scratch: Path, **extra: str) -> Run:
    """Run a command in `scratch` and time it as a whole process.

    Raises:
        RuntimeError: If it failed; a benchmark of something that fails measures nothing.
    """
    began, clock = time.time(), time.perf_counter()
    env = environment(scratch) | extra
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - clock
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Run(began, seconds, done.stdout)


def resident(pid: int) -> float:
    """Resident memory of a process in MB (10⁶ bytes); Linux only."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def children(pid: int) -> dict[int, str]:
    """Process numbers of the direct children and their command lines; Linux only."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            except FileNotFoundError:
                continue  # ended meanwhile
            found[int(child)] = b" ".join(words).decode(errors="replace")
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the range where there is one."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def setting(notes: Mapping[str, object]) -> None:
    """Print what a reader needs to know to compare: the machine, the versions, and `notes`."""
    names = ("keras", "tensorflow", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"Python {platform.python_version()}, {versions}")
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{cores()} cores, load averages before: {load}; measure on a quiet machine")
    for key, value in notes.items():
        print(f"{key}: {value}")
