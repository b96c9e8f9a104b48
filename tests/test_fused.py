"""An epoch in one call against the ordinary fit: the same numbers, with all that Keras can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.errors import SpaceError
from search.harness import fused
from tests.test_training import DROPOUT, WEIGHTED, Running, weights

SOFTMAX = "model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation='softmax')])"


def compiled(loss: str = "'sparse_categorical_crossentropy'", rest: str = "metrics=['accuracy']") -> str:
    return f"def build(hp):\n    {SOFTMAX}\n    model.compile('adam', {loss}, {rest})\n    return model"


OWN_STEP = (
    "class Own(keras.Sequential):\n"
    "    def train_step(self, data):\n"
    "        x, y = data\n"
    "        with __import__('tensorflow').GradientTape() as tape:\n"
    "            predicted = self(x, training=True)\n"
    "            loss = self.compute_loss(x, y, predicted)\n"
    "        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)\n"
    "        return self.compute_metrics(x, y, predicted) | {'last': loss, 'largest': keras.ops.max(x, axis=0)}\n\n\n"
) + compiled().replace("keras.Sequential", "Own")

UNSEEN = (
    "class Deep(keras.Model):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.one, self.two = keras.layers.Dense(8), keras.layers.Dense(2, activation='softmax')\n\n"
    "    def call(self, x, training=False):\n        return self.two(self.one(x))\n\n\n"
    "def build(hp):\n    model = Deep()\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n    return model"
)
CLASS_WEIGHT = "def class_weight(hp):\n    return {0: hp.Fixed('weight_of_0', 4.0)}"
SCHEDULE = (
    "def callbacks(hp):\n    return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / (1 + epoch))]"
)
CASES: dict[str, dict[str, str]] = {
    # By SGD: the bias before a batch normalization has a gradient of mere rounding, which Adam makes large.
    "dropout and batch normalization": {"build": DROPOUT.replace("'adam'", "'sgd'")},
    "noise from a seeded layer": {
        "build": DROPOUT.replace("Dropout(0.5)", "GaussianNoise(0.3, seed=1)").replace("'adam'", "'sgd'")
    },
    "sample weights": {"build": compiled(rest="weighted_metrics=['accuracy']"), "load": WEIGHTED},
    "class weights": {"rest": CLASS_WEIGHT},
    "metrics with a state of their own": {
        "build": compiled(
            "'sparse_categorical_crossentropy'", "metrics=['accuracy', 'sparse_top_k_categorical_accuracy']"
        )
    },
    "a train_step of its own": {"build": OWN_STEP},
    "a model that is built when it is called": {"build": UNSEEN},
    "callbacks of Keras": {"rest": SCHEDULE},
    "jit_compile": {"build": compiled(rest="metrics=['accuracy'], jit_compile=True")},
    "mixed precision": {
        "build": compiled(rest="metrics=['accuracy']").replace(
            "    model =", "    keras.mixed_precision.set_global_policy('mixed_bfloat16')\n    model ="
        )
    },
    "a scaled loss": {
        "build": compiled(rest="metrics=['accuracy']").replace(
            "'adam'", "keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=64.0)"
        )
    },
    "accumulated gradients and averaged weights": {
        "build": compiled().replace(
            "'adam'", "keras.optimizers.Adam(0.01, gradient_accumulation_steps=3, use_ema=True, clipnorm=0.5)"
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_in_one_call_agrees_with_the_ordinary_fit(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = keras.mixed_precision.dtype_policy()
    seen: list[tuple[Any, list[dict[str, Any]]]] = []
    used: list[bool] = []
    of = fused.fit
    monkeypatch.setattr(fused, "fit", lambda *args, **named: (used.append(True), of(*args, **named)))
    try:
        for whole in (True, False):
            if not whole:
                monkeypatch.setattr(fused, "usable", lambda model, callbacks: False)
            logs: list[dict[str, Any]] = []
            running = Running(tmp_path, f"agrees_{whole}", **CASES[case])
            running.fit(lambda body, logs=logs: logs.append(body["metrics"]), epochs=3)
            seen.append((running.model, logs))
    finally:
        keras.mixed_precision.set_dtype_policy(policy)
    assert used == [True], "the first of the two must have run an epoch in one call"
    (ours, our_logs), (theirs, their_logs) = seen
    tolerance = 1e-2 if case == "mixed precision" else 2e-5
    assert len(our_logs) == len(their_logs) == 3
    for one, other in zip(weights(ours), weights(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)
    for one, other in zip(our_logs, their_logs, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


WATCHING = (
    "SEEN = []\n\n\n"
    "class Own(keras.callbacks.Callback):\n"
    "    def on_epoch_end(self, epoch, logs=None):\n"
    "        x, y = np.zeros((50, 4), 'float32'), np.zeros(50, 'int64')\n"
    "        kept = self.model.evaluate(x, y, batch_size=7, verbose=0, return_dict=True)\n"
    "        SEEN.append((self.params['steps'], kept['loss'], self.model.predict(x, verbose=0)[0, 0], logs))\n\n\n"
    "def callbacks(hp):\n    return [Own()]"
)


def test_a_callback_of_the_module_may_evaluate_on_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(fused, "usable", lambda model, callbacks: False)
        running = Running(tmp_path, f"watching_{whole}", rest=WATCHING)
        running.fit(epochs=3)
        found.append(running.module._get("SEEN"))
    assert len(found[0]) == len(found[1]) == 3
    for ours, theirs in zip(*found, strict=True):
        assert ours[0] == theirs[0] == -(-running.rows.size("train") // 32)
        assert ours[1:3] == pytest.approx(theirs[1:3], abs=1e-5)
        assert ours[1] == pytest.approx(-np.log(ours[2]), abs=1e-5), (
            "of the callback's rows, not of the validation rows"
        )
        assert ours[3] == pytest.approx(theirs[3], abs=1e-5)


def test_what_goes_through_data_in_its_own_way_keeps_the_ordinary_fit(tmp_path: Path) -> None:
    running = Running(tmp_path, "plain")
    assert fused.usable(running.model, [keras.callbacks.EarlyStopping()])
    assert fused.usable(running.model, [keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None)])
    assert not fused.usable(
        running.model, [keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)]
    )
    assert not fused.usable(running.model, [keras.callbacks.TerminateOnNaN()])
    own = type("Own", (keras.Sequential,), {"make_train_function": lambda self, force=False: None})
    assert not fused.usable(own([keras.layers.Dense(1)]), [])
    running.model.run_eagerly = True
    assert not fused.usable(running.model, [])


def test_a_lambda_that_watches_batches_is_called_for_each(tmp_path: Path) -> None:
    rest = (
        "SEEN = []\n\n\n"
        "def callbacks(hp):\n"
        "    return [keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: SEEN.append(batch))]"
    )
    running = Running(tmp_path, "lambda_watch", rest=rest)
    running.fit(epochs=1)
    assert len(running.module._get("SEEN")) == -(-running.rows.size("train") // 32)


def test_class_weights_are_those_of_keras(tmp_path: Path) -> None:
    running = Running(tmp_path, "keras_own", rest=CLASS_WEIGHT)
    running.fit(epochs=1)
    other = Running(tmp_path, "keras_other")
    rows, labels = other.rows.features("train"), other.rows.labels("train")
    at = fused.order(len(rows), other.seed, 0)
    keras.utils.set_random_seed(other.seed)
    other.model.fit(rows[at], labels[at], class_weight={0: 4.0}, shuffle=False, verbose=0)
    for one, two in zip(weights(running.model), weights(other.model), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-5)
    both = Running(tmp_path, "both_weights", rest=CLASS_WEIGHT, load=WEIGHTED)
    with pytest.raises(SpaceError, match="sample_weight or by class_weight, but got both"):
        both.fit(epochs=1)
