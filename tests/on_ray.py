"""Executors on Ray for tests: of bodies that are no trials, in any slot, on nodes that see our files or do not."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search.cluster.connecting import Division
from search.cluster.ray_executor import RayExecutor
from search.cluster.sources import Sources
from search.definition.problem import Problem
from search.executors import Job, Slot
from search.executors.local import LocalExecutor

HERE = Path(__file__).resolve().parent


class Anywhere(RayExecutor):
    """Runs every job on an agent, those without a slot in the next free one."""

    @property
    def is_closed(self) -> bool:
        """Whether a test has closed it."""
        return self._closed

    def submit(self, job: Job, slot: Slot | None) -> None:
        """As the protocol says."""
        self._kinds = (job.kind,)
        taken = {job.slot for agent in self._agents for job in agent.running.values()}
        super().submit(job, slot or next(one for one in self.slots if one.index not in taken))


@contextmanager
def on_ray(
    ray: Any,
    folder: Path,
    slots: int = 3,
    division: Division | None = None,
    apart: bool = False,
    secrets: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[Anywhere]:
    """An executor that is ready, for the bodies of ``bodies.py``.

    Args:
        folder: Stands for the workspace.
        apart: Treats nodes as if they saw none of our files.
    """
    how = {"required": (), "preload": (), "entry": "bodies:main", "path": [str(HERE)], "start_method": None} | options
    module = Problem("bodies", str(HERE / "bodies.py"), (HERE / "bodies.py").read_text())
    with LocalExecutor((), log=folder / "template.log", **{**how, "required": (), "secrets": secrets}) as here:
        made = Anywhere(
            here,
            division or Division(1, slots),
            Sources(ray.put, folder, folder, module, apart),
            options=how,
            environ={},
            secrets=secrets or {},
            session=uuid.uuid4().hex[:12],
        )
        with made:
            assert made.wait(120.0)
            yield made
