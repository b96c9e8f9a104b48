"""A headless Chromium for tests: opens pages as a person with an account does, and says what is to be seen there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 90.0
_TEXT = (  # of the page and of the frames that it may look into
    "[document, ...[...document.querySelectorAll('iframe')].map(f => f.contentDocument)]"
    ".map(d => d && d.body ? d.body.innerText : '').join('\\n')"
)


@dataclass(frozen=True)
class Account:
    user: str
    password: str


class Browser:
    """A running Chromium; a visit gives an account where a page asks for one, once, as a person types it in."""

    def __init__(self, port: int) -> None:
        self._port = port

    def visit(self, url: str, account: Account, *wanted: str, shot: Path | None = None) -> str:
        """Open a page in a tab of its own, and wait until it shows these texts; all that it shows.

        Args:
            shot: File for a picture of what is seen then, a PNG.

        Raises:
            AssertionError: If it does not show them.
        """
        return asyncio.run(self._visit(url, account, wanted, shot))

    async def _visit(self, url: str, account: Account, wanted: tuple[str, ...], shot: Path | None) -> str:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            made = await session.put(f"http://127.0.0.1:{self._port}/json/new?about:blank")
            target = await made.json(content_type=None)
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = _Tab(socket, account)
                reading = asyncio.ensure_future(tab.read())
                try:
                    await tab.call("Fetch.enable", handleAuthRequests=True)
                    await tab.call("Page.enable")
                    await tab.call("Emulation.setDeviceMetricsOverride", width=1400, height=1000, deviceScaleFactor=1,
                                   mobile=False)  # fmt: skip
                    await tab.call("Page.navigate", url=url)
                    return await self._seen(tab, wanted, shot)
                finally:
                    reading.cancel()
                    await session.get(f"http://127.0.0.1:{self._port}/json/close/{target['id']}")

    async def _seen(self, tab: _Tab, wanted: tuple[str, ...], shot: Path | None) -> str:
        until = time.monotonic() + _SECONDS
        while True:
            found = await tab.call("Runtime.evaluate", expression=_TEXT)
            text = str(found["result"].get("value", ""))
            missing = [word for word in wanted if word not in text]
            late = time.monotonic() > until
            if (late or not missing) and shot is not None:
                await asyncio.sleep(2.0)  # what is drawn after its text
                picture = await tab.call("Page.captureScreenshot", format="png")
                shot.write_bytes(base64.b64decode(picture["data"]))
            if not missing:
                return text
            assert not late, f"waited for {missing}, but the page shows:\n{text}"
            await asyncio.sleep(0.5)


class _Tab:
    """One tab, by Chromium's own protocol: numbered requests, answers to them, and events in between."""

    def __init__(self, socket: Any, account: Account) -> None:
        self._socket, self._account = socket, account
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._asked = set[str]()  # requests that were given the account already

    async def call(self, method: str, **params: Any) -> Any:
        number = len(self._answers) + 1
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(self._answers[number], _SECONDS)

    async def read(self) -> None:
        async for message in self._socket:
            body = json.loads(message.data)
            if "id" in body:
                answer = self._answers[body["id"]]
                if "error" in body:
                    answer.set_exception(AssertionError(body["error"]["message"]))
                else:
                    answer.set_result(body["result"])
            elif body["method"] == "Fetch.requestPaused":
                self._send("Fetch.continueRequest", requestId=body["params"]["requestId"])
            elif body["method"] == "Fetch.authRequired":
                self._authorize(body["params"]["requestId"])

    def _authorize(self, request: str) -> None:
        response = {"response": "CancelAuth"}
        if request not in self._asked:
            self._asked.add(request)
            response = {"response": "ProvideCredentials", "username": self._account.user,
                        "password": self._account.password}  # fmt: skip
        self._send("Fetch.continueWithAuth", requestId=request, authChallengeResponse=response)

    def _send(self, method: str, **params: Any) -> None:
        task = asyncio.ensure_future(self.call(method, **params))
        # A request that was given up meanwhile is no matter.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own below a folder, and end it."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    words = [CHROMIUM, "--headless=new", "--remote-debugging-port=0", "--remote-allow-origins=*", "--disable-gpu",
             "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
             f"--user-data-dir={profile}"]  # fmt: skip
    words += ["--no-sandbox"] * (os.getuid() == 0)  # which it refuses to have as root
    process = subprocess.Popen([*words, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)  # fmt: skip
    try:
        port = profile / "DevToolsActivePort"
        until = time.monotonic() + _SECONDS
        while not (port.exists() and port.read_text().strip()):
            assert process.poll() is None and time.monotonic() < until, "Chromium did not start"
            time.sleep(0.1)
        yield Browser(int(port.read_text().split()[0]))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
