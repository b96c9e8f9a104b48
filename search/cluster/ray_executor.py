"""The executor of a study on a Ray cluster: agents on its nodes, and a local executor for what stays here."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from search.cluster import mirror
from search.cluster.agent import Agent, source_digest, versions
from search.cluster.calls import AgentCalls, Answers, Running
from search.cluster.connecting import Division, Share, free_of_each
from search.cluster.sources import Sources
from search.errors import ExecutorError
from search.executors import Event, Exited, Job, Lost, Message, Slot, Warned, died, task
from search.executors.local import LocalExecutor
from search.processes import devices
from search.processes.channel import encode

_LOOK = 3.0  # seconds between looks at which nodes there are
_PAUSES = (0.0, 5.0, 30.0, 120.0)  # before an agent is placed once more where others died one after the other
_LEAVING = 5.0  # seconds that agents have to end by themselves
_IDLE = 30.0  # seconds without a trial, and with none to come, after which an agent is given back
_QUEUED = 10.0  # seconds that an agent waits for a busy node before it is placed on one that is free
# A call that waits for what happens must not keep orders waiting.
_GROUPS = {"poll": 1, "order": 1}


class RayExecutor:
    """Keeps the executor protocol with the nodes of a cluster.

    Trials run on agents. All other jobs see sealed labels, or all of the user's rows, or both: they run on this
    machine, in ``here``. Slots come and go with the nodes.

    Args:
        here: Started, and closed by whoever made it.
        division: How nodes are divided into slots.
        sources: The files that agents are sent.
        options: Of the agents' ``LocalExecutor``.
        environ: Variables of the agents' processes.
        secrets: As of ``LocalExecutor``.
        kinds: Jobs that run on agents.
        session: Names the agents' folders on their nodes.
    """

    def __init__(
        self,
        here: LocalExecutor,
        division: Division,
        sources: Sources,
        *,
        options: Mapping[str, Any],
        environ: Mapping[str, str],
        secrets: Mapping[str, str],
        session: str,
        kinds: tuple[str, ...] = ("trial",),
    ) -> None:
        self._here, self._division, self._sources, self._kinds = here, division, sources, kinds
        self._options, self._environ, self._secrets, self._session = dict(options), environ, dict(secrets), session
        self._actor = ray.remote(max_restarts=0, concurrency_groups=_GROUPS)(Agent)
        self._slot = devices.slots(1, "none", None, None)[0]  # of jobs that stay here
        self._agents: list[AgentCalls] = []
        self._slots: tuple[Slot, ...] | None = None  # unless they have changed
        self._events: deque[Event] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._answers = Answers(self._ring)
        self._looked = 0.0
        self._deaths: dict[str, tuple[int, float]] = {}  # of a node's agents in a row, and when one may be placed again
        self._refused: dict[str, str] = {}  # nodes that cannot run trials, and why
        self._warned: set[str] = set()
        self._needs_more = True
        self._closed = False

    # ── the protocol ─────────────────────────────────────────────────────────────────────────────

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots of all agents that are ready."""
        if self._slots is None:
            found = {index: slot for agent in self._agents for index, slot in agent.slots.items()}
            self._slots = tuple(found[index] for index in sorted(found))
        return self._slots

    def start(self) -> None:
        """Have agents placed, without waiting for them."""
        self._look()

    def submit(self, job: Job, slot: Slot | None) -> None:
        """Run a job, on an agent if it is a trial; see the protocol.

        Raises:
            ExecutorError: If no more processes can be had.
            ValueError: If the slot is taken or a job of that id is running.
        """
        if self._closed:
            raise ExecutorError("an executor must be started before it gets jobs, but this is closed: make another")
        if self._agent_of(job.id) is not None:
            raise ValueError(f"the id of a job must be its own, but {job.id!r} is running")
        if slot is None or job.kind not in self._kinds:
            own = None if slot is None else dataclasses.replace(self._slot, index=slot.index)
            return self._here.submit(job, own)
        encode(task(job, slot))  # what cannot be sent is refused here
        agent = next((one for one in self._agents if slot.index in one.slots), None)
        if agent is None or agent.said is None:  # it died a moment ago
            self._events.append(Lost(job.id, taken=True))
            return
        if any(other.slot == slot.index for other in agent.running.values()):
            raise ValueError(f"a slot must be free to be given a job, but slot {slot.index} is taken")
        if not agent.said["sees"] and self._sources.must_be_seen(job.payload):
            self._events.append(Lost(job.id, taken=True))
            return self._give_up(agent, f"does not see {self._sources.workspace}: rows that are files need a workspace "
                                 "on storage that every node has at the same path")  # fmt: skip
        inputs = self._sources.inputs(job.payload, agent.said["sees"], agent.said["module"])
        new = [spec for spec in inputs if spec["own"] or id(spec) not in agent.sent]
        agent.sent |= {id(spec) for spec in inputs if not spec["own"]}
        mine = {(spec["root"], entry[0]) for spec in inputs if spec["own"] for entry in spec["files"]}
        outputs = self._sources.outputs(job.payload)
        agent.running[job.id] = Running(slot.index, outputs, mine)
        there = dataclasses.replace(slot, index=agent.inner[slot.index]).to_json()
        known = {"run": job.id, "kind": job.kind, "payload": job.payload, "log": job.log, "env": dict(job.env)}
        cache = self._sources.cache(job.payload)
        agent.order(known | {"slot": there, "inputs": new, "outputs": outputs, "cache": cache})

    def poll(self, timeout: float) -> list[Event]:
        """What has happened; see the protocol.

        Raises:
            ExecutorError: If no node can run trials.
        """
        until = time.monotonic() + timeout
        while not self._closed:
            if time.monotonic() - self._looked >= _LOOK:
                self._look()
            due = self._answers.due()
            self._take_in()
            left = 0.0 if self._events else max(0.0, until - time.monotonic())
            self._events += self._here.poll(min(left, due, _LOOK), also=self._woken.fileno())
            self._take_in()
            if self._events or time.monotonic() >= until:
                break
        events = list(self._events)
        self._events.clear()
        if not events and self._refused and not self._agents and self._needs_more:
            raise ExecutorError(f"no node of the cluster can run trials: {next(iter(self._refused.values()))}")
        return events

    def need(self, more: bool) -> None:
        """Place agents while more trials could begin; give idle ones back to the cluster while none could."""
        if more and not self._needs_more:
            self._looked = 0.0  # at the next poll
        self._needs_more = more

    def send(self, job_id: str, body: Mapping[str, Any]) -> None:
        """Send a message to a job; nothing happens if it is gone."""
        if (agent := self._agent_of(job_id)) is None:
            return self._here.send(job_id, body)
        encode(body)
        agent.order({"send": job_id, "body": dict(body)})

    def kill(self, job_id: str) -> None:
        """End a job; see the protocol."""
        if (agent := self._agent_of(job_id)) is None:
            return self._here.kill(job_id)
        agent.order({"kill": job_id})

    def cpu_seconds(self, job_id: str) -> float | None:
        """CPU time of a job as its agent told it since the last question; None if it has not yet."""
        if (agent := self._agent_of(job_id)) is None:
            return self._here.cpu_seconds(job_id)
        job = agent.running[job_id]
        known, job.is_fresh = (job.seconds if job.is_fresh else None), False
        if not job.is_asked:
            job.is_asked = True
            agent.order({"usage": job_id})
        return known

    def has_begun(self, job_id: str) -> bool:
        """Whether a job's process is there: its files may have to be sent first."""
        if (agent := self._agent_of(job_id)) is None:
            return self._here.has_begun(job_id)
        return agent.running[job_id].has_begun

    def close(self) -> None:
        """End every agent, and with it every job of it. Their events are dropped."""
        if self._closed:
            return
        self._closed = True
        self._sources.close()
        with contextlib.suppress(Exception):
            if asked := [agent.handle.close.remote() for agent in self._agents if agent.said is not None]:
                ray.wait(asked, num_returns=len(asked), timeout=_LEAVING)
        for agent in self._agents:
            self._let_go(agent)
        self._agents, self._slots = [], None
        self._events.clear()
        self._wake.close()
        self._woken.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self, seconds: float) -> bool:
        """Wait until an agent is ready; whether one is. What happens meanwhile is kept for ``poll``.

        Raises:
            ExecutorError: If no node can run trials.
        """
        until, kept = time.monotonic() + seconds, list[Event]()
        while not self.slots and time.monotonic() < until:
            kept += self.poll(1.0)
        self._events.extendleft(reversed(kept))
        return bool(self.slots)

    # ── agents ───────────────────────────────────────────────────────────────────────────────────

    def _agent_of(self, job_id: str) -> AgentCalls | None:
        return next((agent for agent in self._agents if job_id in agent.running), None)

    def _look(self) -> None:
        """Place agents on what is free of the cluster, and on what is not they wait; or give idle ones back."""
        self._looked = now = time.monotonic()
        if not self._needs_more:
            for agent in [one for one in self._agents if not one.running and now - one.used > _IDLE]:
                self._give_back(agent)
            return
        usable = [
            node
            for node in ray.nodes()
            if node["Alive"]
            and node["NodeID"] not in self._refused
            and self._deaths.get(node["NodeID"], (0, 0.0))[1] <= now
        ]
        waiting = [agent for agent in self._agents if not agent.is_placed and now - agent.used > _QUEUED]
        if not waiting and not self._division.shares(usable, [agent.share for agent in self._agents]):
            return
        free = free_of_each(ray)
        others = [agent.share for agent in self._agents if agent not in waiting]
        for agent, _ in zip(waiting, self._division.shares(usable, others, free), strict=False):
            self._drop(agent)
        for room in (free, None):
            for share in self._division.shares(usable, [agent.share for agent in self._agents], room):
                self._place(share)

    def _place(self, share: Share) -> None:
        kept_to = NodeAffinitySchedulingStrategy(share.node, soft=False)
        made = self._actor.options(num_cpus=share.cpus, num_gpus=share.gpus, scheduling_strategy=kept_to)
        agent = AgentCalls(made.remote(), share, self._answers)
        self._agents.append(agent)
        setup = self._sources.setup() | {
            "source": source_digest(),
            "session": self._session,
            "share": {**dataclasses.asdict(share), "gpus": bool(share.gpus)},
            "environ": dict(self._environ),
            "executor": {**self._options, "template_threads": share.threads},
        }
        self._answers.bring(agent, "placed", agent.handle.__ray_ready__.remote())
        self._answers.bring(agent, "begin", agent.handle.begin.remote(setup, self._secrets))

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it is awake
            self._wake.send(b"x")

    def _take_in(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while (arrived := self._answers.take()) is not None:
            agent, what, future = arrived
            if what == "close":
                self._let_go(agent)
            if agent.is_gone:
                continue
            if (error := future.exception()) is not None:
                if not agent.may_return(what, error):
                    self._lose(agent, error)
            elif what == "placed":
                agent.is_placed = True
            elif what == "begin":
                self._began(agent, future.result())
            else:
                agent.heard(what, future.result())
                if what == "poll":
                    self._answered(agent, future.result())

    def _began(self, agent: AgentCalls, said: dict[str, Any]) -> None:
        if "error" in said:
            return self._give_up(agent, said["error"])
        agent.said, agent.used = said, time.monotonic()
        for name, own in versions().items():
            if (found := said["versions"].get(name)) != own:
                self._warn(f"{said['host']} has {name} {found}, and this machine has {own}: trials may differ by that")
        used = {index for other in self._agents for index in other.slots}
        free = (index for index in range(len(used) + len(said["slots"])) if index not in used)
        for slot in said["slots"]:
            index = next(free)
            agent.slots[index] = Slot(**slot | {"gpus": tuple(slot["gpus"]), "index": index})
            agent.inner[index] = slot["index"]
        self._slots = None
        agent.ask()

    def _lose(self, agent: AgentCalls, error: BaseException) -> None:
        """An agent is gone, and its jobs with it; another is placed when it is looked again."""
        self._drop(agent)
        node, why = agent.share.node, " ".join(str(error).split())
        is_there = any(one["NodeID"] == node and one["Alive"] for one in ray.nodes())
        is_taken = not is_there or bool(getattr(error, "preempted", False))
        if is_there:
            deaths = self._deaths.get(node, (0, 0.0))[0] + 1
            self._deaths[node] = deaths, time.monotonic() + _PAUSES[min(deaths, len(_PAUSES)) - 1]
            is_error = not isinstance(error, ray.exceptions.RayActorError) or "creation task" in why
            if agent.said is None and (is_error or deaths > len(_PAUSES)):
                self._refuse(node, f"could not start an agent ({why[-300:]})")
        self._events += [Lost(job, taken=is_taken) for job in agent.running]

    def _give_back(self, agent: AgentCalls) -> None:
        """End an idle agent in order, which removes what it has written on its node."""
        if agent.said is None:
            return self._drop(agent)
        self._forget(agent)
        self._answers.bring(agent, "close", agent.handle.close.remote())

    def _drop(self, agent: AgentCalls) -> None:
        self._forget(agent)
        self._let_go(agent)

    def _forget(self, agent: AgentCalls) -> None:
        agent.is_gone, self._slots = True, None
        self._agents.remove(agent)

    def _let_go(self, agent: AgentCalls) -> None:
        with contextlib.suppress(Exception):
            ray.kill(agent.handle)

    def _give_up(self, agent: AgentCalls, why: str) -> None:
        """No more trials on an agent's node."""
        self._drop(agent)
        self._refuse(agent.share.node, why)
        self._events += [Lost(job) for job in agent.running]

    def _refuse(self, node: str, why: str) -> None:
        where = next((one["NodeManagerHostname"] for one in ray.nodes() if one["NodeID"] == node), node)
        self._refused[node] = f"{where} {why}"
        self._warn(f"no trials run on {where}: it {why}")

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._events.append(Warned(text))

    # ── what agents tell ─────────────────────────────────────────────────────────────────────────

    def _answered(self, agent: AgentCalls, answers: list[tuple[dict[str, Any], bytes | None]]) -> None:
        for body, data in answers:
            if "warned" in body:
                self._warn(body["warned"])
            elif "fatal" in body:
                return self._give_up(agent, f"could not go on ({body['fatal']})")
            elif (job := agent.running.get(name := next(iter(body.values())))) is not None:
                self._told(agent, name, job, body, data or b"")
        agent.ask()

    def _told(self, agent: AgentCalls, name: str, job: Running, body: dict[str, Any], data: bytes) -> None:
        if "begun" in body:
            job.has_begun = True
        elif "usage" in body:
            job.seconds, job.is_fresh, job.is_asked = body["seconds"], True, False
        elif "file" in body:
            self._receive(job, body, data)
        elif "names" in body:
            if body["root"] in job.outputs:
                gone = {name for root, name in job.mine if root == body["root"]} - set(body["all"])
                mirror.forget(Path(body["root"]), gone)
        elif "message" in body:
            said = body["body"]
            if said.get("type") == "result" and job.broken is not None:
                said = died(name, job.broken).body
            self._events.append(Message(name, said))
        else:
            del agent.running[name]
            agent.used = time.monotonic()
            self._deaths.pop(agent.share.node, None)
            kind = Lost if "lost" in body else Exited
            self._events.append(kind(name, **body["known"]))

    def _receive(self, job: Running, body: dict[str, Any], data: bytes) -> None:
        try:
            if body["root"] not in job.outputs:
                raise ValueError(f"a file must be the trial's own, but lies in {body['root']}")
            mirror.receive(Path(body["root"]), body["name"], body["offset"], data, body["changed"])
            job.mine.add((body["root"], body["name"]))
        except (OSError, ValueError) as error:
            job.broken = f"a file of it could not be taken over: {error}"
