"""Cluster the codes of an image tokenizer by k-means, for CogLM's cluster sampling.

Command: python -m pipelines cluster_codes smoke --root runs/coglm_smoke
Reads:   the image tokenizer of the chain that ran last, or --image-tokenizer FOLDER
Writes:  cluster_label.npy (the cluster of each code, as the release stores it), clusters.json, clusters.png
Time:    seconds; a minute or two for 20,000 codes
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cogview.config import input_field, require_positive, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.shards.manifest import atomic_file
from cogview.tokenizers.code_clusters import LABELS_NAME, SETTINGS_NAME, CodeClusters, cluster_codes
from cogview.tokenizers.dvae import DVAETokenizer
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from pipelines.runtime.chain import fill_from_chain
from pipelines.runtime.jobs import Job, JobRun, given_folders

SHEET_NAME = "clusters.png"
SOURCES = {"image_tokenizer": "train_image_tokenizer"}
SHEET_CLUSTERS, SHEET_CODES = 24, 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """image_tokenizer: whose codes; num_clusters: CogView2 makes 500 of 20,000 codes. max_rounds: of k-means."""

    image_tokenizer: Path | None = input_field(default=None)
    num_clusters: int = 500
    max_rounds: int = 100
    seed: int = 0
    threads: int = runtime_field(2)

    def __post_init__(self) -> None:
        require_positive(self, "num_clusters", "max_rounds", "threads")


PAPER = Config()
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, num_clusters=64),  # of 512 codes
}


def main(config: Config, run: JobRun) -> None:
    """Cluster, write, and show the codes of the largest clusters side by side."""
    torch.set_num_threads(config.threads)
    tokenizer = load_image_tokenizer(given_folders(config, SOURCES)["image_tokenizer"])
    if isinstance(tokenizer, DVAETokenizer):
        raise ConfigError("image_tokenizer: DALL-E's tokenizer has no codebook, so its codes have no distances")
    vectors_KD = tokenizer.codebook.codebook_KD
    found = cluster_codes(vectors_KD, num_clusters=config.num_clusters, seed=config.seed, max_rounds=config.max_rounds)
    clusters = CodeClusters(labels_K=found.labels_K, image_tokenizer=tokenizer.fingerprint)
    clusters.save(run.output)
    sheet = draw_sheet(cluster_tiles(tokenizer, clusters), title="The largest clusters", picture_side=64, columns=2)
    with atomic_file(run.output / SHEET_NAME) as file:
        sheet.save(file, format="PNG")
    run.tracker.log_image(sheet, SHEET_NAME)
    sizes_C = clusters.sizes_C
    run.scores.update(
        clusters=clusters.num_clusters,
        smallest=int(sizes_C.min()),
        median=float(sizes_C.float().quantile(0.5)),
        largest=int(sizes_C.max()),
        spread_inside=spread_inside(vectors_KD, clusters.labels_K),
    )
    run.say(f"{clusters.num_clusters} clusters of {int(sizes_C.min())} to {int(sizes_C.max())} codes: {run.output}")


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the image tokenizer from the chain that ran last under `root`."""
    filled: Config = fill_from_chain(config, SOURCES, root=root)
    return filled


def cluster_tiles(tokenizer: AnyImageTokenizer, clusters: CodeClusters) -> list[Tile]:
    """Of each of the largest clusters some codes, each as a patch of nothing but itself."""
    tiles = []
    for cluster in clusters.sizes_C.argsort(descending=True)[:SHEET_CLUSTERS].tolist():
        codes = (clusters.labels_K == cluster).nonzero()[:SHEET_CODES, 0]
        with torch.inference_mode():
            patches = to_pictures(tokenizer.decode(codes[:, None, None].expand(-1, 2, 2)))
        shown = tuple(patches + [patches[-1]] * (SHEET_CODES - len(patches)))  # a strip has one width
        tiles.append(Tile(images=shown, caption=f"{int(clusters.sizes_C[cluster])} codes"))
    return tiles


def spread_inside(vectors_KD: Tensor, labels_K: Tensor) -> float:
    """The share of the codes' variance that is left inside clusters."""
    vectors_KD = vectors_KD.detach().float()
    sums_CD = vectors_KD.new_zeros(int(labels_K.max()) + 1, vectors_KD.shape[1]).index_add_(0, labels_K, vectors_KD)
    means_CD = sums_CD / torch.bincount(labels_K)[:, None]
    inside = (vectors_KD - means_CD[labels_K]).square().sum()
    return float(inside / (vectors_KD - vectors_KD.mean(dim=0)).square().sum())


JOB = Job(name="cluster_codes", version=1, products=(LABELS_NAME, SETTINGS_NAME, SHEET_NAME), main=main)
