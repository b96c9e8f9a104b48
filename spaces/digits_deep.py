"""Deep dense stacks on the 8×8 digits: what makes ten layers train at all.

Ten sigmoid layers stay near chance without BatchNormalization. SELU (Klambauer et al., NeurIPS 2017) normalises itself,
with its own initialiser and its own dropout, and is offered no BatchNormalization.

    heldout launch spaces/digits_deep.py --trials 40
"""

import keras

from search import Dataset

objective = "val_accuracy"
epochs = 30
MOMENTUM = 0.9  # of running statistics; Keras' default is slow for the few batches of an epoch here


def load() -> Dataset:
    """All 1,797 digits: 64 pixels from 0 to 16 each, and the digit that was written."""
    # Imported here because a trial never calls load(): it starts faster without scikit-learn.
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return Dataset(pixels.astype("float32"), digits)


def build(hp) -> keras.Model:
    """Layers of one width, all alike."""
    activation = hp.Choice("activation", ["relu", "sigmoid", "tanh", "selu"])
    rate = hp.Float("dropout", 0.0, 0.4, step=0.1, default=0.0)
    if activation == "selu":
        norm, initializer = "none", "lecun_normal"
        dropout = keras.layers.AlphaDropout  # keeps mean and variance, on which SELU relies
    else:
        norm = hp.Choice("batch_norm", ["none", "before", "after"])  # before or after the activation
        initializer = hp.Choice("initializer", ["glorot_uniform", "he_normal"])
        dropout = keras.layers.Dropout
    penalty = hp.Choice("penalty", ["none", "l1", "l2"])
    regularizer = None
    if penalty != "none":
        strength = hp.Float(f"{penalty}_strength", 1e-6, 1e-2, sampling="log", default=1e-4)
        regularizer = keras.regularizers.L1(strength) if penalty == "l1" else keras.regularizers.L2(strength)

    units = hp.Int("units", 16, 128, step=2, sampling="log", default=64)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Rescaling(1 / 8, offset=-1)])
    for _ in range(hp.Int("layers", 2, 12, default=10)):
        model.add(
            keras.layers.Dense(
                units, use_bias=norm != "before", kernel_initializer=initializer, kernel_regularizer=regularizer
            )
        )
        if norm == "before":
            model.add(keras.layers.BatchNormalization(momentum=MOMENTUM))
        model.add(keras.layers.Activation(activation))
        if norm == "after":
            model.add(keras.layers.BatchNormalization(momentum=MOMENTUM))
        if rate:
            model.add(dropout(rate))
    model.add(keras.layers.Dense(10, activation="softmax"))

    hp.Choice("batch_size", [32, 64, 128], default=64)  # reaches the training loop by its name
    speed = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(speed), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
