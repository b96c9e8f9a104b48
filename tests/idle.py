"""What trials run that do nothing: they ask for one parameter and say a score. Imports nothing but the engine."""

from __future__ import annotations

from typing import Any

from search.definition.space import Domain, Parameter, Space
from search.processes.channel import Channel

RATE = Parameter("rate", "rate", (), Domain("float", 0.0, 1.0, default=0.5))


def main(job: dict[str, Any], channel: Channel) -> None:
    """One job of a study, as ``search.harness.worker`` would answer it."""
    payload = job["payload"]
    rate = (payload.get("proposal") or {}).get(RATE.identity, 0.5)
    asks = [{**RATE.to_json(), "value": rate}]
    if job["kind"] == "discover":
        channel.send({"type": "result", "space": Space.empty().grown(asks).to_json(), "complete": True})
        return
    if payload["number"] == 0:
        channel.send({"type": "preflight", "asks": asks})
    channel.send({"type": "report", "step": 1, "metrics": {"loss": rate}})
    told = {"epochs": 1, "best_epoch": 1, "size": 1, "weights": "", "reported": {}, "devices": [], "declaration": {}}
    channel.send({"type": "result", "asks": asks, "score": rate, **told})
