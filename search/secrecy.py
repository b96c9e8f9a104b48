"""What must not be seen: credentials and the variables of `--env`, where they come from, and taking them out of texts.

What a process has learned here once is taken out of every text that it hands to ``scrub``: as it is, and as URLs,
JSON, Python and Base64 write it. Numbers are left alone: a secret is a text.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
import re
import stat
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from search.errors import RequestError

LEAST = 4
"""Characters of a secret: a shorter one would be found, and taken out, everywhere."""

NAMES = "HELDOUT_SECRETS"
"""Variable that tells trial-side processes which of their variables are secrets."""

_MARK = "***"
_MOST_BYTES = 100_000  # Linux takes no more than 128 KiB in one variable
_SURE = 8  # bytes of a text that is not met by chance among a model's weights
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = "TOKEN|SECRET|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"
_LOOKS_SECRET = re.compile(rf"PASSWORD|PASSWD|(?<![A-Z])({_WORDS})S?(?![A-Z])", re.IGNORECASE)
_TRACKING = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SERVERS = ("http", "https")

_known: dict[str, str] = {}  # every form of every secret, and what stands in its place
_values: dict[str, str] = {}  # the secrets themselves, by what stands in their place
_texts: re.Pattern[str] | None = None


# ---- variables


def resolve(names: Iterable[str]) -> dict[str, str]:
    """The values of these variables, from our environment or, as Docker's secrets are given, from files; learns them.

    ``NAME`` may be missing if ``NAME_FILE`` names a file; its last line break is no part of the value.

    Raises:
        RequestError: If one has neither, its file cannot be read, or it is too short to be kept secret.
    """
    found: dict[str, str] = {}
    for name in names:
        value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
        if not value and file:
            try:
                value = os.fsdecode(Path(file).read_bytes()).removesuffix("\n").removesuffix("\r")
            except OSError as error:
                raise RequestError(
                    f"--env {name}: {name}_FILE must name a file that can be read, but {file}: {error.strerror}"
                ) from None
        if not value:
            raise RequestError(
                f"the variable {name}, which the study needs (--env {name}), must be set, or {name}_FILE to the name "
                "of a file that has its value, but neither is; set one of them"
            )
        if len(value.strip()) < LEAST:
            raise RequestError(
                f"--env {name} must have at least {LEAST} characters, since it is taken out of all that is written, "
                f"but has {len(value.strip())}; a variable that is no secret needs no --env"
            )
        if "\0" in value or len(os.fsencode(value)) > _MOST_BYTES:
            raise RequestError(
                f"--env {name} must fit a variable: no zero byte and at most {_MOST_BYTES} bytes; let the module "
                "read the file itself"
            )
        found[name] = value
    learn({f"{_MARK}{name}{_MARK}": value for name, value in found.items()})
    return found


def check_variables(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once, if they can be names of variables; a value that was given with one is not repeated.

    Raises:
        RequestError: Otherwise.
    """
    names = tuple(dict.fromkeys(names))
    for name in names:
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            shown, mark, _ = str(name).partition("=")
            hint = "; leave the value out, it is taken from the environment" if mark else ""
            raise RequestError(f"--env must be the name of a variable, but got {shown + mark!r}{hint}")
    return names


def absent(secrets: Mapping[str, str], text: str, what: str) -> None:
    """Refuses a text that is going to be recorded and has a secret in it.

    Raises:
        RequestError: If it has one.
    """
    for name, value in secrets.items():
        if any(form in text for form in _forms(value)):
            raise RequestError(
                f"{what} must not have the value of --env {name} in it, since it is recorded; read it from "
                f'os.environ["{name}"], or leave --env {name} out if it is no secret'
            )


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment may reach trials unasked: all but what looks like a secret."""
    return {name: value for name, value in environment.items() if not _is_withheld(name, value)}


def withheld(environment: Mapping[str, str]) -> dict[str, str]:
    """The rest of it, for a job that must have it."""
    return {name: value for name, value in environment.items() if _is_withheld(name, value)}


def _is_withheld(name: str, value: str) -> bool:
    if name in ("MLFLOW_TRACKING_URI", "HELDOUT_LEDGER"):
        return redacted(value) != value
    return name in _TRACKING or _LOOKS_SECRET.search(name) is not None


# ---- addresses


def redacted(uri: str) -> str:
    """The address without user, password and query, fit to be shown and stored."""
    scheme, separator, rest = uri.partition("://")
    if not separator:  # no address, though it may have been meant for one
        return uri.rpartition("@")[2]
    if scheme.split("+")[0] == "sqlite":  # a path, in which anything goes; only one dialect has a passphrase before it
        authority, slash, path = rest.partition("/")
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    rest = rest.partition("?")[0]
    if scheme in _SERVERS and "@" not in rest.partition("/")[0] and has_good_port(uri):
        return f"{scheme}://{rest}"  # any "@" is part of the path
    # Database drivers allow "/" and "@" in a password, so everything up to the last "@" may be one.
    return f"{scheme}://{rest.rpartition('@')[2]}"


def has_good_port(uri: str) -> bool:
    """Whether an address can be taken apart; one with a "/" in its password cannot."""
    try:
        _ = urllib.parse.urlsplit(uri).port
    except ValueError:
        return False
    return True


def learn_tracking(uri: str, least: int = LEAST) -> None:
    """Learns the credentials of an MLflow address, and those that the environment has for it.

    Args:
        least: Characters of what is learned; 1 where only MLflow's own messages are scrubbed.
    """
    secrets = [os.environ.get(name, "") for name in _TRACKING[1:]]
    if redacted(uri) != uri:
        rest = uri.partition("://")[2] or uri
        userinfo, query = rest.rpartition("@")[0], rest.partition("?")[2]
        password = userinfo.partition(":")[2]
        secrets += [userinfo, query, password, urllib.parse.unquote(password), urllib.parse.unquote(userinfo)]
        secrets += [value for name, value in urllib.parse.parse_qsl(query) if _LOOKS_SECRET.search(name)]
    learn({value: value for value in secrets if len(value) >= least}, _MARK)


# ---- texts


def learn(secrets: Mapping[str, str], mark: str | None = None) -> None:
    """Takes these values out of all that is scrubbed from here on.

    Args:
        secrets: Values by what shall stand in their place, unless that is ``mark``.
    """
    global _texts
    for shown, value in secrets.items():
        for form in _forms(value):
            _known.setdefault(form, mark or shown)
        if value:
            _values.setdefault(value, mark or shown)
    if _known:
        longest = sorted(_known, key=len, reverse=True)
        _texts = re.compile("|".join(map(re.escape, longest)))


def scrub(text: str) -> str:
    """The text without the secrets that are known."""
    return text if _texts is None else _texts.sub(lambda found: _known[found[0]], text)


def scrubbed(body: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the secrets that are known, in whatever it holds; its own keys and its type stay.

    Raises:
        RecursionError: If it is nested too deeply.
    """
    if _texts is None:
        return dict(body)
    return {key: value if key == "type" else _scrubbed(value) for key, value in body.items()}


