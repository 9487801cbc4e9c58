"""The road on real pictures: 7,670 emoji in six styles, with Chinese and English names.

Command: make verify NAME=emoji [ARGS="--preset smoke --pretrain.loop.num-steps 3000"]; unknown flags go to the road
Reports what went in, what was rejected and why, the tokens, the losses and where the sample grid is. It has no bar: the
pictures are for looking at. The data lie beside the checkout, in ../shared/data/emoji.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chains import run_job
from benchmarks.harness import REPOSITORY, Figures, UnmeasuredError, argument_parser, verify
from cogview.shards.manifest import read_json, read_sealed

DATA = Path("../shared/data/emoji")
ROOT = Path("runs/emoji")
PAIR_JOBS = ("import_pairs", "filter_pairs", "tokenize_pairs")


def measure(*, preset: str, flags: Sequence[str]) -> Figures:
    """Run the road on the emoji, or find it done, and collect its numbers."""
    if not (REPOSITORY / DATA).is_dir():
        raise UnmeasuredError(f"{DATA} does not exist; put tars of emoji with captions there")
    run_job("road", "--data", str(DATA), *flags, root=ROOT, preset=preset)
    chain = read_json(REPOSITORY / ROOT / "chain.json")
    stages = {stage["job"]: stage for stage in chain["stages"]}
    return {**pair_figures(stages), **score_figures(stages), "grid": str(ROOT / "grid.png")}


def pair_figures(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Pairs in and out of each stage, and those rejected by reason."""
    figures: dict[str, int] = {}
    for job in PAIR_JOBS:
        manifest = read_sealed(REPOSITORY / ROOT / stages[job]["output"] / "manifest.json")
        figures |= {f"{job}/in": manifest["rows_in"], f"{job}/out": manifest["rows_out"]}
        figures |= {f"{job}/rejected/{reason}": count for reason, count in sorted(manifest["rejected"].items())}
    return figures


def score_figures(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What each stage scored, and how long it took."""
    figures: dict[str, float] = {}
    for job, stage in stages.items():
        figures[f"seconds/{job}"] = stage["seconds"]
        scores = stage["scores"].items()
        figures |= {f"{job}/{name}": value for name, value in scores if isinstance(value, (int, float))}
    return figures


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--preset", default="smoke", help="preset of the road (default: smoke)")
    flags, others = parser.parse_known_args()
    return verify("emoji", lambda: measure(preset=flags.preset, flags=others), bars=(), save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
