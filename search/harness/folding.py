"""A trial of several trainings: one process after the other, in the trial's slot, and one result of them all.

Each training is a process forked from the trial's own, which has imported and done nothing else: what a module keeps
between calls, and a layer that it made on import, cannot carry one fold's rows into the next, and names of metrics are
those of a first build. The last training is the refit, on all open rows: it is the model that predicts guard rows and
that is shipped.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from search.definition.problem import Problem
from search.harness import failing
from search.harness.rungs import Stopped
from search.processes.channel import ChannelError, Link, wait
from search.processes.template import run_trial
from search.tiers.validation import REFIT, parse

DONE = "checkpoint.json"  # of a fold that has ended, for an attempt that goes on after it
_LOOK = 0.2  # seconds between looks at whether a process is still there

Send = Callable[[dict[str, Any]], None]
Body = dict[str, Any]


def folder_of(trial: Path, number: int) -> Path:
    """Where one split's predictions of validation rows lie, in a trial's folder."""
    return trial / f"fold_{number}"


def preprocess_of(folds: Path, number: int) -> Path:
    """The preprocessing that was fitted on one split's train rows."""
    return folds / f"preprocess_{number}.keras"


def run(payload: Mapping[str, Any], send: Send) -> Body:
    """Train once for each split, reporting after each, then once on all open rows.

    A report's step is the number of the split, its metrics are Keras' own at that training's chosen epoch. The refit
    has as many epochs as the median of the chosen ones, rounded up, since no validation rows are left to choose by.

    Args:
        payload: The trial's, with ``folds`` (see ``folds.write``).

    Returns:
        As the ``trial`` job; ``predictions["validation"]`` has one list of paths for each split, ``epochs`` and
        ``best_epoch`` are the refit's, ``reported`` has means over the splits.
    """
    plan, folder = parse(payload["folds"]["plan"]), Path(payload["folder"])
    trial = _Trial(payload, folder, send)
    try:
        done = [trial.fold(number, plan.count) for number in range(plan.count)]
        chosen = [body["best_epoch"] or body["epochs"] for body in done]
        epochs = math.ceil(statistics.median(chosen)) if all(chosen) else payload.get("epochs")
        whole = trial.refit(epochs)
    except Stopped:
        trial.forget()
        return {"asks": trial.asks, "stopped": True}
    trial.forget()
    return whole | {
        "predictions": {
            "validation": [body["predictions"]["validation"] for body in done],
            "guard": whole["predictions"]["guard"],
        },
        "best_epoch": epochs if all(chosen) else None,
        "reported": _means([body["reported"] for body in done]),
    }


def _means(logs: list[Mapping[str, float]]) -> dict[str, float]:
    both = [name for name in logs[0] if all(name in one for one in logs)]
    return {name: statistics.fmean(one[name] for one in logs) for name in both}


