"""TensorBoard's logs of one trial, for studies that were launched with ``--tensorboard``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from search import secrecy
from search.definition.problem import first_line


class EventLog(keras.callbacks.Callback):
    """Logs each epoch under the names that Keras' own callback uses, and the trial's parameters.

    Keras' own watches batches as well, and a trial whose callbacks do cannot run an epoch in one call. Whatever happens
    to the logs, the trial goes on.

    Args:
        folder: The trial's; what an earlier attempt has left there goes, once there is an epoch to log.
        params: The trial's parameters by name, complete by the end of the first epoch.
        epochs: Gives the metrics of all epochs so far, of those before a checkpoint too.
    """

    def __init__(
        self, folder: Path, params: Mapping[str, Any], epochs: Callable[[], Sequence[Mapping[str, float]]]
    ) -> None:
        super().__init__()
        self._folder, self._params, self._epochs = folder, params, epochs
        self._writers: dict[str, Any] = {}  # none before this process has logged something
        self._failed = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log what this process has not logged, and have it on disk, since a trial may end at any time."""
        if self._failed:
            return
        try:
            self._log()
        except Exception as error:  # a full disk, above all
            self._failed = True
            sys.stderr.write(f"no logs for TensorBoard from here on: {first_line(error)} ({type(error).__name__})\n")

    def _log(self) -> None:
        import tensorflow as tf

        epochs = list(enumerate(self._epochs(), start=1))
        if self._writers:
            epochs = epochs[-1:]
        else:
            self._begin()
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        for step, metrics in epochs:
            shown = {"learning_rate": rate, **metrics} if step == epochs[-1][0] else metrics
            for part, writer in self._writers.items():
                with writer.as_default(step=step):  # flushes at its end
                    for name, value in shown.items():
                        if name.startswith("val_") == (part == "validation"):
                            tf.summary.scalar(f"epoch_{secrecy.scrub(name.removeprefix('val_'))}", value)

    def _begin(self) -> None:
        import tensorflow as tf
        from tensorboard.plugins.hparams import api

        shutil.rmtree(self._folder, ignore_errors=True)
        with tf.summary.create_file_writer(str(self._folder)).as_default():
            api.hparams({secrecy.scrub(name): _plain(value) for name, value in self._params.items()})
        self._writers |= {
            part: tf.summary.create_file_writer(str(self._folder / part)) for part in ("train", "validation")
        }


def _plain(value: Any) -> Any:
    return secrecy.scrub(value) if isinstance(value, str) else value
