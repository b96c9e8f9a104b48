"""Jobs on a cluster: listing them, following what they say to their end, and stopping them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from search.errors import RequestError, StudyError, StudyFailed, StudyStopped
from search.service.job_server import ENDED, Cluster
from search.service.submitting import MARK, STOP_SECONDS

_POLL_SECONDS = 0.5
_LOST_SECONDS = 60.0  # without a word from the cluster, after which following gives up
_QUIET_SECONDS = 20.0  # in which a job says nothing, before the cluster is asked whether it is still there


def jobs(cluster: Cluster) -> list[dict[str, Any]]:
    """Heldout's jobs, the newest last.

    Each has ``job``, ``does`` (the command that it was sent by), ``command`` (its words, or None for a launch, which
    has ``space``), ``study``, ``state``, ``user``, ``started`` and ``ended``.
    """
    with cluster.speaking():
        found = [info for info in cluster.client.list_jobs() if (info.metadata or {}).get(MARK) not in (None, "check")]
    return [_described(info) for info in sorted(found, key=lambda info: info.start_time or 0)]


def log(cluster: Cluster, job: str) -> str:
    """All that a job has said so far.

    Raises:
        StudyError: If there is no such job.
    """
    with cluster.speaking(job):
        return str(cluster.client.get_job_logs(job))


def follow(cluster: Cluster, job: str, say: Callable[[str], None]) -> int:
    """Say what a job says, from its beginning to its end; a connection that is lost is made again.

    Returns:
        The exit code of the job's command.

    Raises:
        StudyError: If there is no such job, or no longer.
        RequestError: If the cluster says nothing any more.
        StudyStopped: If somebody stopped it.
        StudyFailed: If it ended otherwise than by its command, as when the cluster could not start it.
    """
    info = _info(cluster, job)
    study = (info.metadata or {}).get("study", job)
    said, heard = 0, time.monotonic()
    while True:
        broken = None
        try:
            said = asyncio.run(_tail(cluster, job, said, say))
            heard = time.monotonic()
        except _Broken as error:
            said, heard, broken = error.said, max(heard, error.heard), str(error)
        try:
            info = _info(cluster, job)
        except StudyError:
            raise StudyError(
                f"job {job!r} must be known to be followed, but {cluster.address} does not know it any more, as after "
                f"its head was lost; `heldout resume {study} --cluster {cluster.address}` goes on"
            ) from None
        except RequestError:
            broken = broken or "it is silent"
        if broken is None and info.status in ENDED:
            return _outcome(info, job, cluster)
        if broken is not None and time.monotonic() - heard > _LOST_SECONDS:
            raise RequestError(
                f"the cluster {cluster.address} must answer to be followed, but: {broken}; the job may go on: "
                f"`heldout logs {job} --cluster {cluster.address}` looks again. If its head was lost, `heldout resume "
                f"{study} --cluster` goes on with another one"
            )
        time.sleep(_POLL_SECONDS)


def stop(cluster: Cluster, job: str) -> dict[str, Any]:
    """Stop a job and wait for its end, which it has a minute for; as of ``jobs``, with what comes ``next``, in words.

    Raises:
        StudyError: If there is no such job.
        RequestError: If it is over.
    """
    with cluster.speaking(job):
        asked = cluster.client.stop_job(job)
        info = cluster.client.get_job_info(job)
        until = time.monotonic() + STOP_SECONDS + 30
        while asked and info.status not in ENDED and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            info = cluster.client.get_job_info(job)
    if not asked:
        raise RequestError(f"a job must run to be stopped, but {job!r} is {_state(info)} on {cluster.address}")
    return _described(info) | {"next": _next(info, cluster)}


def _info(cluster: Cluster, job: str) -> Any:
    """What the cluster knows of a job, if it answers within a time."""
    cluster.version()
    with cluster.speaking(job):
        return cluster.client.get_job_info(job)


class _Broken(Exception):
    """The connection was lost after so many characters were said, and its last sign of life was then."""

    def __init__(self, said: int, heard: float, why: str) -> None:
        super().__init__(why)
        self.said, self.heard = said, heard


async def _tail(cluster: Cluster, job: str, skip: int, say: Callable[[str], None]) -> int:
    """Say what follows the first ``skip`` characters of the log; how many it has when the connection ends."""
    import aiohttp

    came, heard = 0, 0.0
    texts = aiter(cluster.client.tail_job_logs(job))
    coming = asyncio.ensure_future(anext(texts, None))
    try:
        while True:
            # Ray's client waits without an end, also for a machine that is gone.
            while not (await asyncio.wait({coming}, timeout=_QUIET_SECONDS))[0]:
                await asyncio.to_thread(cluster.version)
                heard = time.monotonic()
            if (text := coming.result()) is None:
                break
            fresh = text[max(0, skip - came) :]
            came += len(text)
            if fresh:
                say(fresh)
                heard = time.monotonic()
            coming = asyncio.ensure_future(anext(texts, None))
    except RequestError:
        raise _Broken(max(came, skip), heard, "it is silent") from None
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise _Broken(max(came, skip), heard, str(error) or type(error).__name__) from None
    finally:
        coming.cancel()
    return max(came, skip)


def _outcome(info: Any, job: str, cluster: Cluster) -> int:
    state = _state(info)
    if state == "STOPPED":
        raise StudyStopped(f"job {job!r} was stopped; {_next(info, cluster)}")
    code = info.driver_exit_code
    if code is None and state == "FAILED":
        said = " ".join(str(info.message).split())[:300]
        raise StudyFailed(f"job {job!r} must run to its end, but the cluster {cluster.address} says: {said}")
    return 0 if code is None else code if 0 <= code < 256 else 1


def _next(info: Any, cluster: Cluster) -> str:
    """How what was stopped is taken up again."""
    meta = info.metadata or {}
    if meta.get(MARK) in ("launch", "resume"):
        return f"`heldout resume {meta['study']} --cluster {cluster.address}` goes on"
    return f"`heldout {meta.get('command')} --cluster {cluster.address}` begins anew"


def _described(info: Any) -> dict[str, Any]:
    meta = info.metadata or {}
    return {
        "job": info.submission_id,
        "does": meta.get(MARK),
        "command": meta.get("command"),
        "study": meta.get("study"),
        "state": _state(info),
        "space": meta.get("space"),
        "user": meta.get("user"),
        "started": _when(info.start_time),
        "ended": _when(info.end_time),
    }


def _state(info: Any) -> str:
    return str(getattr(info.status, "value", info.status))


def _when(millis: int | None) -> str | None:
    return None if not millis else datetime.fromtimestamp(millis / 1000, UTC).isoformat(timespec="seconds")