class _Trial:
    """The trainings of one trial, and what they have told of its parameters."""

    def __init__(self, payload: Mapping[str, Any], folder: Path, send: Send) -> None:
        self.asks: list[dict[str, Any]] = []
        self._payload, self._folder, self._send = payload, folder, send
        self._folds = int(parse(payload["folds"]["plan"]).count)

    def fold(self, number: int, of: int) -> Body:
        """Train one split, or take over what an earlier attempt made of it, and report; may raise ``Stopped``."""
        place = folder_of(self._folder, number)
        place.mkdir(exist_ok=True)
        payload = {**self._part(number), "folder": str(place), "tiers": ["validation"], "weights": False}
        if self._payload["preprocess"]:
            payload["preprocess"] = str(preprocess_of(Path(self._payload["folds"]["folder"]), number))
        if events := self._payload.get("events"):
            payload["events"] = str(Path(events) / place.name)
        payload["preflight"] = bool(self._payload.get("preflight")) and number == 0
        identity, keeps = self._identity(number), self._payload.get("checkpoint_minutes") is not None
        # A preflight that was not recorded must be run and told again.
        body = self._kept(place, identity) if keeps and not payload["preflight"] else None
        if body is None:
            body = self._trained(payload)
            if keeps:
                self._keep(place, identity, body)
        elif len(body["asks"]) > len(self.asks):
            self._ask(body["asks"])
        self._send({"type": "report", "step": number + 1, "of": of, "metrics": body["reported"]})
        return body

    def refit(self, epochs: int | None) -> Body:
        """Train on all open rows, and leave in the trial's folder what a trial leaves."""
        asked = {"epochs": epochs, "keep_last": True, "tiers": ["guard"], "preflight": False}
        return self._trained({**self._part(REFIT), **asked})

    def forget(self) -> None:
        """Nothing goes on from here any more."""
        for number in range(self._folds):
            (folder_of(self._folder, number) / DONE).unlink(missing_ok=True)

    def _part(self, number: int | str) -> Body:
        mine = {key: value for key, value in self._payload.items() if key not in ("folds", "rungs", "slot")}
        part = {"folds": self._payload["folds"], "seed": self._payload["seed"], "number": number}
        return {**mine, "part": part}

    def _trained(self, payload: Body) -> Body:
        job = {"kind": "trial", "payload": payload, "slot": self._payload.get("slot")}
        result: Body | None = None
        for body in _said(job):
            kind = body.get("type")
            if kind == "result":
                result = body
            elif kind == "failed":
                raise failing.Told(body)
            elif kind == "asks" and len(body["asks"]) > len(self.asks):
                self._ask(body["asks"])
            elif kind == "preflight":
                self._send(body)
        assert result is not None  # or it would have said that it failed
        return result

    def _ask(self, asks: list[dict[str, Any]]) -> None:
        self.asks = asks
        self._send({"type": "asks", "asks": asks})

    def _identity(self, number: int) -> Any:
        mine = self._payload
        known = [mine.get(key) for key in ("proposal", "seed", "epochs", "default", "deterministic")]
        return json.loads(json.dumps([Problem(**mine["problem"]).digest, mine["folds"]["plan"], number, known]))

    def _kept(self, place: Path, identity: Any) -> Body | None:
        """What an earlier attempt made of this split, if it is whole and of this very training."""
        try:
            found: Body = json.loads((place / DONE).read_text())
            body: Body = found["result"]
            if found["identity"] == identity and all(map(os.path.exists, body["predictions"]["validation"])):
                return body
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _keep(self, place: Path, identity: Any, body: Body) -> None:
        temporary = place / f".{DONE}"
        try:
            temporary.write_text(json.dumps({"identity": identity, "result": body}))
            os.replace(temporary, place / DONE)
        except OSError:  # a full disk costs the checkpoint, not the trial
            temporary.unlink(missing_ok=True)


def _said(job: Mapping[str, Any]) -> Iterator[Body]:
    """What a job says in a process of its own, forked from this one; it ends with a ``result`` or ``failed``.

    Where a signal ends that process, it ends this one too, for whoever watches over it to see what it was.
    """
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the thread that listens to the driver, which the child has no part in
        pid = os.fork()
    if pid == 0:
        ours.close()
        run_trial(theirs.detach(), parent)
    theirs.close()
    link = Link(ours)
    link.queue({"entry": "search.harness.worker:main", "path": [], "job": job})
    over, status = False, None
    try:
        while status is None or (not link.eof and wait([link], 0.0)):
            wait([link], _LOOK)
            link.flush()
            if status is None:
                ended, code = os.waitpid(pid, os.WNOHANG if not link.eof else 0)
                status = code if ended else None  # what it sent is in the socket by then
            for body in link.read():
                over = over or body.get("type") in ("result", "failed")
                yield body
    except ChannelError as error:
        yield failing.broken(f"the process of one training broke its channel: {error}")
        return
    finally:
        link.close()
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    if over:
        return
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    else:
        yield failing.broken(f"the process of one training exited with {os.waitstatus_to_exitcode(status)}, no result")
