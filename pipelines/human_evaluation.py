"""Let people judge pictures: groups for one caption from several models and the truth, blind, on a web page.

Command: make human-evaluation [MODELS="CogView=/folder GAN=/other"]; then make count-votes
Reads:   the pictures of each model: outputs of generate or super_resolve (by default of the last chain), or any folder
         of pictures named by their captions; --references FOLDER or the demo's scenes as the truth; the image tokenizer
Writes:  pictures/, study.json (whose they are), votes/votes.db; every vote is on the disk before it is answered
Time:    about 15 s to prepare 100 groups of small pictures on two cores; then until Ctrl-C, and the next time at once
"""

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.shards.manifest import read_json
from pipelines.judging.ballots import VOTES_FOLDER, VOTES_NAME, Ballots, Share
from pipelines.judging.booth import Booth
from pipelines.judging.study import STUDY, Study, StudyConfig
from pipelines.runtime.chain import fill_from_chain, latest_output, output_of, show_finished
from pipelines.runtime.display import open_display
from pipelines.runtime.flags import Order
from pipelines.runtime.jobs import CONFIG_NAME, Finished, digest_input, run_job
from pipelines.runtime.locks import folder_lock
from pipelines.serving.gate import Gate
from pipelines.serving.listening import check_address, listen, read_token

TOKENIZER = {"image_tokenizer": "train_image_tokenizer"}
LATEST = {"generate": "CogView", "super_resolve": "CogView super-resolved"}  # what there is to judge without --models
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is judged, by how much work of each evaluator, and where.

    models: NAME=FOLDER of each; without any, what the last chain drew, and super_resolve made of it. recovered: judge
    the truth as well, passed through the image tokenizer; references: pictures of it with the same captions, or tars of
    pairs such as filter_pairs writes (the demo's captions need none); image_size: of the truth, 0 for that of the first
    model's pictures.
    num_groups: captions of the study, 0 for all. each: groups that one evaluator judges, 0 for all; repeated, planted:
    attention checks among them, groups shown a second time and groups with one whole picture among scrambled ones.
    host, port, token_file, names: see `serve`. only_prepare: do not listen. device: of the image tokenizer.
    """

    models: tuple[str, ...] = ()
    recovered: bool = True
    references: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    image_size: int = 0
    num_groups: int = 0
    num_planted: int = 12
    seed: int = 0
    each: int = runtime_field(50)
    repeated: int = runtime_field(3)
    planted: int = runtime_field(3)
    host: str = runtime_field("127.0.0.1")
    port: int = runtime_field(8081)
    token_file: Path | None = runtime_field(None)
    names: tuple[str, ...] = runtime_field(())
    only_prepare: bool = runtime_field(False)
    device: str = runtime_field("cpu")

    def __post_init__(self) -> None:
        for name in ("image_size", "num_groups", "seed", "each", "repeated", "planted"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: give 0 or more")
        require_positive(self, "num_planted")
        check_address(host=self.host, port=self.port, token_file=self.token_file)


PAPER = Config(num_groups=2950, image_size=256, num_planted=60, device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, num_groups=100, image_size=0, num_planted=12, each=20, repeated=2, planted=2, device="cpu"),
}


def main(config: Config, *, order: Order, command: str) -> list[str]:
    """Prepare the study unless it is there, serve it until Ctrl-C, and return the closing words."""
    token = read_token(config.token_file)
    done = prepare_study(study_config(config, root=order.root), order=order)
    if config.only_prepare:
        return [f"study: {done.output}"]
    study = Study.open(done.output)
    with open_ballots(config, study) as ballots:
        booth = Booth(
            study,
            ballots,
            gate=Gate(token=token, names=config.names),
            results_key=secrets.token_urlsafe(KEY_BYTES),
        )
        asyncio.run(listen(booth.app(), host=config.host, port=config.port, greet=booth.greeting, close=lambda: None))
        votes = ballots.votes()
    return [f"{len(votes)} votes of {len({vote.evaluator for vote in votes})} evaluators: {done.output / VOTES_FOLDER}"]


def study_config(config: Config, *, root: Path) -> StudyConfig:
    """What decides the pictures, all that is not given filled in. ConfigError for models other than NAME=FOLDER."""
    models = dict(_model(given) for given in config.models) if config.models else latest_models(root)
    if len(models) < len(config.models):
        raise ConfigError(f"models={config.models}: every model needs a name of its own")
    if config.recovered:
        config = fill_from_chain(config, TOKENIZER, root=root)
    return StudyConfig(
        names=tuple(models),
        folders=tuple(models.values()),
        contents=tuple(digest_input(folder, field_name=f"models: {name}") for name, folder in models.items()),
        references=config.references if config.recovered else None,
        image_tokenizer=config.image_tokenizer if config.recovered else None,
        image_size=config.image_size,
        num_groups=config.num_groups,
        num_planted=config.num_planted,
        seed=config.seed,
        device=config.device,
    )


def prepare_study(config: StudyConfig, *, order: Order) -> Finished:
    """Write the study's pictures, unless they are there."""
    with open_display([STUDY.name], title="human evaluation", root=order.root, is_verbose=order.is_verbose) as display:
        display.start(STUDY.name)
        done = run_job(STUDY, config, root=order.root, display=display)
        show_finished(display, done)
    return done


@contextmanager
def open_ballots(config: Config, study: Study) -> Iterator[Ballots]:
    """The study's votes, held by this process alone. ConfigError when another server has them."""
    folder = study.folder / VOTES_FOLDER
    folder.mkdir(exist_ok=True)
    share = Share(measured=config.each, repeated=config.repeated, planted=config.planted)
    with folder_lock(folder):
        ballots = Ballots(folder / VOTES_NAME, study=study, share=share)
        try:
            yield ballots
        finally:
            ballots.close()


def _model(given: str) -> tuple[str, Path]:
    name, equals, folder = given.partition("=")
    if not equals or not name.strip() or not folder:
        raise ConfigError(f"models={given!r}: give NAME=FOLDER, such as CogView=runs/smoke/generate/4f2a")
    return name.strip(), Path(folder).absolute()


def latest_models(root: Path) -> dict[str, Path]:
    """What the chain drew, or else what was drawn last, and the same pictures magnified, if they were.

    A prompt drawn by hand since then is no study. ConfigError only when there is no picture at all.
    """
    drawn = output_of("generate", flag="--models NAME=", root=root)
    models = {LATEST["generate"]: drawn}
    with suppress(ConfigError):
        magnified = latest_output("super_resolve", flag="--models NAME=", root=root)
        if read_json(magnified / CONFIG_NAME)["config"]["samples"] == str(drawn):
            models[LATEST["super_resolve"]] = magnified
    return models
