"""The agent: a process that Ray places on a node, which runs a local executor there for the driver.

The driver gives it orders and asks it for what has happened, both numbered, so that a call that was lost on the way can
be made again. One thread of its own uses the executor, for as long as the process lives: what it forks then dies with
it, however it ends. Nothing that a trial says is anything but JSON here, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from search import secrecy
from search.cluster import mirror
from search.errors import ExecutorError, HeldoutError
from search.executors import NO_GPU, Event, Exited, Job, Lost, Message, Slot, Warned, died
from search.executors.local import LocalExecutor
from search.processes import devices

Body = dict[str, Any]
Answer = tuple[Body, bytes | None]

_MOST_WAITING = 2000  # things to tell, after which trials have to wait before they say more
_COMPARED = ("keras", "tensorflow", "numpy")


def source_digest() -> str:
    """SHA-256 of Heldout's own source: a version says too little about a checkout."""
    out, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for file in sorted(root.rglob("*.py")):
        out.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return out.hexdigest()


def versions() -> dict[str, str]:
    """Of what should be the same on all machines."""
    found = {}
    for name in ("heldout", *_COMPARED):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


class Agent:
    """Runs jobs in one share of a node.

    Args:
        fetch: Gets what a reference stands for; None for Ray's own way.
    """

    def __init__(self, fetch: Callable[[Any], Any] | None = None) -> None:
        self._fetch = fetch or _from_ray
        self._roots: dict[str, str] = {}
        self._orders: deque[Body] = deque()
        self._heard = 0  # number of the last order
        self._told: tuple[int, list[Answer]] = (0, [])
        self._outbox: deque[Body] = deque()
        self._changed = threading.Condition()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._jobs: dict[str, Body] = {}
        self._killed: set[str] = set()
        self._submitted: set[str] = set()  # of which it was not told yet that they have begun
        self._over = False
        self._thread: threading.Thread | None = None

    # ── called by the driver ─────────────────────────────────────────────────────────────────────

    def begin(self, setup: Body, secrets: Mapping[str, str]) -> Body:
        """Get ready.

        Args:
            setup: ``source``, ``session``, ``token``, ``module``, ``share``, ``environ`` and ``executor``; see
                ``Sources.setup`` and ``RayExecutor``.
            secrets: Variables for every job. Of a call, not of the actor: what an actor is made with, Ray records.

        Returns:
            ``slots``, ``sees`` (the driver's workspace), ``module`` (whether its files are the same here), ``host``,
            ``versions``; or ``error``.
        """
        if setup["source"] != source_digest():
            return {"error": f"has another version of heldout ({versions()['heldout']}, or changed files)"}
        secrecy.learn({f"***{name}***": value for name, value in secrets.items()})
        self._host = socket.gethostname()
        base = Path(tempfile.gettempdir())
        self._home = base / f"heldout-node-{setup['session']}-{setup['share']['node'][:8]}"
        mirror.sweep(base, self._home.name)
        self._lock = mirror.held(base / f"{self._home.name}.lock")
        self._home.mkdir(mode=0o700, exist_ok=True)
        apart, token, module = setup["apart"], setup["token"], setup["module"]
        self._sees = not apart and token is not None and _reads(Path(token[0])) == token[1]
        same = not apart and mirror.is_same(Path(module["root"]), module["files"], module["digests"])
        self._map(module["root"], "" if same else str(self._home))
        if self._sees:
            self._map(setup["workspace"], "")
        own = tempfile.mkdtemp(prefix="agent-", dir=self._home)
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's, of the whole share
        os.environ.update(setup["environ"])
        slots = self._slots(setup["share"])
        executor = dict(setup["executor"])
        executor["path"] = mirror.there(executor["path"], self._roots)
        local = LocalExecutor(slots, log=Path(own) / "template.log", secrets=secrets, lasting=True, **executor)
        self._thread = threading.Thread(target=self._serve, args=(local,), name="heldout-agent", daemon=True)
        self._thread.start()
        told = {"sees": self._sees, "module": same, "host": self._host, "versions": versions(), "pid": os.getpid()}
        return told | {"slots": [slot.to_json() for slot in slots]}

    def order(self, number: int, orders: Sequence[Body]) -> int:
        """Take orders, the first of which has this number; returns the number of the last one."""
        with self._changed:
            for at, order in enumerate(orders, start=number):
                if at == self._heard + 1:
                    self._heard = at
                    self._orders.append(order)
        self._ring()
        return self._heard

    def poll(self, number: int, timeout: float) -> list[Answer]:
        """What has happened since the last call, at least one thing unless time is up; the same again if asked again.

        Args:
            number: Of this question; one more than that of the last one that was answered.
            timeout: Seconds.
        """
        if number == self._told[0]:
            return self._told[1]
        with self._changed:
            self._changed.wait_for(lambda: self._outbox, timeout)
        answers: list[Answer] = []
        room = mirror.CHUNK
        while self._outbox and room > 0:
            item = self._outbox[0]
            if "clean" in item:
                shutil.rmtree(item["clean"], ignore_errors=True)
            elif "file" in item:
                answer, is_last = _piece(item, room)
                answers.append(answer)
                room -= len(answer[1] or b"")
                if not is_last:
                    break
            else:
                answers.append((item, None))
                room -= 1024
            with self._changed:
                self._outbox.popleft()
                self._changed.notify_all()
        self._told = number, answers
        return answers

    def close(self) -> None:
        """End every job, and remove what was written here."""
        self._over = True
        self._ring()
        if self._thread is not None:
            self._thread.join(10.0)
            self._thread = None
            with self._lock as lock:
                fcntl.flock(lock, fcntl.LOCK_UN)
                with contextlib.suppress(OSError):  # another agent is at work here
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(self._home, ignore_errors=True)
                    Path(lock.name).unlink(missing_ok=True)
        self._wake.close()
        self._woken.close()

    def _map(self, root: str, prefix: str | None) -> None:
        """Say where a root is here, or that it is not any more; another thread may be reading the table."""
        with self._changed:
            others = {key: value for key, value in self._roots.items() if key != root}
            self._roots = others if prefix is None else others | {root: prefix}

    # ── its own thread ───────────────────────────────────────────────────────────────────────────

    def _slots(self, share: Mapping[str, Any]) -> tuple[Slot, ...]:
        where = f"{self._host}-{share['node'][:8]}"
        if not share["gpus"]:
            return tuple(Slot(index, share["threads"], NO_GPU, machine=where) for index in range(share["slots"]))
        import ray

        given = [str(number) for number in ray.get_gpu_ids()]
        slots = devices.granted(given, share["slots"], share["threads"], where)
        return tuple(Slot(**{**vars(slot), "machine": where}) for slot in slots)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it is awake
            self._wake.send(b"x")

    def _tell(self, *items: Body) -> None:
        with self._changed:
            self._outbox.extend(items)
            self._changed.notify_all()

    def _serve(self, executor: LocalExecutor) -> None:
        try:
            with executor:
                while not self._over:
                    self._obey(executor)
                    for event in executor.poll(60.0, also=self._woken.fileno()):
                        self._happened(event)
                    self._notice_begun(executor)
                    with self._changed:  # a trial that says too much waits, as if this were the driver itself
                        self._changed.wait_for(lambda: len(self._outbox) < _MOST_WAITING, 0.1)
        except ExecutorError as error:
            self._tell({"fatal": str(error)})
        except BaseException as error:
            self._tell({"fatal": f"{type(error).__name__}: {error}"})

    def _obey(self, executor: LocalExecutor) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        while self._orders:
            with self._changed:
                order = self._orders.popleft()
            if "run" in order:
                self._jobs[order["run"]] = order | {"unsent": []}
                threading.Thread(target=self._stage, args=(order,), daemon=True).start()
            elif "start" in order:
                self._start(executor, self._jobs[order["start"]])
            elif "send" in order and "unsent" in (job := self._jobs.get(order["send"], {})):
                job["unsent"].append(order["body"])  # its files are still on their way
            elif "send" in order:
                executor.send(order["send"], order["body"])
            elif "kill" in order:
                self._killed.add(order["kill"])
                executor.kill(order["kill"])
            elif "usage" in order:
                self._tell({"usage": order["usage"], "seconds": executor.cpu_seconds(order["usage"])})

    def _start(self, executor: LocalExecutor, order: Body) -> None:
        name = order["run"]
        if name in self._killed:
            return self._happened(Exited(name, None, 15, 0.0))
        for root in order["outputs"]:
            if not self._sees and root not in self._roots:
                self._map(root, str(self._home))
        payload, log = mirror.there([order["payload"], order["log"]], self._roots)
        env = dict(order["env"])
        if order["cache"] is not None:
            env["HELDOUT_CACHE"] = mirror.there(order["cache"], self._roots)
        slot = Slot(**order["slot"] | {"gpus": tuple(order["slot"]["gpus"])})
        try:
            for out in mirror.there(order["outputs"], self._roots):
                Path(out).mkdir(parents=True, exist_ok=True)
            executor.submit(Job(name, order["kind"], payload, log=log, env=env), slot)
            self._submitted.add(name)
            for body in order.pop("unsent"):
                executor.send(name, body)
        except (OSError, ValueError, HeldoutError) as error:
            self._fail(name, f"its process could not be started on {self._host}: {error}")

    def _fail(self, name: str, why: str) -> None:
        self._happened(died(name, why))
        self._happened(Exited(name, 1, None, 0.0))

    def _notice_begun(self, executor: LocalExecutor) -> None:
        for name in list(self._submitted):
            if executor.has_begun(name):
                self._submitted.remove(name)
                self._tell({"begun": name})

    def _happened(self, event: Event) -> None:
        home = str(self._home)
        if isinstance(event, Warned):
            return self._tell({"warned": f"{self._host}: {event.text}"})
        if isinstance(event, Message):
            body = mirror.back(event.body, home)
            if body.get("type") == "result" and (lack := self._send_back(event.job, but_log=True)) is not None:
                body = died(event.job, lack).body
            return self._tell({"message": event.job, "body": body})
        order = self._jobs.pop(event.job)
        if (lack := self._send_back(event.job, order, but_log=False)) is not None:
            self._tell({"message": event.job, "body": died(event.job, lack).body})
        self._killed.discard(event.job)
        self._submitted.discard(event.job)
        kind = "lost" if isinstance(event, Lost) else "exited"
        self._tell({kind: event.job, "known": {key: value for key, value in vars(event).items() if key != "job"}})
        for root in order["outputs"]:
            if prefix := self._roots.get(root):
                self._map(root, None)
                self._tell({"clean": prefix + root})

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def _stage(self, order: Body) -> None:
        """Get what the job reads, in a thread of its own, since it may take a while."""
        try:
            for spec in order["inputs"]:
                self._get(spec)
        except Exception as error:
            why = f"its files could not be brought to {self._host}: {type(error).__name__}: {error}"
            self._tell({"message": order["run"], "body": died(order["run"], why).body})
            self._killed.add(order["run"])
        with self._changed:
            self._orders.append({"start": order["run"]})
        self._ring()

    def _get(self, spec: Body) -> None:
        root, home = spec["root"], self._home
        if spec["digests"] is not None and not spec["apart"]:
            if mirror.is_same(Path(root), spec["files"], spec["digests"]):
                return self._map(root, "")
        parts = (self._fetch(part) for part in spec["parts"])
        if spec["own"]:  # of one job: what an earlier attempt left here is gone
            to = Path(f"{home}{root}")
            shutil.rmtree(to, ignore_errors=True)
            to.mkdir(parents=True)
            mirror.write(to, spec["files"], parts)
        else:
            with (home / ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                mirror.place(home, root, spec["files"], parts)
        self._map(root, str(home))

    def _send_back(self, name: str, order: Body | None = None, *, but_log: bool) -> str | None:
        """Queue what the job's folders hold and was not sent yet; what is wrong with them, if something is."""
        order = order or self._jobs[name]
        sent = order.setdefault("sent", {})
        for root in order["outputs"]:
            if not self._roots.get(root):
                continue  # the driver sees it where it is
            try:
                files = mirror.listed(Path(self._roots[root] + root))
            except (OSError, ValueError) as error:
                return f"its files could not be sent back from {self._host}: {error}"
            for entry in files:
                file, size, changed = entry
                path = f"{self._roots[root]}{root}/{file}"
                is_log = mirror.back(path, str(self._home)) == order["log"]
                if sent.get((root, file)) == (size, changed) or (but_log and is_log):
                    continue
                sent[root, file] = size, changed
                self._tell({"file": name, "root": root, "name": file, "size": size, "changed": changed, "from": path})
            if not but_log:
                self._tell({"names": name, "root": root, "all": [entry[0] for entry in files]})
        return None


def _piece(item: Body, room: int) -> tuple[Answer, bool]:
    """The next bytes of a file that is sent back, at most as many as it had, and whether that is all."""
    offset, left = item.get("offset", 0), item["size"] - item.get("offset", 0)
    data = b""
    try:
        with open(os.open(item["from"], os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            file.seek(offset)
            data = file.read(min(room, left))
    except OSError:  # removed meanwhile
        pass
    is_last = len(data) == left or not data
    item["offset"] = offset + len(data)
    told = {"file": item["file"], "root": item["root"], "name": item["name"], "offset": offset}
    return (told | {"changed": item["changed"] if is_last else None}, data), is_last


def _reads(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _from_ray(reference: Any) -> Any:
    import ray

    return ray.get(reference)
