"""What a compiled model says of itself: its ends, its outputs, and the losses and metrics that they are held to."""

from __future__ import annotations

import re
from typing import Any

import keras


def ends(model: keras.Model) -> tuple[Any, Any] | None:
    """The symbolic inputs and outputs of a model in their structure; None for a subclassed one, which has none."""
    if isinstance(model, keras.Sequential):  # one that was never called refuses `input`
        return (model.inputs[0], model.outputs[0]) if model.built else None
    try:
        return model.input, model.output
    except (AttributeError, ValueError):
        return None


def output_names(model: keras.Model) -> list[str]:
    """Names of the outputs as Keras reports them, in the order of flattened predictions."""
    known = ends(model)
    if known is not None and isinstance(known[1], dict):
        return sorted(known[1])
    return list(getattr(model, "output_names", ["output"]))  # a Sequential has no names, and one output


def declare(model: keras.Model) -> dict[str, Any]:
    """What the scorer needs to know of a compiled model, as JSON (see ``scoring``)."""
    names = output_names(model)
    config = model.get_compile_config() if model.compiled else {}
    losses = _per_output(config.get("loss"), names)
    weights = _per_output(config.get("loss_weights"), names, share=False)
    outputs = []
    shapes = _output_shapes(model, names)
    for name, loss, weight, shape in zip(names, losses, weights, shapes, strict=True):
        kind, settings = _described(loss)
        outputs.append(
            {
                "name": name,
                "loss": kind,
                "from_logits": bool(settings.get("from_logits", False)),
                "label_smoothing": float(settings.get("label_smoothing", 0.0) or 0.0),
                "weight": 1.0 if weight is None else float(weight),
                "shape": shape,
                "config": settings,
            }
        )
    metrics = []
    for part in ("metrics", "weighted_metrics"):
        for name, wanted in zip(names, _per_output(config.get(part), names, many=True), strict=True):
            for one in wanted or []:
                kind, settings = _described(one)
                reported = settings.get("name") or (one if isinstance(one, str) else kind)
                prefix = f"{name}_" if len(names) > 1 else ""
                metrics.append(
                    {
                        "output": name,
                        "name": f"{prefix}{reported}",
                        "kind": kind or "custom",
                        "config": settings,
                    }
                )
    return {"outputs": outputs, "metrics": metrics}


def _output_shapes(model: keras.Model, names: list[str]) -> list[list[int | None]]:
    known = ends(model)
    if known is None:
        return [[None]] * len(names)
    out = known[1]
    parts = [out[name] for name in names] if isinstance(out, dict) else out if isinstance(out, list | tuple) else [out]
    return [list(part.shape) for part in parts]


def _per_output(given: Any, names: list[str], many: bool = False, share: bool = True) -> list[Any]:
    """Spread a compile argument (one, a list, or a dict) over the outputs, the way Keras does."""
    serialized = isinstance(given, dict) and "class_name" in given
    if isinstance(given, dict) and not serialized:
        return [_as_list(given.get(name)) if many else given.get(name) for name in names]
    if isinstance(given, list | tuple):
        if many and (len(names) == 1 or not any(isinstance(item, list | tuple) for item in given)):
            return [list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)] * len(
                names
            )
        if len(given) == len(names):
            return [_as_list(item) if many else item for item in given]
    value = _as_list(given) if many else given
    return [value] * len(names) if share or len(names) == 1 else [value] + [None] * (len(names) - 1)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _described(item: Any) -> tuple[str | None, dict[str, Any]]:
    """Snake-case name and config of a loss or metric; the name is None for one of the user's own."""
    if item is None:
        return None, {}
    if isinstance(item, str):
        return item, {}
    config = item.get("config")
    module = item.get("module") or ""
    plain = (bool, int, float, str, list)
    settings = {k: v for k, v in config.items() if isinstance(v, plain)} if isinstance(config, dict) else {}
    if item.get("registered_name") not in (None, item.get("class_name")) or not module.startswith("keras"):
        name = config if isinstance(config, str) else item.get("class_name")
        known = module == "builtins" and isinstance(name, str) and hasattr(keras.losses, name)
        return (name if known else None), {"name": name} | settings
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", item["class_name"]).lower(), settings
