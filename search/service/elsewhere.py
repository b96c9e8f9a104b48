"""Studies that ran elsewhere: putting report and models with a study's run in MLflow, and reading them from there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from search import secrecy
from search.errors import RequestError, StudyError
from search.export import beside, export, new_folder
from search.loop.watcher import Watcher
from search.record import places
from search.shown.report import report
from search.study import Study, check_name
from search.tiers.validation import parse
from search.tracker import publishing
from search.trial import Trial

_STORING = "search.tracker.storing"
_PUBLISHED = "published"


def publish(study: Study, watcher: Watcher) -> dict[str, Any]:
    """Store the report, and exported model and ensemble if there are any, with the study's run in MLflow.

    The ensemble is the one that was asked for last. It has a place of its own for each size, where publishing again
    leaves it, as what made it may since have been extended.

    Returns:
        ``study``, ``uri``, ``run_id`` and ``files``.

    Raises:
        RequestError: If MLflow does not have the study, or refuses.
    """
    record = study.meta("study")
    if record is None:
        raise StudyError(f"study {study.name!r} must have begun to be published, but nothing is recorded yet")
    uri = publishing.uri_of(places.study(record, study.workspace))
    # What is a path here is nothing elsewhere.
    found = report(study) | {"picture": None, "architecture": None}
    with tempfile.TemporaryDirectory(prefix="heldout-publish-") as scratch:
        folder = Path(scratch)
        if found["best"] is not None:
            export(study, folder / "model", watcher=watcher)
        text = secrecy.scrub(json.dumps(found, default=str))
        (folder / "report.json").write_text(text, encoding="utf-8")
        watcher.say("storing report and model in MLflow")
        asked = {"do": "store", "study_id": record["study_id"], "folder": str(folder), "place": _PUBLISHED}
        stored = publishing.call(_STORING, uri, asked)
    if found["ensemble"] is not None and found["state"] == "COMPLETE":
        stored["files"] += _publish_ensemble(study, uri, asked, found["ensemble"]["size"], watcher)
    return {"study": study.name, "uri": secrecy.redacted(uri), **stored}


def _publish_ensemble(study: Study, uri: str, asked: dict[str, Any], size: int, watcher: Watcher) -> list[str]:
    from search.ensembles.ensembling import ensemble  # before what most have no need of

    place = _ensemble(size)
    with tempfile.TemporaryDirectory(prefix="heldout-publish-") as scratch:
        folder = Path(scratch) / "ensemble"
        ensemble(study, size, out=folder, watcher=watcher)
        watcher.say("storing the ensemble in MLflow")
        stored = publishing.call(_STORING, uri, asked | {"folder": str(folder), "place": place})
    return [f"{place}/{name}" for name in stored["files"]]


def _ensemble(size: int) -> str:
    return f"ensemble-{size}"


def status(uri: str, study: str | None) -> list[dict[str, Any]]:
    """How far a study is, or all studies, as far as MLflow was told; the newest last.

    Raises:
        StudyError: If MLflow has no such study.
    """
    found: list[dict[str, Any]] = _call(uri, {"do": "states", "study": _checked(study)})["studies"]
    if study is not None and not found:
        raise _unknown(uri, study)
    about: dict[str, Any] = {"ended": None, "because": None, "warm_start": [], "kept": None, "deleted": 0}
    return [about | one | {"tracking": {"uri": secrecy.redacted(uri), **one["tracking"]}} for one in found]


def read_trials(uri: str, study: str) -> list[Trial]:
    """The trials of a study, as far as MLflow was told; see ``reading.trials``.

    Raises:
        StudyError: If MLflow has no such study.
    """
    found = _call(uri, {"do": "trials", "study": _checked(study)})["trials"]
    if found is None:
        raise _unknown(uri, study)
    return [Trial.from_json(one) for one in found]


def read_trial(uri: str, study: str, number: int) -> dict[str, Any]:
    """One trial with its reports, in the keys of ``report.show``; what only its own workspace has is None.

    Raises:
        StudyError: If MLflow has no such study, or the study no such trial.
    """
    answer = _call(uri, {"do": "trial", "study": _checked(study), "number": number})
    found: dict[str, Any] | None = answer["trial"]
    if found is None:
        count = len(read_trials(uri, study))
        raise StudyError(f"study {study!r} has no trial {number} in {secrecy.redacted(uri)}; it has {count}, from 0")
    return found | {"step": parse(answer["plan"]).step}


def read_report(uri: str, study: str) -> dict[str, Any]:
    """The report that was published of a study.

    Raises:
        StudyError: If none was.
    """
    with tempfile.TemporaryDirectory(prefix="heldout-report-") as scratch:
        _fetch(uri, study, "report.json", Path(scratch))
        found: dict[str, Any] = json.loads((Path(scratch) / "report.json").read_bytes())
    return found


def read_page(uri: str, study: str, out: str) -> Path:
    """The report's page, as it was when the study ended, in a file.

    Raises:
        StudyError: If there is none.
        RequestError: If the file cannot be written.
    """
    path = Path(out).expanduser()
    with tempfile.TemporaryDirectory(prefix="heldout-report-") as scratch:
        _fetch(uri, study, "", Path(scratch), "page")
        try:
            path.write_bytes((Path(scratch) / "report.html").read_bytes())
        except OSError as error:
            raise RequestError(f"--html must name a file that can be written, but {path}: {error.strerror}") from None
    return path


def read_model(uri: str, study: str, out: str) -> dict[str, Any]:
    """Write the model that was published of a study to a folder, with all that an export has; its lineage.

    Raises:
        StudyError: If none was published.
        RequestError: If the folder has files in it.
    """
    made = _read_folder(uri, study, "model/", out)
    lineage: dict[str, Any] = json.loads((made / "lineage.json").read_bytes())
    return lineage


def read_ensemble(uri: str, study: str, size: int, out: str | os.PathLike[str]) -> list[str]:
    """Write the ensemble that was published of a study, of so many picks, to a folder; the names of its files.

    Raises:
        StudyError: If none was published.
        RequestError: If the folder has files in it.
    """
    return sorted(path.name for path in _read_folder(uri, study, "", out, _ensemble(size)).iterdir())


def _read_folder(uri: str, study: str, below: str, out: str | os.PathLike[str], place: str = _PUBLISHED) -> Path:
    folder = new_folder(out)
    with beside(folder) as scratch:
        made = Path(scratch) / "out"
        made.mkdir()
        _fetch(uri, study, below, made, place)
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    return folder


def _fetch(uri: str, study: str, below: str, out: Path, place: str = _PUBLISHED) -> None:
    asked = {"do": "fetch", "study": _checked(study), "place": place, "below": below, "out": str(out)}
    if _call(uri, asked)["files"]:
        return
    [found] = status(uri, study)[-1:]
    what = {"report.json": "report", "model/": "model"}.get(below, place.replace("-", " of size "))
    raise StudyError(
        f"study {study!r} must have published its {what} to be read from {secrecy.redacted(uri)}, but has not (it is "
        f"{str(found['state']).lower()}); `heldout publish {study}` does that where it ran"
    )


def _checked(study: str | None) -> str | None:
    return None if study is None else check_name(study)  # it goes into a query


def check_address(uri: str) -> None:
    """See that MLflow can be asked there.

    Raises:
        TrackingError: Otherwise.
    """
    secrecy.learn_tracking(uri)
    publishing.check_uri(uri)


def _call(uri: str, asked: dict[str, Any]) -> dict[str, Any]:
    check_address(uri)
    return publishing.call(_STORING, uri, asked)


def _unknown(uri: str, study: str) -> StudyError:
    return StudyError(
        f"there is no study called {study!r} in {secrecy.redacted(uri)}; `heldout status --tracking-uri URI` lists "
        "those that are there"
    )
