"""Calling a module's own ``fit`` as KerasTuner does, whatever of its arguments it sets itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import keras

_TWICE = re.compile(r"multiple values for keyword argument '(epochs|verbose)'")


class AtMost(keras.callbacks.Callback):
    """Stops training after a number of epochs, through every ``fit`` that the callbacks were handed to.

    Args:
        epochs: That number.
        count: Epochs so far, the one that ends included.
    """

    def __init__(self, epochs: int, count: Callable[[], int]) -> None:
        super().__init__()
        self._epochs, self._count = epochs, count

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Stop, if it was the last one."""
        if self._count() >= self._epochs:
            self.model.stop_training = True


def call(
    fit: Callable[..., Any],
    hp: Any,
    model: keras.Model,
    data: tuple[Any, ...],
    given: Mapping[str, Any],
    limit: int | None,
    count: Callable[[], int],
) -> None:
    """Call ``fit(hp, model, *data, **given)``; what it returns is dropped, since the score is computed elsewhere.

    KerasTuner hands on what its search was given, which need not be a number of epochs. So its guides write
    ``model.fit(*args, epochs=hp.Int(...), **kwargs)``, which Python refuses if ``kwargs`` has one too: then ``fit`` is
    called again without.

    Args:
        data: Rows, as ``(x, y)`` or ``(batches,)``.
        given: Keyword arguments; ``callbacks`` begins with the one that counts epochs.
        limit: Epochs at most where ``fit`` sets their number itself, or None; count: those so far.

    Raises:
        TypeError: As Python does, where training had begun by then, for it would begin twice.
    """
    given = dict(given)
    before = int(model.optimizer.iterations)
    while True:
        try:
            fit(hp, model, *data, **given)
            return
        except TypeError as error:
            twice = _TWICE.search(str(error))
            if twice is None or twice[1] not in given or int(model.optimizer.iterations) > before:
                raise
        del given[twice[1]]
        if twice[1] == "epochs" and limit is not None:
            counting, *others = given["callbacks"]
            given["callbacks"] = [counting, AtMost(limit, count), *others]
