"""A real server on a free port of the loopback address, with small untrained models behind it."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from aiohttp import ClientSession, web
from torch import Tensor

from cogview.models.published import load_model, save_model
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.completion import Completer
from pipelines import serve
from pipelines.serving.desk import Desk
from pipelines.serving.gate import Gate
from pipelines.serving.orders import DrawOrder
from pipelines.serving.studio import Picture, Studio
from pipelines.serving.web import Site
from pipelines.tasks.completing import CompleterFolders, load_completer
from tests.pipelines.trained_folders import GRID, LENGTH, write_trained_folders
from tests.sampling.small_coglm import write_small_coglm

SECONDS = 60.0  # after which a test has failed


def write_config(root: Path) -> serve.Config:
    """Folders of a model that draws, and of the same weights said to be finetuned for captions and for larger sizes."""
    folders = write_trained_folders(root)
    model, settings = load_model(folders.checkpoint)
    large = {"task": "super_resolution", "other_grids": [GRID // 2]}
    save_model(model, root / "captioner", settings={**settings, "task": "captioning", "length": LENGTH})
    save_model(model, root / "magnifier", settings={**settings, **large, "length": LENGTH})
    return serve.Config(
        checkpoint=folders.checkpoint,
        text_tokenizer=folders.text_tokenizer,
        image_tokenizer=folders.image_tokenizer,
        captioner=root / "captioner",
        magnifier=root / "magnifier",
        sampling=SamplingConfig(top_k=12),
        timeout=SECONDS,
        threads=1,
        port=0,
    )


@dataclass(kw_only=True)
class Served:
    """desk: its worker is at work unless the test starts it."""

    desk: Desk
    session: ClientSession
    url: str


@asynccontextmanager
async def serving(
    studio: Studio, config: serve.Config, *, is_working: bool = True, token: str = ""
) -> AsyncIterator[Served]:
    """The server and a client."""
    desk = serve.open_desk(config, studio)
    site = Site(desk, limits=serve.limits_of(config, studio), gate=Gate(token=token))
    runner = web.AppRunner(site.app(), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    if is_working:
        desk.__enter__()
    async with ClientSession() as session:
        try:
            yield Served(desk=desk, session=session, url=f"http://127.0.0.1:{runner.addresses[0][1]}")
        finally:
            if isinstance(studio, PausedStudio):
                studio.go_on.set()
            await asyncio.to_thread(desk.close)
            await runner.cleanup()


@dataclass(frozen=True, kw_only=True)
class PausedStudio(Studio):
    """Draws as ever, but waits after the first token until it may go on."""

    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def draw(
        self, orders: Sequence[DrawOrder], *, watch: Callable[[Sequence[Tensor]], None] | None = None
    ) -> list[list[Picture]]:
        def pausing(codes: Sequence[Tensor]) -> None:
            self.reached.set()
            assert self.go_on.wait(SECONDS)
            assert watch is not None
            watch(codes)

        return super().draw(orders, watch=pausing)


def write_completer(root: Path) -> Completer:
    """A small untrained CogLM that completes pictures."""
    write_small_coglm(root)
    folders = CompleterFolders(
        checkpoint=root / "checkpoint", text_tokenizer=root / "text", image_tokenizer=root / "image"
    )
    plain = CogLMSampling(by_clusters=False, tokens=SamplingConfig(top_k=0))
    return load_completer(folders, filling=plain, device="cpu")


def paused(studio: Studio) -> PausedStudio:
    return PausedStudio(painter=studio.painter, magnify_sampling=studio.magnify_sampling)


def without_skills(studio: Studio) -> Studio:
    return replace(studio, captioner=None, magnifier=None, completer=None)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or process does."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)
