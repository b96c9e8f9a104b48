"""Sending a study to a cluster: what it must have, what goes along, and the job that runs it there.

The job copies what was sent into the workspace of the cluster before anything else: Ray keeps a job's folder only as
long as the head node lives, and a study that is resumed needs its module's helpers again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.definition.packing import Packed, pack
from search.definition.problem import find
from search.errors import RequestError
from search.service import answering
from search.service.job_server import ENDED, Cluster
from search.study import check_name

MARK = "heldout"
"""Key of a job's metadata by which ours are known; its value is what the job does."""

MOST_BYTES = 100 * 1024**2
"""What Ray's job server takes in one request (its ``DASHBOARD_CLIENT_MAX_SIZE``)."""

STOP_SECONDS = 60
"""That a job which is stopped has to end in order; Ray's own three are too few to record how trials stood."""

_ANSWER_SECONDS = 120.0
_POLL_SECONDS = 0.2
_WORKSPACE = "HELDOUT_WORKSPACE"


@dataclass(frozen=True)
class Sent:
    """What was sent: the job, which is called as the study is or begins so, the study, and where."""

    job: str
    study: str
    cluster: str


def launch(
    cluster: Cluster,
    space: str,
    arguments: Sequence[str],
    *,
    study: str | None,
    user: str | None,
    files: Sequence[str],
    workspace: str | None = None,
) -> Sent:
    """Submit a study; the cluster, the module and its size are checked before anything is queued.

    Args:
        arguments: Options of ``heldout launch`` for the cluster, without the study's name.
        study: Its name, or None for the space's and six characters, so that names of a team do not collide.
        files: Of this machine that options name; they go along, so the options must name them by their last part.
        workspace: The cluster's own folder that it goes to, or None for what is set there.

    Raises:
        RequestError: If the cluster cannot run it.
    """
    exported = _exported(workspace)
    problem = find(space)
    packed = pack(problem)
    name = check_name(study if study is not None else f"{problem.name}-{secrets.token_hex(3)}")
    _check_size(packed, files)
    check_fits(cluster, packed.needs)
    words = ["heldout", "launch", packed.module, "--study", name, *arguments]
    with tempfile.TemporaryDirectory(prefix="heldout-job-") as scratch:
        _written(packed, files, Path(scratch))
        place = f'"${_WORKSPACE}"/jobs/{shlex.quote(name)}'
        steps = [exported, f"mkdir -p {place}", f"cp -R . {place}", f"cd {place}"]
        entrypoint = " && ".join([*steps, shlex.join(words), shlex.join(["heldout", "publish", name])])
        _submit(cluster, name, entrypoint, {MARK: "launch", "study": name, "space": problem.name}, user, scratch)
    return Sent(name, name, cluster.address)


def send(
    cluster: Cluster,
    does: str,
    studies: Sequence[str],
    arguments: Sequence[str],
    *,
    user: str | None,
    workspace: str | None = None,
    publishes: bool = True,
) -> Sent:
    """Submit a job that does something with studies of the cluster's workspace, where their rows and weights are.

    Args:
        does: The command, such as ``resume``.
        studies: Their names, the first of which names the job.
        arguments: Options of that command.
        workspace: The cluster's own folder that has them, or None for what is set there.
        publishes: Whether the first study is published after it, as what is known of it has changed.

    Raises:
        RequestError: If the cluster cannot run it. Whether it has the studies is said by the job.
    """
    for study in studies:
        check_name(study)
    exported = _exported(workspace)
    check_fits(cluster, ())
    words = ["heldout", does, *studies, *arguments]
    job = f"{studies[0]}-{does}-{secrets.token_hex(3)}"
    after = [shlex.join(["heldout", "publish", studies[0]])] if publishes else []
    known = {MARK: does, "study": studies[0], "command": shlex.join(word for word in words[1:] if word != "--json")}
    _submit(cluster, job, " && ".join([exported, shlex.join(words), *after]), known, user, None)
    return Sent(job, studies[0], cluster.address)


def _exported(workspace: str | None) -> str:
    """The step of a job that says which workspace all others use."""
    if workspace is None:
        return f'export {_WORKSPACE}="${{{_WORKSPACE}:-$HOME/heldout-workspace}}"'
    if not workspace.startswith("/"):
        raise RequestError(
            f"with --cluster, --workspace must be a whole path there, such as /workspace, but got {workspace!r}"
        )
    return f"export {_WORKSPACE}={shlex.quote(workspace)}"


