"""Dense network on the 8×8 digits that scikit-learn ships.

A space is a module like this one: `load` returns every labelled row, `build` returns a compiled
model, and each `hp.*` call in it declares something to search, where it is used.

    heldout launch spaces/digits_mlp.py
"""

import keras

from search import Dataset

objective = "val_accuracy"
epochs = 30  # at most: training stops once the objective no longer improves

# Of BatchNormalization's running statistics. Keras' default of 0.99 looks back a hundred batches;
# an epoch here has about twenty, and validation would be scored with statistics from the start.
MOMENTUM = 0.9


def load() -> Dataset:
    """All 1,797 digits: 64 pixels from 0 to 16 each, and the digit that was written."""
    # Imported here because a trial never calls load(): it starts faster without scikit-learn.
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    return Dataset(pixels.astype("float32"), digits)


def build(hp) -> keras.Model:
    """One to three dense layers. Layer 2's width is declared only where there is a layer 2."""
    norm = hp.Choice("batch_norm", ["none", "before", "after"])  # before or after the activation
    activation = hp.Choice("activation", ["relu", "gelu", "tanh"])
    dropout = hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)

    # Scaling inside the model, so that an exported model takes pixels as they come.
    model = keras.Sequential([keras.Input((64,)), keras.layers.Rescaling(1 / 16)])
    for i in range(hp.Int("layers", 1, 3)):
        units = hp.Int(f"units_{i}", 16, 256, step=2, sampling="log", default=64)
        # BatchNormalization subtracts the mean, and a bias added before it would go with that.
        model.add(keras.layers.Dense(units, use_bias=norm != "before"))
        if norm == "before":
            model.add(keras.layers.BatchNormalization(momentum=MOMENTUM))
        model.add(keras.layers.Activation(activation))
        if norm == "after":
            model.add(keras.layers.BatchNormalization(momentum=MOMENTUM))
        model.add(keras.layers.Dropout(dropout))
    model.add(keras.layers.Dense(10, activation="softmax"))

    # No line here reads the batch size: a hyperparameter of this name reaches the training loop.
    hp.Choice("batch_size", [16, 32, 64, 128], default=64)
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
