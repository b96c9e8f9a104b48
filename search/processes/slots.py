"""Which slot a trial gets: the free ones, and those that are kept empty around a trial that must be alone."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence

from search.executors import Slot


class Alone(enum.Enum):
    """With what a trial may not share: nothing else on its GPUs (of CPU slots: none at all), or on the machine."""

    DEVICE = "device"
    MACHINE = "machine"


class Slots:
    """The slots of an executor, given out and taken back.

    A trial that ran out of memory runs again with nothing beside it. While it waits for its neighbours to end,
    and while it runs, their slots are given to nobody.

    Args:
        slots: All of them.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._offered: Sequence[Slot] = ()
        self._slots: dict[int, Slot] = {}
        self._free: set[int] = set()
        self._busy: set[int] = set()
        self._sharing: Counter[tuple[str, str]] = Counter()  # how many slots have a GPU, by its machine and name
        self._kept: dict[int, frozenset[int]] = {}  # index of a slot with a trial that is alone, to those kept empty
        self._awaited: frozenset[int] = frozenset()  # slots that are being emptied
        self.offer(slots)

    def offer(self, slots: Sequence[Slot]) -> None:
        """These are all from now on, as where machines come and go; trials in slots that are gone may end there."""
        if slots is not self._offered and slots != self._offered:
            self._slots, self._awaited = {slot.index: slot for slot in slots}, frozenset()
            self._free = self._slots.keys() - self._busy
            self._sharing = Counter((slot.machine, gpu) for slot in slots for gpu in slot.gpus)
            self._offered = slots

    def take(self, alone: Alone | None = None) -> Slot | None:
        """A slot to run in, or None if there is none now.

        With ``alone``, a slot whose neighbours are all free; until that is so, they are emptied: whoever asks for
        one with ``alone`` has to ask again, and not for another way of being alone.
        """
        blocked = frozenset().union(*self._kept.values())
        if alone is None:
            usable = self._free - blocked - self._awaited
            if not usable:
                return None
            return self._given(min(usable))
        around = {slot.index: self._around(slot, alone) for slot in self._slots.values()}
        ready = [slot for slot in self._slots.values() if {slot.index, *around[slot.index]} <= self._free - blocked]
        if not ready:
            if not self._awaited and self._slots:
                least = min(self._slots.values(), key=lambda slot: (len(around[slot.index] - self._free), slot.index))
                self._awaited = around[least.index] | {least.index}
            return None
        chosen = ready[0]
        self._awaited = frozenset()
        self._kept[chosen.index] = around[chosen.index]
        return self._given(chosen.index).whole()

    def _given(self, index: int) -> Slot:
        self._free.remove(index)
        self._busy.add(index)
        return self._slots[index]

    def gpus(self, slot: Slot) -> float:
        """How many GPUs a trial in this slot has; of one that is shared, its share."""
        if slot.memory_share is None:
            return float(len(slot.gpus))
        return sum(1 / self._sharing[slot.machine, gpu] for gpu in slot.gpus)

    def give_back(self, slot: Slot) -> None:
        """The trial in this slot is over."""
        self._busy.discard(slot.index)
        if slot.index in self._slots:
            self._free.add(slot.index)
        self._kept.pop(slot.index, None)

    def _around(self, slot: Slot, alone: Alone) -> frozenset[int]:
        """Slots that share memory with this one."""
        everywhere = alone is Alone.MACHINE or not slot.gpus
        return frozenset(
            other.index
            for other in self._slots.values()
            if other.index != slot.index
            and other.machine == slot.machine
            and (everywhere or set(other.gpus) & set(slot.gpus))
        )
