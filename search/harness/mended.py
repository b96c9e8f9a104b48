"""KerasTuner's ready-made models, mended where Keras 3 could not train them or read them again from a file."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras_tuner.src.applications import augment, resnet


class _InTraining(keras.layers.Layer):  # type: ignore[misc]
    """The layer that ``HyperImageAugment`` builds: each image is changed in one way of several, chosen at random.

    The stock one (KerasTuner 1.4) makes new layers at every call, which a compiled Keras 3 model refuses; changes
    images when it predicts as well, so that scores would be of changed images; and no file with it can be loaded,
    since its ``__init__`` does not take what Keras writes of every layer. This one does nothing when it predicts, and
    so is written as what it is then, an ``Identity``: the file needs no KerasTuner.

    Args:
        layers: Names of the ways, of ``augment.TRANSFORMS``; factors: how strong each is, 0 for not at all.
    """

    def __init__(self, layers: Sequence[str], factors: Sequence[float]) -> None:
        super().__init__()
        self._ways = len(layers)
        strong = [(at, name, factor) for at, (name, factor) in enumerate(zip(layers, factors, strict=True)) if factor]
        self._places = [at for at, _, _ in strong]
        self._changes = [augment.TRANSFORMS[name](factor) for _, name, factor in strong]

    def build(self, input_shape: Any) -> None:
        """Make the changes ready for images of this shape."""
        for change in self._changes:
            change.build(input_shape)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Images (n, height, width, channels), of the same shape afterwards."""
        if not training:
            return inputs
        drawn = keras.random.uniform((keras.ops.shape(inputs)[0], 1, 1, 1), maxval=self._ways)
        chosen, out = keras.ops.cast(drawn, "int32"), inputs
        for at, change in zip(self._places, self._changes, strict=True):
            out = keras.ops.where(keras.ops.equal(chosen, at), change(inputs, training=True), out)
        return out

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the images."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """An ``Identity``'s."""
        return {"name": self.name, "trainable": self.trainable, "dtype": self.dtype}


# By these two Keras writes a layer, and finds it again.
_InTraining.__module__, _InTraining.__name__ = "keras.layers", keras.layers.Identity.__name__


class _Summed:
    """What ``HyperResNet`` has a ``Lambda`` for: the sum over the channels of each group, as an operation of Keras.

    Keras loads no Python code from a file, so that no ``version="next"`` could be exported.
    """

    def __init__(self, function: Callable[..., Any], name: str, output_shape: tuple[int, ...]) -> None:
        # (n, height, width, groups, channels, channels), or with the first of the channels before both sides.
        self._axis = 4 if keras.config.image_data_format() == "channels_last" else 2

    def __call__(self, x: Any) -> Any:
        return keras.ops.sum(x, axis=self._axis)


def mend() -> None:
    """Let models that are built from now on in this process have what is here."""
    augment.RandAugment = _InTraining
    resnet.layers = types.SimpleNamespace(**vars(keras.layers) | {"Lambda": _Summed})
