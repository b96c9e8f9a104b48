"""TensorBoard's web server on the logs of one study, for this machine only."""

from __future__ import annotations

import importlib.util
import os
import sys

from search.errors import RequestError
from search.record import places
from search.study import Study
from search.tracker.serving import HOST, Server, check_free, start


def check_installed() -> None:
    """See that TensorBoard is installed, which TensorFlow does not bring any more.

    Raises:
        RequestError: Otherwise, with the extra that has it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise RequestError(
            "TensorBoard and its logs need the package tensorboard, which must be installed first: "
            "pip install 'heldout[tensorboard]'"
        )


def tensorboard(study: Study, port: int = 6006) -> Server:
    """Starts TensorBoard on a study's logs, also while it runs, and returns when it answers.

    It stops with us, as ``ui.serve`` does, and listens on the loopback interface alone: it asks for no password.

    Raises:
        RequestError: If the study has no logs, TensorBoard is not installed or cannot start, or the port is taken.
    """
    check_installed()
    logs = study.folder / places.EVENTS
    if not logs.is_dir():
        raise RequestError(
            f"study {study.name!r} must have logs for TensorBoard, but has none; they are written for a study that is "
            "launched with --tensorboard (`heldout ui` shows the curves of any)"
        )
    check_free(HOST, port)
    command = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", str(logs), "--host", HOST]
    command += ["--port", str(port), "--reload_multifile", "true", "--load_fast", "false"]
    url = f"http://{HOST}:{port}"
    return start(command, os.environ, "TensorBoard", health=f"{url}/data/environment", url=url)
