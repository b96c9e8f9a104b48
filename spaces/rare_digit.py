"""Is it an 8? One class in ten, and how to train for it.

Optimisers and what only they have, learning-rate schedules, epochs, batch size, class weights, label smoothing.

    heldout launch spaces/rare_digit.py --trials 60
"""

import math

import keras

from search import Dataset

objective = "val_auc"  # the share of pairs, an 8 and another digit, that the model puts in the right order


def load() -> Dataset:
    """All 1,797 digits: 64 pixels from 0 to 16 each, and 1 for an 8."""
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return Dataset(pixels.astype("float32"), (digits == 8).astype("float32")[:, None])


def build(hp) -> keras.Model:
    """A small network; all else is how it is trained."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Rescaling(1 / 16)])
    model.add(keras.layers.Dense(hp.Int("units", 16, 128, step=2, sampling="log", default=32), "relu"))
    model.add(keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)))
    model.add(keras.layers.Dense(1, activation="sigmoid"))

    # These two reach the training loop by their names.
    hp.Choice("batch_size", [16, 32, 64, 128], default=64)
    hp.Int("epochs", 10, 60, step=10, default=30)  # a schedule ends with them, so more are not always better
    smoothing = hp.Float("label_smoothing", 0.0, 0.1, step=0.02, default=0.0)
    loss = keras.losses.BinaryCrossentropy(label_smoothing=smoothing)
    model.compile(optimizer(hp), loss, metrics=[keras.metrics.AUC(name="auc")])
    return model


def optimizer(hp) -> keras.optimizers.Optimizer:
    """Each with the learning rates that suit it, and with what only it has."""
    name = hp.Choice("optimizer", ["sgd", "rmsprop", "adam", "adamw"], default="adam")
    if name == "sgd":
        momentum = hp.Float("momentum", 0.5, 0.99, sampling="reverse_log", default=0.9)
        rate = hp.Float("sgd_rate", 1e-3, 1.0, sampling="log", default=0.1)
        return keras.optimizers.SGD(rate, momentum=momentum, nesterov=hp.Boolean("nesterov"))
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    if name == "adamw":
        return keras.optimizers.AdamW(rate, hp.Float("weight_decay", 1e-5, 1e-1, sampling="log", default=4e-3))
    return keras.optimizers.RMSprop(rate) if name == "rmsprop" else keras.optimizers.Adam(rate)


def callbacks(hp) -> list[keras.callbacks.Callback]:
    """How the learning rate changes from one epoch to the next."""
    schedule = hp.Choice("schedule", ["constant", "cosine", "exponential", "plateau"])
    if schedule == "constant":
        return []
    if schedule == "plateau":
        return [keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=3)]
    if schedule == "exponential":
        decay = hp.Float("decay", 0.8, 0.99, sampling="reverse_log", default=0.95)
        return [keras.callbacks.LearningRateScheduler(lambda epoch, last: last * decay if epoch else last)]
    epochs = hp.get("epochs")
    return [keras.callbacks.LearningRateScheduler(lambda epoch, last: last * cosine(epoch, epochs) if epoch else last)]


def cosine(epoch: int, epochs: int) -> float:
    """What is left of the learning rate of the epoch before; in all it falls to nearly nothing, slowly at both ends."""
    height = [1.001 + math.cos(math.pi * min(at, epochs) / epochs) for at in (epoch - 1, epoch)]
    return height[1] / height[0]


def class_weight(hp) -> dict[int, float]:
    """What an 8 weighs; nine times as much makes both classes weigh the same."""
    return {0: 1.0, 1: hp.Float("weight_of_8", 1.0, 20.0, sampling="log", default=1.0)}
