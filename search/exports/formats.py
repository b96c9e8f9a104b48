"""Files that a model is exported as: writing each, and predicting with the written file itself to see that it holds.

Keras writes all of them (``model.save`` and ``model.export``). What a file predicts is asked of the program that users
of the file will have: TensorFlow's loader, ONNX Runtime, LiteRT's interpreter.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search.definition.problem import first_line
from search.errors import RequestError

FILES = {"keras": "model.keras", "saved_model": "saved_model", "onnx": "model.onnx", "litert": "model.tflite"}
"""What each format is written as; ``keras`` is there with each of the others."""

ROWS = 32
TOLERANCE = 1e-4
"""Largest difference between two files' predictions, relative to those that exceed 1: float32 sums in another order."""

_KERAS_NAMES = {"saved_model": "tf_saved_model"}
_NEEDS = {"onnx": ("tf2onnx", "onnx", "onnxruntime"), "litert": ("ai_edge_litert",)}


def check_installed(format: str) -> None:
    """See that a format can be written and read here, before anything is trained or built for it.

    Raises:
        RequestError: If there is no such format, or what it needs is not installed; with the extra that has it.
    """
    if format not in FILES:
        raise RequestError(f"--format must be one of {', '.join(FILES)}, but got {format!r}")
    missing = [name for name in _NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(
            f"--format {format} needs {' and '.join(missing)}, which must be installed first: "
            f"pip install 'heldout[{format}]'"
        )


def read_again(model: Any, path: Path, rows: Any) -> dict[str, Any]:
    """Load a ``.keras`` file that was just written from a model, and compare; see ``checked``."""
    import keras

    from search.harness import training

    some = _some(rows)
    read = keras.models.load_model(path, compile=False)
    return checked(training.predict(model, some), training.predict(read, some), path.name)


def convert(source: Path, path: Path, format: str, rows: Any) -> dict[str, Any]:
    """Write a ``.keras`` file in another format, run that on some rows, and compare; see ``checked``.

    Raises:
        RequestError: If Keras cannot write this model so, or the file predicts something else.
    """
    import keras

    from search.harness import training

    model, some = keras.models.load_model(source, compile=False), _some(rows)
    write(model, path, format)
    return checked(training.predict(model, some), predict(model, path, format, some), path.name)


def _some(rows: Any) -> Any:
    """The train rows that files are compared on: ``ROWS`` of them, or all there are."""
    from search.harness import feeding

    index = np.arange(min(ROWS, rows.size("train")))
    return feeding.as_fed(feeding.joined(rows, "train", None, index))


def write(model: Any, path: Path, format: str) -> None:
    """Write a model that was loaded from its ``.keras`` file in another format.

    Raises:
        RequestError: If Keras cannot: not every layer has a counterpart in every format.
    """
    try:
        with _quiet():
            _predicting(model).export(str(path), format=_KERAS_NAMES.get(format, format), verbose=False)
    except Exception as error:
        raise RequestError(
            f"this model must be one that Keras can write as {format}, but it is not "
            f"({type(error).__name__}: {first_line(error)}); leave --format out for model.keras alone"
        ) from error


def _predicting(model: Any) -> Any:
    """The model as it predicts: Keras exports what a call without ``training`` does, and augmentation takes that for
    training."""
    import keras

    inputs = [keras.Input(part.shape[1:], dtype=part.dtype, name=part.name) for part in model.inputs]
    given = keras.tree.pack_sequence_as(_structure(model), inputs)
    predicting = keras.Model(given, model(given, training=False), name=f"{model.name}_predicting")
    predicting(given)  # or Keras refuses to export it as ONNX
    return predicting


def _structure(model: Any) -> Any:
    """The symbolic inputs in their structure; every exported model is functional."""
    from search.scorer.declaration import ends

    known = ends(model)
    assert known is not None
    return known[0]


def checked(expected: Sequence[np.ndarray], got: Sequence[np.ndarray], name: str) -> dict[str, Any]:
    """How far a written file's predictions are from those of the model that it was written from.

    Args:
        expected: One array for each output, the rows first; got: the same of the file.
        name: The file's.

    Returns:
        ``rows``, and ``largest_difference``: relative where a prediction exceeds 1, else absolute.

    Raises:
        RequestError: If one differs by more than ``TOLERANCE``, or there are other outputs.
    """
    shapes, found = [part.shape for part in expected], [part.shape for part in got]
    if shapes != found:
        raise RequestError(f"{name} must predict arrays of shapes {shapes}, as the model does, but predicts {found}")
    largest = max((_difference(one, other) for one, other in zip(expected, got, strict=True)), default=0.0)
    rows = len(expected[0]) if expected else 0
    if not largest <= TOLERANCE:
        raise RequestError(
            f"{name} must predict what the model predicts, but on {rows} rows it is off by up to {largest:.2g} "
            f"({TOLERANCE:g} is allowed); nothing was exported, choose another --format"
        )
    return {"rows": rows, "largest_difference": largest}


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest; NaN counts as equal to NaN alone."""
    if one.dtype.kind not in "fiub" or other.dtype.kind not in "fiub":
        return 0.0 if np.array_equal(one, other) else np.inf
    wide, read = one.astype(np.float64), other.astype(np.float64)
    same = (wide == read) | (np.isnan(wide) & np.isnan(read))
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(wide - read) / np.maximum(1.0, np.abs(wide)))
    return float(np.max(np.where(np.isnan(off), np.inf, off), initial=0.0))


def predict(model: Any, path: Path, format: str, features: Any) -> list[np.ndarray]:
    """Predict with a written file itself.

    Args:
        model: That the file was written from: what its inputs are called, and of what type they are.
        features: Rows as ``load()`` gave them, in one of the structures that the model takes.

    Returns:
        One array for each output, in the order of flattened predictions.

    Raises:
        RequestError: If the file cannot be read or run.
    """
    try:
        with _quiet():
            return _READERS[format](model, path, fed(model, features))
    except Exception as error:
        raise RequestError(
            f"this model must be one that runs as {format}, but Keras wrote a {path.name} that does not "
            f"({type(error).__name__}: {first_line(error)}); nothing was exported, choose another --format"
        ) from error


def fed(model: Any, features: Any) -> list[np.ndarray]:
    """One array for each input of a functional model, in its order and of its type.

    Keras does this for itself; other programs want to be given exactly what they declare.
    """
    import keras

    if isinstance(features, dict):
        features = [features[name] for name in _names(model)]
    arrays = keras.tree.flatten(features)
    out = []
    for part, array in zip(model.inputs, arrays, strict=True):
        array = np.asarray(array) if part.dtype == "string" else np.asarray(array).astype(part.dtype)
        out.append(array[..., None] if array.ndim == len(part.shape) - 1 else array)
    return out


def _names(model: Any) -> list[str]:
    """What the inputs are called by those who feed the model, in its order."""
    structure = _structure(model)
    return sorted(structure) if isinstance(structure, dict) else [part.name for part in model.inputs]


def _by_name(model: Any, wanted: Sequence[str], arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays for a file's inputs, which need not be in the model's order; a single one may have any name."""
    known = dict(zip(_names(model), arrays, strict=True))
    if len(wanted) == 1 == len(arrays):
        return {wanted[0]: arrays[0]}
    return {name: known[name.split(":")[0]] for name in wanted}


def _saved_model(model: Any, path: Path, arrays: list[np.ndarray]) -> list[np.ndarray]:
    import keras
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    given = keras.tree.pack_sequence_as(_structure(model), [tf.constant(array) for array in arrays])
    return [np.asarray(part) for part in keras.tree.flatten(loaded.serve(given))]


def _onnx(model: Any, path: Path, arrays: list[np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = _by_name(model, [part.name for part in session.get_inputs()], arrays)
    return [np.asarray(part) for part in session.run(None, given)]


def _litert(model: Any, path: Path, arrays: list[np.ndarray]) -> list[np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    run = interpreter.get_signature_runner()
    out = run(**_by_name(model, list(run.get_input_details()), arrays))
    # Called output_0, output_1, … or by their names in a dict, either way in the order of flattened predictions.
    numbered = all(re.fullmatch(r"output_\d+", name) for name in out)
    return [np.array(out[name]) for name in sorted(out, key=(lambda name: int(name[7:])) if numbered else None)]


_READERS: dict[str, Callable[[Any, Path, list[np.ndarray]], list[np.ndarray]]] = {
    "saved_model": _saved_model,
    "onnx": _onnx,
    "litert": _litert,
}


def _quiet() -> warnings.catch_warnings:
    """Converters warn of their own code, which is not ours or the user's to mend; results are checked."""
    return warnings.catch_warnings(action="ignore")
