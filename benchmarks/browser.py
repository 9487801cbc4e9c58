"""A real headless Chromium, driven over its DevTools protocol, for tests and benchmarks of our pages."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0"),
)
SECONDS = 120.0


class Tab:
    """One tab, for one caller at a time.

    complaints: what the page has written to its console, errors and breaches of its policy among it.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._last = 0
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._last += 1
        await self._socket.send_json({"id": self._last, "method": method, "params": params})
        async with asyncio.timeout(SECONDS):
            while True:
                message = await self._socket.receive_json()
                if message.get("id") == self._last:
                    assert "error" not in message, message["error"]
                    return dict(message["result"])
                if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                    self.complaints.append(json.dumps(message["params"]))

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are waited for."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait_for(self, expression: str) -> None:
        """Until the expression is true."""
        async with asyncio.timeout(SECONDS):
            while not await self.evaluate(expression):
                await asyncio.sleep(0.05)

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.wait_for("document.readyState === 'complete'")

    async def write(self, selector: str, text: str) -> None:
        """Type into a field, as a person would."""
        await self.evaluate(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({selector!r}))")
        await self.call("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """With the mouse, in the middle of the element."""
        place = await self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelector({selector!r}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    async def choose_file(self, selector: str, path: Path) -> None:
        document = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    async def screenshot(self, path: Path, *, width: int, height: int, scale: float = 1.0) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


def find_browser() -> str | None:
    """The Chromium of this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@asynccontextmanager
async def open_tab() -> AsyncIterator[Tab]:
    """A fresh browser with one tab, if there is a Chromium (see `find_browser`)."""
    program = find_browser()
    assert program is not None, f"none of {', '.join(NAMES)} is installed"
    with tempfile.TemporaryDirectory(prefix="cogview-browser-", ignore_cleanup_errors=True) as folder:
        browser = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [target for target in await answer.json() if target["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Log", "DOM"):
                        await tab.call(f"{domain}.enable")
                    yield tab
        finally:
            browser.terminate()
            browser.wait(timeout=SECONDS)


async def _port(path: Path) -> int:
    """Which port the browser has chosen."""
    async with asyncio.timeout(SECONDS):
        while not path.is_file() or not path.read_text().strip():
            await asyncio.sleep(0.05)
    return int(path.read_text().splitlines()[0])
