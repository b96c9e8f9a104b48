"""Checkpoints: a trial that was killed goes on in another process to the very numbers of one that was not."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from search.definition.problem import find
from search.executors import Exited, Job, Message
from search.executors.local import LocalExecutor
from search.harness import checkpoints, training
from search.harness.checkpoints import Checkpoints
from search.loop.watcher import Silent
from search.processes import devices, jobs
from tests.test_training import DROPOUT, Running, same, weights
from tests.tiny import write_space

EPOCHS = 24
KILLED_IN = 6  # counted from 0: its process dies when this epoch begins

# What is drawn anew in every epoch, remembered by the optimizer, and counted by callbacks, is all here. Where the
# callback that kills sees batches, an epoch does not run as one call.
SEES_BATCHES = "    def on_train_batch_end(self, batch, logs=None):\n        pass\n"
KILLER = (
    "class Killer(keras.callbacks.Callback):\n"
    "    def on_train_begin(self, logs=None):\n"
    "        self.noise = []\n"
    "        print('trains by', self.model.train_function.__module__)\n"
    "    def on_epoch_begin(self, epoch, logs=None):\n"
    f"        if epoch == {KILLED_IN} and os.environ.get('KILL') and not os.path.exists(os.environ['KILL']):\n"
    "            open(os.environ['KILL'], 'w').close()\n"
    "            os.kill(os.getpid(), signal.SIGKILL)\n"
    "    def on_epoch_end(self, epoch, logs):\n"
    "        self.noise.append(np.random.normal() + random.random())\n"
    "        logs['noise'] = sum(self.noise)  # reported, as it comes before the reporter\n"
)
CALLBACKS = (
    "def callbacks(hp):\n"
    "    return [keras.callbacks.ReduceLROnPlateau(monitor='val_loss', factor=0.5, patience=1, min_delta=0.02),\n"
    "            keras.callbacks.EarlyStopping(monitor='val_loss', patience=4, min_delta=0.01, mode='min'),\n"
    "            Killer()]"
)
BUILD = (
    "def build(hp):\n"
    "    model = keras.Sequential([INPUTkeras.layers.Dense(16, activation='relu'),\n"
    "        keras.layers.BatchNormalization(), keras.layers.Dropout(0.4), keras.layers.Dense(2)])\n"
    "    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
    "    model.compile(keras.optimizers.Adam(0.02), loss, metrics=['accuracy'])\n"
    "    return model"
)
OWN = "def fit(hp, model, *args, **kwargs):\n    return model.fit(*args, **kwargs)"
OWN_BATCHES = "def fit(hp, model, *args, **kwargs):\n    return model.fit(*args, shuffle=False, **kwargs)"


@dataclasses.dataclass
class Ended:
    """One attempt of a trial, in a process of its own."""

    folder: Path
    reports: list[dict[str, Any]]
    result: dict[str, Any] | None
    signal: int | None

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def predictions(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted(self.folder.glob("validation_*.npy"))]

    def weights(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        with h5py.File(self.folder / "model.weights.h5") as file:
            file.visititems(
                lambda name, part: found.update({name: part[()].tobytes()}) if hasattr(part, "dtype") else None
            )
        return found


class Bench:
    """Runs trials of one module in forked processes, the way the driver does."""

    def __init__(self, folder: Path, executor: LocalExecutor) -> None:
        self.folder, self.executor = folder, executor
        self._number = 0

    def prepared(self, name: str, **parts: str) -> dict[str, Any]:
        problem = find(write_space(self.folder, name, imports=IMPORTS, **parts))
        (self.folder / name).mkdir()
        return jobs.prepare(self.executor, problem, self.folder / "ws", self.folder / name, 0, Silent())

    def attempt(self, prepared: dict[str, Any], place: str, kill: bool = False, **changes: Any) -> Ended:
        folder = self.folder / place
        folder.mkdir(exist_ok=True)
        payload = jobs.base_payload(prepared, folder) | {"epochs": EPOCHS, "seed": 11, "default": True}
        payload |= {"checkpoint_minutes": 1e-9} | changes
        env = {"KILL": str(folder / "killed")} if kill else {}
        self._number += 1
        job = Job(f"trial-{self._number}", "trial", payload, log=str(folder / "log.txt"), env=env)
        self.executor.submit(job, self.executor.slots[0])
        ended = Ended(folder, [], None, None)
        while True:
            for event in self.executor.poll(1.0):
                if isinstance(event, Message) and event.body["type"] == "report":
                    ended.reports.append(event.body)
                elif isinstance(event, Message) and event.body["type"] == "result":
                    ended.result = event.body
                elif isinstance(event, Exited):
                    ended.signal = event.signal
                    return ended


IMPORTS = "import os\nimport random\nimport signal\n\nimport keras\nimport numpy as np\n\nfrom search import Dataset"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    problem = find(write_space(folder))
    with jobs.start_executor(devices.slots(1, "none"), problem, folder, None) as executor:
        yield Bench(folder, executor)


CASES: dict[str, tuple[dict[str, str], dict[str, Any], bool]] = {  # parts of the module, of the payload; in one call?
    "one_call": ({}, {}, True),
    "batches": ({}, {}, False),
    "batches_from_the_map": ({}, {"budget": 0}, False),
    "own_fit": ({"own": OWN}, {}, False),
    "own_fit_with_batches": ({"own": OWN_BATCHES}, {"budget": 0}, False),
    "no_input": ({"input": ""}, {}, False),
    "no_input_in_one_call": ({"input": ""}, {}, True),
    "deterministic": ({}, {"deterministic": True}, True),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES)
def test_a_killed_trial_continues_in_a_new_process_to_the_same_bits(bench: Bench, case: str) -> None:
    parts, changes, in_one_call = CASES[case]
    build = BUILD.replace("INPUT", parts.get("input", "keras.Input((4,)), "))
    killer = KILLER if in_one_call else KILLER + SEES_BATCHES
    rest = "\n\n\n".join((killer, CALLBACKS, parts.get("own", "")))
    prepared = bench.prepared(case, build=build, rest=rest)
    whole = bench.attempt(prepared, f"{case}-whole", **changes)
    assert whole.result is not None, whole.log
    assert KILLED_IN + 1 < whole.result["epochs"] < EPOCHS, "callbacks shall have stopped it, but after the kill"

    assert ("trains by search.harness.fused" in whole.log) == in_one_call

    first = bench.attempt(prepared, f"{case}-cut", kill=True, **changes)
    assert (first.signal, len(first.reports)) == (signal.SIGKILL, KILLED_IN)
    assert (first.folder / checkpoints.NAME).exists()
    second = bench.attempt(prepared, f"{case}-cut", kill=True, **changes)
    assert second.result is not None, second.log
    assert f"continued from the checkpoint after epoch {KILLED_IN}" in second.log
    assert second.reports == whole.reports
    for key in ("epochs", "best_epoch", "reported", "asks"):
        assert second.result[key] == whole.result[key]
    assert second.predictions() == whole.predictions()
    assert second.weights() == whole.weights()
    assert not list(second.folder.glob("*checkpoint*")) and not list(second.folder.glob(".checkpoint*"))

    without = bench.attempt(prepared, f"{case}-without", **changes, checkpoint_minutes=None)
    assert without.reports == whole.reports and without.weights() == whole.weights()


class Stop(Exception):
    """Ends a training in the test's own process, as a kill would."""


