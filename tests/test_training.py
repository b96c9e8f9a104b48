"""Build, preflight, fit, predict and export of one trial, with real Keras."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.definition.problem import SpaceModule, find
from search.definition.tracing import TracingHyperParameters
from search.errors import SpaceError, TrialFailed
from search.harness import feeding, fused, preflight, training
from search.scorer.declaration import declare
from search.tiers.data import Dataset, OpenRows, prepare
from tests.tiny import write_space


class Running:
    """What the worker holds of a trial, made without a process."""

    def __init__(self, folder: Path, name: str, seed: int = 3, objective: str = "val_accuracy", **parts: str):
        self.module = SpaceModule(find(write_space(folder, name, **parts)))
        manifest = prepare(self.module.load(), folder / "ws", 0, False)
        self.rows = OpenRows(folder / "ws" / "rows" / manifest["digest"])
        self.hp = TracingHyperParameters(None, seed, True)
        self.preprocess: Any = None
        self.payload = {"objective": objective}
        self.seed = seed
        keras.utils.set_random_seed(seed)
        self.model = training.build(self.module, self.hp)

    def fit(self, send: Callable[[dict[str, Any]], None] = lambda body: None, **changes: Any) -> training.Fitted:
        settings = {"objective": "val_accuracy", "direction": "max", "epochs": 3, "budget": 1 << 30} | changes
        return training.fit(
            self.module, self.model, self.hp, self.rows, self.preprocess, seed=self.seed, send=send, **settings
        )


def weights(model: Any) -> list[np.ndarray]:
    return [np.asarray(w) for w in model.get_weights()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


DROPOUT = (
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization(),\n"
    "                              keras.layers.Dropout(0.5), keras.layers.Dense(2, activation='softmax')])\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
    "    return model"
)


WEIGHTED = (
    "def load():\n"
    "    rng = np.random.default_rng(0)\n"
    "    x = rng.normal(size=(200, 4)).astype('float32')\n"
    "    y = (x[:, 0] > 0).astype('int64')\n"
    "    return Dataset(x, y, sample_weight=np.where(y == 1, 5.0, 0.1))"
)


def test_preflight_leaves_no_trace_in_the_training_that_follows(tmp_path: Path) -> None:
    plain = Running(tmp_path, "plain", build=DROPOUT)
    plain.fit()
    checked = Running(tmp_path, "checked", build=DROPOUT)
    found = preflight.run(checked)
    checked.fit()
    assert set(found["reported"]) == {"val_accuracy", "val_loss"}
    assert same(weights(plain.model), weights(checked.model))


def test_the_same_seed_trains_the_same_weights_whether_rows_are_copied_or_mapped(tmp_path: Path) -> None:
    copied = Running(tmp_path, "copied")
    copied.fit()
    mapped = Running(tmp_path, "mapped")
    mapped.fit(budget=0)
    other = Running(tmp_path, "other", seed=4)
    other.fit()
    assert same(weights(copied.model), weights(mapped.model))
    assert not same(weights(copied.model), weights(other.model))


def test_every_epoch_sees_every_row_once(tmp_path: Path) -> None:
    running = Running(tmp_path, "rows")
    data = feeding.batches(running.rows, "train", None, batch=32, budget=1 << 30, seed=1)
    expected = running.rows.features("train")
    steps = -(-len(expected) // 32)
    seen = np.concatenate([np.asarray(x) for x, _ in data.take(2 * steps)])
    first, second = seen[: len(expected)], seen[len(expected) :]
    assert not np.array_equal(first, second)
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch, axis=0), np.sort(expected, axis=0))


def test_each_pass_over_batches_for_a_modules_own_fit_is_an_epoch_with_an_end(tmp_path: Path) -> None:
    running = Running(tmp_path, "passes")
    asked = {"batch": 32, "budget": 0, "seed": 1, "first": lambda: 4, "endless": False}
    data = feeding.batches(running.rows, "train", None, **asked)
    expected = running.rows.features("train")
    assert int(data.cardinality()) == -(-len(expected) // 32)
    for epoch in (4, 5, 6):
        seen = np.concatenate([np.asarray(x) for x, _ in data])
        assert np.array_equal(seen, expected[fused.order(len(expected), 1, epoch)])
    own = "def fit(hp, model, *args, **kwargs):\n    return model.fit(*args, shuffle=False, **kwargs)"
    assert Running(tmp_path, "ends", rest=own).fit(budget=0, epochs=2).epochs == 2


def test_backends_without_tf_data_get_the_same_rows_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(tmp_path, "gathered", load=WEIGHTED)
    monkeypatch.setattr(fused, "usable", lambda model, callbacks: False)
    monkeypatch.setattr(feeding, "_has_tf_data", lambda: False)
    data = feeding.batches(running.rows, "train", None, batch=32, budget=0, seed=1)
    seen = np.concatenate([data[n][0] for n in range(len(data))])
    assert np.array_equal(np.sort(seen, axis=0), np.sort(running.rows.features("train"), axis=0))
    assert all(len(data[n]) == 3 for n in range(len(data)))
    assert running.fit(epochs=2).epochs == 2


def test_an_epoch_in_one_call_keeps_weights_of_rows_and_a_models_own_train_step(tmp_path: Path) -> None:
    own = (
        "class Own(keras.Sequential):\n"
        "    def train_step(self, data):\n"
        "        x, y, weight = data\n"
        "        logs = super().train_step((x, y, weight))\n"
        "        return logs | {'heaviest': keras.ops.max(weight)}\n\n\n"
        "def build(hp):\n"
        "    model = Own([keras.Input((4,)), keras.layers.Dense(2, activation='softmax')])\n"
        "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
        "    return model"
    )
    running = Running(tmp_path, "own_step", build=own, load=WEIGHTED)
    reports: list[dict[str, Any]] = []
    running.fit(reports.append, epochs=2)
    assert reports[-1]["metrics"]["heaviest"] == 5.0
    assert "val_accuracy" in reports[-1]["metrics"]


def test_a_models_functions_are_its_own_again_after_training(tmp_path: Path) -> None:
    running = Running(tmp_path, "after")
    running.fit(epochs=1)
    x, y = running.rows.features("validation"), running.rows.labels("validation")
    whole = running.model.evaluate(x, y, verbose=0, return_dict=True)
    (predicted,) = training.predict(running.model, x)
    assert whole["accuracy"] == pytest.approx(float((predicted.argmax(axis=1) == y).mean()), abs=1e-6)


def test_the_chosen_epoch_is_the_best_one_and_its_weights_are_kept(tmp_path: Path) -> None:
    running = Running(tmp_path, "chosen")
    reports: list[dict[str, Any]] = []
    fitted = running.fit(reports.append, epochs=12)
    scores = [r["metrics"]["val_accuracy"] for r in reports]
    assert fitted.best_epoch == int(np.argmax(scores)) + 1
    assert fitted.epochs == len(reports) == 12
    (predicted,) = training.predict(running.model, running.rows.features("validation"))
    accuracy = (predicted.argmax(axis=1) == running.rows.labels("validation")).mean()
    assert accuracy == pytest.approx(max(scores), abs=1e-6)


PLATEAU = (
    "def callbacks(hp):\n"
    "    patience = hp.Int('patience', 1, 5)\n"
    "    return [keras.callbacks.ReduceLROnPlateau('val_accuracy', mode='max', factor=0.5, patience=patience)]"
)


def test_a_rate_that_falls_on_a_plateau_is_reported_and_keeps_the_epoch_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_fit_by_batches", lambda *_: pytest.fail("it watches no batches"))
    sent: list[dict[str, Any]] = []
    running = Running(tmp_path, "plateau", rest=PLATEAU)
    running.fit(sent.append, epochs=12)
    found = [(body["metrics"]["val_accuracy"], body["metrics"]["learning_rate"]) for body in sent]
    assert "patience" in {ask["name"] for ask in running.hp.asks}
    expected, best = 1e-2, -1.0
    for accuracy, rate in found:
        assert rate == pytest.approx(expected)
        expected, best = (expected, accuracy) if accuracy > best + 1e-4 else (expected / 2, best)
    assert found[-1][1] < 1e-2, "there is no plateau to test with"


def test_the_weights_on_disk_are_those_of_the_best_epoch_alone(tmp_path: Path) -> None:
    """What ModelCheckpoint does with ``save_best_only``; a module's own works beside it."""
    rest = (
        "def callbacks(hp):\n"
        f"    path = {str(tmp_path / 'own.weights.h5')!r}\n"
        "    return [keras.callbacks.ModelCheckpoint(path, 'val_accuracy', mode='max', save_best_only=True,\n"
        "                                            save_weights_only=True)]"
    )
    running = Running(tmp_path, "checkpointed", rest=rest)
    fitted = running.fit(epochs=12)
    assert fitted.best_epoch is not None and fitted.best_epoch < fitted.epochs
    training.save(running.model, tmp_path / "model.weights.h5")
    other = Running(tmp_path, "loaded")
    other.model.optimizer.build(other.model.trainable_variables)  # its state is in the files too
    for path in ("model.weights.h5", "own.weights.h5"):
        other.model.load_weights(tmp_path / path)
        assert same(weights(other.model), weights(running.model)), path


