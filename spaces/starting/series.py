"""A series of readings over time, the next one to be predicted from the last ones: a start for your own.

Runs as it is, on a made-up demand for power. Replace what is marked with YOURS, then:

    heldout check series.py --sanity
    heldout launch series.py --trials 30
"""

import keras
import numpy as np

from search import Dataset

objective = "val_mae"
epochs = 30  # at most: training stops when the objective has not improved for a while

WINDOW = 48  # YOURS: readings that a prediction is made from
AHEAD = 1  # YOURS: how many readings later the predicted one is
MIDDLE, SPREAD = 50.0, 10.0  # YOURS: about the mean of the readings and how far they go from it


def load() -> Dataset:
    """A row for every reading that has enough others before it. Heldout trains on the earliest rows and tests on the
    latest, because they have a time."""
    readings = made_up()
    # YOURS: in place of the line above, for a table with the column "demand", the earliest reading first:
    # import pandas
    # readings = pandas.read_csv("/path/to/power.csv")["demand"].to_numpy("float32")
    windows = np.lib.stride_tricks.sliding_window_view(readings[:-AHEAD], WINDOW)
    following = readings[WINDOW + AHEAD - 1 :]
    # For several readings at a time (demand and temperature), give windows the shape (rows, WINDOW, readings).
    return Dataset(windows[..., None].copy(), following, time=np.arange(len(following)))


def made_up() -> np.ndarray:
    """Hourly demand over 100 days, by the hour, the day of the week and chance. YOURS: not needed any more."""
    hours, rng = np.arange(2400), np.random.default_rng(0)
    daily, weekly = 8 * np.sin(hours * 2 * np.pi / 24), 4 * (hours // 24 % 7 < 5)
    chance = np.convolve(rng.normal(0, 1, len(hours) + 5), np.ones(6) / 2, mode="valid")
    return (45 + daily + weekly + chance).astype("float32")


def build(hp) -> keras.Model:
    """A convolution, a GRU, or dense layers; each `hp` call declares a parameter where it is used."""
    x = inputs = keras.Input((WINDOW, 1))
    x = keras.layers.Rescaling(1 / SPREAD, offset=-MIDDLE / SPREAD)(x)
    reader = hp.Choice("reader", ["dense", "convolution", "gru"])
    if reader == "convolution":
        filters = hp.Int("filters", 8, 32, step=8, default=16)
        x = keras.layers.Conv1D(filters, hp.Choice("kernel", [3, 5, 7], default=5), activation="relu")(x)
    if reader == "gru":
        x = keras.layers.GRU(hp.Int("memory", 8, 32, step=8, default=16))(x)
    else:
        x = keras.layers.Flatten()(x)
    for i in range(hp.Int("layers", 1, 2)):
        x = keras.layers.Dense(hp.Int(f"units_{i}", 16, 128, step=2, sampling="log", default=64), activation="relu")(x)
    x = keras.layers.Dense(1)(x)
    # Start in the middle of the scale: otherwise the first epochs only learn it.
    model = keras.Model(inputs, keras.layers.Rescaling(SPREAD, offset=MIDDLE)(x))

    hp.Choice("batch_size", [16, 32, 64], default=32)  # reaches training by its name
    rate = hp.Float("learning_rate", 1e-4, 1e-2, sampling="log", default=1e-3)
    loss = hp.Choice("loss", ["mse", "mae"])
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["mae"])
    return model
