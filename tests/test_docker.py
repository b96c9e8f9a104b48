"""What docker/ starts: its files against what the pinned packages have, and its entry script with bad secrets.

No Docker engine is needed: what only one could tell is listed in docker/README.md as not run.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from search.cli import main
from search.guard import database_chain
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
SECRETS = ("postgres_password", "mlflow_password", "mlflow_cookies", "ledger_password", "ray_token")
GOOD = "3f1c9a77d2e84b06915be0aa"
NEEDS = {
    "postgres": {"postgres_password"},
    "ledger": {"postgres_password", "ledger_password"},
    "mlflow": {"postgres_password", "mlflow_password", "mlflow_cookies"},
    "head": {"ray_token", "mlflow_password", "ledger_password"},
    "worker": {"ray_token"},
}
PROGRAMS = {"postgres": "docker-entrypoint.sh", "ledger": "psql", "mlflow": "mlflow", "head": "ray", "worker": "ray"}
LEDGER = "postgresql://ledger@postgres/ledger"


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def rayjob() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "rayjob.yaml").read_text())
    return found


def script() -> str:
    return ENTRYPOINT.read_text()


# ---- the entry script


def entered(
    folder: Path, *words: str, environment: dict[str, str] | None = None, **secrets: str
) -> subprocess.CompletedProcess[str]:
    """Run the entry script with these secrets, and programs that only write down how they were called."""
    place, programs = folder / "secrets", folder / "bin"
    place.mkdir(exist_ok=True), programs.mkdir(exist_ok=True)
    for name, value in secrets.items():
        (place / name).write_text(value)
    for name in ("python", *PROGRAMS.values()):
        (programs / name).write_text('#!/bin/sh\n{ echo "$*"; env; } >"$0.called"\n')
        (programs / name).chmod(0o755)
    return subprocess.run(
        ["sh", str(ENTRYPOINT), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "HELDOUT_SECRETS_DIR": str(place),
            "HELDOUT_WORKSPACE": str(folder / "workspace"),
            "HELDOUT_LEDGER": LEDGER,
            **(environment or {}),
        },
    )


def called(folder: Path, program: str) -> tuple[str, list[str]]:
    """The words and the environment that a program was called with, if it was."""
    words, *environment = (folder / "bin" / f"{program}.called").read_text().splitlines()
    return words, environment


@pytest.mark.parametrize("role", sorted(NEEDS))
def test_a_role_starts_with_good_secrets_and_says_none_of_them(role: str, tmp_path: Path) -> None:
    values = {name: f"{GOOD}{place}" for place, name in enumerate(SECRETS)}
    ran = entered(tmp_path, role, **{name: values[name] for name in NEEDS[role]})
    assert ran.returncode == 0, ran.stderr
    words, environment = called(tmp_path, PROGRAMS[role])
    said = words + ran.stdout + ran.stderr
    assert not [value for value in values.values() if value in said], "a command line can be read by everybody"
    if role in ("head", "worker"):
        assert {"RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={tmp_path}/secrets/ray_token"} <= set(environment)
    # A worker runs anybody's trials: what it does not need, it is not given.
    shown = [name for name, value in values.items() if any(value in line for line in environment)]
    assert set(shown) == (NEEDS[role] - {"ray_token"} if role in ("ledger", "mlflow", "head") else set())


@pytest.mark.parametrize("role, secret", [(role, name) for role in sorted(NEEDS) for name in sorted(NEEDS[role])])
@pytest.mark.parametrize(
    "bad",
    [None, "", "\n", "changeme", "Password1234567890", "5d41402abc", "postgres5d41402abc4b", "5d41 402a bc4b 5d41"],
)
def test_no_role_starts_without_a_secret_of_its_own(role: str, secret: str, bad: str | None, tmp_path: Path) -> None:
    given = dict.fromkeys(NEEDS[role], GOOD) | ({} if bad is None else {secret: bad})
    ran = entered(tmp_path, role, **{name: value for name, value in given.items() if (name, bad) != (secret, None)})
    assert ran.returncode == 64 and not list(tmp_path.glob("bin/*.called")), "nothing may start"
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"heldout: the secret {secret} must ")
    assert not bad or not bad.strip() or bad not in line.removeprefix(f"heldout: the secret {secret} must ")


def test_a_head_whose_ledger_is_a_file_needs_no_password_for_it(tmp_path: Path) -> None:
    needed = dict.fromkeys(NEEDS["head"] - {"ledger_password"}, GOOD)
    assert entered(tmp_path, "head", **needed).returncode == 64
    ran = entered(tmp_path, "head", environment={"HELDOUT_LEDGER": "/workspace/ledger.jsonl"}, **needed)
    assert ran.returncode == 0 and "PGPASSWORD" not in "".join(called(tmp_path, "ray")[1])


def test_a_ledger_that_is_a_file_already_is_not_left_for_a_database(tmp_path: Path) -> None:
    needed = dict.fromkeys(NEEDS["head"], GOOD)
    ledger = tmp_path / "workspace" / "ledger.jsonl"
    ledger.parent.mkdir()
    ledger.touch()
    assert entered(tmp_path, "head", **needed).returncode == 0, "nothing is in it"
    ledger.write_text("{}\n")
    ran = entered(tmp_path, "head", **needed)
    (line,) = ran.stderr.splitlines()
    assert ran.returncode == 64 and "must stay the file that this workspace has" in line
    assert entered(tmp_path, "head", environment={"HELDOUT_LEDGER": str(ledger)}, **needed).returncode == 0


def test_a_role_that_there_is_not_is_refused(tmp_path: Path) -> None:
    assert entered(tmp_path, "everything").returncode == 64


# ---- commands and options exist


@functools.cache
def command_of(program: str) -> click.Group:
    home = {"mlflow": "mlflow.cli", "ray": "ray.scripts.scripts"}[program]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own type hints
        return importlib.import_module(home).cli  # type: ignore[no-any-return]


def check_command(words: list[str]) -> None:
    """Every option is one of that command's, with a value where it takes one."""
    program, name, *rest = words
    command: click.Command = main.commands[name] if program == "heldout" else command_of(program).commands[name]
    known = {opt: p for p in command.params for opt in (*p.opts, *p.secondary_opts)}
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            assert word in known, f"{program} {name} has no {word}"
            parameter: Any = known[word]
            if not parameter.is_flag:
                assert rest and not rest[0].startswith("--"), f"{program} {name} {word} needs a value"
                rest.pop(0)


