"""Draw pictures with CogLM, in a style, and put candidates in the order in which their caption can be read off them.

Command: python -m pipelines generate_coglm smoke --root runs/coglm_smoke --prompt "a large red circle"
Reads:   the outputs of pretrain_coglm (or imported weights) and of both tokenizers; of cluster_codes where codes are
         drawn by clusters
Writes:  samples/000000.png ..., samples.parquet (prompt, seed, codes, CapLoss, rank of each), grid.png, prompts.json
Time:    about 10 s for 48 pictures of 64 x 64 pixels on two cores
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.caption_loss import score_pairs
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.evaluation.reranking import ranking
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.cluster_choice import ClusterSampling, CogLMSampling
from cogview.sampling.coglm import CogLM
from cogview.sampling.coglm_captioning import CogLMCaptioner
from cogview.sampling.style_recipes import style_recipe
from cogview.shards.manifest import atomic_file, write_json
from pipelines.runtime.chain import fill_from_chain, latest_output
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.tasks.drawing import save_picture

TOKENIZERS = {"text_tokenizer": "train_text_tokenizer", "image_tokenizer": "train_image_tokenizer"}
GRID_TILES, CANDIDATES_SHOWN = 48, 8
SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("prompt_index", pa.int32()),
        ("prompt", pa.string()),
        ("style", pa.string()),
        ("candidate", pa.int32()),
        ("seed", pa.int64()),
        ("codes", pa.list_(pa.uint16())),
        ("cap_loss", pa.float64()),  # of the prompt for this picture, by the same weights
        ("rank", pa.int32()),  # among the candidates of a prompt, 0 is the best
        ("path", pa.string()),
        ("checkpoint", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Folders that are not given are those that ran last under the root.

    clusters: the output of cluster_codes, or a `cluster_label.npy`, for `sampling.clusters`. prompt: captions;
    prompts_file: a text file with a caption on every line. style: words behind each caption, and how boldly it is
    drawn. candidates: pictures of each prompt. seed: of the run; each picture gets a seed of its own from it.
    """

    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    clusters: Path | None = input_field(default=None)
    prompt: tuple[str, ...] = ()
    prompts_file: Path | None = input_field(default=None)
    style: str = "none"
    candidates: int = 8
    sampling: CogLMSampling = field(default_factory=CogLMSampling)
    seed: int = 0
    batch_size: int = runtime_field(8)
    device: str = runtime_field("cpu")
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "candidates", "batch_size", "threads")
        style_recipe(self.style)
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: give 0 or more")


PAPER = Config(style="mainbody", device="cuda")
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(
        PAPER,
        style="none",  # the scenes' captions name no styles
        # A small model is less sure of what it knows.
        sampling=CogLMSampling(
            clusters=ClusterSampling(temperature=0.4, top_clusters=4, temperature_inside=0.2),
            tokens=SamplingConfig(temperature=0.2, top_k=12),
        ),
        device="cpu",
        batch_size=50,
    ),
}


