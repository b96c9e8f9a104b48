"""Sanity before search: what the default model must be able to do before it is worth searching for a better one.

Its first loss is what chance gives, and it can learn a few rows by heart. A model that fails here has a mistake that
no hyperparameter mends, and where it fails, changing one thing at a time tells the likely cause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from search.checks import chance, diagnosis
from search.checks.chance import Chance
from search.checks.diagnosis import Cause
from search.checks.findings import Finding, finding
from search.errors import TrialFailed
from search.harness import feeding, training
from search.scorer import declaration, scoring
from search.scorer.metrics import Array

ROWS = 32  # to be learned by heart
_LOOKED_AT = 512  # rows that the first loss is taken over
_LOOKED_AT_BYTES = 64 << 20
_NEARLY_NOTHING = 0.05  # of the loss by chance
_STEPS = 25  # between two looks at the loss
_REPEATED_BYTES = 64 << 20  # of the same rows over and over, for so many steps in one call
_MOST_LOOKS = 40
_STALLED = 16  # looks without a gain of a hundredth
_SECONDS = 60.0  # for learning the rows once
_RATE = 1e-3
_RANDOM = (
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.AlphaDropout,
)
_AUGMENT = frozenset({"AugMix", "CutMix", "MixUp", "RandAugment"})


def run(running: Any) -> list[Finding]:
    """Check a trial's default model.

    Args:
        running: The worker's trial: module, hyperparameters, rows, preprocessing and built model. Its model is not
            what it was afterwards.

    Returns:
        Findings for ``last layer``, ``initial loss`` and ``32 rows``.
    """
    subject = _Subject(running)
    last = subject.last_layer()
    initial = subject.initial_loss()
    return [last, initial, subject.learns_by_heart()]


class _Subject:
    """The default model, some train rows, and the loss as the scorer sees it.

    Penalties, class weights and label smoothing are no part of that loss.
    """

    def __init__(self, running: Any) -> None:
        self._running, self._model, self._rows = running, running.model, running.rows
        self._declared = declaration.declare(self._model)
        self._outputs = self._declared["outputs"]
        self._names = [output["name"] for output in self._outputs]
        self._kinds = [scoring.loss_kind(output) for output in self._outputs]
        count, each = self._rows.size("train"), self._rows.nbytes("train") / max(1, self._rows.size("train"))
        some = min(count, _LOOKED_AT, max(ROWS, int(_LOOKED_AT_BYTES // max(1, each))))
        self._rng = np.random.default_rng(0)
        index = np.sort(self._rng.choice(count, some, replace=False))
        self._x = feeding.joined(self._rows, "train", running.preprocess, index)
        self._y = self._rows.labels("train", index)
        self._out = self._predicted(keras.tree.map_structure(lambda part: part[:1], self._x), training=False)
        self._model.optimizer.build(self._model.trainable_variables)
        self._start = [np.array(v) for v in self._variables()]
        self._cause = diagnosis.of_outputs(self._outputs, diagnosis.last_layers(self._model), self._labels(self._y))

    def last_layer(self) -> Finding:
        """Whether what the outputs end in is what their losses take."""
        ends = diagnosis.last_layers(self._model)
        if self._cause is not None:
            return finding("last layer", False, self._cause[0], self._cause)
        pairs = [(end, output["loss"]) for end, output in zip(ends, self._outputs, strict=True)]
        if any(end is None for end, _ in pairs) or None in self._kinds:
            return finding("last layer", None, "the model does not tell what it ends in, or only Keras knows its loss")
        said = ", ".join(f"{end} for the loss {loss}" for end, loss in pairs)
        return finding("last layer", True, said)

    def initial_loss(self) -> Finding:
        """Whether the loss before any training is what chance gives."""
        name, rows = "initial loss", len(keras.tree.flatten(self._x)[0])
        if None in self._kinds:
            return finding(name, None, "only Keras knows this loss, so it is not known what chance gives")
        by_chance = self._chance(self._y)
        if by_chance is None:
            return finding(name, None, f"no constant prediction says what chance gives by {self._losses()}")
        found = self._first_loss(self._x)
        says = f"{found:.4g} on {rows} train rows before any training, where chance gives {by_chance.why}"
        if by_chance.informed - by_chance.perfect <= 1e-9 * max(1.0, abs(by_chance.perfect)):
            cause = ("all labels that were looked at are the same", "look at y in load()")
            return finding(name, False, says, cause)
        if found > by_chance.allowed:
            return finding(name, False, says, self._why_high(by_chance))
        if found - by_chance.perfect < 0.5 * (by_chance.informed - by_chance.perfect):
            cause = (
                "the model knows the labels before it was trained: by weights that it loads, or because its loss is "
                "not what it seems",
                "if it loads weights that were trained on other rows, nothing is wrong",
            )
            return finding(name, False, says, cause)
        return finding(name, True, says)

    def learns_by_heart(self) -> Finding:
        """Whether the default model drives the loss of 32 rows to nearly nothing."""
        x, y = self._few()
        rows = len(keras.tree.flatten(x)[0])
        name = f"{rows} rows"
        if None in self._kinds or (by_chance := self._chance(y)) is None:
            return self._judged_by_itself(name, x, y)
        if (frozen := diagnosis.frozen(self._model)) is not None and not self._model.trainable_weights:
            return finding(name, False, "nothing is there that could learn", frozen)
        _stilled(self._model)
        goal = by_chance.perfect + _NEARLY_NOTHING * (by_chance.informed - by_chance.perfect) + self._smoothing()
        losses = self._trained(x, y, goal)
        went = f"the loss of {rows} train rows goes from {losses[0]:.4g} to {losses[-1]:.4g} in "
        went += f"{_STEPS * (len(losses) - 1)} steps ({by_chance.informed:.4g} by chance)"
        if losses[-1] <= goal:
            return finding(name, True, went)
        return finding(name, False, went, self._why_not(x, y, goal, losses, by_chance))

    def _judged_by_itself(self, name: str, x: Any, y: Any) -> Finding:
        """A loss that has no known chance: only whether it falls can be seen."""
        _stilled(self._model)
        if None in self._kinds:
            self._restore()
            before = self._keras_loss(x, y)
            self._fit(x, y, 10 * _STEPS)
            after = self._keras_loss(x, y)
        else:
            losses = self._trained(x, y, -math.inf, looks=10)
            before, after = losses[0], losses[-1]
        went = f"by {self._losses()} it is not known what nothing is; it goes from {before:.4g} to {after:.4g}"
        if not after < before:
            return finding(name, False, went, self._stuck(x) or ("it does not fall at all", "look at the loss itself"))
        return finding(name, None, went)

    # ── causes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _why_high(self, by_chance: Chance) -> Cause:
        if self._cause is not None:
            return self._cause
        if (target := diagnosis.offset(self._labels(self._y), self._kinds)) is not None:
            return target
        self._restore()
        if self._first_loss(diagnosis.scaled(self._x, self._x, self._model)) <= by_chance.allowed:
            return self._unscaled()
        spread = max(float(np.std(part)) for part in self._out)
        return (
            f"the first weights make large outputs (up to a standard deviation of {spread:.3g})",
            "look for a large initializer, or for many layers without BatchNormalization",
        )

    def _unscaled(self) -> Cause:
        said = diagnosis.unscaled(self._x) or "features have very different scales"
        return (
            f"{said}; scaled to mean 0 and variance 1, the same model passes",
            "scale them in preprocess(train) with a Normalization layer adapted on train.x, or begin the model with "
            "Rescaling",
        )

    def _why_not(self, x: Any, y: Any, goal: float, losses: list[float], by_chance: Chance) -> Cause:
        """What one change lets the model learn the rows, or what is seen of it."""
        if self._cause is not None:
            return self._cause
        stuck = self._stuck(x)
        self._restore()
        seen = (
            diagnosis.penalised(self._model, by_chance.fresh - by_chance.perfect),
            diagnosis.dead(self._model, feeding.as_fed(x)),
            diagnosis.offset(self._labels(y), self._kinds),
        )
        if (found := next((cause for cause in seen if cause is not None), None)) is not None:
            return found
        by_scale = diagnosis.scaled(x, self._x, self._model)
        if diagnosis.unscaled(self._x) and self._trained(by_scale, y, goal)[-1] <= goal:
            return self._unscaled()
        rate, kind = self._rate(), type(self._model.optimizer).__name__
        self._exchange_optimizer()
        if self._trained(x, y, goal)[-1] <= goal:
            falls = losses[-1] < losses[0] and losses[-1] <= 1.02 * min(losses)
            way = "small, or falls too early," if falls else "large"
            return (
                f"the learning rate of {kind}, {rate}, is too {way} for it: with Adam({_RATE:g}) the same model passes",
                f"change the default of the learning rate, {'upwards' if falls else 'downwards'}",
            )
        if self._trained(by_scale, y, goal)[-1] <= goal:
            return self._unscaled()
        rest = (
            diagnosis.vanishing(self._model),
            stuck,
            diagnosis.frozen(self._model),
            diagnosis.small(self._model, len(keras.tree.flatten(x)[0])),
        )
        unknown = ("not known", "look at a few rows of x and y as the model gets them, and take the model apart")
        return next((cause for cause in rest if cause is not None), unknown)

    def _stuck(self, x: Any) -> Cause | None:
        x = feeding.as_fed(x)
        return diagnosis.dead(self._model, x) or diagnosis.constant(self._predicted(x, training=False))

    # ── what they need ───────────────────────────────────────────────────────────────────────────────────────────

    def _losses(self) -> str:
        return ", ".join(str(output["loss"] or output["config"].get("name") or "its loss") for output in self._outputs)

    def _labels(self, y: Any) -> list[Array]:
        return scoring.in_order(y, self._names)

    def _chance(self, y: Any) -> Chance | None:
        parts = []
        for output, kind, labels, out in zip(self._outputs, self._kinds, self._labels(y), self._out, strict=True):
            one = chance.of(str(kind), output.get("config") or {}, labels, out.shape[1:])
            if one is None:
                return None
            parts.append((float(output["weight"]), one))
        return chance.together(parts)

    def _smoothing(self) -> float:
        """What label smoothing leaves of a loss that is driven to its least."""
        total = 0.0
        for output, out in zip(self._outputs, self._out, strict=True):
            units = 2 if out.shape[-1] == 1 or output["loss"] == "binary_crossentropy" else out.shape[-1]
            share = output["label_smoothing"]
            total -= float(output["weight"]) * math.log(1 - share + share / units)
        return total

    def _predicted(self, x: Any, training: bool) -> list[Array]:
        out = self._model(feeding.as_fed(x), training=training)
        out = keras.tree.map_structure(keras.ops.convert_to_numpy, out)
        return scoring.in_order(out, sorted(out) if isinstance(out, dict) else [])

    def _loss(self, predicted: list[Array], y: Any) -> float:
        """The scorer's loss, or infinity for predictions that are not finite."""
        metric = scoring.Metric("loss")
        try:
            return scoring.score(metric, self._declared, predicted, self._labels(y)).value
        except TrialFailed as failure:
            if failure.reason == "nan":
                return math.inf
            raise

    def _first_loss(self, x: Any) -> float:
        """As the first steps of training see it: batch by batch, BatchNormalization by the batch."""
        batch = int(self._running.hp.values.get("batch_size", training.DEFAULT_BATCH))
        count, parts = len(keras.tree.flatten(x)[0]), []
        for at in range(0, count, batch):
            some = keras.tree.map_structure(lambda part, at=at: part[at : at + batch], x)
            parts.append(self._predicted(some, training=True))
        return self._loss([np.concatenate(pieces) for pieces in zip(*parts, strict=True)], self._y)

    def _keras_loss(self, x: Any, y: Any) -> float:
        """Keras' value, penalties left out."""
        x = feeding.as_fed(x)
        out = self._model(x, training=False)
        loss = float(self._model.compute_loss(x=x, y=y, y_pred=out, training=False))
        return loss - float(sum(float(keras.ops.sum(penalty)) for penalty in self._model.losses))

    def _few(self) -> tuple[Any, Any]:
        """Rows to be learned by heart: no two alike, and of classes in turn where there are few."""
        x, labels = keras.tree.flatten(self._x), self._labels(self._y)[0]
        seen = {b"".join(part[at].tobytes() for part in x): at for at in reversed(range(len(labels)))}
        index = self._rng.permutation(np.array(list(seen.values())))
        kinds = np.unique(labels[index].reshape(len(index), -1), axis=0, return_inverse=True)[1].reshape(-1)
        turn = np.zeros(len(index), dtype=np.int64)
        for kind in np.unique(kinds):
            turn[kinds == kind] = np.arange((kinds == kind).sum())
        index = np.sort(index[np.argsort(turn, kind="stable")][:ROWS])
        pick = lambda part: part[index]  # noqa: E731
        return keras.tree.map_structure(pick, self._x), keras.tree.map_structure(pick, self._y)

    def _trained(self, x: Any, y: Any, goal: float, looks: int = _MOST_LOOKS) -> list[float]:
        """Train on some rows from the first weights on, until their loss is at the goal; the losses on the way."""
        self._restore()
        losses = [self._loss(self._predicted(x, training=False), y)]
        deadline = time.monotonic() + _SECONDS
        for _ in range(looks):
            self._fit(x, y, _STEPS)
            losses.append(self._loss(self._predicted(x, training=False), y))
            stalled = len(losses) > _STALLED and min(losses[-_STALLED:]) > 0.99 * min(losses[:-_STALLED])
            if losses[-1] <= goal or losses[-1] == math.inf or stalled or time.monotonic() > deadline:
                break
        return losses

    def _fit(self, x: Any, y: Any, steps: int) -> None:
        parts = keras.tree.flatten((x, y))
        count, size = len(parts[0]), sum(part.nbytes for part in parts)
        repeated = int(min(steps, max(1, _REPEATED_BYTES // max(1, size))))
        x, y = keras.tree.map_structure(lambda part: np.concatenate([part] * repeated), (x, y))
        epochs = math.ceil(steps / repeated)
        self._model.fit(feeding.as_fed(x), y, batch_size=count, epochs=epochs, shuffle=False, verbose=0)

    def _variables(self) -> list[Any]:
        return [*self._model.variables, *self._model.optimizer.variables]

    def _restore(self) -> None:
        """The first weights again, in model and optimizer."""
        for variable, value in zip(self._variables(), self._start, strict=True):
            variable.assign(value)
        if keras.backend.backend() != "torch":
            self._model.steps_per_execution = _STEPS
        training.forget_functions(self._model)

    def _exchange_optimizer(self) -> None:
        count = len(self._model.variables)
        self._model.optimizer = keras.optimizers.Adam(_RATE)
        self._model.optimizer.build(self._model.trainable_variables)
        self._start[count:] = [np.array(v) for v in self._model.optimizer.variables]

    def _rate(self) -> str:
        rate = self._model.optimizer._learning_rate
        schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
        return type(rate).__name__ if schedule else f"{float(keras.ops.convert_to_numpy(rate)):.3g}"


def _stilled(model: keras.Model) -> None:
    """Leave out what keeps a model from learning by heart: dropout, noise and augmentation. Averages of
    BatchNormalization follow at once, or predictions would lag behind training."""
    for layer in diagnosis.layers_of(model):
        kind = type(layer).__name__
        if isinstance(layer, _RANDOM) or (kind.startswith("Random") and kind != "RandomCrop") or kind in _AUGMENT:
            layer.call = _unchanged
        elif isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
        for inner in (layer, getattr(layer, "cell", None)):
            if isinstance(layer, keras.layers.RNN) and isinstance(getattr(inner, "recurrent_dropout", None), float):
                _set(inner, {"dropout": 0.0, "recurrent_dropout": 0.0})


def _set(item: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(getattr(type(item), name, None), property):
            setattr(item, name, value)


def _unchanged(inputs: Any, *_: Any, **__: Any) -> Any:
    return inputs
