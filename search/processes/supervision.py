"""Which running jobs have to be ended: those that take too long, and those that hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# Less CPU time than this share is what threads use that only wait: they look around now and then.
_IDLE_SHARE = 0.001
_STOOD_STILL = 5.0  # seconds without a question after which the machine or the driver was stopped meanwhile
_LOOKS = 10  # at a silent job, within the time after which it counts as hung


@dataclass
class _Watched:
    began: float
    heard: float  # when it last gave a sign of life
    looked: float
    cpu: float | None = None
    timeout: float | None = None
    has_begun: bool = False


class Supervisor:
    """Watches over jobs that run. Time is monotonic and injected.

    A job hangs when, for ``heartbeat`` seconds, it has said nothing and its processes have used no CPU time. So
    compiling, a fold or a custom fit that reports nothing is no hang.

    Args:
        timeout: Seconds that a trial's attempt may take, or None.
        heartbeat: Seconds without a sign of life after which a job hangs; None for never.
        cpu_seconds: CPU time that a job's processes have used so far, None if that is unknown.
        has_begun: Whether a job's process is there; until then it waits for others, and its time does not run.
    """

    def __init__(
        self,
        timeout: float | None,
        heartbeat: float | None,
        cpu_seconds: Callable[[str], float | None],
        clock: Callable[[], float] = time.monotonic,
        has_begun: Callable[[str], bool] = lambda job: True,
    ) -> None:
        self._timeout, self._heartbeat = timeout, heartbeat
        self._cpu_seconds, self._clock, self._has_begun = cpu_seconds, clock, has_begun
        self._asked = clock()
        self._watched: dict[str, _Watched] = {}

    def began(self, job: str, timed: bool = False) -> None:
        """A job was submitted; ``timed`` if the timeout of trials holds for it."""
        now = self._clock()
        self._watched[job] = _Watched(now, now, now, timeout=self._timeout if timed else None)

    def heard(self, job: str) -> None:
        """A job said something."""
        if job in self._watched:
            self._watched[job].heard = self._watched[job].looked = self._clock()

    def ended(self, job: str) -> None:
        """A job is gone; nothing happens if it was not watched."""
        self._watched.pop(job, None)

    def paused(self, seconds: float) -> None:
        """The driver itself stood still for so long and heard nobody; that is not the jobs' fault."""
        self._asked = self._clock()
        for job in self._watched.values():
            job.began, job.heard, job.looked = job.began + seconds, job.heard + seconds, job.looked + seconds

    def overdue(self) -> list[tuple[str, str]]:
        """Jobs to be ended now, each with why; they are watched no longer."""
        now = self._clock()
        if now - self._asked > _STOOD_STILL:  # asked several times a second, unless we were stopped and go on now
            self.paused(now - self._asked)
        self._asked = now
        found = []
        for name, job in self._watched.items():
            if not job.has_begun and not self._has_begun(name):
                job.began = job.heard = job.looked = now
                continue
            job.has_begun = True
            if job.timeout is not None and now - job.began >= job.timeout:
                found.append((name, f"it took longer than --trial-timeout {job.timeout:g} s and was ended"))
            elif self._hangs(name, job, now):
                silent = f"for {now - job.heard:.0f} s it reported nothing and used no CPU time"
                found.append((name, f"{silent}, so it was taken to hang and was ended (see --heartbeat)"))
        for name, _ in found:
            del self._watched[name]
        return found

    def _hangs(self, name: str, job: _Watched, now: float) -> bool:
        if self._heartbeat is None or now - job.looked < self._heartbeat / _LOOKS:
            return False
        cpu, since = self._cpu_seconds(name), now - job.looked
        # A total can also fall, when a process that was counted is gone: that is life as well.
        if cpu is None or job.cpu is None or abs(cpu - job.cpu) > _IDLE_SHARE * since:
            job.heard = now
        job.cpu, job.looked = cpu, now
        return now - job.heard >= self._heartbeat