def parts(interrupt: int | None = None, build: str = DROPOUT, callbacks: str = "", imports: str = "") -> dict[str, str]:
    """A module whose training ends with an exception when an epoch begins, if asked to."""
    rest = (
        "class Interrupt(keras.callbacks.Callback):\n"
        "    def on_epoch_begin(self, epoch, logs=None):\n"
        f"        if epoch == STOP_AT: raise RuntimeError('interrupted')\n\n\n"
        f"def callbacks(hp):\n    return [{callbacks}Interrupt()]"
    )
    head = f"import os\nimport threading\n\nimport keras\nimport numpy as np\n\nfrom search import Dataset\n{imports}"
    return {"imports": head + "STOP_AT = int(os.environ.get('STOP_AT', '-1'))", "build": build, "rest": rest}


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains up to an epoch with a checkpoint after each; the folder with the last one."""

    def train(seed: int = 3, **given: Any) -> Path:
        folder = tmp_path / "trial"
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("STOP_AT", "2")
        with pytest.raises(RuntimeError, match="interrupted"):
            Running(tmp_path, "space", seed=seed, **parts(**given)).fit(epochs=5, checkpoint=(folder, 1e-9))
        monkeypatch.setenv("STOP_AT", "-1")
        assert (folder / checkpoints.NAME).exists()
        return folder

    return train


def goes_on(folder: Path, tmp_path: Path, seed: int = 3, epochs: int = 5, **given: Any) -> training.Fitted:
    running = Running(tmp_path, "space", seed=seed, **parts(**given))
    return running.fit(epochs=epochs, checkpoint=(folder, 1e9))


def plain_fit(made: keras.Model, folder: Path, minutes: float = 1e9, epochs: int = 2, known: Any = 1) -> Checkpoints:
    keeper = Checkpoints(folder, minutes, [], lambda: known)
    made.fit(np.ones((8, 2)), np.ones((8, 1)), epochs=epochs, callbacks=[keeper], verbose=0)
    return keeper


def plain_model(units: int = 3, optimizer: str = "adam") -> keras.Model:
    made = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units), keras.layers.Dense(1)])
    made.compile(optimizer, "mse")
    return made


def test_a_torn_checkpoint_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = plain_model(), tmp_path / checkpoints.NAME
    plain_fit(model, tmp_path, 1e-9)
    whole = path.read_bytes()
    torn = [whole[: len(whole) * n // 7] for n in range(7)]
    torn += [whole[:at] + bytes(40) + whole[at + 40 :] for at in range(100, len(whole) - 100, len(whole) // 7)]
    for one in (*torn, b"\x80\x04not a file of ours"):
        path.write_bytes(one)
        assert plain_fit(model, tmp_path).epoch in (0, 2)
        said = capsys.readouterr().err
        if "continued" not in said:  # zeros may lie in the padding of the archive, where they change nothing
            assert "training starts from zero" in said and not path.exists()
        path.unlink(missing_ok=True)
    path.write_bytes(whole)
    assert plain_fit(model, tmp_path).epoch == 2


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"epochs": 6},
        {"build": DROPOUT.replace("'adam'", "'adamax'")},
        {"callbacks": "keras.callbacks.TerminateOnNaN(), "},
    ],
    ids=["seed", "epochs", "module", "callbacks"],
)
def test_a_checkpoint_of_another_training_is_not_used(
    interrupted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any]
) -> None:
    folder = interrupted()
    goes_on(folder, tmp_path, **other)
    assert "training starts from zero: it is of another" in capsys.readouterr().err


def test_other_parameters_another_optimizer_and_other_shapes_are_told_apart(tmp_path: Path) -> None:
    for other, known in (
        (plain_model(), {"rate": 0.2}),
        (plain_model(optimizer="adamax"), {"rate": 0.1}),  # of the same shapes
        (plain_model(units=4), {"rate": 0.1}),
    ):
        plain_fit(plain_model(), tmp_path, 1e-9, known={"rate": 0.1})
        assert plain_fit(other, tmp_path, known=known).epoch == 0
        assert not (tmp_path / checkpoints.NAME).exists()
    plain_fit(plain_model(), tmp_path, 1e-9, known={"rate": 0.1})
    same_again = plain_model()
    assert plain_fit(same_again, tmp_path, epochs=3, known={"rate": 0.1}).epoch == 2
    assert same_again._initial_epoch is None, "a later fit of this model would begin late"


def test_callbacks_with_odd_attributes_keep_what_can_be_kept(tmp_path: Path) -> None:
    class Odd(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.lock, self.function, self.model_of_its_own = object(), lambda: None, keras.layers.Dense(1)
            self.endless: list[Any] = []
            self.endless.append(self.endless)
            self.count, self.seen, self.scalar = 0, {"loss": [], 3: (None, True)}, np.float32(0)
            self.half, self.text = np.zeros(2, dtype="bfloat16"), "begun"

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.count += 1
            self.seen["loss"].append(float("nan") if epoch else float("inf"))
            self.scalar, self.half, self.text = np.float32(0.1), np.asarray([1.5, -3], dtype="bfloat16"), "ended"

    def train(epochs: int, minutes: float) -> Odd:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="bfloat16")])
        model.compile("adam", "mse")
        odd = Odd()
        keeper = Checkpoints(tmp_path, minutes, [odd], lambda: 1)
        model.fit(np.ones((8, 2)), np.ones((8, 1)), epochs=epochs, callbacks=[odd, keeper], verbose=0)
        return odd

    train(2, 1e-9)
    back = train(2, 1e9)  # nothing is left to train, so it is what was restored
    assert (back.count, back.text, back.scalar) == (2, "ended", np.float32(0.1))
    assert type(back.scalar) is np.float32
    assert back.seen["loss"][0] == float("inf") and np.isnan(back.seen["loss"][1]) and back.seen[3] == (None, True)
    assert back.half.dtype.name == "bfloat16" and back.half.tolist() == [1.5, -3.0]
    assert callable(back.function) and back.endless[0] is back.endless


def test_variables_of_half_precision_survive(tmp_path: Path) -> None:
    def made() -> keras.Model:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype="bfloat16")])
        model.compile("adam", "mse")
        return model

    def fit(model: keras.Model, minutes: float) -> None:
        keeper = Checkpoints(tmp_path, minutes, [], lambda: 1)
        model.fit(np.ones((8, 3)), np.ones((8, 4)), epochs=2, callbacks=[keeper], verbose=0)

    one, other = made(), made()
    fit(one, 1e-9)
    fit(other, 1e9)
    assert str(one.variables[0].dtype) == "bfloat16" and same(weights(one), weights(other))
    assert same([np.asarray(v) for v in one.optimizer.variables], [np.asarray(v) for v in other.optimizer.variables])


def test_a_checkpoint_is_made_when_the_minutes_have_passed(tmp_path: Path) -> None:
    now, saved = [0.0], []

    class Minute(keras.callbacks.Callback):
        """Each epoch takes a minute."""

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            now[0] += 60.0

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if (path := tmp_path / checkpoints.NAME).exists():
                saved.append(epoch)
                path.unlink()

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    keeper = Checkpoints(tmp_path, 2.5, [], lambda: 1, clock=lambda: now[0])
    model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=9, callbacks=[Minute(), keeper, Looks()], verbose=0)
    assert saved == [2, 5, 8]


def test_training_twice_with_the_same_callbacks_turns_checkpoints_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folds = (
        "def fit(hp, model, *args, **kwargs):\n"
        "    for _ in range(3):\n"
        "        model.fit(*args, **{**kwargs, 'epochs': 2})\n"
        "        seen.append(os.path.exists(os.environ['PLACE']))"
    )
    os.environ["PLACE"] = str(tmp_path / checkpoints.NAME)
    running = Running(tmp_path, "folds", imports=IMPORTS + "\n\nseen = []", rest=folds)
    assert running.fit(epochs=2, checkpoint=(tmp_path, 1e-9)).epochs == 6
    assert running.module._module.seen == [True, False, False]
    assert capsys.readouterr().err.count("trains more than once") == 1


def test_nothing_that_is_about_to_stop_is_kept(tmp_path: Path) -> None:
    stops = "def callbacks(hp):\n    return [Stops()]"
    kind = (
        "class Stops(keras.callbacks.Callback):\n"
        "    def on_epoch_end(self, epoch, logs=None):\n"
        "        self.model.stop_training = epoch == 1\n\n\n"
    )
    running = Running(tmp_path, "stops", rest=kind + stops)
    now = iter(range(100))
    keeper = Checkpoints(tmp_path, 1e-9, [], lambda: 1, clock=lambda: float(next(now)))
    written: list[int] = []
    keeper._save = lambda epoch: written.append(epoch)  # type: ignore[method-assign]
    x, y = running.rows.features("train"), running.rows.labels("train")
    running.model.fit(x, y, epochs=5, callbacks=[*running.module.callbacks(None), keeper], verbose=0)
    assert written == [1]


@pytest.mark.faults
def test_a_full_disk_costs_a_checkpoint_and_not_the_trial(bench: Bench) -> None:
    """The kernel itself refuses, as files of this process may not become that large while it trains."""
    full = (
        "import resource\n\n\n"
        "def fit(hp, model, *args, **kwargs):\n"
        "    before = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))\n"
        "    model.fit(*args, **kwargs)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, before)"
    )
    build = BUILD.replace("INPUT", "keras.Input((4,)), ").replace("Dense(16", "Dense(600")
    ended = bench.attempt(bench.prepared("full", build=build, rest=full), "full-disk", epochs=2)
    assert ended.result is not None and ended.result["epochs"] == 2, ended.log
    assert ended.log.count("no checkpoint after epoch") == 2 and os.strerror(errno.EFBIG) in ended.log
    assert not list(ended.folder.glob("*checkpoint*")) and not list(ended.folder.glob(".checkpoint*"))


def test_a_trial_that_fails_by_itself_leaves_no_checkpoint(bench: Bench) -> None:
    nan = (
        "class Late(keras.callbacks.Callback):\n"
        "    def on_epoch_begin(self, epoch, logs=None):\n"
        "        if epoch == 2: self.model.optimizer.learning_rate = float('nan')\n\n\n"
        "def callbacks(hp):\n    return [Late()]"
    )
    ended = bench.attempt(bench.prepared("nan", rest=nan), "nan-trial")
    assert ended.result is None and len(ended.reports) >= 3
    assert not (ended.folder / checkpoints.NAME).exists()


def test_unfinished_files_of_killed_processes_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-123.npz").write_bytes(b"half")
    (tmp_path / checkpoints.NAME).write_bytes(b"whole")
    checkpoints.remove(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".checkpoint-123.npz").write_bytes(b"half")
    Running(tmp_path, "clears").fit(epochs=1, checkpoint=(tmp_path, 1e9))
    assert not (tmp_path / ".checkpoint-123.npz").exists()


def test_random_numbers_without_a_seed_go_on(tmp_path: Path) -> None:
    """Of Python, NumPy, and of Keras where a layer asks for no generator of its own."""

    class Noise(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            return x + keras.random.normal((1,))

    def train(epochs: int, folder: Path, minutes: float) -> tuple[list[np.ndarray], float, float]:
        keras.utils.clear_session()
        keras.utils.set_random_seed(5)
        model = keras.Sequential([keras.Input((2,)), Noise(), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        keeper = Checkpoints(folder, minutes, [], lambda: 1)
        data = np.arange(16.0).reshape(8, 2), np.ones((8, 1))
        model.fit(*data, epochs=epochs, shuffle=False, callbacks=[keeper], verbose=0)
        return weights(model), random.random(), float(np.random.normal())

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = train(4, tmp_path / "whole", 1e9)
    train(2, tmp_path / "cut", 1e-9)
    continued = train(4, tmp_path / "cut", 1e9)
    assert same(whole[0], continued[0]) and whole[1:] == continued[1:]
