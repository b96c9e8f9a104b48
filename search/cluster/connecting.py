"""Connecting to a Ray cluster, and how its nodes are divided into shares, each of which one agent takes."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search import secrecy
from search.errors import RequestError
from search.processes import devices
from search.study import StudyConfig

LOCAL = "local"
_SECONDS = 5.0  # that an address has for answering
MOST_SLOTS = 16
"""Of a study that names no number: a team shares the cluster, and proposals gain little from more at a time."""

_SLOTS = 8  # CPU slots of one agent at most: what its death costs
# How HTTP/2 begins, which gRPC and so Ray speaks (RFC 9113, 3.4), and the type of the frame that a server says first.
_FRAME = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _FRAME + b"\0\0\0\0\0"
_TRIES = 3  # to start a private Ray: it gives its own processes half a minute, which a busy machine may exceed
_SETTINGS = {
    # Ray's reports of dead workers go to stdout otherwise, in the middle of our JSON.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "3",  # each takes some seconds
    "RAY_worker_niceness": "0",  # or trials would give way to all else, the search itself included
    "RAY_prestart_worker_first_driver": "0",  # a process for each CPU, of which none is needed
}


Room = tuple[float, float]
"""CPUs and GPUs of a node."""

_ANY: Room = (1e9, 1e9)


@dataclass(frozen=True)
class Share:
    """Of one node, for one agent.

    Attributes:
        node: Ray's id of the node.
        cpus, gpus: That the agent reserves.
        slots: Trials at a time; threads: of each.
    """

    node: str
    cpus: int
    gpus: int
    slots: int
    threads: int


@dataclass(frozen=True)
class Division:
    """How nodes are divided.

    Attributes:
        threads: CPU threads of a slot, where slots have no GPU.
        most: Slots in all, or None for as many as there are.
        gpus: GPUs of one share, 0 for slots without; sharing: slots on it.
    """

    threads: int
    most: int | None = None
    gpus: int = 0
    sharing: int = 1

    def shares(
        self, nodes: Sequence[Mapping[str, Any]], taken: Sequence[Share], free: Mapping[str, Room] | None = None
    ) -> list[Share]:
        """The shares that have no agent yet.

        Args:
            nodes: As ``ray.nodes()`` lists them, the living ones.
            taken: Those that have one, or may not have one now.
            free: What nobody has of each node, by its id: then only shares that find room at once.
        """
        found: list[Share] = []
        left = (_ANY[0] if self.most is None else self.most) - sum(share.slots for share in taken)
        for node in nodes:
            own = [share for share in taken if share.node == node["NodeID"]]
            room = _ANY if free is None else free.get(node["NodeID"], (0, 0))
            while (share := self._next(node, own, left, room)) is not None:
                left, room = left - share.slots, (room[0] - share.cpus, room[1] - share.gpus)
                own.append(share)
                found.append(share)
        return found

    def _next(self, node: Mapping[str, Any], own: Sequence[Share], left: float, room: Room) -> Share | None:
        """A node's next share, of so many slots at most and within that room."""
        cpus, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        if self.gpus:
            groups = gpus // self.gpus
            if len(own) >= groups or self.sharing > left:
                return None
            each = cpus // groups
            share = Share(node["NodeID"], each, self.gpus, self.sharing, max(1, each // self.sharing))
            return share if share.cpus <= room[0] and share.gpus <= room[1] else None
        idle = cpus // self.threads - sum(share.slots for share in own)
        slots = int(min(idle, room[0] // self.threads, left, _SLOTS))
        return Share(node["NodeID"], slots * self.threads, 0, slots, self.threads) if slots > 0 else None


def divided(config: StudyConfig, nodes: Sequence[Mapping[str, Any]]) -> Division:
    """How a study divides a cluster as it is now; that is the same for nodes that come later.

    Raises:
        RequestError: If what is asked for cannot be had there.
    """
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    gpus = [int(node["Resources"].get("GPU", 0)) for node in nodes]
    asked = "--trials-per-gpu" if config.trials_per_gpu else "--gpus-per-trial" if config.gpus_per_trial else None
    if config.gpus not in (None, "auto", "none"):
        raise RequestError(f"with --ray, Ray chooses the GPUs, but got --gpus {config.gpus}; use --gpus auto or none")
    devices.contradictions(config.workers, config.gpus, config.trials_per_gpu, config.gpus_per_trial)
    if config.workers is None and config.gpus != "none" and any(gpus):
        each = config.gpus_per_trial or 1
        if each > max(gpus):
            raise RequestError(
                f"--gpus-per-trial must be at most {max(gpus)}, the GPUs of the cluster's largest node, but got {each}"
            )
        sharing = config.trials_per_gpu or 1
        most = most_slots(config)
        if most is not None and sharing > most:
            raise RequestError(f"--max-slots must be at least --trials-per-gpu ({sharing}), but got {most}")
        return Division(1, most, gpus=each, sharing=sharing)
    if asked or config.max_gpu_hours is not None:
        needing = asked or "--max-gpu-hours"
        raise RequestError(f"{needing} needs GPUs, but the trials on this cluster have none; leave it out")
    threads = 1
    if config.workers is not None:
        threads = max(1, sum(cpus) // config.workers)
        while threads > 1 and sum(count // threads for count in cpus) < config.workers:
            threads -= 1
    return Division(threads, most_slots(config))


def most_slots(config: StudyConfig) -> int | None:
    """How many trials a study may run at a time on its cluster; None for as many as there is room for."""
    given = [asked for asked in (config.workers, config.max_slots) if asked is not None]
    return min(given) if given else None if config.ray == LOCAL else MOST_SLOTS


def free_of_each(ray: Any) -> dict[str, Room]:
    """What nobody has of each node, by its id; a moment old."""
    # Its public functions tell this of the cluster as a whole alone.
    found = ray._private.state.available_resources_per_node()
    return {node: (room.get("CPU", 0.0), room.get("GPU", 0.0)) for node, room in found.items()}


@contextlib.contextmanager
def connected(address: str, workers: int | None) -> Iterator[Any]:
    """Ray, connected to a cluster, or to a private one on this machine for ``"local"``; disconnected at the end.

    Args:
        address: ``local``, ``auto`` or ``HOST:PORT``.
        workers: Slots that a private one has room for, if those are more than CPUs.

    Raises:
        RequestError: If Ray is not installed or there is no such cluster.
    """
    if importlib.util.find_spec("ray") is None:
        raise RequestError("--ray needs Ray, which is not installed; pip install 'heldout[ray]'")
    if address not in (LOCAL, "auto"):
        _reach(address)
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    known: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        if address == LOCAL:
            _start(ray, known | {"num_cpus": max(devices.cpus(), workers or 1)}, stack)
        else:
            _init(ray, address, {"address": address, **known})
        yield ray


def _start(ray: Any, known: Mapping[str, Any], stack: contextlib.ExitStack) -> None:
    for left in reversed(range(_TRIES)):
        # Sockets lie in it, whose names must be short.
        scratch = tempfile.mkdtemp(prefix="heldout-ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        stack.callback(ray.shutdown)  # before its folder goes
        try:
            return _init(ray, LOCAL, {"include_dashboard": False, "_temp_dir": scratch, **known})
        except RequestError as error:
            if not left or "timed out" not in str(error):
                raise
            ray.shutdown()


def _init(ray: Any, address: str, known: Mapping[str, Any]) -> None:
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if on_main else None
    try:
        ray.init(**known)
    except Exception as error:
        raise RequestError(_told(address, error)) from error
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own there


def _reach(address: str) -> None:
    """See that something listens there that speaks as Ray does, which Ray itself takes minutes to find out."""
    host, mark, port = address.rpartition(":")
    if "://" in address or not mark or not port.isdecimal():
        raise RequestError(
            f"--ray must be local, auto or HOST:PORT of a cluster that this machine is a node of, but got {address!r}"
        )
    answer = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _SECONDS) as there:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                there.settimeout(_SECONDS)
                there.sendall(_HELLO)
                answer = there.recv(9)
    except (OSError, OverflowError) as error:
        raise RequestError(
            f"--ray must name a Ray cluster that runs, but {address} does not answer ({error}); see `ray status`"
        ) from None
    if answer[3:4] != _FRAME:
        raise RequestError(
            f"--ray must name a Ray cluster, but what listens at {address} is none; `ray status` on its head says its "
            "address (Ray's port is 6379, and not that of its dashboard)"
        )


def _told(address: str, error: BaseException) -> str:
    chain, said = error.__cause__ or error.__context__, str(error)
    while chain is not None:  # Ray's own last word is that it failed
        chain, said = chain.__cause__ or chain.__context__, f"{said} {chain}"
    said = " ".join(secrecy.scrub(said).split())
    if "Version mismatch" in said:
        why = said.partition("Version mismatch:")[2].strip()
        return f"--ray {address}: Ray and Python must be the same here as on the cluster, but {why[:300]}"
    if "InvalidAuthToken" in said or "AuthenticationError" in said:
        return (
            f"--ray {address}: the cluster asks for a token, and takes none of ours; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to the file that has it"
        )
    said = said.partition("Traceback")[0].rstrip(" :") or type(error).__name__  # nobody's who asked for a search
    if address == LOCAL:
        return f"--ray local: a private Ray could not be started ({said[:300]})"
    return (
        f"--ray must name a Ray cluster that this machine is a node of, but at {address} there is none ({said[:200]}); "
        "run this on one of its nodes, such as the head"
    )
