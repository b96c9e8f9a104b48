"""The trial's side of pruning: at a rung it waits for the driver's word on whether to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Protocol


class Stopped(BaseException):
    """The driver's word that this trial is to stop early. No ``Exception``, which a module's own fit may catch."""


class Channel(Protocol):
    """What a trial needs of its connection to the driver."""

    def send(self, body: dict[str, Any]) -> None:
        """Send one JSON object."""

    def receive(self) -> dict[str, Any] | None:
        """What the driver sends, once it does. Where the driver is gone, so is this process."""


def asking(channel: Channel, rungs: Collection[int]) -> Callable[[dict[str, Any]], None]:
    """``channel.send`` that waits, at the report of an epoch that is a rung, for the driver's word.

    Not at the last epoch, after which there is nothing to save, nor at one whose loss is no number, which fails. A
    trial that goes on from a checkpoint reports its earlier epochs again, and asks again at their rungs.

    Args:
        rungs: Numbers of epochs.

    Raises:
        Stopped: By what it returns, where the word is to stop.
    """

    def send(body: dict[str, Any]) -> None:
        asks = body["type"] == "report" and body["step"] in rungs and body["step"] < body["of"]
        if not asks or math.isnan(body["metrics"].get("loss", 0.0)):
            channel.send(body)
            return
        channel.send({**body, "waits": True})
        if (channel.receive() or {}).get("stop"):
            raise Stopped

    return send