def _scrubbed(tree: Any) -> Any:
    if isinstance(tree, str):
        return scrub(tree)
    if isinstance(tree, dict):
        return {scrub(key): _scrubbed(value) for key, value in tree.items()}
    return [_scrubbed(value) for value in tree] if isinstance(tree, list) else tree


def scrub_file(path: str | os.PathLike[str]) -> None:
    """Overwrites known secrets in a file with asterisks, where they stand.

    In place, since a copy would leave them in the blocks that are given back, needs room on a disk that may be full,
    and is not the file that a process which lingers goes on writing to.
    """
    if not _known:
        return
    # Whoever can write the file can put a link, a pipe or nothing in its place.
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), "r+b") as file:
        status = os.fstat(file.fileno())
        if stat.S_ISREG(status.st_mode) and status.st_size:
            with mmap.mmap(file.fileno(), 0) as text:
                # One after the other, since that takes a third of the time of an expression that has them all.
                for form in sorted(_known, key=len, reverse=True):
                    raw, at = os.fsencode(form), -1
                    while (at := text.find(raw, at + 1)) >= 0:
                        text[at : at + len(raw)] = b"*" * len(raw)


def held_by(path: Path) -> str | None:
    """What stands for the secret that a binary file has in it as it is, or None; very short ones are not looked for."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for value, mark in _values.items():
            raw = os.fsencode(value)
            if len(raw) >= _SURE and content.find(raw) >= 0:
                return mark
    return None


def adopt() -> None:
    """Learns the secrets that this trial-side process was started with, and keeps them out of what it prints.

    What C code or another process writes to the same descriptor is not seen here: see ``scrub_file``.
    """
    names = os.environ.get(NAMES, "").split(",")
    learn({f"{_MARK}{name}{_MARK}": os.environ[name] for name in names if name in os.environ})
    if _texts is None:
        return
    for stream in (sys.stdout, sys.stderr):
        # On the object itself: libraries keep the stream that they have found at their import.
        setattr(stream, "write", _scrubbing(stream.write))  # noqa: B010


def _scrubbing(write: Callable[[str], int]) -> Callable[[str], int]:
    return lambda text: write(scrub(text) if isinstance(text, str) else text)


def _forms(value: str) -> set[str]:
    """How a value may be written; each line of a long one counts as well."""
    lines = [line for line in value.splitlines() if len(line) >= 2 * LEAST]
    found = set()
    for text in {value, value.strip(), *(lines if "\n" in value else ())}:
        raw = os.fsencode(text)
        quoted = {urllib.parse.quote(raw, safe=""), urllib.parse.quote(raw), urllib.parse.quote_plus(raw)}
        quoted |= {re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), one) for one in quoted}
        escaped = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]}
        found |= {text, ascii(text)[1:-1], *quoted, *escaped, *_encoded(raw)}
    return found - {""}


def _encoded(raw: bytes) -> set[str]:
    """Base64 of a text that has these bytes in it, wherever they begin: those characters that they alone decide."""
    found = {base64.b64encode(raw).decode()}
    for before in range(3):
        text = base64.b64encode(b"\0" * before + raw).decode()
        found.add(text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6])
    return {form for form in found | {one.replace("+", "-").replace("/", "_") for one in found} if len(form) > LEAST}
