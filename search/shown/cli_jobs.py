"""Commands about jobs on a cluster, and sending one there; about studies that are published there."""

from __future__ import annotations

import getpass
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search.errors import RequestError
from search.shown import options
from search.shown.printing import print_json, watching

if TYPE_CHECKING:
    from search.service.job_server import Cluster
    from search.service.submitting import Sent

LOCAL = {"space", "study", "cluster", "detach", "as_json"}
"""Of a launch: what is not passed on to the cluster as it is."""

FILES = ("enqueue",)
"""Options that name a file of this machine, which goes along."""

INTERRUPTED = 130
"""Exit code of following that was ended by Ctrl-C, as shells have it; the job goes on."""


@click.command()
@options.cluster
@options.as_json
def jobs(cluster: str, as_json: bool) -> None:
    """List the jobs that were sent to a cluster, the newest last."""
    from search.service.following import jobs as run
    from search.service.job_server import Cluster

    found = run(Cluster(cluster))
    if as_json:
        return print_json(found)
    for one in found:
        by, space = one["user"] or "somebody", f" of {one['space']}" if one["space"] else ""
        until = f" to {one['ended']}" if one["ended"] else ""
        click.echo(f"{one['job']}: {one['state'].lower()}, a search{space} by {by}, {one['started']}{until}")
    if not found:
        click.echo(f"no jobs on {cluster}; send one with `heldout launch SPACE --cluster {cluster}`")


@click.command()
@click.argument("job")
@click.option("--follow", is_flag=True, help="Until it ends; exits as the job does.")
@options.cluster
def logs(job: str, follow: bool, cluster: str) -> None:
    """Print what JOB has said so far."""
    from search.service.following import log
    from search.service.job_server import Cluster

    at = Cluster(cluster)
    if follow:
        return followed(at, job)
    click.echo(log(at, job), nl=False)


@click.command()
@click.argument("study", required=False)
@options.workspace
@options.as_json
def publish(study: str | None, workspace: str | None, as_json: bool) -> None:
    """Store report and best model of STUDY in MLflow.

    With its run, from where `report` and `export` read them on any machine. A job on a cluster ends with it.
    """
    from search.study import Study

    recorded = Study(study, workspace)  # before what takes a while to import
    from search.service.elsewhere import publish as run

    with watching(None, as_json) as watcher:
        found = run(recorded, watcher or _quiet())
    if as_json:
        return print_json(found)
    click.echo(f"{len(found['files'])} files of study {found['study']} are stored with its run in {found['uri']}")


def stopped(cluster: str, job: str, as_json: bool) -> None:
    """Stop a job, and say how its study goes on."""
    from search.service.following import stop
    from search.service.job_server import Cluster

    found = stop(Cluster(cluster), job)
    if as_json:
        return print_json(found)
    click.echo(f"job {job} is {found['state'].lower()}; `heldout resume {found['study']} --cluster {cluster}` goes on")


def launched(command: click.Context, space: str, cluster: str, detach: bool, as_json: bool) -> None:
    """Send a launch to a cluster as it was asked for here, and follow it."""
    from search.service.job_server import Cluster
    from search.service.submitting import launch

    if command.params.get("ray") is not None:
        raise RequestError("a job runs its trials on the cluster that it is sent to, so --ray cannot be given as well")
    asked = given(command)
    files = [path for name, path in asked if name in FILES]
    if missing := [path for path in files if not Path(path).is_file()]:
        raise RequestError(f"--enqueue must name a file, but {missing[0]} is none")
    words = arguments(command, [(name, Path(path).name if name in FILES else path) for name, path in asked])
    words += ["--ray", "auto"]
    words += ["--json"] if as_json and not detach else []
    at = Cluster(cluster)
    study = command.params["study"]
    _sent(at, launch(at, space, words, study=study, user=_user(), files=files), detach, as_json)


def resumed(command: click.Context, study: str, cluster: str, detach: bool, as_json: bool) -> None:
    """Send a resume to a cluster, and follow it."""
    from search.service.job_server import Cluster
    from search.service.submitting import resume

    words = arguments(command, given(command)) + (["--json"] if as_json and not detach else [])
    at = Cluster(cluster)
    _sent(at, resume(at, study, words, user=_user()), detach, as_json)


def given(command: click.Context) -> list[tuple[str, Any]]:
    """Options that somebody gave, by name, with their values as they were checked; one that may be repeated, often."""
    out: list[tuple[str, Any]] = []
    for parameter in command.command.params:
        name = str(parameter.name)
        source = command.get_parameter_source(name)
        if name in LOCAL or source is None or source.name != "COMMANDLINE":
            continue
        value = command.params[name]
        if isinstance(value, dict):
            out += [(name, f"{key}={one}") for key, one in value.items()]
        else:
            out += [(name, one) for one in (value if isinstance(value, tuple | list) else (value,))]
    return out


def arguments(command: click.Context, asked: Sequence[tuple[str, Any]]) -> list[str]:
    """The same options as words of a command line."""
    flags = {str(one.name): one for one in command.command.params}
    words: list[str] = []
    for name, value in asked:
        parameter: Any = flags[name]
        flag = parameter.opts[0]
        if parameter.is_flag:
            words.append(flag)
        else:
            words += [flag, "all" if value is None else str(value)]  # of --keep, whose all is None
    return words


def followed(cluster: Cluster, job: str) -> None:
    """Print what a job says; ends the command with the job's exit code, or with a hint after Ctrl-C."""
    from search.service.following import follow

    context = click.get_current_context()
    try:
        code = follow(cluster, job, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        at = f"{job} --cluster {cluster.address}"
        again = f"`heldout logs {at} --follow` follows it again, `heldout stop {at}` stops it"
        click.echo(f"\nheldout: job {job} goes on; {again}", err=True)
        context.exit(INTERRUPTED)
    context.exit(code)


def _sent(cluster: Cluster, sent: Sent, detach: bool, as_json: bool) -> None:
    at = f"{sent.job} --cluster {sent.cluster}"
    if detach and as_json:
        return click.echo(json.dumps({"job": sent.job, "study": sent.study, "cluster": sent.cluster}))
    said = f"study {sent.study} was sent to {sent.cluster} as job {sent.job}; its driver runs there"
    click.echo(said, err=not detach)
    if detach:
        click.echo(f"    heldout logs {at} --follow")
        return click.echo(f"    heldout stop {at}")
    followed(cluster, sent.job)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def _quiet() -> Any:
    from search.loop.watcher import Silent

    return Silent()


COMMANDS = (jobs, logs, publish)
