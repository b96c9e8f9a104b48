"""Spreading a study over a Ray cluster: connecting, and the executor that its trials run with."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from search import secrecy
from search.cluster.connecting import LOCAL, connected, divided
from search.definition.problem import Problem
from search.errors import ExecutorError, RequestError
from search.executors import Executor
from search.executors.local import LocalExecutor
from search.loop.watcher import Watcher
from search.processes import jobs
from search.study import StudyConfig

_SECONDS = 60.0  # to wait for the first agent
# What our environment says to Keras and what it computes with; all else is the node's, or comes by --env.
_PASSED_ON = ("KERAS_", "TF_", "XLA_", "JAX_", "CUBLAS_", "OMP_", "OPENBLAS_", "MKL_")


@contextlib.contextmanager
def spread(
    here: LocalExecutor, config: StudyConfig, problem: Problem, folder: Path, watcher: Watcher
) -> Iterator[Executor]:
    """The executor of a study: on the cluster that ``config.ray`` names, or ``here`` if it names none.

    Args:
        here: Runs what stays on this machine.
        folder: The study's, in its workspace.

    Raises:
        RequestError: If there is no such cluster, or it cannot run this study's trials; before any was begun.
    """
    if config.ray is None:
        yield here
        return
    with connected(config.ray, config.workers) as ray:
        from search.cluster.ray_executor import RayExecutor
        from search.cluster.sources import Sources

        nodes = [node for node in ray.nodes() if node["Alive"]]
        division = divided(config, nodes)
        environ = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
        executor = RayExecutor(
            here,
            division,
            Sources(ray.put, folder, folder.parent.parent, problem),
            options=jobs.processes(problem, config.start_method),
            environ=secrecy.inherited(environ),
            secrets=secrecy.resolve(config.env),
            session=uuid.uuid4().hex[:12],
        )
        with executor:
            try:
                ready = executor.wait(_SECONDS)
            except ExecutorError as error:
                raise RequestError(f"--ray {config.ray}: {error}") from None
            where = "a private Ray" if config.ray == LOCAL else f"Ray at {config.ray}"
            most = "" if division.most is None or config.workers else f" of {division.most} at most (--max-slots)"
            watcher.say(
                f"trials run on {where}, in {len(executor.slots)} slots at present{most}; the search itself runs "
                f"here, on {socket.gethostname()}, for as long as this command does"
                if ready
                else f"on {where} no agent is ready yet: trials begin when it has room; the search itself runs here"
            )
            yield executor
