"""Finding, reading and executing space modules, and the one-line errors for those that break the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from search.definition.problem import Problem, SpaceModule, find, shipped
from search.errors import SpaceError
from tests.tiny import PARTS, write_space


def test_a_space_is_found_by_path_by_short_name_and_by_dotted_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_space(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert find(path).path == path
    assert find("tiny").path == path
    assert find("digits_mlp").name == "digits_mlp"
    assert Path(find("digits_mlp").path).parent.name in ("spaces", "shipped")


def test_the_shipped_spaces_are_listed() -> None:
    assert {"digits_mlp", "digits_cnn", "breast_cancer", "diabetes"} <= set(shipped())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere/digit_mlp.py", "no such file: nowhere/digit_mlp.py; did you mean the shipped space `digits_mlp`?"),
        ("nowhere.at.all", "no space called 'nowhere.at.all'"),
        (".", "is a folder"),
    ],
)
def test_a_space_that_is_not_there_is_one_clear_line(given: str, said: str) -> None:
    with pytest.raises(SpaceError) as caught:
        find(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"load": ""}, "must define load(); add"),
        ({"build": ""}, "must define build(hp)"),
        ({"objective": ""}, "must name its objective; add `objective"),
        ({"build": "def build(hp:"}, "must be valid Python"),
    ],
)
def test_a_missing_part_is_named_before_anything_is_executed(tmp_path: Path, parts: dict[str, str], said: str) -> None:
    with pytest.raises(SpaceError) as caught:
        find(write_space(tmp_path, **parts, rest="raise SystemExit('executed')"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"objective": "objective = 'accuracy'"}, "objective must be a validation metric such as"),
        ({"objective": "objective = 'loss'"}, "the value on train rows; write \"val_loss\""),
        ({"objective": "objective = 'val_loss'\ndirection = 'up'"}, 'direction must be "min" or "max"'),
        ({"objective": "objective = 'val_loss'\nepochs = 0"}, "epochs must be a whole number of at least 1"),
        ({"load": "load = 3"}, "load must be a function, but it is int"),
        ({"rest": "callbacks = []"}, "callbacks must be a function, but it is list"),
        ({"rest": "import no_such_package"}, "the module raised ModuleNotFoundError"),
    ],
)
def test_a_part_of_the_wrong_kind_is_one_clear_line(tmp_path: Path, parts: dict[str, str], said: str) -> None:
    problem = find(write_space(tmp_path, "wrong", **parts))
    with pytest.raises(SpaceError) as caught:
        SpaceModule(problem)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_in_load_names_the_line(tmp_path: Path) -> None:
    path = write_space(tmp_path, "loads", load="def load():\n    return 1 / 0")
    with pytest.raises(SpaceError) as caught:
        SpaceModule(find(path)).load()
    line = Path(path).read_text().splitlines().index("    return 1 / 0") + 1
    assert str(caught.value) == f"{path}:{line}: load() raised ZeroDivisionError: division by zero"


def test_the_recorded_text_is_executed_not_the_file_as_it_is_by_then(tmp_path: Path) -> None:
    path = write_space(tmp_path, "edited")
    problem = Problem(**find(path).to_json())
    Path(path).write_text("raise RuntimeError('edited since')")
    assert SpaceModule(problem).objective == "val_accuracy"


def test_what_to_preload_is_read_and_leaves_out_local_modules_and_load(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    path = write_space(
        tmp_path,
        imports="import json\nimport beside\nimport keras.layers\nimport numpy as np\nfrom search import Dataset",
        load="def load():\n    from sklearn.datasets import load_iris",
        build="def build(hp):\n    from scipy import special",
    )
    assert find(path).imports() == ["keras.layers", "numpy", "scipy"]


def test_a_hypermodel_takes_the_place_of_build_and_brings_its_fit(tmp_path: Path) -> None:
    hyper = "import keras_tuner\n\n\nclass Hyper(keras_tuner.HyperModel):\n" + "".join(
        f"    {line}\n" for line in PARTS["build"].replace("build(hp)", "build(self, hp)").splitlines()
    )
    own = hyper + "    def fit(self, hp, model, *args, **kwargs):\n        return model.fit(*args, **kwargs)\n"
    plain = SpaceModule(find(write_space(tmp_path, "plain", build=hyper + "\n\nhypermodel = Hyper()")))
    with_fit = SpaceModule(find(write_space(tmp_path, "with_fit", build=own + "\n\nhypermodel = Hyper()")))
    assert plain.fit is None
    assert with_fit.fit is not None


def test_a_dotted_name_is_found_without_executing_the_packages_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("raise SystemExit('executed in the driver')")
    path = write_space(inner)
    monkeypatch.chdir(tmp_path)
    assert find("outer.inner.tiny").path == path
    with pytest.raises(SpaceError, match="no space called 'outer.inner.other'"):
        find("outer.inner.other")


def test_a_file_is_read_by_the_encoding_that_it_declares(tmp_path: Path) -> None:
    path = Path(write_space(tmp_path, imports="# -*- coding: latin-1 -*-\n# größer\n" + PARTS["imports"]))
    text = path.read_text()
    path.write_bytes(text.encode("latin-1"))
    assert "größer" in find(str(path)).source
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("latin-1", "utf-8").encode())
    assert find(str(path)).name == "tiny"


def test_a_file_that_is_no_text_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "binary.py"
    path.write_bytes(b"x = 1\0")
    with pytest.raises(SpaceError) as caught:
        find(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_library_beside_the_module_is_not_the_line_to_change(tmp_path: Path) -> None:
    library = tmp_path / "venv" / "site-packages" / "strict.py"
    library.parent.mkdir(parents=True)
    library.write_text("def check():\n    raise ValueError('no')")
    load = f"def load():\n    import sys\n    sys.path.insert(0, {str(library.parent)!r})\n    import strict\n"
    path = write_space(tmp_path, "uses", load=load + "    strict.check()")
    with pytest.raises(SpaceError) as caught:
        SpaceModule(find(path)).load()
    assert str(caught.value).startswith(f"{path}:")
