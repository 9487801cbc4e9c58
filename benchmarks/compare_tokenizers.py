"""Four ways to learn a codebook, on 7,670 emoji: straight-through, Gumbel, moving average, and not at all.

Command: make verify NAME=compare_tokenizers; with ARGS=--save also docs/tokenizers.png and docs/tokenizers.csv
Figure 2 of CogView, small: `make compare-image-tokenizers DATA=../shared/data/emoji`, that is the smoke preset of
compare_image_tokenizers at 64 pixels with 512 codes. The arms differ in nothing but the rule. L2 is the mean over the
last tenth of the steps, in normalised pixels; all other figures are of 200 pictures that were not trained on, each
vector taking its nearest code. The data lie beside the checkout, in ../shared/data/emoji.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chains import run_job
from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, verify
from cogview.evaluation.tokenizer_arms import spread
from cogview.shards.manifest import read_json

DATA = Path("../shared/data/emoji")
ROOT = Path("runs/tokenizers")
DOCS = REPOSITORY / "docs"
JOB = "compare_image_tokenizers"
LEARNED = ("straight_through", "gumbel", "moving_average")
BARS = (
    Bar(figure="l2/spread of the trained rules", op="<=", value=0.15),
    Bar(figure="moving_average/codes_in_use", op=">=", value=0.9),
    Bar(figure="moving_average/held_out_codes_used", op=">=", value=0.9),
    *(Bar(figure=f"{rule}/psnr", op=">", value=0) for rule in (*LEARNED, "fixed")),  # it is there
)


def measure(*, save: bool) -> Figures:
    """Import the pictures unless that is done, train the four arms anew, and collect their scores."""
    if not (REPOSITORY / DATA).is_dir():
        raise UnmeasuredError(f"{DATA} does not exist; put tars of emoji with captions there")
    run_job("road", "--until", "filter_pairs", "--data", str(DATA), root=ROOT)
    shutil.rmtree(REPOSITORY / ROOT / JOB, ignore_errors=True)
    run_job(JOB, root=ROOT)
    (output,) = (REPOSITORY / ROOT / JOB).iterdir()
    if save:
        shutil.copy(output / "curves.png", DOCS / "tokenizers.png")
        shutil.copy(output / "curves.csv", DOCS / "tokenizers.csv")
    return figures_of(read_json(output / "complete.json"))


def figures_of(complete: Mapping[str, Any]) -> dict[str, float]:
    """The job's scores, and how far apart the trained rules end."""
    scores: dict[str, float] = complete["scores"]
    apart = {
        "l2/spread of the trained rules": spread([scores[f"{rule}/l2"] for rule in LEARNED]),
        "held_out_l2/spread of the trained rules": spread([scores[f"{rule}/held_out_l2"] for rule in LEARNED]),
    }
    return {**apart, **scores, "seconds/total": complete["seconds"]}


def main() -> int:
    """The command line."""
    flags = argument_parser(__doc__).parse_args()
    return verify("compare_tokenizers", lambda: measure(save=flags.save), bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
