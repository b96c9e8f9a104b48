"""The tracker: a process of its own that tails a study's journal and publishes it to MLflow.

Run as ``python -m search.tracker.tracking STUDY_DIR`` by ``publishing.start``; ends when its stdin does. It
reads the journal and never writes it, so whatever becomes of MLflow or of this process the study goes on.
It can be killed at any moment and started again, and MLflow has each trial once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import secrecy
from search.errors import RequestError
from search.record import places
from search.record.journal import Journal
from search.tracker import publishing

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from search.tracker.publisher import Publisher

DONE, BEHIND = 0, 3
_POLL_SECONDS = 0.5
_LONGEST_WAIT = 30.0
_GRACE_SECONDS = 60.0
_SELDOM = 20  # times as long as it took lies between two looks at all runs

_log = logging.getLogger("heldout.tracking")


class Ending:
    """The end of our stdin, which the driver closes, or which comes with its death.

    Args:
        grace: Seconds that catching up may take then; the driver's last line may say another number.
    """

    def __init__(self, grace: float) -> None:
        self._ended = threading.Event()
        self._grace = grace
        threading.Thread(target=self._watch, daemon=True).start()

    def __bool__(self) -> bool:
        return self._ended.is_set()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not past the end; after it, at most a second."""
        if self:
            time.sleep(min(seconds, 1.0))
        else:
            self._ended.wait(seconds)

    def _watch(self) -> None:
        for line in sys.stdin.buffer:
            with contextlib.suppress(ValueError):
                self._grace = float(line)
        self._ended.set()
        # A call to MLflow cannot be interrupted; but to be killed in one does no harm, so neither does this.
        time.sleep(self._grace)
        _log.warning("time is up before everything was published; starting again continues")
        os._exit(BEHIND)


