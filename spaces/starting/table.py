"""A table with columns of numbers and columns of words, and a label to predict: a start for your own.

Runs as it is, on customers that are made up. Replace what is marked with YOURS, then:

    heldout check table.py --sanity
    heldout launch table.py --trials 30
"""

import keras
import numpy as np
import pandas

from search import Dataset

objective = "val_accuracy"
epochs = 30  # at most: training stops when the objective has not improved for a while

NUMBERS = ["age", "income", "visits"]  # YOURS: columns of numbers
WORDS = ["plan", "region"]  # YOURS: columns of words, each with a few different ones
LABEL = "left"  # YOURS: the column to predict; numbers 0, 1, 2, …
CLASSES = 2  # YOURS: how many different labels there are


def load() -> Dataset:
    """Every labelled row. Heldout splits them."""
    table = made_up()  # YOURS: pandas.read_csv("/path/to/customers.csv")
    x = {name: table[[name]].to_numpy(str) for name in WORDS}
    x["numbers"] = table[NUMBERS].to_numpy("float32")
    # Rows that belong together (of one person, one place) stay together with groups=table["person"].
    return Dataset(x, table[LABEL].to_numpy("int64"))


def made_up() -> pandas.DataFrame:
    """1,500 customers, some of whom left. YOURS: not needed any more."""
    rng = np.random.default_rng(0)
    table = pandas.DataFrame({
        "age": rng.integers(18, 80, 1500),
        "income": rng.lognormal(10, 0.5, 1500).round(),
        "visits": rng.poisson(4, 1500),
        "plan": rng.choice(["basic", "family", "premium"], 1500),
        "region": rng.choice(["north", "east", "south", "west"], 1500),
    })  # fmt: skip
    unhappy = (table["plan"] == "basic") * 1.5 - 0.4 * table["visits"] + 0.03 * table["age"]
    table["left"] = (unhappy + rng.normal(0, 0.5, 1500) > 0).astype("int64")
    return table


def preprocess(train: Dataset) -> keras.Model:
    """Everything in numbers of a similar size, learned on train rows only. Becomes part of the exported model."""
    normalize = keras.layers.Normalization()
    normalize.adapt(train.x["numbers"])
    inputs = {"numbers": keras.Input((len(NUMBERS),), name="numbers")}
    parts = [normalize(inputs["numbers"])]
    for name in WORDS:
        look_up = keras.layers.StringLookup(output_mode="one_hot")  # a word that train does not have counts as unknown
        look_up.adapt(train.x[name])
        inputs[name] = keras.Input((1,), dtype="string", name=name)
        parts.append(look_up(inputs[name]))
    return keras.Model(inputs, keras.layers.Concatenate()(parts))


def build(hp) -> keras.Model:
    """One to three dense layers; each `hp` call declares a parameter where it is used."""
    model = keras.Sequential()
    penalty = keras.regularizers.L2(hp.Float("l2", 1e-6, 1e-2, sampling="log", default=1e-5))
    for i in range(hp.Int("layers", 1, 3)):
        units = hp.Int(f"units_{i}", 16, 128, step=2, sampling="log", default=64)
        model.add(keras.layers.Dense(units, activation="relu", kernel_regularizer=penalty))
    model.add(keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)))
    model.add(keras.layers.Dense(CLASSES, activation="softmax"))
    # For a number in place of classes: Dense(1) with no activation, the loss "mse", metrics=["mae"] and the objective
    # "val_mae"; to_numpy("float32") in load().

    hp.Choice("batch_size", [16, 32, 64, 128], default=32)  # reaches training by its name
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
