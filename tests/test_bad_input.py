"""Modules that are wrong in the ways people get them wrong: one line, with the fix and the line to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.definition.problem import find
from search.harness import failing, worker
from search.processes import jobs
from tests.conftest import Heldout
from tests.test_cli import refused
from tests.tiny import PARTS, write_space

HEAD = "keras.Sequential([keras.Input((4,)), "


def unheard(_: dict[str, Any]) -> None:
    """These jobs send nothing but their result."""


def checked(folder: Path, space: str) -> dict[str, Any]:
    """What `heldout check` asks of its processes, in this one: the last result, or the failure as it is told."""
    problem = find(space)
    try:
        prepared = jobs.completed(worker.load(jobs.load_payload(problem, folder, folder, 0), unheard), problem)
        found = worker.discover({"problem": problem.to_json(), "seconds": 20.0}, unheard)
        asked = {"epochs": 1, "seed": 0, "default": True, "deterministic": False}
        return found | worker.check(jobs.base_payload(prepared, folder) | asked, unheard)
    except Exception as error:
        return failing.told(error, False)


def line_of(space: str, text: str) -> int:
    """The number of the one line that has this text in it."""
    (number,) = [k for k, line in enumerate(Path(space).read_text().splitlines(), start=1) if text in line]
    return number


def build(layers: str, loss: str) -> str:
    return f"def build(hp):\n    model = {HEAD}{layers}])\n    model.compile('adam', {loss})\n    return model"


def load(labels: str) -> str:
    return PARTS["load"].replace("(x[:, 0] + x[:, 1] > 0).astype('int64')", labels)


def transformer(name: str, body: str = "", home: str = "preprocessing") -> dict[str, str]:
    return {
        "imports": f"{PARTS['imports']}\nfrom sklearn.{home} import {name}",
        "rest": f"def preprocess(train):\n    fitted = {body or f'{name}()'}\n    return fitted",
    }


SPARSE, HOT = "'sparse_categorical_crossentropy'", "'categorical_crossentropy'"
SOFTMAX = "keras.layers.Dense(5, 'softmax')"
LOSSES = {
    "numbers from 1": (load("np.arange(200) % 5 + 1"), build(SOFTMAX, SPARSE), "write y - 1 in load()"),
    "too few units": (
        load("np.arange(200) % 5"),
        build("keras.layers.Dense(3, 'softmax')", SPARSE),
        "give the last layer 5 units",
    ),
    "one-hot for sparse": (
        load("np.eye(5, dtype='float32')[np.arange(200) % 5]"),
        build(SOFTMAX, SPARSE),
        "take the loss categorical_crossentropy",
    ),
    "numbers for one-hot": (
        load("np.arange(200) % 5"),
        build(SOFTMAX, HOT),
        "take the loss sparse_categorical_crossentropy, or keras.utils.to_categorical(y, 5) in load()",
    ),
    "five classes for two": (
        load("np.arange(200) % 5"),
        build("keras.layers.Dense(1, 'sigmoid')", "'binary_crossentropy'"),
        "with 5 units and 'softmax'",
    ),
    "stretched": (load("x[:, 0]"), build("keras.layers.Dense(3)", "'mse'"), "give the last layer one unit"),
}


@pytest.mark.parametrize("case", sorted(LOSSES))
def test_labels_that_are_not_what_the_loss_wants(tmp_path: Path, case: str) -> None:
    rows, model, fix = LOSSES[case]
    space = write_space(tmp_path, "wrong", objective='objective = "val_loss"', load=rows, build=model)
    told = checked(tmp_path, space)
    assert told["error"] == "SpaceError", told
    assert told["message"].startswith(f"{space}:{line_of(space, 'model.compile(')}: the loss "), told["message"]
    assert fix in told["message"] and "\n" not in told["message"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (transformer("StandardScaler"), "scikit-learn's StandardScaler, which nothing can export with it; take keras."),
        (transformer("PCA", "PCA(2).fit(train.x)", "decomposition"), "holds pca.components_.T"),
        (transformer("Pipeline", "Pipeline([])", "pipeline"), "one keras.Sequential of layers that do its steps"),
        (transformer("StandardScaler", "StandardScaler().fit_transform(train.x)"), "but returned rows (ndarray)"),
        ({"rest": "def preprocess(train):\n    return keras.layers.Rescaling(2.0)"}, "the layer Rescaling alone"),
        ({"rest": "def preprocess(train):\n    return None"}, "but returned nothing"),
    ],
    ids=["scaler", "pca", "pipeline", "rows", "layer", "nothing"],
)
def test_preprocessing_that_is_no_model(tmp_path: Path, parts: dict[str, str], said: str) -> None:
    space = write_space(tmp_path, "wrong", **parts)
    told = checked(tmp_path, space)
    at = len(Path(space).read_text().splitlines())  # the return comes last
    assert told["error"] == "SpaceError"
    assert told["message"].startswith(f"{space}:{at}: preprocess(train) must return a keras.Model"), told["message"]
    assert said in told["message"]


def test_one_name_with_different_bounds(tmp_path: Path) -> None:
    body = "    first = hp.Int('units', 2, 16)\n    again = hp.Int('units', 2, 32)\n    return first, again"
    space = write_space(tmp_path, "twice", build=f"def build(hp):\n{body}")
    told = checked(tmp_path, space)
    lines = [f"{space}:{line_of(space, text)}" for text in ("first = hp", "again = hp")]
    assert told["error"] == "SpaceError" and all(line in told["message"] for line in lines), told["message"]
    assert "rename one of them" in told["message"]


def scoped(body: str) -> str:
    return (
        f"def build(hp):\n    kind = hp.Choice('kind', ['a', 'b'])\n    units = 4\n{body}\n"
        f"    model = {HEAD}keras.layers.Dense(units), keras.layers.Dense(2, 'softmax')])\n"
        f"    model.compile('adam', {SPARSE}, metrics=['accuracy'])\n    return model"
    )


def test_a_scope_inside_its_own_if_is_noted_and_nothing_is_lost(tmp_path: Path) -> None:
    scope, branch, ask = "with hp.conditional_scope('kind', ['b']):", "if kind == 'b':", "units = hp.Int('units', 2, 9)"
    inside = f"    {branch}\n        {scope}\n            {ask}"
    space = write_space(tmp_path, "inside", build=scoped(inside))
    found = checked(tmp_path, space)
    (note,) = found["notes"]
    assert note.startswith(f"{space}:{line_of(space, 'conditional_scope')}: conditional_scope('kind', ['b']) is inside")
    assert "put the `if` inside the scope" in note
    assert {parameter["name"] for parameter in found["space"]["parameters"]} == {"kind", "units"}

    around = f"    {scope}\n        {branch}\n            {ask}"
    assert checked(tmp_path, write_space(tmp_path, "around", build=scoped(around)))["notes"] == []


@pytest.mark.parametrize(
    ("body", "line", "said"),
    [
        (
            "    with hp.conditional_scope('kind', ['c']):\n        units = hp.Int('units', 2, 9) or 4",
            "conditional_scope",
            "can never hold",
        ),
        (
            "    with hp.conditional_scope('sort', ['b']):\n        units = hp.Int('units', 2, 9) or 4",
            "conditional_scope",
            "has not been declared yet; declare it above",
        ),
        (
            "    with hp.conditional_scope('kind', ['b']):\n        units = hp.Int('units', 2, 9)",
            "keras.layers.Dense(units)",
            "is None while 'kind' is not 'b', as its conditional_scope says; use it under an `if`",
        ),
    ],
    ids=["never", "undeclared", "none"],
)
def test_scopes_that_cannot_work(tmp_path: Path, body: str, line: str, said: str) -> None:
    space = write_space(tmp_path, "scope", build=scoped(body))
    told = checked(tmp_path, space)
    assert told["error"] == "SpaceError" and said in told["message"], told["message"]
    assert told["message"].startswith(f"{space}:{line_of(space, line)}: ")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["numbers from 1", "stretched"])
def test_a_launch_says_it_too_and_leaves_no_study(tmp_path: Path, heldout: Heldout, case: str) -> None:
    rows, model, fix = LOSSES[case]
    space = write_space(tmp_path, "wrong", objective='objective = "val_loss"', load=rows, build=model)
    ran = heldout("launch", space, "--trials", "2", "--workspace", str(tmp_path / "ws"))
    refused(ran, tmp_path / "ws", f"{space}:{line_of(space, 'model.compile(')}: ", fix)


def test_a_transformer_is_refused_by_the_command(tmp_path: Path, heldout: Heldout) -> None:
    space = write_space(tmp_path, "scaler", **transformer("StandardScaler"))
    ran = heldout("check", space, "--workspace", str(tmp_path / "ws"))
    refused(ran, tmp_path / "ws", "keras.layers.Normalization(), after its adapt(train.x)")