def test_a_loss_that_is_no_number_fails_the_trial(tmp_path: Path) -> None:
    running = Running(tmp_path, "nan")
    running.model.compile("sgd", lambda y, p: keras.ops.sum(p, axis=-1) * float("nan"), metrics=["accuracy"])
    with pytest.raises(TrialFailed) as caught:
        running.fit()
    assert caught.value.reason == "nan"


def test_a_modules_own_fit_gets_what_kerastuner_would_give_it_and_may_ask_for_more(tmp_path: Path) -> None:
    own = (
        "def fit(hp, model, x, y, validation_data, epochs, callbacks, **kwargs):\n"
        "    batch = hp.Choice('batch_size', [16, 64])\n"
        "    return model.fit(x, y, validation_data=validation_data, epochs=epochs, callbacks=callbacks,\n"
        "                     batch_size=batch, verbose=0)"
    )
    running = Running(tmp_path, "own_fit", rest=own)
    fitted = running.fit(epochs=2)
    assert fitted.epochs == 2
    assert running.hp.asks[-1]["name"] == "batch_size"


def test_callbacks_that_watch_batches_see_every_batch(tmp_path: Path) -> None:
    rest = (
        "SEEN = []\n\n\nclass Watch(keras.callbacks.Callback):\n"
        "    def on_train_batch_end(self, batch, logs=None):\n        SEEN.append(batch)\n\n\n"
        "def callbacks(hp):\n    return [Watch()]"
    )
    running = Running(tmp_path, "watch", rest=rest)
    running.fit(epochs=1)
    assert len(running.module._get("SEEN")) == -(-running.rows.size("train") // 32)


@pytest.mark.parametrize(
    ("parts", "objective", "said"),
    [
        ({}, "val_auc", "it reports val_accuracy, val_loss: change `objective` or add the metric"),
        (
            {"build": DROPOUT.replace("Dense(2, activation='softmax')", "Dense(1)").replace("sparse_", "")},
            "val_accuracy",
            "the loss categorical_crossentropy wants one output for each class",
        ),
        (
            {"build": DROPOUT.replace("Input((4,))", "Input((5,))")},
            "val_accuracy",
            "did not go through the default model",
        ),
    ],
)
def test_preflight_says_what_is_wrong_in_one_line(
    tmp_path: Path, parts: dict[str, str], objective: str, said: str
) -> None:
    running = Running(tmp_path, "wrong", objective=objective, **parts)
    with pytest.raises(SpaceError) as caught:
        preflight.run(running)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        ("def build(hp):\n    return None", "must return a keras.Model, but returned NoneType"),
        (
            "def build(hp):\n    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])",
            "must return a compiled model",
        ),
    ],
)
def test_build_must_return_a_compiled_model(tmp_path: Path, build: str, said: str) -> None:
    with pytest.raises(SpaceError, match="must return") as caught:
        Running(tmp_path, "uncompiled", build=build)
    assert said in str(caught.value)


