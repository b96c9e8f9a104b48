"""A whole study on Keras' other backends, where they are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import write_space

ROOT = Path(__file__).resolve().parent.parent
HELDOUT = (sys.executable, "-c", "import sys; from search.cli import main; sys.exit(main())")
DROPOUT = (
    "def build(hp):\n"
    "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.Choice('units', [4, 8]))])\n"
    "    model.add(keras.layers.Dropout(hp.Float('dropout', 0.0, 0.5)))\n"
    "    model.add(keras.layers.Dense(2, activation='softmax'))\n"
    "    model.compile('adam', 'sparse_categorical_crossentropy', metrics=['accuracy'])\n"
    "    return model"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_study_runs_to_its_test_score(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed; nothing but Keras needs it")
    env = os.environ | {
        "KERAS_BACKEND": backend,
        "HELDOUT_WORKSPACE": str(tmp_path / "workspace"),
        "HELDOUT_LEDGER": str(tmp_path / "ledger.jsonl"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    env.pop("MLFLOW_TRACKING_URI", None)
    space = write_space(tmp_path, build=DROPOUT, rest="def class_weight(hp):\n    return {0: 2.0}")
    options = ("--trials", "4", "--workers", "2", "--confirm", "0", "--seed", "3", "--study", "other", "--json")
    done = subprocess.run([*HELDOUT, "launch", space, *options], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["trials"]["complete"] == 4, done.stderr
    assert found["test"]["winner"] is not None
    show = subprocess.run([*HELDOUT, "reproduce", "other", "1"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert show.returncode == 0 and "reproduced exactly" in show.stdout, show.stdout + show.stderr
