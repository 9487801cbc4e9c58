"""The whole road: from web pages, or your own pairs, to a trained model and its pictures.

Command: make pretrain, make pretrain DATA=/folder; python -m pipelines road smoke --pretrain.loop.num-steps 3000
Reads:   the demo site that it serves itself; or with --data a folder of tars or pictures, or a table of files or URLs
Writes:  the output folder of every job, chain.json, grid.png, report.html
Time:    under ten minutes on two cores for the smoke preset; seconds when everything is done
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.locations import addresses_of
from cogview.records.sources import detect_source
from cogview.records.tables import inspect_table
from cogview.shards.manifest import atomic_file
from pipelines import evaluate as evaluating
from pipelines import filter_pairs as filtering
from pipelines import generate as generating
from pipelines import import_pairs as importing
from pipelines import pretrain as pretraining
from pipelines import scrape_pairs as scraping
from pipelines import tokenize_pairs as tokenizing
from pipelines import train_image_tokenizer as image_training
from pipelines import train_text_tokenizer as text_training
from pipelines.runtime.chain import CHAIN_NAME, DEMO_DATA, ChainStage, read_chain, run_chain
from pipelines.runtime.cluster import shutdown_ray
from pipelines.runtime.display import duration, open_display
from pipelines.runtime.flags import Order
from pipelines.runtime.report import write_report
from pipelines.runtime.status import GRID_NAME, REPORT_NAME, product_lines

OWN_PROMPTS = 48  # captions of held-out pairs to draw when the data is not the demo's


@dataclass(frozen=True, kw_only=True)
class Config:
    """Whose pairs, and the config of every job on the way.

    data: your own pairs instead of the demo site; caption_columns: its columns or JSON fields with captions, and
    image_column: a table's column of paths or URLs, both found by their usual names if not given. until: the last job
    to run, for those who want its output only.
    """

    data: tuple[str, ...] = input_field(default=())
    caption_columns: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--captions", "--caption-fields"))] = ()
    image_column: str = ""
    until: str = runtime_field("")
    scrape_pairs: scraping.Config
    import_pairs: importing.Config
    filter_pairs: filtering.Config
    train_text_tokenizer: text_training.Config
    train_image_tokenizer: image_training.Config
    tokenize_pairs: tokenizing.Config
    pretrain: pretraining.Config
    generate: generating.Config
    evaluate: evaluating.Config


def compose(preset: str) -> Config:
    """The road of which every job has the same preset."""
    return Config(
        scrape_pairs=scraping.PRESETS[preset],
        import_pairs=importing.PRESETS[preset],
        filter_pairs=filtering.PRESETS[preset],
        train_text_tokenizer=text_training.PRESETS[preset],
        train_image_tokenizer=image_training.PRESETS[preset],
        tokenize_pairs=tokenizing.PRESETS[preset],
        pretrain=pretraining.PRESETS[preset],
        generate=generating.PRESETS[preset],
        evaluate=evaluating.PRESETS[preset],
    )


def compose_fashion(preset: str, *, image_size: int) -> Config:
    """The road as far as finetune_fashion needs it: pictures of a size of its own, and a VQGAN for their tokens."""
    base, tokenizer = compose(preset), {"paper": "fashion", "smoke": "fashion_smoke"}[preset]
    return replace(
        base,
        until="tokenize_pairs",
        import_pairs=replace(base.import_pairs, image=replace(base.import_pairs.image, image_size=image_size)),
        scrape_pairs=replace(base.scrape_pairs, image=replace(base.scrape_pairs.image, image_size=image_size)),
        train_image_tokenizer=image_training.PRESETS[tokenizer],
        tokenize_pairs=replace(base.tokenize_pairs, image_size=image_size),
    )


def compose_coglm(preset: str) -> Config:
    """The road as far as pretrain_coglm needs it: a bilingual text tokenizer, and CogView2's picture sizes."""
    base = compose(preset)
    text, image, tokens = {
        "paper": ("bilingual", "cogview2", "cogview2"),
        "smoke": ("bilingual_smoke", "smoke", "smoke"),
    }[preset]
    return replace(
        base,
        until="tokenize_pairs",
        train_text_tokenizer=text_training.PRESETS[text],
        train_image_tokenizer=image_training.PRESETS[image],
        tokenize_pairs=tokenizing.PRESETS[tokens],
    )


PRESETS: dict[str, Config] = {
    "paper": compose("paper"),
    "smoke": compose("smoke"),
    "coglm_paper": compose_coglm("paper"),
    "coglm_smoke": compose_coglm("smoke"),
    "fashion_paper": compose_fashion("paper", image_size=800),  # 50 x 50 codes
    "fashion_smoke": compose_fashion("smoke", image_size=256),  # 16 x 16 codes of a VQGAN trained on 64 x 64 pixels
}


