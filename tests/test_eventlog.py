"""TensorBoard's logs of a trial, and the server that shows them."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from search.cli import main
from search.errors import RequestError
from search.harness import fused
from search.study import Study
from search.tracker import board
from tests.test_training import Running
from tests.test_warm_start import earlier
from tests.tiny import PARTS
from tests.tracked import free_port


def series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every series of scalars in a folder: its tag to (step, value)."""
    import tensorflow as tf

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name in ("scalars", ""):
                    found.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    return found


def test_epochs_are_logged_and_training_stays_one_call_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[Any] = []
    real = fused.fit
    monkeypatch.setattr(fused, "fit", lambda *args, **named: (whole.append(1), real(*args, **named)))
    sent: list[dict[str, Any]] = []
    Running(tmp_path, "logged").fit(sent.append, events=tmp_path / "events", epochs=3)
    assert whole, "logs must not cost the fast path"
    train, validation = series(tmp_path / "events" / "train"), series(tmp_path / "events" / "validation")
    reports = [body["metrics"] for body in sent]
    assert train["epoch_loss"] == [(n, pytest.approx(one["loss"])) for n, one in enumerate(reports, start=1)]
    assert [step for step, _ in validation["epoch_accuracy"]] == [1, 2, 3]
    assert [value for _, value in train["epoch_learning_rate"]] == pytest.approx([1e-2] * 3)
    text = b"".join(path.read_bytes() for path in (tmp_path / "events").glob("events.*"))
    assert b"units_0" in text and b"rate" in text  # what TensorBoard's page of hyperparameters reads


def test_another_attempt_begins_its_logs_anew(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        Running(tmp_path / name, "again").fit(events=tmp_path / "events", epochs=2)
    train = series(tmp_path / "events" / "train")
    assert [step for step, _ in train["epoch_loss"]] == [1, 2]


def test_an_attempt_that_goes_on_from_a_checkpoint_logs_the_epochs_before_it_too(tmp_path: Path) -> None:
    interrupt = (
        "class Interrupt(keras.callbacks.Callback):\n"
        "    def on_epoch_end(self, epoch, logs=None):\n"
        "        if epoch == 2 and not MARK.exists():\n"
        "            MARK.touch()\n"
        "            raise KeyboardInterrupt\n\n\n"
        "def callbacks(hp):\n    return [Interrupt()]"
    )
    imports = f"{PARTS['imports']}\nimport pathlib\n\nMARK = pathlib.Path({str(tmp_path / 'mark')!r})"
    keeping = {"checkpoint": (tmp_path, 1e-9), "events": tmp_path / "events", "epochs": 5}
    with pytest.raises(KeyboardInterrupt):
        Running(tmp_path, "goes_on", rest=interrupt, imports=imports).fit(**keeping)
    Running(tmp_path, "goes_on", rest=interrupt, imports=imports).fit(**keeping)
    train = series(tmp_path / "events" / "train")
    assert [step for step, _ in train["epoch_loss"]] == [1, 2, 3, 4, 5]


def test_logs_that_cannot_be_written_cost_no_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events").write_text("a file, where a folder should be")
    fitted = Running(tmp_path, "unwritable").fit(events=tmp_path / "events" / "0001", epochs=2)
    assert fitted.epochs == 2
    assert capsys.readouterr().err.count("no logs for TensorBoard from here on") == 1


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return earlier(tmp_path)


def test_a_study_without_logs_says_how_to_have_some(study: Study) -> None:
    with pytest.raises(RequestError, match="has none; they are written for .* launched with --tensorboard"):
        board.tensorboard(study)


def test_a_missing_package_is_named_before_anything_begins(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    for words in (
        ["tensorboard", study.name, "--workspace", str(tmp_path)],
        ["launch", "digits_mlp", "--tensorboard", "--workspace", str(tmp_path / "none")],
    ):
        ran = CliRunner().invoke(main, words)
        assert ran.exit_code == 2 and "pip install 'heldout[tensorboard]'" in ran.stderr, ran.stderr
    assert not (tmp_path / "none").exists()


def test_the_server_shows_the_logs_to_this_machine_and_ends(study: Study, tmp_path: Path) -> None:
    Running(tmp_path, "shown").fit(events=study.folder / "tensorboard" / "0003", epochs=2)
    port = free_port()
    with board.tensorboard(study, port) as server:
        assert server.url == f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{server.url}/data/plugin/scalars/tags", timeout=60) as answer:
            tags = json.load(answer)
        assert "epoch_loss" in tags["0003/train"] and "epoch_accuracy" in tags["0003/validation"]
        with pytest.raises(RequestError, match=f"port {port} must be free"):
            board.tensorboard(study, port)
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url, timeout=5)