def check_fits(cluster: Cluster, needs: Sequence[str]) -> None:
    """See that the cluster's head has our Python, our Heldout, and the modules that a space needs.

    Raises:
        RequestError: If it has not, or does not say.
    """
    found = _asked(cluster, needs)
    here, there = "{}.{}".format(*sys.version_info[:2]), str(found["python"])
    if here != there:
        raise RequestError(
            f"the cluster {cluster.address} must run the Python that runs here, but it runs {there} and here is "
            f"{here}; use an environment or an image with the same"
        )
    if "search" in found["missing"]:
        raise RequestError(
            f"the cluster {cluster.address} must have Heldout installed, but it has not; use an image of docker/"
        )
    own = _own_version()
    if found["heldout"] != own:
        raise RequestError(
            f"the cluster {cluster.address} must run the Heldout that is installed here, but it runs "
            f"{found['heldout']} and here is {own}; install the same on both"
        )
    missing = [name for name in found["missing"] if name != "search"]
    if missing:
        raise RequestError(
            f"the cluster {cluster.address} must have what the space module imports, but lacks {', '.join(missing)}; "
            "install that in its image, or put it beside the module"
        )


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("heldout")
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout


def _asked(cluster: Cluster, needs: Sequence[str]) -> dict[str, Any]:
    """What a small job says, which is gone from the list when this returns."""
    text = inspect.getsource(answering)
    with cluster.speaking():
        job = cluster.client.submit_job(
            entrypoint=shlex.join(["python", "-c", text, "search", *needs]), metadata={MARK: "check"}
        )
        try:
            until = time.monotonic() + _ANSWER_SECONDS
            while (info := cluster.client.get_job_info(job)).status not in ENDED:
                if time.monotonic() > until:
                    cluster.client.stop_job(job)
                    raise RequestError(
                        f"the cluster {cluster.address} must start a job within {_ANSWER_SECONDS:.0f} s, but did not; "
                        "see its dashboard for what its head is at"
                    )
                time.sleep(_POLL_SECONDS)
            log = str(cluster.client.get_job_logs(job))
        finally:
            with contextlib.suppress(RuntimeError):
                cluster.client.delete_job(job)
    for line in reversed(log.splitlines()):
        with contextlib.suppress(ValueError, TypeError):
            found = json.loads(line)
            if {"python", "heldout", "missing"} <= set(found):
                return dict(found)
    last = (log.strip().splitlines() or [str(info.message)])[-1]
    raise RequestError(f"the cluster {cluster.address} must run `python`, but: {last[:300]}")


def _check_size(packed: Packed, files: Sequence[str]) -> None:
    sizes = {str(packed.folder / name): (packed.folder / name).stat().st_size for name in packed.files}
    sizes |= {name: Path(name).stat().st_size for name in files if Path(name).is_file()}
    size = packed.size + sum(sizes[name] for name in files if name in sizes)
    if size > MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise RequestError(
            f"the module and what it imports must be at most {MOST_BYTES >> 20} MiB to be sent, but are "
            f"{size / 1024**2:.0f} MiB, {largest} the largest file; put data where the cluster reads them"
        )


def _written(packed: Packed, files: Sequence[str], folder: Path) -> None:
    packed.write(folder)
    for name in files:
        to = folder / Path(name).name
        if to.exists():
            raise RequestError(f"{name} must not be called as a file of the space is, {to.name}; rename it")
        try:
            to.write_bytes(Path(name).read_bytes())
        except OSError as error:
            raise RequestError(f"{name} must be read to be sent, but: {error.strerror}") from None


def _submit(
    cluster: Cluster, job: str, entrypoint: str, metadata: dict[str, str], user: str | None, folder: str | None
) -> None:
    environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    if folder is not None:
        environment["working_dir"] = folder
    with cluster.speaking(job):
        cluster.client.submit_job(
            entrypoint=entrypoint,
            submission_id=job,
            runtime_env=environment,
            metadata=metadata | ({} if user is None else {"user": user}),
        )