CUSTOM = (
    "{register}class Halve(keras.layers.Layer):\n"
    "    def call(self, x):\n        return x / 2\n\n\n"
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((4,)), Halve(), keras.layers.Dense(2, activation='softmax')])\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
    "    return model"
)


def test_a_custom_layer_that_keras_could_not_load_is_found_with_the_line_to_add(tmp_path: Path) -> None:
    running = Running(tmp_path, "custom", build=CUSTOM.format(register=""))
    with pytest.raises(SpaceError) as caught:
        preflight.run(running)
    line = Path(running.module.problem.path).read_text().splitlines().index("class Halve(keras.layers.Layer):") + 1
    assert f"custom.py:{line}: " in str(caught.value)
    assert '@keras.saving.register_keras_serializable("custom")' in str(caught.value)


def test_a_registered_custom_layer_passes_and_is_named(tmp_path: Path) -> None:
    register = "@keras.saving.register_keras_serializable('registered')\n"
    running = Running(tmp_path, "registered", build=CUSTOM.format(register=register))
    assert [item["class"] for item in preflight.run(running)["custom"]] == ["Halve"]


def test_an_exported_model_takes_raw_features_and_predicts_the_same(tmp_path: Path) -> None:
    running = Running(tmp_path, "composed")
    normalize = keras.layers.Normalization()
    normalize.adapt(running.rows.features("train"))
    running.preprocess = keras.Sequential([keras.Input((4,)), normalize])
    running.fit(epochs=1)
    raw = running.rows.features("validation")
    (separate,) = training.predict(running.model, feeding.joined(running.rows, "validation", running.preprocess))

    training.save(training.compose(running.model, running.preprocess, running.rows.manifest["x"]), tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(again.predict(raw, verbose=0), separate, atol=1e-6)
    assert zipfile.is_zipfile(tmp_path / "m.keras")
    assert [p.name for p in tmp_path.glob(".*.keras")] == []


def two_inputs(compile_with: str) -> str:
    return (
        "def build(hp):\n"
        "    a, b = keras.Input((3,), name='a'), keras.Input((2,), name='b')\n"
        "    h = keras.layers.Concatenate()([a, b])\n"
        "    out = {'kind': keras.layers.Dense(2, activation='softmax', name='kind')(h),\n"
        "           'size': keras.layers.Dense(1, name='size')(h)}\n"
        "    model = keras.Model({'a': a, 'b': b}, out)\n"
        f"    model.compile('adam', {compile_with})\n"
        "    return model"
    )


SEVERAL = (
    "def load():\n"
    "    rng = np.random.default_rng(0)\n"
    "    x = {'a': rng.normal(size=(120, 3)), 'b': rng.normal(size=(120, 2))}\n"
    "    return Dataset(x, {'kind': (x['a'][:, 0] > 0).astype(int), 'size': x['b'][:, 0]})"
)


def test_several_inputs_and_outputs_train_and_are_declared_under_keras_names(tmp_path: Path) -> None:
    compiled = (
        "loss={'kind': 'sparse_categorical_crossentropy', 'size': 'mse'}, "
        "metrics={'kind': ['accuracy'], 'size': ['mae']}, loss_weights={'kind': 1.0, 'size': 0.5}"
    )
    running = Running(tmp_path, "several", objective="val_kind_accuracy", load=SEVERAL, build=two_inputs(compiled))
    found = preflight.run(running)
    declared = declare(running.model)
    assert {"val_kind_accuracy", "val_size_mae", "val_loss"} <= set(found["reported"])
    assert [(o["name"], o["loss"], o["weight"]) for o in declared["outputs"]] == [
        ("kind", "sparse_categorical_crossentropy", 1.0),
        ("size", "mse", 0.5),
    ]
    assert [m["name"] for m in declared["metrics"]] == ["kind_accuracy", "size_mae"]
    fitted = running.fit(objective="val_kind_accuracy")
    assert fitted.epochs == 3
    kind, size = training.predict(running.model, running.rows.features("guard"))
    assert kind.shape == (running.rows.size("guard"), 2) and size.shape[0] == len(kind)


def test_a_declaration_tells_a_known_loss_with_its_settings_from_the_users_own(tmp_path: Path) -> None:
    rest = "def my_loss(y, p):\n    return keras.ops.mean(keras.ops.square(y - p))"
    running = Running(tmp_path, "declared", rest=rest)
    running.model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1))
    (output,) = declare(running.model)["outputs"]
    assert (output["loss"], output["from_logits"], output["label_smoothing"]) == ("binary_crossentropy", True, 0.1)
    running.model.compile("adam", running.module._get("my_loss"), metrics=[keras.metrics.AUC(name="area")])
    declared = declare(running.model)
    assert declared["outputs"][0]["loss"] is None
    assert [(m["name"], m["kind"]) for m in declared["metrics"]] == [("area", "auc")]


