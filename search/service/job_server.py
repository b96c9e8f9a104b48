"""A Ray cluster's job server: connecting with a token, and each way that fails in one line.

Ray is imported where it is asked for: nothing else of Heldout needs it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search import secrecy
from search.errors import RequestError, StudyError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
"""States of a job that is over."""

_SECONDS = 10.0  # for an address that does not answer; Ray's own client waits without an end
_ELSEWHERE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray's client prefers these to what it is told
_CHATTY = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)
TOKEN, TOKEN_FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TOKEN_HOME = Path(".ray") / "auth_token"


class Cluster:
    """A connection to a cluster's job server.

    Attributes:
        address: As it was given, without a slash at its end.
        ray: Version of Ray there.
        client: Ray's ``JobSubmissionClient``; to be used within ``speaking``.

    Raises:
        RequestError: If the address, the token or the version does not fit, or Ray is not installed here.
    """

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        self._headers = _authorization()
        self.ray = self.version()
        try:
            import ray
            from ray.job_submission import JobSubmissionClient
        except ImportError as error:
            raise RequestError(
                f"--cluster needs Ray's client, but {error}; install it with `pip install 'heldout[ray]'`"
            ) from None
        if _minor(ray.__version__) != _minor(self.ray):
            raise RequestError(
                f"the cluster {self.address} must run the Ray that is installed here, but it runs {self.ray} and here "
                f"is {ray.__version__}; install ray=={self.ray} here, or another image there"
            )
        for name in _CHATTY:  # each sets a level of its own when it is imported
            logging.getLogger(name).setLevel(logging.WARNING)
        with _unset(_ELSEWHERE), self.speaking():
            self.client: Any = JobSubmissionClient(self.address, headers=dict(self._headers))

    @contextlib.contextmanager
    def speaking(self, job: str | None = None) -> Iterator[None]:
        """A context that says in one line what the job server, or the way to it, refuses.

        Args:
            job: Whom a request is about, for one that is not there.

        Raises:
            StudyError: If there is no such job, or there is one already.
            RequestError: For everything else.
        """
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise self._refused() from None
        except (RuntimeError, ValueError, OSError, requests.RequestException) as error:
            said = " ".join(secrecy.scrub(str(error)).split())
            if job is not None and "404" in said:
                raise StudyError(
                    f"there is no job called {job!r} on {self.address}; `heldout jobs --cluster {self.address}` "
                    "lists those that are there"
                ) from None
            if job is not None and "already exists" in said:
                raise StudyError(
                    f"there is a job called {job!r} on {self.address} already; choose another --study"
                ) from None
            raise RequestError(f"the cluster {self.address} must do what was asked, but: {said[:300]}") from None

    def version(self) -> str:
        """Ray's version there, from the one request that has a time limit.

        Raises:
            RequestError: If nothing answers, or something else does, or it refuses us.
        """
        request = urllib.request.Request(f"{self.address}/api/version", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                return str(json.load(answer)["ray_version"])
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise self._refused() from None
            got = f"it answers {error.code}"
        except (ValueError, KeyError, TypeError):
            got = "it answers something else"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RequestError(
                f"the cluster {self.address} must answer, but: {secrecy.scrub(str(reason))}; start it, or correct "
                "--cluster"
            ) from None
        raise RequestError(
            f"{self.address} must be the dashboard of a Ray cluster, but {got}; correct --cluster (Ray's port is 8265)"
        )

    def _refused(self) -> RequestError:
        what = "refuses our token" if self._headers else "asks for a token, and there is none here"
        return RequestError(
            f"the cluster {self.address} {what}; set {TOKEN}, or {TOKEN_FILE} to a file that has it"
        )


def _checked(address: str) -> str:
    shown = secrecy.redacted(address)
    try:
        parts = urllib.parse.urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        hint = " (the port of Ray's dashboard, not that of its client)" if address.startswith("ray://") else ""
        raise RequestError(f"--cluster must be an address such as http://head:8265{hint}, but got {shown!r}")
    if "@" in parts.netloc:
        raise RequestError(f"--cluster takes no password; set {TOKEN}, and leave it at {shown}")
    return address.rstrip("/")


def _authorization() -> dict[str, str]:
    """The token as a header, from where Ray itself looks for it, in its order; nothing where there is none.

    Raises:
        RequestError: If the file that is named cannot be read, or what it has can be no token.
    """
    token, file = os.environ.get(TOKEN, ""), os.environ.get(TOKEN_FILE, "")
    where = TOKEN
    if not token and file:
        where = f"{TOKEN_FILE} ({file})"
        try:
            token = Path(file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise RequestError(f"{TOKEN_FILE} must name a file that has the token, but {file}: {reason}") from None
        if not token.strip():
            raise RequestError(f"{TOKEN_FILE} must name a file that has the token, but {file} is empty")
    elif not token:
        where = str(Path.home() / _TOKEN_HOME)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            token = Path(where).read_text()
    token = token.strip()
    if not token:
        return {}
    secrecy.learn({token: token}, "***")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise RequestError(f"a token must be one word of plain characters, but that of {where} is not; correct it")
    return {"Authorization": f"Bearer {token}"}


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


@contextlib.contextmanager
def _unset(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
