"""Scoring by a metric that only Keras knows: the compiled metric object over saved predictions."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from search.definition.problem import SpaceModule
from search.definition.tracing import TracingHyperParameters
from search.errors import SpaceError
from search.harness import training
from search.scorer import scoring
from search.scorer.declaration import output_names
from search.tiers.data import load_structure


def score(payload: dict[str, Any], module: SpaceModule) -> dict[str, Any]:
    """Values of the objective's own Keras metric or loss for several sets of rows.

    Args:
        payload: ``objective``; ``sets``: name to ``predictions`` (paths, one per output) and ``labels``
            (a structure of paths, see ``data.load_structure``).
        module: The executed space module, whose default model brings the metric.

    Returns:
        ``values``: name to value. NaN for a set named "guard" that the metric raises an error on: guard labels
        do not decide whether a trial failed.
    """
    keras.utils.clear_session()  # in the process of `heldout try` a trial's model has taken the metrics' names
    keras.utils.set_random_seed(0)
    model = training.build(module, TracingHyperParameters(None, 0, True))
    names = output_names(model)
    values = {}
    for name, paths in payload["sets"].items():
        predicted = [np.load(path, allow_pickle=False) for path in paths["predictions"]]
        labels = scoring.in_order(load_structure(paths["labels"]), names)
        try:
            values[name] = _value(model, payload["objective"].removeprefix("val_"), names, predicted, labels)
        except Exception:
            if name != "guard":
                raise
            values[name] = float("nan")
    return {"values": values}


def _value(model: keras.Model, wanted: str, names: list[str], predicted: list[Any], labels: list[Any]) -> float:
    several = len(names) > 1
    y_true: Any = dict(zip(names, labels, strict=True)) if several else labels[0]
    y_pred: Any = dict(zip(names, predicted, strict=True)) if several else predicted[0]
    if several and not isinstance(model.output, dict):
        y_true, y_pred = labels, predicted
    model.reset_metrics()
    # First the loss, which fills in those of the single outputs.
    loss = float(model.compute_loss(y=y_true, y_pred=y_pred, training=False))
    if wanted == "loss":
        # Penalties on weights are not part of a score: they would be those of the default model's first weights.
        return loss - float(sum(float(penalty) for penalty in model.losses))
    result = keras.tree.map_structure(float, model.compute_metrics(None, y_true, y_pred))
    if wanted not in result:
        raise SpaceError(f"the default model does not report {wanted!r}; it reports {', '.join(result)}")
    return float(result[wanted])