def commands_of_the_script() -> list[list[str]]:
    text = script().replace("\\\n", " ")
    found = [line.strip().removeprefix("exec ") for line in text.splitlines()]
    lines = [line for line in found if line.startswith(("mlflow ", "ray "))]
    return [[word for word in shlex.split(line) if word != "$@"] for line in lines]


@pytest.mark.slow
def test_the_script_calls_what_is_there() -> None:
    pytest.importorskip("ray")
    found = commands_of_the_script()
    assert sorted(words[:2] for words in found) == [
        ["mlflow", "server"], ["ray", "health-check"], ["ray", "start"], ["ray", "start"]
    ]  # fmt: skip
    for words in found:
        check_command(words)


@pytest.mark.slow
def test_the_check_of_commands_finds_what_is_not_there() -> None:
    with pytest.raises(AssertionError, match="has no --worker"):
        check_command(["mlflow", "server", "--worker", "4"])
    with pytest.raises(AssertionError, match="needs a value"):
        check_command(["mlflow", "server", "--port", "--workers", "4"])


@pytest.mark.slow
def test_every_variable_is_one_that_something_reads() -> None:
    pytest.importorskip("ray")
    named = set(re.findall(r"\b((?:MLFLOW|RAY|HELDOUT|POSTGRES|PG)[A-Z_]*[A-Z])=", script()))
    for service in compose()["services"].values():
        named |= set(service.get("environment") or {})
    for file in DOCKERFILES:
        named |= set(re.findall(r"\b((?:MLFLOW|RAY|HELDOUT|PIP)_[A-Z_]+)=", file.read_text()))
    head = rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    named |= {entry["name"] for entry in head["env"]}
    # Read by the script itself, by libpq, by PostgreSQL's image, or by pip: nothing here has those as text.
    elsewhere = {"PGPASSWORD", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE", "POSTGRES_INITDB_ARGS"}
    elsewhere |= {"PGHOST"}
    elsewhere |= {"PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_NO_CACHE_DIR"}
    own = {name for name in named if f"${{{name}:" in script() or f"${name}" in script()}
    own |= {"STUDY"} & set(re.findall(r"\$(\w+)", rayjob()["spec"]["entrypoint"]))
    for name in sorted(named - elsewhere - own):
        assert is_read(name), f"nothing reads {name}"
    assert not is_read("RAY_AUTH_TOKEN_FILE"), "the check must find what is not there"


@functools.cache
def is_read(name: str) -> bool:
    homes = [ROOT / "search"]
    homes += [Path(str(importlib.import_module(package).__file__)).parent for package in ("ray", "mlflow")]
    wanted = [f'"{name}"', f"'{name}'", f"${name}", f"{name}="]
    command = ["grep", "-rlF", "--include=*.py", *(word for text in wanted for word in ("-e", text)), *map(str, homes)]
    if subprocess.run([*command, "-m1"], capture_output=True, timeout=120).stdout:
        return True
    binary = homes[1] / "_raylet.so"
    return name.encode() in binary.read_bytes()


# ---- the compose file

SERVICE_KEYS = set(
    "build cap_drop command depends_on deploy entrypoint environment healthcheck hostname image init networks ports "
    "profiles restart secrets security_opt shm_size user volumes".split()
)


def test_the_compose_file_hangs_together() -> None:
    found = compose()
    assert set(found) - {"x-heldout"} == {"name", "services", "networks", "volumes", "secrets"}
    for name, service in found["services"].items():
        assert set(service) <= SERVICE_KEYS, name
        assert set(service["networks"]) <= set(found["networks"])
        assert set(service["secrets"]) <= set(found["secrets"])
        for other, how in service.get("depends_on", {}).items():
            # What ends by itself has no restart, and what goes on has a check of its health.
            ends = "restart" not in found["services"][other]
            assert how == {"condition": "service_completed_successfully" if ends else "service_healthy"}, name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in found["volumes"] or source.startswith((".", "$")), volume
            if source.startswith("./"):
                assert (DOCKER / source).exists(), volume
        if "build" in service:
            file = (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).resolve()
            assert file in DOCKERFILES
            assert set(service["build"].get("args", {})) <= set(re.findall(r"^ARG (\w+)", file.read_text(), re.M))
    assert all(secret == {"file": f"./secrets/{name}"} for name, secret in found["secrets"].items())
    assert set(found["secrets"]) == set(SECRETS)


def test_every_service_is_given_the_secrets_of_its_role_and_no_other() -> None:
    for name, service in compose()["services"].items():
        role = (service.get("command") or service.get("entrypoint") or [name])[-1]
        assert set(service["secrets"]) == NEEDS[role], name


def test_nothing_listens_beyond_this_machine_and_the_database_not_at_all() -> None:
    services = compose()["services"]
    ports = {name: service.get("ports", []) for name, service in services.items()}
    assert {name for name, listed in ports.items() if listed} == {"mlflow", "head"}
    assert all(port.startswith("127.0.0.1:") for listed in ports.values() for port in listed)
    networks = compose()["networks"]
    assert networks["record"] == {"internal": True} and networks["cluster"] == {"internal": True}
    for name in ("postgres", "ledger", "cpu-worker", "gpu-worker"):
        assert all(networks[network] for network in services[name]["networks"]), f"{name} has a way out"


def test_the_ledger_is_where_every_part_expects_it() -> None:
    services, head = compose()["services"], rayjob()["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert services["head"]["environment"]["HELDOUT_LEDGER"] == f"${{HELDOUT_LEDGER:-{LEDGER}}}"
    (container,) = head["template"]["spec"]["containers"]
    assert {"name": "HELDOUT_LEDGER", "value": LEDGER} in container["env"]
    assert services["ledger"]["environment"]["PGHOST"] == "postgres"
    assert services["ledger"]["image"] == services["postgres"]["image"]
    # Beside the script, where that looks for it.
    assert {"./entrypoint.sh:/heldout/entrypoint.sh:ro", "./ledger.sql:/heldout/ledger.sql:ro"} == set(
        services["ledger"]["volumes"]
    )
    made = " ".join((DOCKER / "ledger.sql").read_text().split())
    tables = [database_chain.TABLES, *(database_chain.STAYS.format(name) for name in database_chain.NAMES)]
    for text in tables:
        assert " ".join(text.split()) in made, "the tables must be those that the program makes"


def test_a_worker_sees_neither_sealed_rows_nor_the_record() -> None:
    for name in ("cpu-worker", "gpu-worker"):
        service = compose()["services"][name]
        assert service["networks"] == ["cluster"] and "record" in compose()["services"]["postgres"]["networks"]
        assert all(volume.startswith("${HELDOUT_DATA:") for volume in service["volumes"])
        assert not [variable for variable in service["environment"] if variable.startswith("MLFLOW")]


def test_gpus_are_reserved_as_compose_wants_them() -> None:
    gpu = compose()["services"]["gpu-worker"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert gpu["build"]["args"] == {"TENSORFLOW": "tensorflow[and-cuda]"}


# ---- Dockerfiles


def instructions(file: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        yield keyword, rest.strip()


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_is_pinned_runs_as_nobody_and_is_looked_after(file: Path) -> None:
    found = list(instructions(file))
    keywords = "ARG FROM WORKDIR COPY ENV RUN USER ENTRYPOINT CMD HEALTHCHECK".split()
    assert {keyword for keyword, _ in found} <= set(keywords)
    last = {keyword: rest for keyword, rest in found}
    assert last["USER"] == "10001" and last["ENTRYPOINT"] == '["heldout-entrypoint"]'
    assert last["HEALTHCHECK"].endswith('CMD ["heldout-entrypoint", "healthy"]')
    assert "PIP_CONSTRAINT=/src/constraints.txt" in " ".join(rest for keyword, rest in found if keyword == "ENV")
    ignored = file.with_name(f"{file.name}.dockerignore").read_text().splitlines()
    assert ignored[0] == "**"
    for keyword, rest in found:
        if keyword == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), f"{file.name} copies {source}, which is not there"
                assert f"!{source}" in ignored, f"{file.name} copies {source}, which is not sent"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_the_pip_steps_of_a_dockerfile_run_in_a_folder_of_their_own(file: Path, tmp_path: Path) -> None:
    """As the build stage does, in a folder that holds what is sent and copied, and a virtual environment of its own."""
    source, prefix = tmp_path / "src", tmp_path / "opt"
    source.mkdir()
    for keyword, rest in instructions(file):
        if keyword == "COPY" and not rest.startswith("--from="):
            for name in rest.split()[:-1]:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, source / Path(name).name)
        if keyword == "RUN" and "pip install" in rest:
            asked = rest.replace("/opt/heldout", str(prefix)).replace("python -m", f"{sys.executable} -m", 1)
            environment = {**os.environ, "TENSORFLOW": "tensorflow", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
            environment |= dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(source / "constraints.txt"))
            environment.pop("PYTHONPATH", None)
            ran = subprocess.run(
                ["sh", "-ec", asked], cwd=source, env=environment, capture_output=True, text=True, timeout=1200
            )
            assert ran.returncode == 0, ran.stderr[-2000:]
            break
    program = "mlflow" if file.name.startswith("mlflow") else "heldout"
    clean = {"PATH": f"{prefix}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    for words in ([program, "--version"], *([["ray", "--version"]] if program == "heldout" else [])):
        said = subprocess.run(words, env=clean, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert said.returncode == 0, said.stderr
    drivers = [str(prefix / "bin" / "python"), "-c", "import psycopg, flask_wtf"]
    assert subprocess.run(drivers, env=clean, timeout=120).returncode == 0
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    listed = [str(prefix / "bin" / "python"), "-m", "pip", "list", "--format=freeze"]
    frozen = subprocess.run(listed, env=clean, capture_output=True, text=True, timeout=120).stdout
    have = dict(line.lower().split("==") for line in frozen.split() if "==" in line)
    loose = sorted(set(have) - {name.lower() for name in pinned} - {"heldout", "pip"})
    assert not loose, f"not in constraints.txt: {loose}"


# ---- Kubernetes


def test_the_manifest_is_a_rayjob_with_a_token_and_a_queue() -> None:
    job = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = "entrypoint submissionMode shutdownAfterJobFinishes ttlSecondsAfterFinished backoffLimit rayClusterSpec"
    assert set(spec) <= set(known.split())
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert cluster["rayVersion"] == pinned["ray"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        (container,) = pod["containers"]
        assert container["image"] in ("heldout-cpu", "heldout-gpu")
        # Kueue counts requests, and Ray by limits: what differs is promised twice.
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounts == {volume["name"] for volume in pod.get("volumes", ())}
        if group is not groups[0]:
            assert "workspace" not in mounts, "workers must not see sealed rows"
        check_start(group["rayStartParams"])


def check_start(params: dict[str, str]) -> None:
    pytest.importorskip("ray")
    assert all(isinstance(value, str) for value in params.values()), "KubeRay wants text"
    known = {opt for parameter in command_of("ray").commands["start"].params for opt in parameter.opts}
    assert {f"--{name}" for name in params} <= known


def test_the_manifest_runs_commands_that_there_are() -> None:
    launch, publish = rayjob()["spec"]["entrypoint"].split(" && ")
    check_command(shlex.split(launch))
    check_command(shlex.split(publish))


# ---- the page


def test_the_page_names_what_is_there() -> None:
    text = (DOCKER / "README.md").read_text()
    commands = re.findall(r"`(heldout [^`]+)`", text.replace("\n", " "))
    assert commands
    for line in commands:
        words = shlex.split(line)
        assert words[1] in main.commands, line
        known = {opt for parameter in main.commands[words[1]].params for opt in parameter.opts}
        assert {word for word in words[2:] if word.startswith("--")} <= known, line
    for name in SECRETS:
        assert name in text
    for volume in compose()["volumes"]:
        assert f"`{volume}`" in text, f"docker/README.md must say what of {volume} is backed up"