def test_sample_weights_reach_training(tmp_path: Path) -> None:
    plain, heavy = Running(tmp_path, "unweighted"), Running(tmp_path, "weighted", load=WEIGHTED)
    batch = next(iter(feeding.batches(heavy.rows, "train", None, batch=8, budget=1 << 30, seed=1)))
    assert len(batch) == 3 and set(np.asarray(batch[2]).round(1)) <= {np.float32(5.0), np.float32(0.1)}
    assert len(next(iter(feeding.batches(plain.rows, "train", None, batch=8, budget=1 << 30)))) == 2


def test_strings_reach_a_model_that_reads_text(tmp_path: Path) -> None:
    words = np.array(["good film", "bad film", "good", "bad"] * 30)
    numbered = np.char.add(words, [f" {i}" for i in range(120)])
    manifest = prepare(Dataset(numbered, np.arange(120) % 2), tmp_path, 0, False)
    rows = OpenRows(tmp_path / "rows" / manifest["digest"])
    vectorize = keras.layers.TextVectorization(max_tokens=20, output_sequence_length=3)
    vectorize.adapt(feeding.as_fed(rows.features("train")))
    preprocess = keras.Sequential([keras.Input((), dtype="string"), vectorize])
    assert feeding.joined(rows, "guard", preprocess).shape == (rows.size("guard"), 3)


def test_a_model_of_words_beside_numbers_can_be_called() -> None:
    """Keras refuses a call with a tensor and an array, which a table of both kinds of columns would be."""
    lookup = keras.layers.StringLookup(vocabulary=["basic", "full"], output_mode="one_hot")
    plan, age = keras.Input((1,), dtype="string", name="plan"), keras.Input((1,), name="age")
    model = keras.Model({"plan": plan, "age": age}, keras.layers.Concatenate()([lookup(plan), age]))
    table = {"plan": np.array([["full"], ["basic"], ["none"]]), "age": np.array([[3.0], [4.0], [5.0]], "float32")}
    fed = feeding.as_fed(table)
    np.testing.assert_array_equal(model(fed), [[0, 0, 1, 3], [0, 1, 0, 4], [1, 0, 0, 5]])
    np.testing.assert_array_equal(model.predict(fed, verbose=0), model(fed))
    numbers = {"age": table["age"]}
    assert feeding.as_fed(numbers) is numbers
