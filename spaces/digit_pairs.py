"""Two digits: are they the same? One encoder with shared weights for both images (a Siamese network).

    heldout launch spaces/digit_pairs.py --trials 30
"""

import keras
import numpy as np

from search import Dataset

objective = "val_accuracy"
epochs = 30


def load() -> Dataset:
    """898 pairs of images (8, 8, 1), of the same digit in about half of them. No image is in two pairs."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(bunch.target))
    half = len(order) // 2
    # Half of the pairs take neighbours in the order of the digits; the others whom they happen to meet.
    alike, mixed = order[:half], order[half : half + half // 2 * 2]
    alike = alike[np.argsort(bunch.target[alike], kind="stable")][: half // 2 * 2]
    left = np.concatenate([alike[0::2], mixed[0::2]])
    right = np.concatenate([alike[1::2], mixed[1::2]])
    images = bunch.images[..., None].astype("float32")
    same = bunch.target[left] == bunch.target[right]
    return Dataset({"left": images[left], "right": images[right]}, same.astype("float32")[:, None])


def build(hp) -> keras.Model:
    """An encoder, and what is made of the two codes."""
    filters = hp.Int("filters", 8, 32, step=8, default=16)
    encoder = keras.Sequential(name="encoder")
    encoder.add(keras.layers.Rescaling(1 / 16))
    for block in range(hp.Int("blocks", 1, 2, default=2)):
        encoder.add(keras.layers.Conv2D(filters * 2**block, 3, padding="same", activation="relu"))
        if hp.Boolean("batch_norm"):
            encoder.add(keras.layers.BatchNormalization(momentum=0.9))
        encoder.add(keras.layers.MaxPooling2D())
    encoder.add(keras.layers.Flatten())
    encoder.add(keras.layers.Dense(hp.Int("code", 8, 64, step=8, default=32)))

    left, right = (keras.Input((8, 8, 1), name=name) for name in ("left", "right"))
    one, other = encoder(left), encoder(right)
    if hp.Choice("compared_by", ["distance", "product"]) == "distance":
        x = keras.ops.square(one - other)
    else:
        x = keras.layers.Multiply()([keras.layers.UnitNormalization()(one), keras.layers.UnitNormalization()(other)])
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0))(x)
    model = keras.Model({"left": left, "right": right}, keras.layers.Dense(1, activation="sigmoid")(x))

    hp.Choice("batch_size", [16, 32, 64], default=32)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=3e-3)
    model.compile(keras.optimizers.Adam(rate), "binary_crossentropy", metrics=["accuracy"])
    return model
