"""Files that a trial, or whoever can write where it writes, could leave for us to load: none makes anything run."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from search.definition.problem import find
from search.errors import SpaceError
from search.harness import preflight, worker
from search.scorer.declaration import declare
from search.scorer.judge import RowJudge
from search.tiers.data import load_structure
from tests.test_training import Running
from tests.tiny import PARTS, write_space


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def pickled(path: Path, mark: Path) -> str:
    """An ``.npy`` file of objects, which NumPy unpickles if it is let."""
    np.save(path, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    return str(path)


def test_the_bomb_would_go_off(tmp_path: Path, mark: Path) -> None:
    np.load(pickled(tmp_path / "x.npy", mark), allow_pickle=True)
    assert mark.exists()


@pytest.mark.parametrize("kind", ["objects", "pickle", "garbage"])
def test_predictions_that_are_none(tmp_path: Path, mark: Path, kind: str) -> None:
    running = Running(tmp_path, "judged")
    rows = running.rows.path
    judge = RowJudge(rows, tmp_path / "ws" / "sealed" / rows.name, "val_accuracy", running.module.problem.to_json())
    files = {tier: [pickled(tmp_path / f"{tier}_0.npy", mark)] for tier in ("validation", "guard")}
    for paths in files.values():
        if kind != "objects":
            Path(paths[0]).write_bytes(pickle.dumps(Bomb(mark)) if kind == "pickle" else os.urandom(500))
    with pytest.raises(ValueError, match="pickle|Object arrays"):
        judge.judge({"predictions": files, "declaration": declare(running.model)})
    assert not mark.exists()


def test_stored_rows_that_are_none(tmp_path: Path, mark: Path) -> None:
    path = pickled(tmp_path / "x_0.npy", mark)
    with pytest.raises(ValueError, match="Python objects in dtype"):
        load_structure({"kind": "array", "names": ["x"], "paths": [path]})
    assert not mark.exists()


def explosive(path: Path, mark: Path) -> Path:
    """A model file with code in a layer."""
    name = str(mark)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: (__import__("os").mkdir(name), x)[1])])
    mark.rmdir()  # it ran while it was built
    model.save(path)
    return path


@pytest.mark.parametrize("kind", ["keras", "h5", "pickle"])
def test_a_model_file_with_code_in_it(tmp_path: Path, mark: Path, kind: str) -> None:
    running = Running(tmp_path, "fed")
    path = explosive(tmp_path / ("model.h5" if kind == "h5" else "model.keras"), mark)
    if kind == "h5":
        path = path.rename(tmp_path / "model.keras")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    common = {"problem": running.module.problem.to_json(), "rows": str(running.rows.path), "seed": 0}
    common["budget"] = 1 << 30
    predicting = {"custom": [], "features": None, "tier": "validation", "folder": str(tmp_path)}
    predicting |= {"models": {"m": str(path)}}
    converting = {"custom": [], "path": str(path), "format": "saved_model", "out": str(tmp_path / "out")}
    jobs: list[Callable[[], Any]] = [
        lambda: worker.predict(common | predicting, lambda body: None),
        lambda: worker._Trial(common | {"preprocess": str(path), "proposal": None, "default": True}),
        lambda: worker.convert(common | converting, print),
    ]
    for job in jobs:
        with pytest.raises(Exception, match="[Ll]ambda|File not found|not.*zip|[Ii]nvalid|does not appear"):
            job()
        assert not mark.exists()


@pytest.mark.parametrize("kind", ["h5 model", "pickle"])
def test_weights_with_code_in_them(tmp_path: Path, mark: Path, kind: str) -> None:
    running = Running(tmp_path, "weighed")
    path = tmp_path / "model.weights.h5"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        explosive(tmp_path / "whole.h5", mark)
        shutil.copy(tmp_path / "whole.h5", path)
    asked = {"problem": running.module.problem.to_json(), "rows": str(running.rows.path), "seed": 0, "default": True}
    with pytest.raises(Exception):  # noqa: B017  (Keras and h5py say it in many ways)
        worker.export(asked | {"weights": str(path), "out": str(tmp_path / "out.keras")}, lambda body: None)
    assert not mark.exists()


LAMBDA = "keras.layers.Lambda(lambda x: x * 2, name='doubling')"


def test_a_lambda_in_the_model_is_refused_with_what_to_use_instead(tmp_path: Path) -> None:
    build = PARTS["build"].replace("keras.Input((4,))", f"keras.Input((4,)), {LAMBDA}")
    said = "the layer 'doubling' is a Lambda around Python code.*use one of Keras' own"
    with pytest.raises(SpaceError, match=said) as told:
        preflight.run(Running(tmp_path, "doubling", build=build))
    assert "\n" not in str(told.value)


def test_a_lambda_in_preprocess_is_refused_too(tmp_path: Path) -> None:
    rest = f"def preprocess(train):\n    return keras.Sequential([keras.Input((4,)), {LAMBDA}])"
    problem = find(write_space(tmp_path, "before", rest=rest))
    asked = {"problem": problem.to_json(), "workspace": str(tmp_path / "ws"), "folder": str(tmp_path), "split_seed": 0}
    asked["budget"] = 1 << 30
    with pytest.raises(SpaceError, match="before.py: the layer 'doubling' is a Lambda around Python code"):
        worker.load(asked, lambda body: None)


def test_a_message_of_a_trial_is_json_and_nothing_else() -> None:
    from search.processes.channel import ChannelError, Receiver

    receiver = Receiver()
    text = pickle.dumps(Bomb(Path("/nowhere")))
    receiver.feed(len(text).to_bytes(4, "big") + text)
    with pytest.raises(ChannelError, match="must be JSON"):
        list(receiver.messages())