class Status:
    """Keeps ``tracking.json`` and the log in step with how publishing goes; shows no credentials.

    That it cannot, because the disk is full for instance, is no reason to stop: what it says is news, no record.
    """

    def __init__(self, study_dir: Path, uri: str) -> None:
        self._path = study_dir / publishing.STATE_FILE
        self._shown: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            self._shown = publishing.read(study_dir)
        self._known = {"uri": secrecy.redacted(uri)}
        self._error: str | None = None
        self._since = self._next = 0.0

    def is_due(self) -> bool:
        """Whether that all went well is to be said again: it names every run, and of a hundred thousand that takes a
        while, so it is said seldom enough to cost a twentieth of the time."""
        return self._error is not None or time.monotonic() >= self._next

    def went_well(self, summary: Callable[[], dict[str, Any]]) -> None:
        """Everything that is due is published."""
        began = time.monotonic()
        if self._error is not None:
            _log.info("MLflow is back after %.0f s, and has caught up", time.monotonic() - self._since)
        self._error = None
        self._write(summary())
        now = time.monotonic()
        self._next = now + _SELDOM * (now - began)

    def failed(self, error: Exception, summary: dict[str, Any]) -> str:
        """MLflow is away, slow or refuses; returns why, in one line."""
        text = secrecy.scrub(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
        if self._error is None:
            self._since = time.monotonic()
        if text != self._error:
            ours = not isinstance(error, OSError) and not type(error).__module__.startswith("mlflow")
            _log.warning("%s events behind, trying again: %s", summary.get("behind", "?"), text, exc_info=ours)
        self._error = text
        self._write(summary)
        return text

    def _write(self, summary: dict[str, Any]) -> None:
        shown = {**self._shown, **self._known, **summary, "error": self._error}
        if shown == self._shown:
            return
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            draft.write_text(json.dumps(shown))
            os.replace(draft, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
        else:
            self._shown = shown


def track(study_dir: Path, uri: str, ending: Ending, say: Callable[[dict[str, Any]], None]) -> None:
    """Publishes the study until its driver ends and everything is published.

    Args:
        say: Tells the driver that the store answers, or once why it does not.
    """
    status = Status(study_dir, uri)
    with _alone(study_dir, ending), Journal.open(study_dir / "journal.sqlite", read_only=True) as journal:
        from search.tracker.publisher import Publisher  # and with it MLflow, which takes seconds

        client, publisher, pause, told = None, None, 1.0, False
        while True:
            # In this order: what the driver wrote before it let go of us is in the journal by then.
            over = bool(ending)
            try:
                began = journal.get("study") is not None and journal.get("state") is not None
                if over and not began:
                    return  # the study was called off before it began, and leaves no trace
                if client is None:
                    if uri == publishing.default_uri(workspace := study_dir.parent.parent):
                        places.rebase_artifacts(workspace)
                    client = connect(uri)
                    say({"type": "ready"})
                if began:
                    if publisher is None:
                        publisher = Publisher(client, journal, _artifact_root(uri, journal))
                    publisher.end() if over else publisher.publish()
            except Exception as error:
                why = status.failed(error, _summary(publisher, journal))
                if publisher is not None:
                    publisher.lost_step()
                elif not told:
                    told = True
                    say({"type": "error", "message": why})
                ending.wait(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
                continue
            pause = 1.0
            if publisher is not None:
                if over or status.is_due():
                    status.went_well(publisher.summary)
                if over:
                    return
            ending.wait(_POLL_SECONDS)


def connect(uri: str) -> MlflowClient:
    """A client whose store has answered; makes the SQLite file if that is what the address names."""
    from mlflow import MlflowClient

    # What fails is told by us, once; MLflow's own traceback each time would fill the log.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        _make_file(file)
    if file is None and not uri.startswith(("http://", "https://")):
        _ask_database(uri)
    client = MlflowClient(tracking_uri=uri)
    client.search_experiments(max_results=1)
    return client


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite address; None for any other."""
    scheme, _, rest = uri.partition("://")
    return Path(rest.partition("?")[0][1:]) if scheme.split("+")[0] == "sqlite" else None


def _ask_database(uri: str) -> None:
    """Connects once: MLflow itself tries for minutes, and a wrong password stays wrong."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with contextlib.closing(engine.connect()):
        engine.dispose()


def _make_file(file: Path) -> None:
    """Makes MLflow's SQLite file, which appears complete or not at all.

    MLflow makes it by running all its migrations in place: a process killed meanwhile, or two that
    start together, leave a file that no MLflow can use or repair.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    draft = file.with_name(f"{file.name}.{os.getpid()}.new")
    try:
        with tempfile.TemporaryDirectory(prefix=publishing.scratch_prefix(os.getpid())) as folder:
            made = Path(folder) / "mlflow.db"
            MlflowClient(tracking_uri=f"sqlite:///{made}").search_experiments(max_results=1)
            shutil.copyfile(made, draft)
        # The file keeps this mode: who browses does not hold up who writes, and a trial costs a third less.
        with contextlib.closing(sqlite3.connect(draft)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        with contextlib.suppress(FileExistsError):  # another study was first
            os.link(draft, file)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _artifact_root(uri: str, journal: Journal) -> Path | None:
    """A server knows best where artifacts go; for a bare database MLflow would take the working directory."""
    workspace = journal.path.parent.parent.parent
    root = places.study(journal.get("study"), workspace).get("artifact_root")
    return None if root is None or uri.startswith(("http://", "https://")) else Path(root)


def _summary(publisher: Publisher | None, journal: Journal) -> dict[str, Any]:
    try:
        return {"behind": journal.length} if publisher is None else publisher.summary()
    except RequestError:  # the journal cannot be read now, which may be what failed
        return {}


@contextlib.contextmanager
def _alone(study_dir: Path, ending: Ending) -> Iterator[None]:
    """Waits for the tracker of a driver that was killed, which may still be catching up."""
    with (study_dir / "tracking.lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                ending.wait(_POLL_SECONDS)
        yield


class _Scrubbing(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return secrecy.scrub(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tracker; returns its exit code, which is 3 when something is left to publish."""
    parser = argparse.ArgumentParser(prog="python -m search.tracker.tracking", description=__doc__)
    parser.add_argument("study_dir", type=Path, help="the study's folder")
    parser.add_argument("--grace", type=float, default=_GRACE_SECONDS, help="seconds to catch up after stdin ends")
    given = parser.parse_args(arguments)
    # Training comes first; and the terminal's Ctrl-C is for the driver.
    os.nice(5)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Called off: unwind, so that a half-made store is taken away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.update(publishing.TRACKER_ENVIRONMENT)
    study_dir = given.study_dir.absolute()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or publishing.default_uri(study_dir.parent.parent)
    handler = logging.StreamHandler()
    secrecy.learn_tracking(uri, least=1)
    handler.setFormatter(_Scrubbing("%(asctime)s %(levelname)s %(message)s"))
    logging.raiseExceptions = False  # a log that cannot be written is not worth a word in the same log
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    # Only we speak on the pipe to the driver; what libraries print goes to the log.
    pipe = os.dup(1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the driver is gone: nobody listens
            os.write(pipe, json.dumps(message).encode() + b"\n")

    try:
        track(study_dir, uri, Ending(given.grace), say)
    except KeyboardInterrupt:
        return BEHIND
    except Exception:
        _log.exception("the tracker cannot go on")
        return BEHIND
    return DONE


if __name__ == "__main__":
    # At once: nothing is buffered, and exit handlers of MLflow's libraries take a second.
    os._exit(main())
