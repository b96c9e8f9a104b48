"""What the processes of a job have used: CPU time, memory, and whether the kernel ran out of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

_PROC = Path("/proc")


def cpu_seconds(leader: int) -> float | None:
    """CPU time of all processes of the session that ``leader`` leads, ended children included; None if unknown."""
    if not (_PROC / "self" / "stat").exists():
        return _by_ps(leader)
    ticks, found = 0, False
    for entry in os.scandir(_PROC):
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may end while we look
            # What follows the name, which may have blanks and parentheses in it: state, ppid, pgrp, session, ….
            fields = (_PROC / entry.name / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                found = True
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK") if found else None


def _by_ps(leader: int) -> float | None:
    """The same of a process group, where there is no /proc (macOS)."""
    try:
        shown = subprocess.run(
            ["ps", "-A", "-o", "pgid=,time="], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    times = [line.split()[1] for line in shown.splitlines() if line.split()[:1] == [str(leader)]]
    return sum(map(_seconds, times)) if times else None


def _seconds(shown: str) -> float:
    """Of ps' ``[[dd-]hh:]mm:ss[.cc]``."""
    days, _, clock = shown.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part)
    return total + 86400 * int(days or 0)


def memory() -> tuple[int, int] | None:
    """The most memory that this process has had so far, in bytes; None if the system does not say (not Linux).

    Returns:
        What it had for itself, and what it shares with the process it was forked from, which is paid for once.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        status = _kilobytes(_PROC / "self" / "status")
        rollup = _kilobytes(_PROC / "self" / "smaps_rollup")
        own = rollup["Private_Dirty"] + rollup.get("Swap", 0)
        # What is mapped from files can be dropped by the kernel at any time.
        shared = rollup["Anonymous"] + rollup.get("Swap", 0) - own
        return (own + max(0, status["VmHWM"] - status["VmRSS"])) << 10, max(0, shared) << 10
    return None


def _kilobytes(file: Path) -> dict[str, int]:
    """Lines such as ``VmHWM:  371000 kB``."""
    words = [line.split() for line in file.read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) for line in words if line[2:] == ["kB"]}


def oom_kills() -> int | None:
    """How many processes the kernel has ended so far for want of memory; None if it does not say (not Linux)."""
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROC / "vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None
