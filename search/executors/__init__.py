"""What an executor is: slots, jobs, the events that come back, and the protocol that every executor keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

__all__ = [
    "MEMORY_FRACTION",
    "NO_GPU",
    "Event",
    "Executor",
    "Exited",
    "Job",
    "Lost",
    "Message",
    "Slot",
    "Warned",
    "died",
    "task",
]

# Environment of processes without a GPU, and of jobs without a slot: on the GPUs that they would see they'd take
# memory from the trials. An empty value hides every GPU from CUDA as well, but some launchers drop empty variables.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}
# The variable by which JAX is told its share of a GPU's memory.
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclass(frozen=True)
class Slot:
    """A place where one trial at a time can run.

    Attributes:
        index: Position among the executor's slots.
        threads: CPU threads that belong to it.
        env: Environment variables of the processes that run in it.
        gpus: UUIDs of its GPUs; empty for a CPU slot.
        memory_share: Share of each GPU's memory that a trial may use; None when the GPU is not shared.
        memory_mib: The same in MiB, where the size of the GPU is known; TensorFlow wants it so.
        machine: Names the machine that it is on, where there are several.
    """

    index: int
    threads: int
    env: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    memory_share: float | None = None
    memory_mib: int | None = None
    machine: str = ""

    def to_json(self) -> dict[str, Any]:
        """The slot as a trial process is told of it."""
        out = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return out | {"env": dict(self.env), "gpus": list(self.gpus)}

    def whole(self) -> Slot:
        """The same slot for a trial that has its GPUs to itself: their memory is not shared out."""
        env = {name: value for name, value in self.env.items() if name != MEMORY_FRACTION}
        return dataclasses.replace(self, env=env, memory_share=None, memory_mib=None)


@dataclass(frozen=True)
class Job:
    """One process to be run.

    Attributes:
        id: Unique among the jobs that run; a retry needs an id of its own.
        kind: What the worker is to do.
        payload: JSON for it, at most 64 MiB.
        log: File that gets stdout and stderr, appended; None drops them.
        env: Environment variables, on top of the driver's; the slot's come last.
    """

    id: str
    kind: str
    payload: Mapping[str, Any] = field(default_factory=dict)
    log: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def task(job: Job, slot: Slot | None) -> dict[str, Any]:
    """The job as the worker gets it."""
    return {"id": job.id, "kind": job.kind, "payload": job.payload, "slot": slot.to_json() if slot else None}


@dataclass(frozen=True)
class Message:
    """A running job said something. One that breaks the protocol is made to say that it failed."""

    job: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Exited:
    """A job's process, and its process group, is gone; its slot is free. No event of this job follows.

    Attributes:
        code: Exit status, or None if a signal ended it; signal: that signal, else None.
        seconds: From fork to exit.
        oom: Whether the kernel ended it for want of memory, as far as that can be told.
    """

    job: str
    code: int | None
    signal: int | None
    seconds: float
    oom: bool = False


@dataclass(frozen=True)
class Lost:
    """A job is gone through no fault of its own; its slot is free. No event of this job follows.

    Attributes:
        taken: Whether the machine it ran on was taken away, and not only the processes around it.
    """

    job: str
    taken: bool = False


@dataclass(frozen=True)
class Warned:
    """Something that people should know and that stops nothing; one line."""

    text: str


Event = Message | Exited | Lost | Warned


def died(job: str, text: str) -> Message:
    """What an executor says of a job whose process broke down without saying anything itself."""
    return Message(job, {"type": "failed", "reason": "crash", "message": text, "error": None, "died": True})


class Executor(Protocol):
    """Runs jobs in processes of their own. Used by one thread; events come from ``poll`` only.

    Every job that was submitted ends in exactly one ``Exited`` or ``Lost``, after all of its messages; unless
    ``poll`` raises because no job could begin.
    """

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The places for trials. There may be more or fewer of them whenever they are looked at."""
        ...

    def start(self) -> None:
        """Begin to get ready, without waiting for it."""
        ...

    def submit(self, job: Job, slot: Slot | None) -> None:
        """Run a job; ``None`` for one that needs no slot.

        Raises:
            ExecutorError: If no more processes can be had.
            ValueError: If the slot is taken or a job of that id is running.
        """
        ...

    def poll(self, timeout: float) -> list[Event]:
        """What has happened, oldest first; waits up to ``timeout`` seconds for something to happen.

        Raises:
            ExecutorError: If no more processes can be had, after every event was handed out.
        """
        ...

    def need(self, more: bool) -> None:
        """Say whether more trials could begin if there were more slots; true until it is said.

        While it is not so, an executor that shares its machines with others may give idle ones back.
        """
        ...

    def send(self, job_id: str, body: Mapping[str, Any]) -> None:
        """Send a message to a job; nothing happens if it is gone."""
        ...

    def kill(self, job_id: str) -> None:
        """End a job: asked first, then made to. Its ``Exited`` follows; nothing happens if it is gone."""
        ...

    def cpu_seconds(self, job_id: str) -> float | None:
        """CPU time that the processes of a running job have used so far; None if that is not known."""
        ...

    def has_begun(self, job_id: str) -> bool:
        """Whether the process of a job that was submitted is there, or was."""
        ...

    def close(self) -> None:
        """End every job, all at once, and every process of the executor. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
