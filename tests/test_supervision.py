"""What takes too long and what hangs, by a clock of our own; CPU time of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from search.processes.supervision import Supervisor
from search.processes.usage import _seconds, cpu_seconds, oom_kills

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class World:
    """A clock, and CPU time that a job uses while the clock goes on."""

    def __init__(self) -> None:
        self.now, self.cpu = 0.0, {"a": 0.0, "b": 0.0}
        self.known = True

    def supervisor(self, timeout: float | None = None, heartbeat: float | None = None) -> Supervisor:
        return Supervisor(timeout, heartbeat, lambda job: self.cpu[job] if self.known else None, lambda: self.now)

    def run(self, supervisor: Supervisor, seconds: int, share: float = 0.0) -> list[tuple[float, str]]:
        """Overdue jobs by the time at which they were found."""
        found = []
        for _ in range(seconds):
            self.now += 1.0
            self.cpu["a"] += share
            found += [(self.now, why) for job, why in supervisor.overdue() if job == "a"]
        return found


def test_a_trial_ends_after_its_timeout_however_lively_it_is() -> None:
    world = World()
    supervisor = world.supervisor(timeout=100.0)
    supervisor.began("a", timed=True)
    supervisor.heard("a")
    ((at, why),) = world.run(supervisor, 300, share=1.0)
    assert at == 100.0 and "--trial-timeout 100 s" in why


def test_a_job_that_is_no_trial_has_no_timeout() -> None:
    world = World()
    supervisor = world.supervisor(timeout=10.0)
    supervisor.began("a")
    assert world.run(supervisor, 100, share=1.0) == []


def test_silent_and_idle_is_a_hang() -> None:
    world = World()
    supervisor = world.supervisor(heartbeat=60.0)
    supervisor.began("a", timed=True)
    world.run(supervisor, 30)
    supervisor.heard("a")
    ((at, why),) = world.run(supervisor, 300)
    assert 90.0 <= at <= 100.0 and "used no CPU time" in why


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_silent_but_at_work_is_no_hang(share: float) -> None:
    world = World()
    supervisor = world.supervisor(heartbeat=60.0)
    supervisor.began("a", timed=True)
    assert world.run(supervisor, 1000, share=share) == []
    ((at, _),) = world.run(supervisor, 200)  # and then it stands still
    assert 1060.0 <= at <= 1072.0


def test_the_little_that_waiting_threads_use_is_no_sign_of_life() -> None:
    world = World()
    supervisor = world.supervisor(heartbeat=600.0)
    supervisor.began("a", timed=True)
    assert len(world.run(supervisor, 1000, share=0.0005)) == 1


def test_a_job_whose_cpu_time_is_not_known_is_not_taken_to_hang() -> None:
    world = World()
    world.known = False
    supervisor = world.supervisor(heartbeat=60.0)
    supervisor.began("a", timed=True)
    assert world.run(supervisor, 1000) == []


def test_time_in_which_the_driver_heard_nobody_does_not_count() -> None:
    world = World()
    supervisor = world.supervisor(timeout=100.0, heartbeat=60.0)
    supervisor.began("a", timed=True)
    world.now += 500.0
    supervisor.paused(500.0)
    assert world.run(supervisor, 59) == []
    assert world.run(supervisor, 20) != []


def test_what_stood_still_together_with_the_driver_does_not_hang() -> None:
    """As after Ctrl-Z and fg, or when the machine slept: nobody used CPU time, and nobody could be heard."""
    world = World()
    supervisor = world.supervisor(timeout=2000.0, heartbeat=600.0)
    supervisor.began("a", timed=True)
    assert world.run(supervisor, 30, share=1.0) == []
    world.now += 9000.0
    assert world.run(supervisor, 500, share=0.01) == []


def test_a_first_look_that_comes_late_is_no_hang() -> None:
    world = World()
    supervisor = world.supervisor(heartbeat=600.0)
    supervisor.began("a", timed=True)
    world.now, world.cpu["a"] = 700.0, 700.0
    assert supervisor.overdue() == []


def test_the_time_before_its_process_is_there_is_not_the_jobs() -> None:
    world, there = World(), [False]
    supervisor = Supervisor(10.0, 60.0, lambda job: 0.0, lambda: world.now, lambda job: there[0])
    supervisor.began("a", timed=True)
    assert world.run(supervisor, 50) == []
    there[0] = True
    ((at, _),) = world.run(supervisor, 20)
    assert at == 60.0


def test_an_ended_job_is_watched_no_longer() -> None:
    world = World()
    supervisor = world.supervisor(timeout=10.0)
    supervisor.began("a", timed=True)
    supervisor.ended("a")
    supervisor.ended("never seen")
    assert world.run(supervisor, 100) == []


@linux
def test_cpu_time_of_a_session_counts_its_children_and_tells_work_from_waiting() -> None:
    spin = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with (
        subprocess.Popen([sys.executable, "-c", spin], start_new_session=True) as busy,
        subprocess.Popen(["sleep", "60"], start_new_session=True) as idle,
    ):
        try:
            until = time.monotonic() + 60
            while (cpu_seconds(busy.pid) or 0.0) < 0.5 and time.monotonic() < until:
                time.sleep(0.05)
            assert (cpu_seconds(busy.pid) or 0.0) >= 0.5
            assert cpu_seconds(idle.pid) is not None and (cpu_seconds(idle.pid) or 0.0) < 0.1
        finally:
            os.killpg(busy.pid, signal.SIGKILL)
            idle.kill()
    assert cpu_seconds(1 << 30) is None  # above every process number


def test_times_as_ps_prints_them() -> None:
    assert [_seconds(text) for text in ("00:01", "1:02:03", "2-00:00:10", "0:00.25")] == [1.0, 3723.0, 172810.0, 0.25]


@linux
def test_the_kernel_says_how_often_it_ran_out_of_memory() -> None:
    assert oom_kills() is not None
