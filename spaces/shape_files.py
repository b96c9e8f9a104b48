"""Images in files, one folder per class: decoded when they are read, so that they need not fit in memory.

The pictures are drawn here, so that nothing is downloaded: three shapes of any size and place under noise.

    heldout launch spaces/shape_files.py --trials 20
"""

import os

import keras
import numpy as np
from PIL import Image

from search import Dataset, cache_folder

objective = "val_accuracy"
epochs = 12
KINDS = ("circle", "cross", "square")
PER_KIND, SIDE = 400, 24


def prepare() -> None:
    """Draw what is not there yet. Runs once, before load()."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for kind in KINDS:
        folder = cache_folder("shape_files") / kind
        folder.mkdir(exist_ok=True)
        for number in range(PER_KIND):
            path = folder / f"{number:04d}.png"
            if path.exists():
                continue
            rng = np.random.default_rng((KINDS.index(kind), number))
            size, (y, x) = rng.integers(4, 9), rng.integers(8, SIDE - 8, 2)
            up, across = np.abs(rows - y), np.abs(columns - x)
            inside = {
                "circle": up**2 + across**2 <= size**2,
                "cross": (np.minimum(up, across) <= 1) & (np.maximum(up, across) <= size),
                "square": np.maximum(up, across) <= size * 0.85,
            }[kind]
            grey = 90 + 50 * inside + rng.normal(0, 40, (SIDE, SIDE))
            Image.fromarray(grey.clip(0, 255).astype("uint8")).save(path.with_suffix(".tmp"), format="png")
            os.replace(path.with_suffix(".tmp"), path)  # whole or absent, should this be interrupted


def load() -> Dataset:
    """Paths as x. Heldout gives the files neutral names: these say what is in them."""
    paths = [path for kind in KINDS for path in sorted((cache_folder("shape_files") / kind).glob("*.png"))]
    return Dataset(paths, np.array([KINDS.index(path.parent.name) for path in paths]))


def decode(path) -> np.ndarray:
    """What the model takes of one file: an image (24, 24, 1), with pixels from 0 to 255."""
    return np.asarray(Image.open(path))[..., None]


def build(hp) -> keras.Model:
    """One to three blocks of convolutions."""
    x = inputs = keras.Input((SIDE, SIDE, 1))
    x = keras.layers.Rescaling(1 / 255)(x)
    filters = hp.Int("filters", 4, 32, step=2, sampling="log", default=8)
    for block in range(hp.Int("blocks", 1, 3, default=2)):
        x = keras.layers.Conv2D(filters * 2**block, hp.Choice("kernel", [3, 5]), padding="same", activation="relu")(x)
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalMaxPooling2D()(x) if hp.Boolean("largest") else keras.layers.Flatten()(x)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.2))(x)
    model = keras.Model(inputs, keras.layers.Dense(len(KINDS), activation="softmax")(x))

    hp.Choice("batch_size", [32, 64], default=32)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 3e-4, 1e-2, sampling="log", default=2e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
