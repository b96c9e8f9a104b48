"""What processes share that answer one request about MLflow, which is slow to import: the answer, and runs by pages.

``publishing.call`` starts them: JSON in, JSON out, the address in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from search import secrecy


def answer(act: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> int:
    """Answer one request; exit code 1 with a line of why if MLflow refuses.

    Args:
        act: Makes the answer from the address and the request.
    """
    uri = os.environ["MLFLOW_TRACKING_URI"]
    secrecy.learn_tracking(uri, least=1)
    pipe = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        said = act(uri, json.load(sys.stdin))
    except Exception as error:
        said = {"error": secrecy.scrub(" ".join(f"{type(error).__name__}: {error}".split()))[:500]}
    with os.fdopen(pipe, "w") as out:
        json.dump(said, out)
    return 1 if "error" in said else 0


def pages(ask: Callable[[str | None], Any]) -> Iterator[Any]:
    """All that MLflow lists page by page.

    Args:
        ask: Gets the page that a token stands for; None for the first.
    """
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def runs(client: Any, wanted: str, view: int, experiments: Sequence[str] | None = None) -> Iterator[Any]:
    """The runs that a filter finds.

    Args:
        view: MLflow's ``ViewType``, of experiments and runs.
        experiments: Ids of those to look in; None for all of them.
    """
    if experiments is None:
        listed = pages(lambda token: client.search_experiments(view, 1000, page_token=token))
        experiments = [one.experiment_id for one in listed]
    for start in range(0, len(experiments), 100):
        yield from pages(partial(client.search_runs, list(experiments[start : start + 100]), wanted, view, 1000, None))
