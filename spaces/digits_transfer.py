"""Transfer learning: a backbone that knows the digits 0 to 4, put to use on 5 to 9.

A larger one would be downloaded in prepare(); this one is trained there, in a few seconds.

    heldout launch spaces/digits_transfer.py --trials 20
"""

import os

import keras
import numpy as np

from search import Dataset, cache_folder

objective = "val_accuracy"
epochs = 15
BACKBONE = cache_folder("digits_transfer") / "backbone.keras"
assets = [BACKBONE]  # recorded by its digest, so that no study goes on with another one


def digits(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (8, 8, 1) of some digits, with pixels from 0 to 16, and labels from 0."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    some = (first <= bunch.target) & (bunch.target <= last)
    return bunch.images[some][..., None].astype("float32"), bunch.target[some] - first


def prepare() -> None:
    """Train the backbone if it is not there. Runs once, before load(), and no trial calls it."""
    if BACKBONE.exists():
        return
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(1 / 16)(inputs)
    for filters in (16, 32):
        x = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
    features = keras.layers.MaxPooling2D()(x)
    whole = keras.Model(inputs, keras.layers.Dense(5, activation="softmax")(keras.layers.Flatten()(features)))
    whole.compile("adam", "sparse_categorical_crossentropy")
    whole.fit(*digits(0, 4), epochs=8, verbose=0)
    part = BACKBONE.with_name("part.keras")
    keras.Model(inputs, features, name="backbone").save(part)
    os.replace(part, BACKBONE)  # whole or absent, should this be interrupted


def load() -> Dataset:
    """The 896 digits from 5 to 9, none of which the backbone has seen."""
    return Dataset(*digits(5, 9))


def build(hp) -> keras.Model:
    """A head on the backbone, which is left as it is, trained further, or started afresh."""
    backbone = keras.models.load_model(BACKBONE, compile=False)
    start = hp.Choice("backbone", ["frozen", "tuned", "afresh"])
    backbone.trainable = start != "frozen"
    if start == "afresh":
        backbone = keras.models.clone_model(backbone)
    x = keras.layers.Flatten()(backbone.output)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.2))(x)
    if hp.Boolean("hidden"):
        x = keras.layers.Dense(hp.Int("units", 16, 64, step=16, default=32), activation="relu")(x)
    model = keras.Model(backbone.input, keras.layers.Dense(5, activation="softmax")(x))

    hp.Choice("batch_size", [16, 32, 64], default=32)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 1e-4, 1e-2, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
