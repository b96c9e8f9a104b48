"""Slots: given out one by one, and kept empty around a trial that must be alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from search.executors import MEMORY_FRACTION, Slot
from search.processes.slots import Alone, Slots

CPUS = [Slot(n, 1) for n in range(3)]
# Two GPUs, each shared by two trials.
SHARED = [
    Slot(n, 1, {MEMORY_FRACTION: "0.45", "X": "1"}, (f"GPU-{n % 2}",), memory_share=0.5, memory_mib=100)
    for n in range(4)
]


def test_slots_are_given_in_order_until_none_is_left() -> None:
    seats = Slots(CPUS)
    assert [slot.index for slot in iter(seats.take, None)] == [0, 1, 2]
    seats.give_back(CPUS[1])
    assert seats.take() == CPUS[1]


def test_a_trial_that_must_be_alone_waits_until_its_neighbours_have_ended() -> None:
    seats = Slots(CPUS)
    first, second = seats.take(), seats.take()
    assert first is not None and second is not None
    assert seats.take(Alone.MACHINE) is None
    assert seats.take() is None  # the third slot is free, but must not be filled meanwhile
    seats.give_back(first)
    assert seats.take(Alone.MACHINE) is None and seats.take() is None
    seats.give_back(second)
    alone = seats.take(Alone.MACHINE)
    assert alone is not None
    assert seats.take() is None  # nothing beside it
    seats.give_back(alone)
    assert len(list(iter(seats.take, None))) == 3


def test_alone_on_its_gpu_leaves_the_other_gpu_to_others_and_gets_all_of_its_memory() -> None:
    seats = Slots(SHARED)
    taken = [seats.take() for _ in range(4)]
    assert seats.take(Alone.DEVICE) is None
    for slot in taken[:2]:  # one trial on each GPU ends
        assert slot is not None
        seats.give_back(slot)
    assert seats.take(Alone.DEVICE) is None
    assert taken[2] is not None
    seats.give_back(taken[2])  # now the first GPU is empty
    alone = seats.take(Alone.DEVICE)
    assert alone is not None and alone.gpus == ("GPU-0",)
    assert (alone.memory_share, alone.memory_mib, alone.env) == (None, None, {"X": "1"})
    other = seats.take()
    assert other is not None and other.gpus == ("GPU-1",)
    assert seats.take() is None


@given(st.data(), st.sampled_from([CPUS, SHARED, SHARED[:1]]))
def test_no_slot_is_given_twice_and_nothing_runs_beside_a_lone_trial(data: st.DataObject, slots: list[Slot]) -> None:
    seats = Slots(slots)
    running: dict[int, Alone | None] = {}
    wanted: Alone | None = None  # the first in the queue keeps its wish until it is served
    for _ in range(data.draw(st.integers(1, 30))):
        if running and data.draw(st.booleans()):
            index = data.draw(st.sampled_from(sorted(running)))
            del running[index]
            seats.give_back(slots[index])
            continue
        if wanted is None:
            wanted = data.draw(st.sampled_from([None, Alone.DEVICE, Alone.MACHINE]))
        slot = seats.take(wanted)
        if slot is None:
            # Only so long as something runs: with all slots free everybody is served.
            assert running
            continue
        assert slot.index not in running
        running[slot.index] = wanted
        wanted = None
        for index, alone in running.items():
            others = [slots[n] for n in running if n != index]
            if alone is Alone.MACHINE:
                assert not others
            elif alone is Alone.DEVICE and slots[index].gpus:
                assert not any(set(other.gpus) & set(slots[index].gpus) for other in others)