def main(config: Config, *, order: Order, command: str) -> list[str]:
    """Run what is not done yet, publish the pictures and the report, and return the closing words."""
    stages = plan_stages(config)
    root, started = order.root, time.monotonic()
    names = [stage.job.name for stage in stages]
    before = _chain_bytes(root)
    with open_display(names, title=f"road {order.preset}", root=root, is_verbose=order.is_verbose) as display:
        finished = run_chain(
            stages,
            root=root,
            display=display,
            facts={"preset": order.preset, "command": command, "data": _source(config)},
        )
        if "generate" in finished and (_chain_bytes(root) != before or not (root / REPORT_NAME).is_file()):
            publish(root, grid=finished["generate"].output / GRID_NAME)
        shutdown_ray()
    is_idle = all(done.was_done for done in finished.values())
    headline = "everything was done already" if is_idle else "done"
    return [f"{headline}, in {duration(time.monotonic() - started)}", *product_lines(read_chain(root), root=root)]


def plan_stages(config: Config) -> list[ChainStage]:
    """The jobs in their order, and which output each of them reads."""
    source = first_stage(config)
    has_demo = not config.data and config.scrape_pairs.demo is not None
    models = {"text_tokenizer": "train_text_tokenizer", "image_tokenizer": "train_image_tokenizer"}
    generate = config.generate if has_demo else _for_own_data(config.generate)
    stages = [
        source,
        ChainStage(job=filtering.JOB, config=config.filter_pairs, reads={"pairs": source.job.name}),
        ChainStage(job=text_training.JOB, config=config.train_text_tokenizer, reads={"pairs": "filter_pairs"}),
        ChainStage(job=image_training.JOB, config=config.train_image_tokenizer, reads={"pairs": "filter_pairs"}),
        ChainStage(job=tokenizing.JOB, config=config.tokenize_pairs, reads={"pairs": "filter_pairs", **models}),
        ChainStage(job=pretraining.JOB, config=config.pretrain, reads={"tokens": "tokenize_pairs", **models}),
        ChainStage(
            job=generating.JOB,
            config=generate,
            reads={"checkpoint": "pretrain", "tokens": "tokenize_pairs", **models},
        ),
        ChainStage(
            job=evaluating.JOB,
            config=replace(config.evaluate, demo=config.evaluate.demo and has_demo),
            reads={"samples": "generate", "checkpoint": "pretrain", "tokens": "tokenize_pairs", **models},
        ),
    ]
    names = [stage.job.name for stage in stages]
    if config.until and config.until not in names:
        raise ConfigError(f"until={config.until!r}: choose one of the road's jobs, {', '.join(names)}")
    return stages[: names.index(config.until) + 1] if config.until else stages


def first_stage(config: Config) -> ChainStage:
    """Where the pairs come from: the web, or files. ConfigError when the data is none of the kinds that we read."""
    columns: dict[str, Any] = {"caption_fields": _words(config.caption_columns), "image_column": config.image_column}
    if not config.data:
        if any(columns.values()):
            raise ConfigError("caption_columns, image_column: these are columns of your own data; give --data too")
        return ChainStage(job=scraping.JOB, config=config.scrape_pairs)
    source = detect_source(config.data)
    if source.kind == "table" and inspect_table(source.files[0].address, **columns).is_web:
        table = replace(config.scrape_pairs, demo=None, pages=(), table=config.data, **columns)
        return ChainStage(job=scraping.JOB, config=table)
    return ChainStage(job=importing.JOB, config=replace(config.import_pairs, data=config.data, **columns))


def publish(root: Path, *, grid: Path) -> None:
    """Put the sample grid and the report of the whole chain where people look first."""
    chain = read_chain(root)
    with atomic_file(root / GRID_NAME) as copy, open(grid, "rb") as original:
        shutil.copyfileobj(original, copy)
    write_report({name: value for name, value in chain.items() if name != "process"}, root / REPORT_NAME, root=root)


def _for_own_data(config: generating.Config) -> generating.Config:
    """Captions of held-out pairs instead of the demo's scenes."""
    return replace(config, num_scenes=0, num_validation_prompts=config.num_validation_prompts or OWN_PROMPTS)


def _words(columns: tuple[str, ...]) -> tuple[str, ...]:
    """`("zh,en",)` and `("zh", "en")` both name two columns."""
    return tuple(word.strip() for column in columns for word in column.split(",") if word.strip())


def _source(config: Config) -> str:
    return (
        ", ".join(addresses_of(config.data)) if config.data else DEMO_DATA if config.scrape_pairs.demo else "web pages"
    )


def _chain_bytes(root: Path) -> bytes:
    path = root / CHAIN_NAME
    return path.read_bytes() if path.is_file() else b""
