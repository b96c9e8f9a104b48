"""A model's architecture as a picture where graphviz is installed, else as a table."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import pytest

from search.harness import architecture


def model() -> keras.Model:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="hidden")], name="inside")
    start = keras.Input((4,))
    return keras.Model(start, keras.layers.Dense(2, name="last")(inner(start)))


def test_without_graphviz_it_is_a_table_with_the_layers_of_nested_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / architecture.PICTURE).write_text("of an earlier winner")
    assert architecture.draw(model(), tmp_path) == architecture.TABLE
    text = (tmp_path / architecture.TABLE).read_text()
    assert "hidden" in text and "last" in text and "Total params: 23" in text
    assert [path.name for path in tmp_path.iterdir()] == [architecture.TABLE]


def test_a_graphviz_that_fails_leaves_a_table_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("dot: Cannot allocate memory")

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dot")
    monkeypatch.setattr(keras.utils, "plot_model", broken)
    assert architecture.draw(model(), tmp_path) == architecture.TABLE
    assert "graphviz could not draw it (OSError)" in (tmp_path / architecture.TABLE).read_text()
    assert [path.name for path in tmp_path.iterdir()] == [architecture.TABLE]


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz' dot is a program that pip does not install")
def test_with_graphviz_it_is_a_picture(tmp_path: Path) -> None:
    assert architecture.draw(model(), tmp_path) == architecture.PICTURE
    assert (tmp_path / architecture.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == [architecture.PICTURE]
