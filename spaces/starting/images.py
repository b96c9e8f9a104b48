"""Images of several kinds, to be told apart: a start for your own.

Runs as it is, on the 8×8 digits that scikit-learn ships. Replace what is marked with YOURS, then:

    heldout check images.py --sanity
    heldout launch images.py --trials 30
"""

import keras

from search import Dataset

objective = "val_accuracy"
epochs = 20  # at most: training stops when the objective has not improved for a while

SIZE = (8, 8)  # YOURS: height and width that images are brought to, such as (96, 96)
CHANNELS = 1  # YOURS: 3 for colours
WHITE = 16.0  # YOURS: the largest value of a pixel, 255.0 for files
CLASSES = 10  # YOURS: how many kinds there are


def load() -> Dataset:
    """Every labelled image. Heldout splits them."""
    # YOURS: these three lines …
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Dataset(digits.images[..., None].astype("float32"), digits.target)
    # … and in their place, for a folder that has a folder for each kind (photos/cat/1.jpg, photos/dog/2.jpg):
    # import numpy as np
    # files = keras.utils.image_dataset_from_directory(
    #     "/path/to/photos", image_size=SIZE, color_mode="grayscale", batch_size=None, shuffle=False
    # )  # color_mode="rgb" for 3 channels
    # images, kinds = zip(*files.as_numpy_iterator(), strict=True)
    # return Dataset(np.stack(images), np.array(kinds))


def build(hp) -> keras.Model:
    """One to three blocks of convolutions; each `hp` call declares a parameter where it is used."""
    x = inputs = keras.Input((*SIZE, CHANNELS))
    x = keras.layers.Rescaling(1 / WHITE)(x)
    if hp.Boolean("augment"):
        amount = hp.Float("shift", 0.05, 0.2, step=0.05)
        x = keras.layers.RandomTranslation(amount, amount, fill_mode="constant")(x)  # in training only
    norm = hp.Boolean("batch_norm")
    filters = hp.Int("filters", 8, 64, step=2, sampling="log", default=16)
    for block in range(hp.Int("blocks", 1, 3, default=2)):
        x = keras.layers.Conv2D(filters * 2**block, 3, padding="same")(x)
        if norm:
            x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0))(x)
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))

    hp.Choice("batch_size", [32, 64, 128], default=32)  # reaches training by its name
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=2e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
