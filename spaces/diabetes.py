"""How far diabetes has progressed after a year: regression on a small table.

The loss is searched too, so the objective is a metric that means the same for every loss.

    heldout launch spaces/diabetes.py --trials 40
"""

import keras

from search import Dataset

objective = "val_mse"
epochs = 60


def load() -> Dataset:
    """442 patients: 10 measurements each, and a score of progression from 25 to 346."""
    # Imported here because a trial never calls load(): it starts faster without scikit-learn.
    from sklearn.datasets import load_diabetes

    # scikit-learn can scale the columns as well, but by statistics of every row, test rows included.
    measurements, progression = load_diabetes(return_X_y=True, scaled=False)
    return Dataset(measurements.astype("float32"), progression.astype("float32"))


def preprocess(train: Dataset) -> keras.Model:
    """Mean 0 and variance 1 for every column, learned on train rows; it becomes part of the model."""
    normalize = keras.layers.Normalization()
    normalize.adapt(train.x)
    return keras.Sequential([keras.Input((10,)), normalize])


def build(hp) -> keras.Model:
    """Up to three dense layers; with none it is a linear regression."""
    activation = hp.Choice("activation", ["relu", "gelu", "tanh"])
    penalty = keras.regularizers.L2(hp.Float("l2", 1e-6, 1e-1, sampling="log", default=1e-4))

    model = keras.Sequential([keras.Input((10,))])
    layers = hp.Int("layers", 0, 3, default=2)
    for i in range(layers):
        units = hp.Int(f"units_{i}", 4, 128, step=2, sampling="log", default=32)
        model.add(keras.layers.Dense(units, activation=activation, kernel_regularizer=penalty))
    if layers:
        model.add(keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)))
    model.add(keras.layers.Dense(1, kernel_regularizer=penalty))
    # Start in the middle of the scale: otherwise the first epochs only learn its offset.
    model.add(keras.layers.Rescaling(100.0, offset=150.0))

    loss = hp.Choice("loss", ["mse", "mae", "huber"])
    if loss == "huber":
        loss = keras.losses.Huber(delta=hp.Float("huber_delta", 10.0, 100.0, sampling="log", default=50.0))

    hp.Choice("batch_size", [16, 32, 64], default=32)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 3e-4, 1e-1, sampling="log", default=3e-3)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["mse", "mae"])
    return model
