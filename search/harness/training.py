"""Build, fit and predict: everything of a trial that touches Keras."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search.definition.problem import DEFAULT_EPOCHS, SpaceModule, first_line
from search.definition.tracing import TracingHyperParameters
from search.errors import SpaceError, TrialFailed
from search.harness import eventlog, fused, own_fit
from search.harness.best_epoch import BestEpoch
from search.harness.checkpoints import Checkpoints
from search.harness.feeding import Weighted, batches, joined, targets
from search.scorer.declaration import ends
from search.scorer.scoring import in_order
from search.tiers.data import OpenRows

DEFAULT_BATCH = 32
_MOST_STEPS_AT_ONCE = 1000
_EAGER_BATCHES = 4
_PREDICT_STEP = keras.Model.predict_step
_CHOOSE_AN_EPOCH = (keras.callbacks.EarlyStopping, keras.callbacks.ModelCheckpoint)
_NEVER = 2**31  # a patience that no training uses up
_CHANGE_THE_RATE = (keras.callbacks.ReduceLROnPlateau, keras.callbacks.LearningRateScheduler)


@dataclass(frozen=True)
class Fitted:
    """What is known of a model after training, its chosen weights in place.

    Attributes:
        epochs: Epochs finished.
        best_epoch: Epoch of the chosen weights, from 1, or None if training reported no objective.
        reported: Keras' own logs at that epoch, for comparison; the score is the scorer's.
    """

    epochs: int
    best_epoch: int | None
    reported: Mapping[str, float]


def build(module: SpaceModule, hp: TracingHyperParameters) -> keras.Model:
    """The module's compiled model for ``hp``; call it once per process, since metric names drift on a second build.

    Raises:
        TrialFailed: ``invalid`` if ``build`` raised.
        SpaceError: If it returned something else than a compiled Keras model.
    """
    try:
        model = module.build(hp)
    except (SpaceError, MemoryError):
        raise
    except Exception as error:
        hp.explain(error)
        raise TrialFailed(
            "invalid", f"{module.line(error)}: build(hp) raised {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(model, keras.Model):
        raise SpaceError(
            f"{module.problem.path}: build(hp) must return a keras.Model, but returned "
            f"{type(model).__name__}; add `return model`"
        )
    if not model.compiled:
        raise SpaceError(
            f"{module.problem.path}: build(hp) must return a compiled model; add "
            "`model.compile(optimizer=..., loss=..., metrics=[...])` before the return"
        )
    return model


class Reporter(keras.callbacks.Callback):
    """Sends Keras' logs after every epoch and ends the trial when the loss is not a number.

    Args:
        send: May wait there for the driver, and may raise to end the training.
        most: Epochs that there can be.

    Attributes:
        rates: Also reports the learning rate of each epoch, as the callbacks that change it do after us.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], most: int) -> None:
        super().__init__()
        self.rates = False
        self.epochs: list[dict[str, float]] = []
        self._send, self._most = send, most

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Report one epoch."""
        metrics = {name: float(value) for name, value in (logs or {}).items() if np.ndim(value) == 0}
        if self.rates:
            metrics["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.epochs.append(metrics)
        self._report(len(self.epochs), metrics)
        if math.isnan(metrics.get("loss", 0.0)):
            raise TrialFailed(
                "nan", f"the training loss became NaN in epoch {len(self.epochs)}; try a lower learning rate"
            )

    def again(self) -> None:
        """Report the epochs of an earlier attempt, so that the record of the one that goes on is whole."""
        for step, metrics in enumerate(self.epochs, start=1):
            self._report(step, metrics)

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._send({"type": "report", "step": step, "of": self._most, "metrics": metrics})


def fit(
    module: SpaceModule,
    model: keras.Model,
    hp: TracingHyperParameters,
    rows: OpenRows,
    preprocess: keras.Model | None,
    *,
    objective: str,
    direction: str,
    epochs: int | None,
    budget: int,
    seed: int,
    send: Callable[[dict[str, Any]], None],
    keep_last: bool = False,
    checkpoint: tuple[Path, float] | None = None,
    events: Path | None = None,
) -> Fitted:
    """Train ``model`` on the train rows and leave the chosen epoch's weights in it.

    The chosen epoch is the best by ``objective`` on validation rows. Guard and test rows are not
    touched here.

    Args:
        epochs: Overrides the number of epochs of the module and of ``hp``.
        budget: Bytes of rows that may be copied into this process; larger data are gathered from
            the memory map batch by batch.
        keep_last: Train all epochs and keep the last one's weights, for a refit: its validation rows are trained
            on, so they can choose no epoch, for us or for callbacks of the module.
        checkpoint: The trial's folder, and minutes between checkpoints in it; training goes on from one that is
            there. None neither makes nor uses any.
        events: Folder for TensorBoard's logs, or None.
    """
    most = epochs or int(hp.values.get("epochs", module.epochs or DEFAULT_EPOCHS))
    batch = int(hp.values.get("batch_size", DEFAULT_BATCH))
    own = module.fit
    reporter = Reporter(send, most)
    patience = max(10, most // 5) if own is None else _NEVER
    stopping = BestEpoch(lambda: len(reporter.epochs), monitor=objective, mode=direction, patience=patience)
    callbacks = [reporter, stopping, *module.callbacks(hp)]
    reporter.rates = any(isinstance(callback, _CHANGE_THE_RATE) for callback in callbacks)
    if events is not None:
        callbacks.append(eventlog.EventLog(events, hp.values, lambda: reporter.epochs))
    if keep_last:
        callbacks = [callback for callback in callbacks if not isinstance(callback, _CHOOSE_AN_EPOCH)]
    first: Callable[[], int] = lambda: 0  # noqa: E731
    if checkpoint is not None:
        keeper = Checkpoints(*checkpoint, callbacks, lambda: _identity(module, hp, seed, most), reporter.again)
        callbacks, first = [*callbacks, keeper], lambda: keeper.epoch
    if (wanted := module.class_weight(hp)) is not None:
        rows = Weighted(rows, wanted, module.problem.path)
    keras.utils.set_random_seed(seed)
    if own is not None:
        _fit_by_module(own, hp, model, rows, preprocess, budget, batch, most, callbacks, seed, first, epochs, reporter)
        if not keep_last:
            stopping.restore()
    elif fused.usable(model, callbacks) and rows.nbytes("train") + rows.nbytes("validation") <= budget:
        train = (joined(rows, "train", preprocess), *targets(rows, "train"))
        held = (joined(rows, "validation", preprocess), *targets(rows, "validation"))
        options: dict[str, Any] = {"epochs": most, "callbacks": callbacks, "first": first}
        fused.fit(model, train, held, batch=batch, large=_large(rows), seed=seed, **options)
    else:
        _fit_by_batches(model, rows, preprocess, budget, batch, most, callbacks, seed, first)
    chosen = not keep_last and reporter.epochs and objective in reporter.epochs[-1]
    at = stopping.at if chosen else None
    reported = reporter.epochs[at - 1 if at is not None else -1] if reporter.epochs else {}
    return Fitted(len(reporter.epochs), at, reported)


def _identity(module: SpaceModule, hp: TracingHyperParameters, seed: int, epochs: int) -> list[Any]:
    """What tells a training from any other, in JSON."""
    return [module.problem.digest, hp.asks, seed, epochs]


def _fit_by_batches(
    model: keras.Model,
    rows: OpenRows,
    preprocess: keras.Model | None,
    budget: int,
    batch: int,
    epochs: int,
    callbacks: list[Any],
    seed: int,
    first: Callable[[], int],
) -> None:
    """The ordinary ``fit``, for what cannot run an epoch in one call."""
    if model.built:
        # Variables that appear while a function is traced make TensorFlow trace it twice.
        model.optimizer.build(model.trainable_variables)
    train = batches(rows, "train", preprocess, batch=batch, budget=budget, seed=seed, first=first)
    validation = batches(rows, "validation", preprocess, batch=_large(rows), budget=budget)
    steps = math.ceil(rows.size("train") / batch)
    _run_whole_epochs(model, steps, callbacks)
    endless = not isinstance(train, keras.utils.PyDataset)
    # The batches come shuffled; asking Keras to shuffle them again would only make it warn.
    model.fit(
        train,
        validation_data=validation,
        epochs=epochs,
        steps_per_epoch=steps if endless else None,
        callbacks=callbacks,
        shuffle=False,
        verbose=0,
    )


def _fit_by_module(
    own: Callable[..., Any],
    hp: TracingHyperParameters,
    model: keras.Model,
    rows: OpenRows,
    preprocess: keras.Model | None,
    budget: int,
    batch: int,
    epochs: int,
    callbacks: list[Any],
    seed: int,
    first: Callable[[], int],
    limit: int | None,
    reporter: Reporter,
) -> None:
    """Call the module's own fit the way KerasTuner does: ``fit(hp, model, x, y, validation_data=…, …)``."""
    if rows.nbytes("train") + rows.nbytes("validation") <= budget:
        data: tuple[Any, ...] = (joined(rows, "train", preprocess), rows.labels("train"))
        validation: Any = (joined(rows, "validation", preprocess), rows.labels("validation"))
    else:
        # With an end, since it may not tell Keras how many make an epoch.
        train = batches(rows, "train", preprocess, batch=batch, budget=budget, seed=seed, first=first, endless=False)
        data = (train,)
        validation = batches(rows, "validation", preprocess, batch=_large(rows), budget=budget)
    weights = rows.weights()
    given: dict[str, Any] = {"sample_weight": weights} if weights is not None and len(data) == 2 else {}
    given |= {"validation_data": validation, "epochs": epochs, "callbacks": callbacks, "verbose": 0}
    own_fit.call(own, hp, model, data, given, limit, lambda: len(reporter.epochs))


