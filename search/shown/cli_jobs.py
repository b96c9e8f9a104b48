"""Commands about jobs on a cluster, and sending one there; about studies that are published there."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search.errors import RequestError
from search.shown import options
from search.shown.printing import print_json, watching

if TYPE_CHECKING:
    from search.service.job_server import Cluster
    from search.service.submitting import Sent

LOCAL = {"study", "workspace", "cluster", "detach", "as_json", "out", "tracking_uri"}
"""Options that are not passed on to the cluster as they are."""

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
        by, until = one["user"] or "somebody", f" to {one['ended']}" if one["ended"] else ""
        what = f"a search of {one['space']}" if one["space"] else f"`{one['command'] or one['does']}`"
        click.echo(f"{one['job']}: {one['state'].lower()}, {what} by {by}, {one['started']}{until}")
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
    """Store report, best model and ensemble of STUDY in MLflow.

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
    click.echo(f"job {job} is {found['state'].lower()}; {found['next']}")


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
    study, workspace = command.params["study"], command.params["workspace"]
    sent = launch(at, space, words, study=study, user=_user(), files=files, workspace=workspace)
    said = f"study {sent.study} was sent to {at.address} as job {sent.job}; its driver runs there"
    _sent(at, sent, said, detach, as_json)


def asked(
    command: click.Context,
    studies: Sequence[str],
    cluster: str,
    detach: bool,
    as_json: bool,
    then: Callable[[], None] | None = None,
) -> None:
    """Send a command about studies of a cluster's workspace there as it was asked for here, and follow it.

    Args:
        then: What is to be done here once the job has succeeded.
    """
    from search.service.job_server import Cluster
    from search.service.submitting import send

    does = str(command.info_name)
    words = arguments(command, given(command)) + (["--json"] if as_json and not detach else [])
    at, is_compared = Cluster(cluster), does == "compare"  # which changes nothing that is known of either
    own: dict[str, Any] = {"user": _user(), "workspace": command.params["workspace"], "publishes": not is_compared}
    sent = send(at, does, studies, words, **own)
    said = f"`heldout {does} {' '.join(studies)}` was sent to {at.address} as job {sent.job}"
    _sent(at, sent, said, detach, as_json, then)


def ensembled(
    command: click.Context, study: str, cluster: str, detach: bool, as_json: bool, out: str | None, uri: str | None
) -> None:
    """The same for an ensemble, whose folder is fetched from MLflow, where the job stores it with the study's run."""
    from search.ensembles.ensembling import check

    size = command.params["size"]
    check(size, command.params["evaluate"])
    if out is None:
        return asked(command, [study], cluster, detach, as_json)
    if detach:
        raise RequestError(
            "--out is written here once the job has ended, and --detach does not wait for that; leave out one of "
            "them (asked for again, an ensemble is answered from the record)"
        )
    from search.export import beside, new_folder
    from search.service.elsewhere import check_address, read_ensemble
    from search.tracker.publishing import anchored

    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RequestError(
            "--out with --cluster is fetched from the cluster's MLflow, so its address must be known here; add "
            "--tracking-uri URI, or set MLFLOW_TRACKING_URI"
        )
    address = anchored(uri)
    folder = new_folder(out)
    with beside(folder):  # it can be written, as far as that is known now
        check_address(address)

    def fetch() -> None:
        files = read_ensemble(address, study, size, folder)
        click.echo(f"it is in {folder}: {', '.join(files)}", err=as_json)

    asked(command, [study], cluster, detach, as_json, fetch)


def check_sending(cluster: str | None, detach: bool) -> None:
    """See that what is meant for a job is asked of one.

    Raises:
        RequestError: Otherwise.
    """
    if detach and cluster is None:
        raise RequestError("--detach goes with --cluster URL, where the study runs on; add that, or leave it out")


def given(command: click.Context) -> list[tuple[str, Any]]:
    """Options that somebody gave, by name, with their values as they were checked; one that may be repeated, often."""
    out: list[tuple[str, Any]] = []
    for parameter in command.command.params:
        name = str(parameter.name)
        source = command.get_parameter_source(name)
        if not isinstance(parameter, click.Option) or name in LOCAL or source is None or source.name != "COMMANDLINE":
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


def followed(cluster: Cluster, job: str, as_json: bool = False, then: Callable[[], None] | None = None) -> None:
    """Print what a job says; ends the command with the job's exit code, or with a hint after Ctrl-C.

    Args:
        as_json: Print its result alone, once it has ended: Ray's own words and those of other steps stand around it. Of
            one that fails, all that it said goes to standard error.
        then: What is to be done here once it has succeeded.
    """
    from search.service.following import follow

    context = click.get_current_context()
    said: list[str] = []
    try:
        code = follow(cluster, job, said.append if as_json else lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        at = f"{job} --cluster {cluster.address}"
        again = f"`heldout logs {at} --follow` follows it again, `heldout stop {at}` stops it"
        later = "" if then is None else "; once it has ended, the same command writes --out from the record"
        click.echo(f"\nheldout: job {job} goes on; {again}{later}", err=True)
        context.exit(INTERRUPTED)
    found = result("".join(said))
    if found is not None:
        click.echo(found)
    if code:
        click.echo("".join(said), nl=False, err=True)
    elif then is not None:
        then()
    context.exit(code)


def result(text: str) -> str | None:
    """The last JSON value that begins a line of its own, as ``print_json`` writes one; None if there is none."""
    lines = text.splitlines(keepends=True)
    for at in reversed([at for at, line in enumerate(lines) if line.rstrip() in ("{", "[")]):
        rest = "".join(lines[at:])
        with contextlib.suppress(ValueError):
            return rest[: json.JSONDecoder().raw_decode(rest)[1]]
    return None


def _sent(
    cluster: Cluster, sent: Sent, said: str, detach: bool, as_json: bool, then: Callable[[], None] | None = None
) -> None:
    at = f"{sent.job} --cluster {sent.cluster}"
    if detach and as_json:
        return click.echo(json.dumps({"job": sent.job, "study": sent.study, "cluster": sent.cluster}))
    click.echo(said, err=not detach)
    if detach:
        click.echo(f"    heldout logs {at} --follow")
        return click.echo(f"    heldout stop {at}")
    followed(cluster, sent.job, as_json, then)


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def _quiet() -> Any:
    from search.loop.watcher import Silent

    return Silent()


COMMANDS = (jobs, logs, publish)
