"""The epoch whose weights a trial keeps: the best by the objective, whoever runs the epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras


class BestEpoch(keras.callbacks.EarlyStopping):
    """Keeps the weights of the best epoch and stops training once there has been no better one for a while.

    Keras counts epochs anew in every ``fit``, and a loop of the module's own may call ``on_epoch_end`` alone.

    Args:
        count: Epochs reported so far, this one included, through every ``fit`` that the callbacks were handed to.
        **settings: Of ``EarlyStopping``.

    Attributes:
        at: Number of the best epoch among those, from 1; None before there is one.
    """

    def __init__(self, count: Callable[[], int], **settings: Any) -> None:
        super().__init__(restore_best_weights=True, **settings)
        self._count = count
        self.at: int | None = None
        self._is_restored = True

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Keep the weights, if they are the best so far."""
        kept = self.best_weights
        super().on_epoch_end(epoch, logs)
        self._is_restored = False
        if self.best_weights is not kept:
            self.at = self._count()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Put them back."""
        super().on_train_end(logs)
        self._is_restored = True

    def restore(self) -> None:
        """Put them back after a loop that did not say that it had ended."""
        if not self._is_restored and self.best_weights is not None:
            self.model.set_weights(self.best_weights)
