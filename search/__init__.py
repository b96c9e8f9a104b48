"""Heldout: hyperparameter search for Keras that hands over a model with a score to believe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.definition.assets import cache_folder
    from search.definition.moving import OptunaTrial
    from search.definition.starting import init
    from search.ensembles.ensembling import ensemble
    from search.errors import (
        DamagedError,
        DataError,
        ExecutorError,
        HeldoutError,
        RequestError,
        SpaceError,
        StudyError,
        StudyFailed,
        TrackingError,
    )
    from search.guard.evaluation import evaluate
    from search.guard.ledger import Ledger
    from search.loop.stopping import stop
    from search.record.garbage import gc
    from search.record.lifecycle import delete
    from search.record.repairing import repair
    from search.rehearsal import check, try_params
    from search.reproduction import reproduce
    from search.resuming import resume
    from search.shown.comparison import compare
    from search.study import Study
    from search.study import names as studies
    from search.tiers.data import Dataset
    from search.tracker.board import tensorboard
    from search.tracker.ui import serve
    from search.wiring import launch

# Loaded when first used: `heldout --help` and a space module need none of the rest.
_HOME = {
    "Dataset": "tiers.data",
    "DamagedError": "errors",
    "DataError": "errors",
    "ExecutorError": "errors",
    "HeldoutError": "errors",
    "Ledger": "guard.ledger",
    "OptunaTrial": "definition.moving",
    "RequestError": "errors",
    "SpaceError": "errors",
    "Study": "study",
    "StudyError": "errors",
    "StudyFailed": "errors",
    "TrackingError": "errors",
    "cache_folder": "definition.assets",
    "check": "rehearsal",
    "compare": "shown.comparison",
    "delete": "record.lifecycle",
    "ensemble": "ensembles.ensembling",
    "evaluate": "guard.evaluation",
    "gc": "record.garbage",
    "init": "definition.starting",
    "launch": "wiring",
    "repair": "record.repairing",
    "resume": "resuming",
    "reproduce": "reproduction",
    "serve": "tracker.ui",
    "stop": "loop.stopping",
    "studies": "study",
    "tensorboard": "tracker.board",
    "try_params": "rehearsal",
}

__all__ = [
    "DamagedError",
    "DataError",
    "Dataset",
    "ExecutorError",
    "HeldoutError",
    "Ledger",
    "OptunaTrial",
    "RequestError",
    "SpaceError",
    "Study",
    "StudyError",
    "StudyFailed",
    "TrackingError",
    "cache_folder",
    "check",
    "compare",
    "delete",
    "ensemble",
    "evaluate",
    "gc",
    "init",
    "launch",
    "repair",
    "reproduce",
    "resume",
    "serve",
    "stop",
    "studies",
    "tensorboard",
    "try_params",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"search.{_HOME[name]}"), "names" if name == "studies" else name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
