"""`heldout init`: each kind of module runs as it is written, and with its marked lines replaced."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas
import pytest

from search.definition.problem import find
from search.definition.starting import KINDS, init
from search.errors import RequestError
from search.harness import worker
from search.processes import jobs
from tests.conftest import Heldout

SHORT = "--trials 3 --epochs 2 --confirm 0".split()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_written_says_what_to_replace_and_its_own_name(tmp_path: Path, kind: str) -> None:
    file = init(os.fspath(tmp_path / "mine"), kind)
    assert file == tmp_path / "mine.py"
    text = file.read_text(encoding="utf-8")
    assert text.count("YOURS") >= 4 and f"heldout launch {file} --trials 30" in text
    compile(text, file, "exec")
    assert find(os.fspath(file)).name == "mine"


def test_the_command_writes_and_says_what_comes_next(tmp_path: Path, heldout: Heldout) -> None:
    ran = heldout("init", str(tmp_path / "cells"), "--kind", "images")
    assert ran.returncode == 0, ran.stderr
    assert f"wrote {tmp_path / 'cells.py'}" in ran.stdout and f"heldout check {tmp_path / 'cells.py'}" in ran.stdout
    again = heldout("init", str(tmp_path / "cells.py"))
    assert again.returncode == 2 and "is there already, and init writes over nothing" in again.stderr
    assert "scikit-learn" in (tmp_path / "cells.py").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("2cells", "its name must be letters"),
        ("my-cells", "its name must be letters"),
        ("class", "its name must be letters"),
        ("keras", "which keras.py would hide"),
        ("random", "which random.py would hide"),
        ("nowhere/cells", "must be in a folder that can be written"),
    ],
)
def test_a_name_that_no_module_can_have_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        init(os.fspath(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--kind must be one of table, images, text, series, but got 'video'"):
        init(os.fspath(tmp_path / "mine"), "video")


def test_a_table_goes_through_all_that_check_asks_for(tmp_path: Path) -> None:
    """In this process; the slow test below launches every kind."""
    problem = find(os.fspath(init(os.fspath(tmp_path / "mine"))))
    asked = jobs.load_payload(problem, tmp_path, tmp_path, 0)
    prepared = jobs.completed(worker.load(asked, lambda body: None), problem)
    payload = jobs.base_payload(prepared, tmp_path) | {"epochs": 1, "seed": 0, "default": True}
    found = worker.check(payload, lambda body: None)
    assert found["disagreement"] is None and found["size"] > 100


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_is_sane_and_launches_as_it_is(tmp_path: Path, heldout: Heldout, kind: str) -> None:
    where = ("--workspace", str(tmp_path / "ws"))
    file = str(init(os.fspath(tmp_path / f"my_{kind}"), kind))
    checked = heldout("check", file, "--sanity", "--json", *where, timeout=400)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert all(one["passed"] for one in json.loads(checked.stdout)["sanity"]["findings"]), checked.stdout
    ran = heldout("launch", file, *SHORT, "--json", *where, timeout=400)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["trials"] == {"complete": 3, "pruned": 0, "failed": 0} and report["test"]["opening"] == 1


def replaced(file: Path, kind: str, own: Path) -> None:
    """Do what the comments of the module say, by their own words."""
    text = file.read_text(encoding="utf-8")
    if kind == "table":
        text = text.replace("made_up()  # YOURS: ", "").replace("/path/to/customers.csv", str(own))
    else:
        # Comment in what is commented out, and drop what it takes the place of.
        head, _, rest = text.partition("# YOURS: these three lines …" if kind == "images" else "    # YOURS: in place")
        body, _, tail = rest.partition("\n\n\n")
        lines = body.splitlines()[1:]
        commented = [line.replace("# ", "", 1) for line in lines if re.match(r"    # (?!…|For several)", line)]
        kept = [line for line in lines if not line.strip().startswith("#")] if kind != "images" else []
        head = head.replace("texts, kinds = made_up()", "").replace("readings = made_up()", "")
        text = "\n".join([head.rstrip(" "), *commented, *kept]) + "\n\n\n" + tail
        text = re.sub(r"/path/to/[\w.]+", str(own), text)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_lines_to_put_in_place_of_the_marked_ones_work(tmp_path: Path, kind: str) -> None:
    """With a CSV file or a folder of images of the kind that the comments speak of."""
    import keras

    rng, own = np.random.default_rng(0), tmp_path / ("photos" if kind == "images" else "own.csv")
    if kind == "table":
        columns = {name: rng.integers(0, 90, 300) for name in ("age", "income", "visits")}
        columns |= {name: rng.choice(["a", "b"], 300) for name in ("plan", "region")}
        pandas.DataFrame({**columns, "left": np.arange(300) % 2}).to_csv(own)
    elif kind == "text":
        texts = [" ".join(rng.choice(["a", "b", "c", "d", "e"], 9)) for _ in range(300)]
        pandas.DataFrame({"text": texts, "kind": np.arange(300) % 2}).to_csv(own)
    elif kind == "series":
        pandas.DataFrame({"demand": rng.normal(50, 10, 400)}).to_csv(own)
    else:
        for number in range(40):
            folder = own / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            keras.utils.save_img(folder / f"{number}.png", rng.integers(0, 255, (9, 7, 1)), scale=False)
    file = init(os.fspath(tmp_path / f"own_{kind}"), kind)
    replaced(file, kind, own)
    from search.definition.problem import SpaceModule

    dataset = SpaceModule(find(os.fspath(file))).load()
    shape = keras.tree.map_structure(lambda part: part.shape, dataset.x)
    assert shape == {
        "table": {"plan": (300, 1), "region": (300, 1), "numbers": (300, 3)},
        "text": (300, 1),
        "series": (352, 48, 1),
        "images": (40, 8, 8, 1),
    }[kind]
    assert len(dataset.y) == len(keras.tree.flatten(dataset.x)[0]) and len(np.unique(dataset.y)) >= 2
