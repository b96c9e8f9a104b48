"""What a sanity check found: as JSON, and in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Finding = dict[str, Any]


def finding(check: str, passed: bool | None, says: str, cause: tuple[str, str] | None = None) -> Finding:
    """One check as JSON.

    Args:
        passed: None where it could not be made, and ``says`` why.
        cause: Of a failure: what is likely wrong, and what to change.
    """
    why, fix = cause or (None, None)
    return {"check": check, "passed": passed, "says": says, "cause": why, "fix": fix}


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Findings in plain words, a line each, and two more for what failed."""
    out = ["sanity:"]
    for one in found:
        state = {True: "ok", False: "FAILED", None: "not checked"}[one["passed"]]
        out.append(f"    {state:12}{one['check']}: {one['says']}")
        if one["cause"]:
            out += [f"{'':16}likely cause: {one['cause']}", f"{'':16}change: {one['fix']}"]
    return out


def failed(found: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any check failed; one that could not be made has not."""
    return any(one["passed"] is False for one in found)
