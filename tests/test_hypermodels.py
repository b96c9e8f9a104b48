"""KerasTuner's own: HyperModels, with a `fit` or without, and those that it ships, as a module's `hypermodel`."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
import pytest
from keras_tuner.applications import HyperImageAugment, HyperResNet, HyperXception
from keras_tuner.src.applications import augment, resnet

from search.definition.problem import SpaceModule, find
from search.definition.tracing import TracingHyperParameters
from search.errors import SpaceError
from search.harness import mended
from search.study import Study
from tests.conftest import Heldout
from tests.test_training import Running, same, weights
from tests.tiny import write_space

HEAD = "import keras\nimport keras_tuner\nimport numpy as np\n\nfrom search import Dataset"
COMPILED = (
    "    def build(self, hp):\n"
    "        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2)])\n"
    "        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
    "        model.compile(keras.optimizers.Adam(0.05), loss, metrics=['accuracy'])\n"
    "        return model\n"
)


def hyper(fit: str) -> dict[str, str]:
    """Parts of a module whose HyperModel has this `fit`."""
    build = f"class Hyper(keras_tuner.HyperModel):\n{COMPILED}\n{fit}\n\n\nhypermodel = Hyper()"
    return {"imports": HEAD, "build": build}


# ── a fit of their own ──


EPOCHS_IN_FIT = hyper(
    "    def fit(self, hp, model, *args, **kwargs):\n"
    "        return model.fit(*args, epochs=hp.Int('epochs', 4, 9), verbose=0, **kwargs)"
)


def test_a_fit_may_set_what_it_is_given_as_kerastuners_guides_do(tmp_path: Path) -> None:
    assert Running(tmp_path, "own", **EPOCHS_IN_FIT).fit(epochs=None).epochs == 4  # the module says 2
    assert Running(tmp_path, "less", **EPOCHS_IN_FIT).fit(epochs=3).epochs == 3  # the command line has the last word
    assert Running(tmp_path, "more", **EPOCHS_IN_FIT).fit(epochs=7).epochs == 4


def test_a_fit_is_not_called_again_once_it_has_trained(tmp_path: Path) -> None:
    parts = hyper(
        "    def fit(self, hp, model, *args, **kwargs):\n"
        "        model.fit(*args, **kwargs)\n"
        "        return model.fit(*args, epochs=2, **kwargs)"
    )
    with pytest.raises(TypeError, match="multiple values for keyword argument 'epochs'"):
        Running(tmp_path, "twice", **parts).fit()


def test_a_longer_training_than_the_modules_is_not_cut_short(tmp_path: Path) -> None:
    parts = hyper(
        "    def fit(self, hp, model, *args, **kwargs):\n"
        "        model.optimizer.learning_rate = 0.0\n"
        "        return model.fit(*args, epochs=20, **kwargs)"
    )
    assert Running(tmp_path, "long", **parts).fit(epochs=None).epochs == 20  # without a better epoch after the first


@pytest.mark.parametrize("initial", ["", "initial_epoch=3, "], ids=["counted anew", "counted on"])
def test_the_best_epoch_is_counted_through_all_stages(initial: str, tmp_path: Path) -> None:
    parts = hyper(
        "    def fit(self, hp, model, *args, **kwargs):\n"
        "        model.fit(*args, **kwargs)\n"
        f"        return model.fit(*args, {initial}**{{**kwargs, 'epochs': 5}})"
    )
    sent: list[dict[str, Any]] = []
    running = Running(tmp_path, "stages", **parts)
    fitted = running.fit(sent.append)
    assert fitted.epochs == (5 if initial else 8)
    assert [body["step"] for body in sent] == list(range(1, fitted.epochs + 1))
    last = sent[3:]
    best = max(range(len(last)), key=lambda at: last[at]["metrics"]["val_accuracy"])
    assert fitted.best_epoch == 4 + best
    assert fitted.reported == last[best]["metrics"]
    x, y = running.rows.features("validation"), running.rows.labels("validation")
    scored = running.model.evaluate(x, y, verbose=0, return_dict=True)
    assert scored["accuracy"] == pytest.approx(fitted.reported["val_accuracy"])


LOOP = hyper(
    "    def fit(self, hp, model, x, y, validation_data, callbacks=None, **kwargs):\n"
    "        for callback in callbacks:\n"
    "            callback.set_model(model)\n"
    "        kept = []\n"
    "        for epoch in range(4):\n"
    "            model.optimizer.learning_rate = [0.05, 0.05, 3.0, 30.0][epoch]  # the last ones spoil it\n"
    "            for at in range(0, len(y), hp.Choice('batch', [20, 40])):\n"
    "                model.train_on_batch(x[at:at + 20], y[at:at + 20])\n"
    "            loss, accuracy = model.evaluate(*validation_data, verbose=0)\n"
    "            kept.append((accuracy, model.get_weights()))\n"
    "            for callback in callbacks:\n"
    "                callback.on_epoch_end(epoch, logs={'val_accuracy': accuracy, 'val_loss': loss})\n"
    "        self.kept = kept\n"
    "        return {'val_accuracy': accuracy}"
)


def test_a_loop_of_ones_own_keeps_the_best_epochs_weights(tmp_path: Path) -> None:
    running = Running(tmp_path, "loop", **LOOP)
    fitted = running.fit()
    kept = running.module._hypermodel.kept
    best = max(range(4), key=lambda at: kept[at][0])
    assert best < 3 and fitted.epochs == 4 and fitted.best_epoch == best + 1
    assert same(weights(running.model), kept[best][1])
    assert running.hp.values["batch"] == 20


def test_a_loop_that_calls_no_callback_is_scored_at_its_end(tmp_path: Path) -> None:
    parts = hyper(
        "    def fit(self, hp, model, x, y, **kwargs):\n"
        "        model.train_on_batch(x, y)\n"
        "        self.kept = model.get_weights()\n"
        "        return 0.5"
    )
    running = Running(tmp_path, "silent", **parts)
    fitted = running.fit()
    assert (fitted.epochs, fitted.best_epoch) == (0, None)
    assert same(weights(running.model), running.module._hypermodel.kept)


# ── what a hypermodel is ──


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("keras_tuner.HyperModel", "must be an instance of a keras_tuner.HyperModel, but is <class"),
        ("lambda hp: None", "but is a function; call it build"),
        ("3", "but is 3"),
    ],
)
def test_what_is_no_hypermodel_is_refused(given: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=said):
        SpaceModule(find(write_space(tmp_path, imports=HEAD, build=f"hypermodel = {given}")))


def test_one_that_is_not_tunable_takes_what_was_declared_before_and_adds_nothing() -> None:
    class Inner(keras_tuner.HyperModel):  # type: ignore[misc]
        def build(self, hp: Any) -> Any:
            return hp.Choice("units", [8, 16, 32]), hp.Int("layers", 1, 3, default=2)

    inner = Inner(tunable=False)
    hp = TracingHyperParameters({}, 0, True, {"units": 16})
    hp.Choice("units", [8, 16])
    assert inner.build(hp) == (16, 2)
    assert [ask["name"] for ask in hp.asks] == ["units"] and "layers" not in hp.values


# ── those that KerasTuner ships ──


@pytest.mark.parametrize(
    ("model", "first", "last"),
    [
        (HyperResNet(input_shape=(32, 32, 3), classes=3), "version", "learning_rate"),
        (HyperXception(input_shape=(32, 32, 3), classes=3), "activation", "learning_rate"),
        (HyperImageAugment(input_shape=(32, 32, 3)), "augment_layers", "factor_contrast"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, keras_tuner.HyperModel) else "",
)
def test_their_parameters_are_found(model: Any, first: str, last: str) -> None:
    hp = TracingHyperParameters(default=True)
    built = model.build(hp)
    names = [ask["name"] for ask in hp.asks]
    assert names[0] == first and names[-1] == last and all(ask["value"] is not None for ask in hp.asks)
    assert built.input_shape == (None, 32, 32, 3)


IMAGES = '''def load():
    """Stripes across, stripes down, squares: 32 x 32 x 3, one-hot labels."""
    rng = np.random.default_rng(0)
    kinds = np.arange(120) % 3
    x = rng.uniform(0.0, 0.4, size=(120, 32, 32, 3)).astype("float32")
    for image, kind in zip(x, kinds):
        at = rng.integers(0, 20)
        image[[np.s_[at:at + 6], np.s_[:, at:at + 6], np.s_[at:at + 12, at:at + 12]][kind]] += 0.6
    return Dataset(x, np.eye(3, dtype="float32")[kinds])'''
AUGMENTED = '''class Augmented(keras_tuner.HyperModel):
    """A small network behind the augmentation that another HyperModel searches."""

    def __init__(self, augment):
        super().__init__()
        self.augment = augment

    def build(self, hp):
        model = keras.Sequential([keras.Input((32, 32, 3)), self.augment.build(hp)])
        model.add(keras.layers.Conv2D(hp.Choice("filters", [8, 16]), 5, strides=2, activation="relu"))
        model.add(keras.layers.GlobalMaxPooling2D())
        model.add(keras.layers.Dense(3, activation="softmax"))
        model.compile(keras.optimizers.Adam(0.01), "categorical_crossentropy", metrics=["accuracy"])
        return model


hypermodel = Augmented(keras_tuner.applications.HyperImageAugment(input_shape=(32, 32, 3), augment_layers={layers}))'''
# What else there is, down to the least that each of them allows: they are made for larger images and machines.
SHIPPED = {
    "resnet": (
        "hypermodel = keras_tuner.applications.HyperResNet(input_shape=(32, 32, 3), classes=3)",
        [{"version": "v1", "learning_rate": 0.001}, {"version": "next", "pooling": "max", "optimizer": "sgd"}],
    ),
    "xception": (
        "hypermodel = keras_tuner.applications.HyperXception(input_shape=(32, 32, 3), classes=3)",
        [
            {"num_residual_blocks": 2, "sep_num_filters": 128, "activation": "selu", "pooling": "max"},
            {"num_residual_blocks": 2, "sep_num_filters": 128, "num_dense_layers": 2, "pooling": "flatten"},
        ],
    ),
    "augment": (
        AUGMENTED.format(layers=3),
        [{"augment_layers": 2, "factor_rotate": 0.2, "factor_contrast": 0.1}, {"factor_translate_x": 0.3}],
    ),
    "augment_in_turn": (
        AUGMENTED.format(layers=0),
        [{"factor_rotate": 0.2, "factor_contrast": 0.1}, {"factor_translate_x": 0.3, "filters": 16}],
    ),
}


def test_kerastuners_augmentation_trains_leaves_predictions_alone_and_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock layer does none of the three."""
    monkeypatch.setattr(augment, "RandAugment", augment.RandAugment)  # are put back afterwards
    monkeypatch.setattr(resnet, "layers", resnet.layers)
    mended.mend()
    hp = keras_tuner.HyperParameters()
    for name, value in {"augment_layers": 2, "factor_rotate": 0.5, "factor_contrast": 0.5}.items():
        hp.values[name] = value
    images = np.random.default_rng(0).uniform(size=(32, 32, 32, 3)).astype("float32")
    changes = HyperImageAugment(input_shape=(32, 32, 3)).build(hp)
    pooled = keras.layers.GlobalAveragePooling2D()
    model = keras.Sequential([keras.Input((32, 32, 3)), changes, pooled, keras.layers.Dense(3)])
    np.testing.assert_array_equal(changes.predict(images, verbose=0), images)
    changed = np.abs(np.asarray(changes(images, training=True)) - images).max(axis=(1, 2, 3))
    assert (changed > 0.01).sum() > 8 and changed.shape == (32,)
    model.compile("adam", "mse")
    assert np.isfinite(model.fit(images, np.zeros((32, 3)), epochs=2, verbose=0).history["loss"]).all()
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert "keras_tuner" not in file.read("config.json").decode()
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(again.predict(images, verbose=0), model.predict(images, verbose=0), rtol=1e-6)