def _run_whole_epochs(model: keras.Model, steps: int, callbacks: Sequence[Any]) -> None:
    """Let one call of the compiled function run a whole epoch, where nothing needs to see single batches.

    The functions are reset because one that was compiled before would keep its old number of steps
    and silently train on a part of the rows.
    """
    by_batch = any(fused.watches_batches(callback) for callback in callbacks)
    if keras.backend.backend() != "torch":
        model.steps_per_execution = 1 if by_batch else max(1, min(steps, _MOST_STEPS_AT_ONCE))
    forget_functions(model)


def forget_functions(model: keras.Model) -> None:
    """Make Keras compile its functions anew, with the current number of steps."""
    model.train_function = None
    model.test_function = None
    model.predict_function = None


def _large(rows: OpenRows) -> int:
    """A batch for validation after every epoch."""
    return _rows_in(64 << 20, rows.nbytes("validation") / max(1, rows.size("validation")))


def _rows_in(room: int, bytes_per_row: float) -> int:
    return int(min(1024, max(32, room // max(1, bytes_per_row))))


def predict_batch(features: Any) -> int:
    """Rows per prediction batch: large, but under about 64 MiB of features.

    Sums of floats depend on the batch a little, so an export records this number.
    """
    leaves = keras.tree.flatten(features)
    return _rows_in(64 << 20, sum(int(np.prod(leaf.shape[1:])) * 8 for leaf in leaves))


def predict(model: keras.Model, features: Any) -> list[np.ndarray]:
    """Predictions for rows in memory, one array per output in the order of ``output_names``.

    Raises:
        TrialFailed: ``invalid`` if the model returns another number of rows than it was given.
    """
    count = len(keras.tree.flatten(features)[0])
    batch = predict_batch(features)
    if count <= _EAGER_BATCHES * batch and type(model).predict_step is _PREDICT_STEP:
        # Compiling a function for a handful of batches costs more than running them without one.
        parts = [_eagerly(model, features, slice(at, at + batch)) for at in range(0, count, batch)]
        out = keras.tree.map_structure(lambda *pieces: np.concatenate(pieces), *parts)
    else:
        if keras.backend.backend() != "torch":
            model.steps_per_execution = 1
        forget_functions(model)
        out = model.predict(features, batch_size=batch, verbose=0)
    arrays = in_order(out, sorted(out) if isinstance(out, dict) else [])
    for part in arrays:
        if len(part) != count:
            raise TrialFailed(
                "invalid", f"the model must return one row per example, but returned {len(part)} rows for {count}"
            )
    return arrays


def _eagerly(model: keras.Model, features: Any, rows: slice) -> Any:
    out = model(keras.tree.map_structure(lambda part: part[rows], features), training=False)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, out)


def compose(model: keras.Model, preprocess: keras.Model | None, spec: Mapping[str, Any]) -> keras.Model:
    """One model from raw features to predictions, without losses or metrics.

    Args:
        spec: The manifest's description of x: kind, names, shapes (with the number of rows first), dtypes.
    """
    known = ends(model)
    if preprocess is None and known is not None:
        return keras.Model(*known, name=model.name)
    inputs = [
        keras.Input(shape[1:], dtype="string" if dtype.startswith("<U") else dtype, name=name)
        for name, shape, dtype in zip(spec["names"], spec["shapes"], spec["dtypes"], strict=True)
    ]
    given: Any = (
        inputs[0]
        if spec["kind"] == "array"
        else dict(zip(spec["names"], inputs, strict=True))
        if spec["kind"] == "dict"
        else inputs
    )
    ready = preprocess(given) if preprocess is not None else given
    return keras.Model(given, model(ready), name=f"{model.name}_on_raw_rows")


def save(model: keras.Model, path: Path) -> None:
    """Write a model or, for a name ending in ``.weights.h5``, its weights, so that the file is whole or absent."""
    suffix = ".weights.h5" if path.name.endswith(".weights.h5") else path.suffix
    temporary = path.with_name(f".{path.name.removesuffix(suffix)}-{os.getpid()}{suffix}")
    model.save_weights(temporary) if suffix == ".weights.h5" else model.save(temporary)
    os.replace(temporary, path)


def save_arrays(arrays: Sequence[np.ndarray], folder: Path, stem: str) -> list[str]:
    """Write one ``.npy`` per output, each whole or absent; the paths in order."""
    paths = []
    for number, array in enumerate(arrays):
        path = folder / f"{stem}_{number}.npy"
        temporary = folder / f".{stem}_{number}-{os.getpid()}.npy"
        np.save(temporary, array, allow_pickle=False)
        os.replace(temporary, path)
        paths.append(str(path))
    return paths
