"""What a trial-side process says of a job that failed: by its kind, in one line."""

from __future__ import annotations

from typing import Any

from search.definition.problem import first_line
from search.errors import RequestError, TrialFailed


class Told(Exception):
    """A failure of which the message is there already, from the process of one training.

    Attributes:
        body: The ``failed`` message.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["message"])
        self.body = body


def broken(text: str) -> dict[str, Any]:
    """The ``failed`` message of a process that ended without a word, as any may; another attempt can help."""
    return {"type": "failed", "reason": "crash", "message": text, "error": None, "died": True}


def told(error: BaseException, has_gpus: bool) -> dict[str, Any]:
    """The ``failed`` message of a job that raised this.

    Args:
        has_gpus: Whether its slot has GPUs, whose memory it is then that a backend says ran out.
    """
    if isinstance(error, Told):
        return error.body
    kind = type(error).__name__
    if (lacking := _out_of_memory(error)) is not None:
        on_host = isinstance(lacking, MemoryError) or not has_gpus
        message = f"{type(lacking).__name__}: {first_line(lacking)}"
        return {"type": "failed", "reason": "oom", "message": message, "error": None, "on_host": on_host}
    if isinstance(error, TrialFailed):
        return {"type": "failed", "reason": error.reason, "message": error.message, "error": None}
    if isinstance(error, RequestError):
        return {"type": "failed", "reason": "invalid", "message": str(error), "error": kind}
    return {"type": "failed", "reason": "crash", "message": f"{kind}: {first_line(error)}", "error": None}


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error, or what caused it, by which Python or a backend says that memory ran out; None if neither does."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # TensorFlow's and torch's by their names; JAX has one class for everything, and the word in its text.
        named = type(error).__name__ in ("ResourceExhaustedError", "OutOfMemoryError")
        if isinstance(error, MemoryError) or named or str(error).startswith("RESOURCE_EXHAUSTED"):
            return error
        error = error.__cause__
    return None
