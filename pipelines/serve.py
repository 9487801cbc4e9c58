"""Serve the model trained last on a web page, and to programs.

Command: make serve
Reads:   the outputs of pretrain, train_text_tokenizer, train_image_tokenizer and, where they are done, of
         finetune_captioning (ranks candidates, captions pictures), finetune_super_resolution and pretrain_coglm
Writes:  nothing; pictures go to whoever asked for them
Time:    until Ctrl-C; smoke: 4 pictures of 64 x 64 pixels in about a second on two cores
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from cogview.config import input_field, require_positive
from cogview.errors import ConfigError, VocabularyError
from cogview.sampling.captioning import Captioner
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import CogLMSampling
from cogview.sampling.completion import Completer
from cogview.sampling.hierarchical_magnifier import HierarchicalSampling
from cogview.sampling.super_resolution import SAMPLING, Magnifier
from cogview.sampling.text_to_image import TextToImage
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.flags import Order
from pipelines.runtime.jobs import given_folders
from pipelines.serving.desk import Desk
from pipelines.serving.gate import Gate
from pipelines.serving.listening import check_address, listen, read_token, say
from pipelines.serving.orders import Limits
from pipelines.serving.studio import Studio
from pipelines.serving.web import Site
from pipelines.tasks.completing import (
    PAINTER,
    SMOKE_FILLING,
    SMOKE_STAGES,
    CompleterFolders,
    find_folders,
    load_completer,
)

SOURCES = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
}
SKILLS = {"captioner": "finetune_captioning", "magnifier": "finetune_super_resolution"}
COGLM_ROOT = "coglm_"  # before the name of the root, as `make pretrain-coglm` has it
Skill = TypeVar("Skill")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Folders that are not given are those of the chain that ran last, and of the finetunes made from it.

    captioner: ranks candidates and captions pictures; magnifier: draws pictures again at twice the size; completer: the
    root under which a CogLM and all that belongs to it were made, which draws parts of pictures anew.
    host, port: where to listen (port 0: any free one); another host than this machine's own needs token_file, a file
    with a secret of 16 characters or more that every client has to send; names: host names under which it is asked for.
    sampling: of a request that does not say; magnify_sampling: of super-resolution; filling, hierarchical: of
    completion and its stages; completions: drawn for a request, of which the best is shown. max_candidates: of one
    request; max_prompt: characters. batch_size: pictures drawn at once, from several requests; max_waiting: requests
    in the queue, more are sent away with 429; timeout: seconds from a request to its answer. device, threads: the
    machine; is_recorded: as in generate.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    captioner: Path | None = input_field(default=None)
    magnifier: Path | None = input_field(default=None)
    completer: Path | None = input_field(default=None)
    host: str = "127.0.0.1"
    port: int = 8080
    token_file: Path | None = input_field(default=None)
    names: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    magnify_sampling: SamplingConfig = field(default_factory=lambda: SAMPLING)
    filling: CogLMSampling = field(default_factory=CogLMSampling)
    hierarchical: HierarchicalSampling = field(default_factory=HierarchicalSampling)
    completions: int = 8
    max_candidates: int = 8
    max_prompt: int = 1000
    batch_size: int = 12
    max_waiting: int = 64
    timeout: float = 120.0
    device: str = "cpu"
    threads: int = 2
    is_recorded: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "completions", "max_candidates", "max_prompt", "batch_size", "max_waiting", "threads")
        if self.max_candidates > self.batch_size:
            raise ConfigError(
                f"max_candidates={self.max_candidates} is more than batch_size={self.batch_size}: a request is drawn "
                "in one batch"
            )
        check_address(host=self.host, port=self.port, token_file=self.token_file)
        if not 0 < self.timeout <= 86400:  # also refuses NaN
            raise ConfigError(f"timeout={self.timeout}: give seconds, above 0 and up to a day")


PAPER = Config(device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        sampling=SamplingConfig(temperature=0.5, top_k=12),  # a small model is less sure of what it knows
        magnify_sampling=SamplingConfig(temperature=0.2, top_k=12),
        filling=SMOKE_FILLING,
        hierarchical=SMOKE_STAGES,
        batch_size=32,
        device="cpu",
    ),
}


def main(config: Config, *, order: Order, command: str) -> list[str]:
    """Serve until Ctrl-C, and return the closing words."""
    config = fill_from_chain(config, SOURCES, root=order.root)
    gate = Gate(token=read_token(config.token_file), names=config.names)
    studio = load_studio(config, root=order.root)
    with open_desk(config, studio) as desk:
        asyncio.run(answer(Site(desk, limits=limits_of(config, studio), gate=gate), config=config))
    counts = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in desk.counts.items())
    return [f"serve: ended; requests: {counts}"]


def load_studio(config: Config, *, root: Path) -> Studio:
    """All models. VocabularyError for a folder that was given and does not belong to the tokenizers.

    A finetune that is found, but was made with other tokenizers, is left out with a line that says so.
    """
    folders = given_folders(config, SOURCES)
    tokenizers = {name: folders[name] for name in ("text_tokenizer", "image_tokenizer")}
    painter = TextToImage.load(**folders, device=config.device)
    if config.is_recorded:
        painter.model.record_steps()
    return Studio(
        painter=painter,
        captioner=_skill("captioner", Captioner.load, tokenizers, config=config, root=root),
        magnifier=_skill("magnifier", Magnifier.load, tokenizers, config=config, root=root),
        magnify_sampling=config.magnify_sampling,
        completer=_completer(config, root=root),
        hierarchical=config.hierarchical,
        completions=config.completions,
    )


def open_desk(config: Config, studio: Studio) -> Desk:
    """The queue and its worker, not yet at work."""
    return Desk(
        studio,
        max_waiting=config.max_waiting,
        batch_size=config.batch_size,
        timeout=config.timeout,
        threads=config.threads,
    )


def limits_of(config: Config, studio: Studio) -> Limits:
    """What a request may ask for."""
    return Limits(
        grid=studio.painter.grid,
        num_codes=studio.painter.image_tokenizer.num_codes,
        sampling=config.sampling,
        max_prompt=config.max_prompt,
        max_candidates=config.max_candidates,
    )


async def answer(site: Site, *, config: Config) -> None:
    """Answer requests until the process is asked to end; what is being drawn then is given up."""
    await listen(
        site.app(),
        host=config.host,
        port=config.port,
        greet=lambda url: f"CogView: {url}  (Ctrl-C ends it)",
        close=site.desk.close,
    )


def _skill(
    name: str, load: Callable[..., Skill], tokenizers: Mapping[str, Path], *, config: Config, root: Path
) -> Skill | None:
    """A finetuned model: the one given, else the one made last, else none."""
    given: Path | None = getattr(config, name)
    if given is not None:
        return load(given, **tokenizers, device=config.device)
    try:
        found = latest_output(SKILLS[name], flag=f"--{name}", root=root)
    except ConfigError:
        return None
    try:
        return load(found, **tokenizers, device=config.device)
    except VocabularyError as error:
        say(f"left out: {error}")
        return None


def _completer(config: Config, *, root: Path) -> Completer | None:
    """What completes pictures: from the root that was given, else from that of a CogLM beside this one, else none."""
    beside = root.parent / f"{COGLM_ROOT}{root.name}"
    if config.completer is None and not (beside / PAINTER).is_dir():
        return None
    needs_clusters = config.filling.by_clusters or config.hierarchical.by_clusters
    try:
        folders = find_folders(
            CompleterFolders(), root=config.completer or beside, magnifies=True, needs_clusters=needs_clusters
        )
    except ConfigError as error:
        if config.completer is not None:
            raise
        say(f"left out: {error}")
        return None
    return load_completer(folders, filling=config.filling, device=config.device)
