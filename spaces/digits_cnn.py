"""Convolutional network on the 8×8 digits: plain against depthwise-separable convolutions.

Shows a choice that opens others: an ordinary `if` around a declaration is all it takes.

    heldout launch spaces/digits_cnn.py --trials 30
"""

import keras

from search import Dataset

objective = "val_accuracy"
epochs = 20
MOMENTUM = 0.9  # of running statistics; Keras' default is slow for the few batches of an epoch here


def load() -> Dataset:
    """All 1,797 digits as images (8, 8, 1), with pixels from 0 to 16."""
    # Imported here because a trial never calls load(): it starts faster without scikit-learn.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return Dataset(bunch.images[..., None].astype("float32"), bunch.target)


def build(hp) -> keras.Model:
    """One or two blocks of convolutions that each halve the image, and a head."""
    convolution = hp.Choice("convolution", ["plain", "separable"])
    norm = hp.Choice("batch_norm", ["none", "before", "after"])  # before or after the activation
    filters = hp.Int("filters", 8, 32, step=8, default=16)
    kernel = hp.Choice("kernel", [3, 5])
    multiplier = 1
    if convolution == "separable":
        multiplier = hp.Int("depth_multiplier", 1, 4)

    x = inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(1 / 16)(x)
    for block in range(hp.Int("blocks", 1, 2)):
        options = dict(padding="same", use_bias=norm != "before")
        if convolution == "separable":
            layer = keras.layers.SeparableConv2D
            x = layer(filters * 2**block, kernel, depth_multiplier=multiplier, **options)(x)
        else:
            x = keras.layers.Conv2D(filters * 2**block, kernel, **options)(x)
        if norm == "before":
            x = keras.layers.BatchNormalization(momentum=MOMENTUM)(x)
        x = keras.layers.Activation("relu")(x)
        if norm == "after":
            x = keras.layers.BatchNormalization(momentum=MOMENTUM)(x)
        x = keras.layers.MaxPooling2D()(x)

    if hp.Choice("head", ["flatten", "average"]) == "flatten":
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(hp.Int("head_units", 16, 128, step=16, default=32), activation="relu")(x)
    else:
        x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0))(x)
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))

    hp.Choice("batch_size", [32, 64, 128], default=64)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=1e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
