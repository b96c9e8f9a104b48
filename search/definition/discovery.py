"""The job that finds a space's parameters, which runs beside the first trial."""

from __future__ import annotations

from typing import Any

from search.errors import SpaceError, request_error
from search.executors import NO_GPU, Event, Executor, Exited, Job, Lost, Message
from search.processes.supervision import Supervisor

_MOST_ATTEMPTS = 3


class Discovery:
    """Runs the ``discover`` job, again if its process dies.

    Args:
        payload: Of the job; None if the space is known already.
    """

    def __init__(self, executor: Executor, supervisor: Supervisor, payload: dict[str, Any] | None) -> None:
        self._executor, self._supervisor, self._payload = executor, supervisor, payload
        self._attempts = 0
        self.is_over = payload is None

    def start(self) -> None:
        """Submit the job, unless the space is known."""
        if self._payload is not None:
            job = Job(f"discover-{self._attempts}", "discover", self._payload, env=NO_GPU)
            self._executor.submit(job, None)
            self._supervisor.began(job.id)
            self._attempts += 1

    def take(self, event: Event) -> dict[str, Any] | None:
        """What an event of the job says: its result, ``space`` and ``complete``, or None.

        Raises:
            RequestError: If the space cannot be built, or its process ended without an answer, three times.
        """
        if isinstance(event, Message) and event.body["type"] == "result":
            self.is_over = True
            return event.body
        if isinstance(event, Message) and event.body["type"] == "failed" and not event.body.get("died"):
            raise request_error(event.body.get("error"), event.body["message"])
        if isinstance(event, Exited | Lost) and not self.is_over:
            if self._attempts < _MOST_ATTEMPTS and (isinstance(event, Lost) or event.signal is not None):
                self.start()
                return None
            raise SpaceError(
                "the process that builds the space to discover its parameters ended without an answer; run "
                "`heldout check` with --debug"
            )
        return None
