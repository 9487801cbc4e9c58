"""Without a loss on the text, does the picture still follow the caption?

Command: make verify NAME=text_loss [ARGS="--steps 1500 --scenes 200 --root runs/smoke"]
Two GPTs of the smoke preset are trained on the tokens of a finished chain for the same steps on the same rows, with
text-loss weight 0.5 and with 0. Each then draws scenes that the corpus never showed, and the scene reader says how many
of the attributes in the captions it drew right. CogView, section 2.3: with a weight of 0 the model "will fail to find
the connections between text and image". The rule of the release counts the step to the first code as text, so this
step is not trained with weight 0 either.
"""

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.chains import add_root, folders_by_field
from benchmarks.harness import Figures, argument_parser, say, verify
from cogview.evaluation.attributes import Score, judge, score_attributes
from cogview.evaluation.grids import to_pictures
from cogview.evaluation.losses import held_out_losses
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.scenes.scene import held_out_prompts
from cogview.training.loop import train
from cogview.training.ranks import Ranks
from pipelines.pretrain import PRESETS, build_task
from pipelines.tasks.language_model import PRODUCERS, Inputs, LanguageModelTask, inputs_of
from pipelines.tasks.new_weights import TaskSettings

WEIGHTS = (0.5, 0.0)
BATCH = 50
SHOWN = ("mean", "shape", "colour", "size", "background")


def measure(*, root: Path, steps: int, scenes: int) -> Figures:
    """Train with each weight, draw, and read the pictures."""
    inputs = inputs_of(folders_by_field(root, PRODUCERS))
    figures: dict[str, float | int | str] = {"steps": steps, "scenes": scenes}
    means = {}
    for weight in WEIGHTS:
        task = train_task(inputs, weight=weight, steps=steps)
        scores = read_back(task, scenes=scenes)
        means[weight] = scores["mean"].value
        figures |= {f"attributes/{name}/{weight:g}": scores[name].value for name in SHOWN}
        losses = held_out_losses(task.gpt, task.held_out_batches())
        figures |= {f"held-out loss/{part}/{weight:g}": loss.value for part, loss in losses.items()}
        say(f"text-loss weight {weight:g}: {means[weight]:.1%} of the attributes right")
    return {"attributes lost": means[WEIGHTS[0]] - means[WEIGHTS[1]], **figures}


def train_task(inputs: Inputs, *, weight: float, steps: int) -> LanguageModelTask:
    """The smoke preset's GPT after `steps` steps in this process."""
    smoke = PRESETS["smoke"]
    loop = replace(smoke.loop, num_steps=steps, validate_every=steps, checkpoint_every=steps)
    config = replace(smoke, **vars(inputs), text_loss_weight=weight, loop=loop)
    with tempfile.TemporaryDirectory(prefix="cogview-text-loss-") as folder:
        settings = TaskSettings(config=config, output=Path(folder), inputs=inputs)
        task = build_task(settings, Ranks())
        train(task, config=loop, output=Path(folder), identity={}, ranks=Ranks())
    return task


def read_back(task: LanguageModelTask, *, scenes: int) -> Mapping[str, Score]:
    """Draw scenes with combinations that were held out, and score what the reader sees."""
    painter = TextToImage(
        model=task.gpt.eval(),
        text_tokenizer=task.parts.text_tokenizer,
        image_tokenizer=task.parts.image_tokenizer,
        vocabulary=task.parts.vocabulary,
        grid=task.parts.train.grid,
        length=task.config.sequence.length,
        is_image_fixed=task.config.sequence.is_image_fixed,
    )
    prompts, judged = list(held_out_prompts(scenes, seed=1)), []
    for start in range(0, scenes, BATCH):
        some = prompts[start : start + BATCH]
        codes_Bhw = painter.codes(
            [prompt.caption for prompt in some],
            seeds=list(range(start, start + len(some))),
            sampling=SamplingConfig(top_k=12),
        )
        pictures = to_pictures(painter.decode(codes_Bhw))
        judged += [judge(picture, expected=prompt.scene) for picture, prompt in zip(pictures, some, strict=True)]
    return score_attributes(judged)


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training (default: 1000)")
    parser.add_argument("--scenes", type=int, default=200, help="scenes drawn with each model (default: 200)")
    add_root(parser)
    flags = parser.parse_args()
    torch.set_num_threads(2)
    return verify(
        "text_loss",
        lambda: measure(root=flags.root, steps=flags.steps, scenes=flags.scenes),
        bars=(),
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