def main(config: Config, run: JobRun) -> None:
    """Draw every candidate, let the same weights say which shows its caption best, and write all of it."""
    torch.set_num_threads(config.threads)
    coglm, prompts = load(config), collect_prompts(config)
    rows: list[dict[str, Any]] = []
    orders = [(place, candidate) for place in range(len(prompts)) for candidate in range(config.candidates)]
    for start in range(0, len(orders), config.batch_size):
        rows += draw(
            orders[start : start + config.batch_size], prompts, coglm=coglm, config=config, run=run, first=start
        )
        run.progress(len(rows), len(orders), "pictures")
    rank_candidates(rows, num_prompts=len(prompts))
    for row in rows:
        row["checkpoint"] = run.inputs["checkpoint"]
    with atomic_file(run.output / "samples.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    write_json(run.output / "prompts.json", prompts)
    sheet = draw_grid(run.output, rows, prompts)
    save_picture(sheet, run.output / "grid.png")
    run.tracker.log_image(sheet, "grid.png")
    best = [row["cap_loss"] for row in rows if row["rank"] == 0]
    run.scores["samples"] = len(rows)
    run.scores["cap_loss"] = sum(row["cap_loss"] for row in rows) / len(rows)
    run.scores["cap_loss_of_best"] = sum(best) / len(best)
    run.say(f"{len(rows)} pictures, the best of each prompt first: {run.output / 'grid.png'}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the model trained last, the clusters made last if they are asked for, and the chain's tokenizers."""
    if config.checkpoint is None:
        config = replace(config, checkpoint=latest_output("pretrain_coglm", flag="--checkpoint", root=root))
    if config.clusters is None and config.sampling.by_clusters:
        config = replace(config, clusters=latest_output("cluster_codes", flag="--clusters", root=root))
    filled: Config = fill_from_chain(config, TOKENIZERS, root=root)
    return filled


def load(config: Config) -> CogLM:
    """The model with all that belongs to it."""
    folders = given_folders(config, {"checkpoint": "pretrain_coglm", **TOKENIZERS})
    coglm = CogLM.load(
        folders["checkpoint"],
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
        clusters=config.clusters,
        device=config.device,
    )
    if config.sampling.by_clusters and coglm.clusters is None:
        raise ConfigError(
            "clusters is not given; name the output of cluster_codes, or choose --sampling.no-by-clusters"
        )
    return coglm


def collect_prompts(config: Config) -> list[str]:
    """All captions in the order in which they are drawn. ConfigError when there is none, or an empty one."""
    given = list(config.prompt)
    if config.prompts_file is not None:
        try:
            given += [line for line in config.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ConfigError(f"prompts_file={config.prompts_file} is not UTF-8 text ({error.reason})") from error
    if not given or any(not text.strip() for text in given):
        raise ConfigError(
            f"prompt={given}: give captions with --prompt or --prompts-file; an empty one asks for nothing"
        )
    return [text.strip() for text in given]


def draw(
    orders: Sequence[tuple[int, int]],
    prompts: Sequence[str],
    *,
    coglm: CogLM,
    config: Config,
    run: JobRun,
    first: int,
) -> list[dict[str, Any]]:
    """Draw a batch, write its pictures, and return its rows. orders: (prompt, candidate)."""
    recipe = style_recipe(config.style)
    captions = [recipe.prompt(prompts[place]) for place, _ in orders]
    seeds = [seed_of(config.seed, place, candidate) for place, candidate in orders]
    codes_Bhw = coglm.draw(captions, seeds=seeds, sampling=recipe.sampling(config.sampling))
    scores = score_pairs(CogLMCaptioner.of(coglm), [prompts[place] for place, _ in orders], codes_Bhw)
    codes = codes_Bhw.flatten(1).cpu().numpy().astype(np.uint16)
    rows = []
    for number, picture in enumerate(to_pictures(coglm.decode(codes_Bhw))):
        (place, candidate), path = orders[number], f"samples/{first + number:06d}.png"
        save_picture(picture, run.output / path)
        rows.append(
            {
                "index": first + number,
                "prompt_index": place,
                "prompt": prompts[place],
                "style": config.style,
                "candidate": candidate,
                "seed": seeds[number],
                "codes": codes[number].tolist(),
                "cap_loss": scores[number].cap_loss,
                "path": path,
            }
        )
    return rows


def seed_of(seed: int, place: int, candidate: int) -> int:
    """A picture's own seed, from (seed, prompt, candidate) alone."""
    return int.from_bytes(hashlib.sha256(f"coglm:{seed}:{place}:{candidate}".encode()).digest()[:6], "big")


def rank_candidates(rows: Sequence[dict[str, Any]], *, num_prompts: int) -> None:
    """Give each row its rank among the candidates of its prompt: inverse prompting, CogView2's post-selection."""
    for place in range(num_prompts):
        ours = [row for row in rows if row["prompt_index"] == place]
        for rank, number in enumerate(ranking([row["cap_loss"] for row in ours])):
            ours[number]["rank"] = rank


def draw_grid(folder: Path, rows: Sequence[dict[str, Any]], prompts: Sequence[str]) -> Image.Image:
    """The candidates of the first prompts side by side, the best first."""
    tiles = []
    for place, prompt in enumerate(prompts[:GRID_TILES]):
        ours = sorted((row for row in rows if row["prompt_index"] == place), key=lambda row: int(row["rank"]))
        pictures = tuple(Image.open(folder / row["path"]).convert("RGB") for row in ours[:CANDIDATES_SHOWN])
        tiles.append(Tile(images=pictures, caption=prompt, fallback=f"prompt {place}"))
    return draw_sheet(tiles)


JOB = Job(name="generate_coglm", version=1, products=("samples.parquet", "grid.png", "prompts.json"), main=main)