def test_a_resnext_of_kerastuner_sums_as_the_stock_one_and_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "RandAugment", augment.RandAugment)  # are put back afterwards
    monkeypatch.setattr(resnet, "layers", keras.layers)
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 64)).astype("float32")

    def block() -> keras.Model:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((8, 8, 64))
        return keras.Model(inputs, resnet.block3(inputs, 64, groups=32, name="block"))

    stock = block().predict(images, verbose=0)
    mended.mend()
    model = block()
    np.testing.assert_allclose(model.predict(images, verbose=0), stock, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(again.predict(images, verbose=0), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_study_of_what_kerastuner_ships(name: str, tmp_path: Path, heldout: Heldout) -> None:
    build, first = SHIPPED[name]
    space = write_space(tmp_path, name, imports=HEAD, load=IMAGES, build=build)
    (tmp_path / "first.json").write_text(json.dumps(first))
    where = ("--workspace", str(tmp_path / "ws"))
    options = ("--enqueue", str(tmp_path / "first.json"), "--trials", "3", "--workers", "1", "--confirm", "0")
    ran = heldout("launch", space, *options, "--study", "s", "--json", *where, timeout=1000)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    assert 0 <= report["test"]["winner"] <= 1 and report["test"]["rows"] == 24
    trials = Study("s", tmp_path / "ws").trials
    assert [one.items() <= trial.params.items() for one, trial in zip(first, trials[1:], strict=True)] == [True, True]
    out = heldout("export", "s", "--out", str(tmp_path / "best"), "--json", *where, timeout=600)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["scores"]["test"]["score"] == report["test"]["winner"]
