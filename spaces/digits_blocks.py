"""Convolutional blocks on the 8×8 digits: plain, separable, residual or Inception-like, with augmented images.

A block that halves the image cannot add its input to its output as it is: it projects it (He et al., CVPR 2016).

    heldout launch spaces/digits_blocks.py --trials 40
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
    """Blocks of one kind; each second one halves the image and doubles the filters."""
    block = BLOCKS[hp.Choice("block", list(BLOCKS))]
    filters = hp.Int("filters", 8, 32, step=8, default=16)

    x = inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(1 / 16)(x)
    x = augmented(hp, x)
    x = convolved(x, filters, 3)
    for number in range(hp.Int("blocks", 1, 4, default=2)):
        halves = number % 2 == 1
        x = block(x, filters * 2 if halves else filters, 2 if halves else 1)
        filters = x.shape[-1]
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.0))(x)
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))

    hp.Choice("batch_size", [32, 64, 128], default=64)  # reaches the training loop by its name
    rate = hp.Float("learning_rate", 1e-4, 3e-2, sampling="log", default=3e-3)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def augmented(hp, x):
    """Layers that change images in training only; whether they help is the search's to find out."""
    if hp.Boolean("augment"):
        shift = hp.Float("shift", 0.0, 0.2, step=0.05, default=0.1)  # of the side
        turn = hp.Float("turn", 0.0, 0.1, step=0.02, default=0.04)  # of a whole turn
        zoom = hp.Float("zoom", 0.0, 0.2, step=0.05, default=0.1)
        options = dict(fill_mode="constant", fill_value=0.0)
        if hp.Boolean("flip"):  # a mirrored 3 is no digit, and the score says so
            x = keras.layers.RandomFlip("horizontal")(x)
        x = keras.layers.RandomTranslation(shift, shift, **options)(x)
        x = keras.layers.RandomRotation(turn, **options)(x)
        x = keras.layers.RandomZoom(zoom, **options)(x)
    return x


def convolved(x, filters, kernel, stride=1, layer=keras.layers.Conv2D, activation="relu"):
    """A convolution of maps (rows, height, width, channels), normalised before its activation."""
    x = layer(filters, kernel, strides=stride, padding="same", use_bias=False)(x)
    x = keras.layers.BatchNormalization(momentum=MOMENTUM)(x)
    return keras.layers.Activation(activation)(x)


def plain(x, filters, stride):
    """Two convolutions."""
    return convolved(convolved(x, filters, 3, stride), filters, 3)


def separable(x, filters, stride):
    """The same, each channel on its own and then all of them at each pixel."""
    layer = keras.layers.SeparableConv2D
    return convolved(convolved(x, filters, 3, stride, layer), filters, 3, layer=layer)


def residual(x, filters, stride):
    """The same, added to the block's input, which is projected where the shapes differ."""
    new = convolved(convolved(x, filters, 3, stride), filters, 3, activation="linear")
    if stride > 1 or x.shape[-1] != filters:
        x = convolved(x, filters, 1, stride, activation="linear")
    return keras.layers.Activation("relu")(keras.layers.Add()([x, new]))


def inception(x, filters, stride):
    """Branches of four scales side by side (Szegedy et al., CVPR 2015)."""
    part = filters // 4
    pooled = keras.layers.MaxPooling2D(3, strides=stride, padding="same")(x)
    branches = [
        convolved(x, part, 1, stride),
        convolved(convolved(x, part, 1), part, 3, stride),
        convolved(convolved(x, part, 1), part, 5, stride),
        convolved(pooled, part, 1),
    ]
    return keras.layers.Concatenate()(branches)


BLOCKS = {"plain": plain, "separable": separable, "residual": residual, "inception": inception}
