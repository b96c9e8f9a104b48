"""The driver's end of one agent: numbered orders and questions, made again where a call did not get through."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from search.cluster.connecting import Share
from search.executors import Slot

_ASK = 30.0  # seconds that an agent waits with an answer, if nothing happens
_AGAIN = 0.5  # seconds until a call that did not get through is made again
_UNREACHABLE = 120.0  # seconds after which an agent that cannot be reached counts as dead


class Answers:
    """What agents answer, on its way from Ray's threads to the one that uses the executor.

    Args:
        ring: Wakes that thread.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._arrived: queue.SimpleQueue[tuple[AgentCalls, str, Any]] = queue.SimpleQueue()
        self._later: list[tuple[float, Callable[[], None]]] = []

    def bring(self, agent: AgentCalls, what: str, reference: Any) -> None:
        """Have the answer to a call brought to ``take``."""

        def arrived(future: Any) -> None:
            self._arrived.put((agent, what, future))
            self._ring()

        reference.future().add_done_callback(arrived)

    def take(self) -> tuple[AgentCalls, str, Any] | None:
        """The next one, or None: an agent, what it was asked, and the future that has its answer or an error."""
        try:
            return self._arrived.get_nowait()
        except queue.Empty:
            return None

    def later(self, act: Callable[[], None]) -> None:
        """Do something after a moment."""
        self._later.append((time.monotonic() + _AGAIN, act))

    def due(self) -> float:
        """Do what is due; seconds until there is more to do."""
        now = time.monotonic()
        acts = [act for at, act in self._later if at <= now]
        self._later = [(at, act) for at, act in self._later if at > now]
        for act in acts:
            act()
        return min((at - now for at, _ in self._later), default=60.0)


@dataclass
class Running:
    """A job on an agent.

    Attributes:
        slot: Its number here.
        outputs: Folders whose files come back.
        seconds: Of CPU time, as told last; is_fresh: since it was last asked for.
        mine: Root and name of files that came back, or were sent.
        broken: What went wrong with its files.
    """

    slot: int
    outputs: list[str]
    mine: set[tuple[str, str]]
    has_begun: bool = False
    seconds: float | None = None
    is_fresh: bool = False
    is_asked: bool = False
    broken: str | None = None


@dataclass(eq=False)
class AgentCalls:
    """One agent as the executor knows it.

    Attributes:
        said: What its ``begin`` said; None before.
        slots: Its slots, by the number that they have here; inner: their numbers there.
        sent: Files that its node has.
        is_placed: Whether a node has had room for it.
        used: When it was asked for, was ready, or ended a trial last, by the monotonic clock.
        is_gone: Whether it counts as dead; what it still says is not heard.
    """

    handle: Any
    share: Share
    answers: Answers
    said: dict[str, Any] | None = None
    slots: dict[int, Slot] = field(default_factory=dict)
    inner: dict[int, int] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)
    is_placed: bool = False
    used: float = field(default_factory=time.monotonic)
    is_gone: bool = False
    _orders: deque[dict[str, Any]] = field(default_factory=deque)  # not acknowledged yet
    _acknowledged: int = 0
    _is_ordering: bool = False
    _asked: int = 1
    _away_since: float | None = None

    def order(self, order: dict[str, Any]) -> None:
        """Give an order; those before it are carried out first."""
        self._orders.append(order)
        self._hand_over()

    def _hand_over(self) -> None:
        if self._orders and not self._is_ordering and not self.is_gone:
            self._is_ordering = True
            call = self.handle.order.options(concurrency_group="order")
            self.answers.bring(self, "order", call.remote(self._acknowledged + 1, list(self._orders)))

    def ask(self) -> None:
        """Ask for what happens next."""
        if not self.is_gone:
            call = self.handle.poll.options(concurrency_group="poll")
            self.answers.bring(self, "poll", call.remote(self._asked, _ASK))

    def heard(self, what: str, answer: Any) -> None:
        """Take note of an answer to ``order`` or ``poll``."""
        self._away_since = None
        if what == "poll":
            self._asked += 1
            return
        while self._acknowledged < answer:
            self._orders.popleft()
            self._acknowledged += 1
        self._is_ordering = False
        self._hand_over()

    def may_return(self, what: str, error: BaseException) -> bool:
        """After a call that failed: whether the agent may be there all the same. The call is made again then."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        if not isinstance(error, ray.exceptions.ActorUnavailableError) or now - self._away_since > _UNREACHABLE:
            return False
        if what == "order":
            self._is_ordering = False
            self.answers.later(self._hand_over)
        elif what == "poll":
            self.answers.later(self.ask)
        return what in ("order", "poll")
