"""An executor without processes: a job runs in the driver, to its end, while it is submitted.

For tests of the driver and for measuring what the driver itself costs.
"""

from __future__ import annotations

import inspect
import json
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from search.executors import Event, Exited, Job, Message, Slot, task

Send = Callable[[Mapping[str, Any]], None]


class InlineExecutor:
    """Runs ``function(job, send)`` at submit.

    Args:
        function: Gets the job as the worker would, ``{"id", "kind", "payload", "slot"}``, and a function that
            sends a message. An exception makes the job exit with 1 and goes to the job's log. A generator function
            waits for the driver where it yields, and is given what ``send`` sends.
        slots: Where trials run; one by default.
    """

    def __init__(self, function: Callable[[dict[str, Any], Send], Any], slots: Sequence[Slot] = (Slot(0, 1),)) -> None:
        self._function = function
        self._slots = tuple(slots)
        self._busy: dict[str, Slot | None] = {}
        self._events: deque[Event] = deque()
        self._waiting: dict[str, tuple[Job, float, Any]] = {}  # when each began, and the rest of it

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The places for trials."""
        return self._slots

    def start(self) -> None:
        """Nothing needs to get ready."""

    def submit(self, job: Job, slot: Slot | None) -> None:
        """Run the job to its end; its events wait for ``poll``.

        Raises:
            ValueError: If the slot is taken or a job of that id has not been polled to its end.
        """
        if job.id in self._busy or (slot is not None and slot in self._busy.values()):
            raise ValueError(f"job {job.id} must have an id and a slot of its own, but one of them is in use")
        order = json.loads(json.dumps(task(job, slot)))
        self._busy[job.id] = slot

        def send(body: Mapping[str, Any]) -> None:
            # Through JSON, as a process would send it, so that a test cannot pass with what JSON cannot hold.
            self._events.append(Message(job.id, json.loads(json.dumps(body))))

        def begin() -> Any:
            rest = self._function(order, send)
            if inspect.isgenerator(rest):
                next(rest)
            return rest

        self._run(job, time.monotonic(), begin)

    def _run(self, job: Job, began: float, step: Callable[[], Any]) -> None:
        """Run the job to its end, or to where it waits; ``step`` returns what is left of it then."""
        code = 0
        try:
            rest = step()
            if inspect.isgenerator(rest):
                self._waiting[job.id] = job, began, rest
                return
        except StopIteration:
            pass
        except Exception:
            code = 1
            if job.log is not None:
                with open(job.log, "a", encoding="utf-8") as log:
                    traceback.print_exc(file=log)
        self._events.append(Exited(job.id, code, None, time.monotonic() - began))

    def poll(self, timeout: float) -> list[Event]:
        """Everything that has happened; never waits, for nothing can happen meanwhile."""
        events = list(self._events)
        self._events.clear()
        for event in events:
            if isinstance(event, Exited):
                self._busy.pop(event.job, None)
        return events

    def need(self, more: bool) -> None:
        """Nothing: its slots are this machine's and stay."""

    def send(self, job_id: str, body: Mapping[str, Any]) -> None:
        """Let a job that waits go on with this message; nothing happens to one that has ended."""
        if job_id in self._waiting:
            job, began, rest = self._waiting.pop(job_id)
            said = json.loads(json.dumps(body))

            def step() -> Any:
                rest.send(said)
                return rest

            self._run(job, began, step)

    def kill(self, job_id: str) -> None:
        """End a job that waits; nothing happens to one that has ended."""
        if job_id in self._waiting:
            _, began, rest = self._waiting.pop(job_id)
            rest.close()
            self._events.append(Exited(job_id, None, signal.SIGTERM, time.monotonic() - began))

    def cpu_seconds(self, job_id: str) -> float | None:
        """Not known: there is no process."""
        return None

    def has_begun(self, job_id: str) -> bool:
        """It has even ended."""
        return True

    def close(self) -> None:
        """Forget what was not polled."""
        self._events.clear()
        self._busy.clear()
        self._waiting.clear()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
