"""Malignant or benign: a small table with two classes, and preprocessing learned on train rows only.

    heldout launch spaces/breast_cancer.py --trials 40
"""

import keras

from search import Dataset

# The log-loss: with about sixty validation rows many models tie on accuracy or AUC, few on this.
objective = "val_loss"
epochs = 60


def load() -> Dataset:
    """569 tumours: 30 measurements each, and 1 where the tumour is benign."""
    # Imported here because a trial never calls load(): it starts faster without scikit-learn.
    from sklearn.datasets import load_breast_cancer

    measurements, benign = load_breast_cancer(return_X_y=True)
    return Dataset(measurements.astype("float32"), benign)


def preprocess(train: Dataset) -> keras.Model:
    """Mean 0 and variance 1 for every column, learned on train rows; it becomes part of the model."""
    normalize = keras.layers.Normalization()
    normalize.adapt(train.x)
    return keras.Sequential([keras.Input((30,)), normalize])


def build(hp) -> keras.Model:
    """Up to two dense layers; with none it is a logistic regression."""
    penalty = keras.regularizers.L2(hp.Float("l2", 1e-6, 1e-1, sampling="log", default=1e-4))
    noise = hp.Float("input_noise", 0.0, 0.3, step=0.1, default=0.0)

    model = keras.Sequential([keras.Input((30,)), keras.layers.GaussianNoise(noise)])
    layers = hp.Int("layers", 0, 2, default=1)
    for i in range(layers):
        units = hp.Int(f"units_{i}", 4, 128, step=2, sampling="log", default=32)
        model.add(keras.layers.Dense(units, activation="relu", kernel_regularizer=penalty))
    if layers:
        model.add(keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0)))
    model.add(keras.layers.Dense(1, activation="sigmoid", kernel_regularizer=penalty))

    hp.Choice("batch_size", [16, 32, 64], default=32)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 3e-4, 1e-1, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy", "auc"])
    return model
