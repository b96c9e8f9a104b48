"""Preprocessing that learns from more than the rows it is handed is found out, however it gets at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from search.checks import withholding
from search.definition.problem import SpaceModule, find
from search.tiers.data import prepare
from tests.tiny import write_space

NORMALIZED = (
    "def preprocess(train):\n"
    "    layer = keras.layers.Normalization()\n"
    "    layer.adapt({})\n"
    "    return keras.Sequential([keras.Input((4,)), layer])"
)
RESCALED = "    return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling({})])"
GLOBAL = (
    "X = np.random.default_rng(0).normal(size=(400, 4)).astype('float32')\n{}\n\n"
    "def load():\n    return Dataset(X, (X[:, 0] > 0).astype('int64'))"
)
READ = (
    "def read():\n"
    "    rng = np.random.default_rng(0)\n"
    "    x = rng.normal(size=(400, 4)).astype('float32')\n"
    "    return x, (x[:, 0] > 0).astype('int64')\n\n\n"
    "def load():\n    return Dataset(*read())"
)
FRAME = (
    "import pandas\n\n\ndef read():\n"
    "    table = pandas.DataFrame(np.random.default_rng(0).normal(size=(400, 4)), columns=list('abcd'))\n"
    "    table['kind'], table['y'] = 'word', (table['a'] > 0).astype(int)\n"
    "    return table\n\n\n"
    "def load():\n"
    "    table = read()\n"
    "    return Dataset(table[list('abcd')].to_numpy('float32'), table['y'].to_numpy())"
)


def found(folder: Path, **parts: str) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    module = SpaceModule(find(write_space(folder, "subject", **parts)))
    manifest = prepare(module.load(), folder / "ws", 0, False)
    homes = [folder / "ws" / name / manifest["digest"] for name in ("rows", "sealed")]
    return withholding.run(module, *homes)


CLEAN = {
    "none": {},
    "train": {"rest": NORMALIZED.format("train.x")},
    "beside a global": {"load": GLOBAL.format(""), "rest": NORMALIZED.format("train.x")},
    "its shape alone": {
        "load": GLOBAL.format(""),
        "rest": "def preprocess(train):\n    width = X.shape[1]\n" + RESCALED.format("1 / (width + train.x.max())"),
    },
    "known ends of a scale": {"rest": "TOP = 16.0\n\n\ndef preprocess(train):\n" + RESCALED.format("1 / TOP")},
}
LEAKS = {
    "load": ({"rest": NORMALIZED.format("load().x")}, "returned by load()"),
    "a helper of load": (
        {"load": READ, "rest": "def preprocess(train):\n    top = read()[0].max(0)\n" + RESCALED.format("1 / top")},
        "returned by read()",
    ),
    "an array of the module": ({"load": GLOBAL.format(""), "rest": NORMALIZED.format("X")}, "in the module's X"),
    "both together": (
        {"load": GLOBAL.format(""), "rest": NORMALIZED.format("np.concatenate([train.x, X])")},
        "in the module's X",
    ),
    "a frame with labels and words": (
        {
            "load": FRAME,
            "rest": "def preprocess(train):\n    std = read()[list('abcd')].std().to_numpy()\n"
            + RESCALED.format("1 / std"),
        },
        "returned by read()",
    ),
}


@pytest.mark.parametrize("case", sorted(CLEAN))
def test_what_learns_from_train_alone_passes(tmp_path: Path, case: str) -> None:
    one = found(tmp_path, **CLEAN[case])
    assert one["passed"] is True and one["cause"] is None, one


@pytest.mark.parametrize("case", sorted(LEAKS))
def test_what_learns_from_others_is_found_with_where_it_got_them(tmp_path: Path, case: str) -> None:
    parts, where = LEAKS[case]
    one = found(tmp_path, **parts)
    assert one["passed"] is False and where in one["cause"], one
    assert "from `train`" in one["fix"]


@pytest.mark.parametrize(
    ("statistic", "what"),
    [
        ("X.mean(axis=0)", "mean"),
        ("X.std(axis=0)", "standard deviation"),
        ("np.median(X, axis=0)", "median"),
        ("float(X.var())", "variance"),
    ],
)
def test_a_statistic_that_was_taken_when_the_module_was_executed(tmp_path: Path, statistic: str, what: str) -> None:
    load = GLOBAL.format(f"NUMBER = {statistic}")
    one = found(tmp_path, load=load, rest="def preprocess(train):\n" + RESCALED.format("1 / NUMBER"))
    assert one["passed"] is False and one["says"].startswith(f"the module's NUMBER is the {what} of all rows"), one
    assert one["fix"] == "compute it in preprocess(train), from train.x"


def test_words_that_only_other_rows_have(tmp_path: Path) -> None:
    load = (
        "WORDS = np.array([[f'word{k}'] for k in range(400)])\n\n\n"
        "def load():\n    return Dataset(WORDS, np.arange(400) % 2)"
    )
    adapted = (
        "def preprocess(train):\n"
        "    layer = keras.layers.StringLookup(output_mode='one_hot')\n"
        "    layer.adapt({})\n"
        "    return keras.Sequential([keras.Input((1,), dtype='string'), layer])"
    )
    assert found(tmp_path / "clean", load=load, rest=adapted.format("train.x"))["passed"] is True
    one = found(tmp_path / "leak", load=load, rest=adapted.format("WORDS"))
    assert one["passed"] is False and "in the module's WORDS" in one["cause"], one


def test_preprocessing_that_differs_each_time_cannot_be_told(tmp_path: Path) -> None:
    rest = "import itertools\n\nCALLS = itertools.count(1)\n\n\ndef preprocess(train):\n"
    one = found(tmp_path, rest=rest + RESCALED.format("1 / next(CALLS)"))
    assert one["passed"] is None and "each time it is fitted" in one["says"]
