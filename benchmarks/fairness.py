"""A model with a planted bias draws by the distribution that is asked for, once word replacing qualifies its prompts.

Command: make verify NAME=fairness [ARGS="--root runs/smoke --steps 1500 --pictures 800"]
A GPT of the smoke preset is trained anew on scenes of one circle, square or star with the tokenizers of a finished
chain. Three in ten of the captions name no colour, and under those 90 % of the circles are red; under all others
colours are as frequent as each other. `generate` then draws circles for captions without a colour, in English and
Chinese, sampled as the preset samples scenes: as they are, and with two lexicons, one that asks for all colours alike
and one that asks for four of them, each with another share. The scene reader names the colour of each picture; a
picture without a shape counts as none. What the prompts ask for is counted as well, for so small a model draws some
colours wrong, most of all blue, which also is a background's name: the even lexicon has it, the other leaves it out.
CogView, conclusion and appendix D.
"""

import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.chains import add_root, folders_by_field, run_job
from benchmarks.harness import REPOSITORY, Bar, Figures, argument_parser, say, verify
from cogview.evaluation.grids import from_pictures
from cogview.scenes import wording
from cogview.scenes.caption_reading import read_caption
from cogview.scenes.reading import read_scene
from cogview.scenes.scene import COLOURS, Colour, Kind, Scene, captions, corpus, draw_scene, random_scene
from cogview.shards.manifest import ShardEntry, shard_name, write_json, write_manifest
from cogview.shards.schema import SPLITS, TokenOrigin
from cogview.shards.writer import TokenRow, write_token_shard
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.training.loop import train
from cogview.training.ranks import Ranks
from pipelines import generate as generating
from pipelines.pretrain import PRESETS, build_task
from pipelines.runtime.chain import latest_output
from pipelines.tasks.language_model import Inputs, inputs_of
from pipelines.tasks.new_weights import TaskSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENIZERS = {"text_tokenizer": "train_text_tokenizer", "image_tokenizer": "train_image_tokenizer"}
BIASED_KIND: Kind = "circle"
PLANTED: Colour = "red"
PLANTED_SHARE = 0.9
SHOWN_KINDS: tuple[Kind, ...] = ("circle", "square", "star")  # half of them: more of each in as many steps
OPEN_SHARE = 0.3  # of the captions name no colour
SCENES, HELD_OUT = 4000, 200
IMAGE_SIZE, BATCH = 64, 100
SAMPLING = generating.PRESETS["smoke"].scene_sampling
ASKED: dict[str, dict[Colour, float]] = {
    "even": dict.fromkeys(COLOURS, 1 / len(COLOURS)),
    "four": {"green": 0.4, "yellow": 0.3, "cyan": 0.2, "red": 0.1},
}
BARS = (
    Bar(figure="before/red", op=">=", value=0.7),  # else there is nothing to mend
    Bar(figure="even/largest deviation", op="<=", value=0.05),
    Bar(figure="four/largest deviation", op="<=", value=0.05),
    Bar(figure="named/rewritten", op="==", value=0),
)
PICTURE = REPOSITORY / "docs" / "fairness.png"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A scene of the biased corpus with its captions in both languages."""

    scene: Scene
    texts: tuple[str, str]


def measure(*, root: Path, steps: int, pictures: int, save: bool) -> Figures:
    """Train on the biased corpus, draw with and without lexicons, and read the colours."""
    tokenizers = folders_by_field(root, TOKENIZERS)
    with tempfile.TemporaryDirectory(prefix="cogview-fairness-") as name:
        folder = Path(name)
        rows = list(biased_corpus(SCENES + HELD_OUT, seed=11))
        write_tokens(rows, folder=folder / "tokens", **tokenizers)
        say(f"training on {SCENES} scenes for {steps} steps")
        loss = train_model(inputs_of({"tokens": folder / "tokens", **tokenizers}), output=folder / "model", steps=steps)
        flags = [f"--{field.replace('_', '-')}={path}" for field, path in tokenizers.items()]
        flags += [f"--threads={torch.get_num_threads()}", f"--sampling.temperature={SAMPLING.temperature:g}"]
        drawer = Drawer(folder=folder, flags=(f"--checkpoint={folder / 'model'}", *flags))
        open_texts = [text for text, _ in prompts(pictures, is_open=True)]
        shares = {"before": colour_shares(drawer.draw("before", open_texts))}
        for asked, choices in ASKED.items():
            write_lexicon(choices, folder / f"{asked}.json")
            shares[asked] = colour_shares(drawer.draw(asked, open_texts, lexicon=folder / f"{asked}.json"))
        named = prompts(pictures // 4, is_open=False)
        found = drawer.draw("named", [text for text, _ in named], lexicon=folder / "even.json")
        texts = {name: drawer.texts(name) for name in (*ASKED, "named")}
    if save:
        plot_shares(shares).savefig(PICTURE, dpi=120)
    right = [reading == colour for reading, (_, colour) in zip(found, named, strict=True)]
    return {
        "pictures": pictures,
        "steps": steps,
        "corpus/red circles where no colour is named": planted_share(rows),
        **{f"{name}/largest deviation": deviation(shares[name], choices) for name, choices in ASKED.items()},
        "before/largest deviation": deviation(shares["before"], ASKED["even"]),
        **{f"{name}/{colour}": share for name, found in shares.items() for colour, share in found.items()},
        **{f"{name}/largest deviation of prompts": deviation(asked_shares(texts[name]), ASKED[name]) for name in ASKED},
        "even/rewritten": sum(given != drawn for given, drawn in texts["even"]) / pictures,
        "named/rewritten": sum(given != drawn for given, drawn in texts["named"]),
        "named/colour as named": sum(right) / len(right),
        "held-out image loss": loss,
    }


def biased_corpus(number: int, *, seed: int) -> Iterator[Row]:
    """Scenes of one shape. Where the captions name no colour, the circles among them are nearly all red."""
    every = corpus(seed, 2 * number + 500, two_shape_share=0.0, held_out_fraction=0.0)
    rows = (row for row in every if row.scene.shapes[0].kind in SHOWN_KINDS)
    for row in itertools.islice(rows, number):
        rng = random.Random(f"bias:{seed}:{row.number}")
        scene = row.scene
        if rng.random() >= OPEN_SHARE:
            yield Row(scene=scene, texts=(row.english, row.chinese))
            continue
        if scene.shapes[0].kind == BIASED_KIND:
            others = [colour for colour in COLOURS if colour != PLANTED]
            colour = PLANTED if rng.random() < PLANTED_SHARE else rng.choice(others)
            scene = replace(scene, shapes=(replace(scene.shapes[0], colour=colour),))
        yield Row(scene=scene, texts=open_captions(scene, rng=rng))


def open_captions(scene: Scene, *, rng: random.Random) -> tuple[str, str]:
    """Captions that say everything of a scene but the colour of its shape."""
    (shape,) = scene.shapes
    english, chinese = captions(scene, rng=rng)
    size, colour, kind = (wording.CHINESE[word] for word in (shape.size, shape.colour, shape.kind))
    return (
        english.replace(f"{shape.size} {shape.colour} {shape.kind}", f"{shape.size} {shape.kind}"),
        chinese.replace(size + colour + kind, size + kind),
    )


def planted_share(rows: Sequence[Row]) -> float:
    """What was planted, counted."""
    shapes = [row.scene.shapes[0] for row in rows if row.scene.shapes[0].kind == BIASED_KIND]
    texts = [row.texts[0] for row in rows if row.scene.shapes[0].kind == BIASED_KIND]
    found = [shape.colour for shape, text in zip(shapes, texts, strict=True) if f"{shape.size} {shape.kind}" in text]
    return found.count(PLANTED) / len(found)


def prompts(number: int, *, is_open: bool) -> list[tuple[str, Colour]]:
    """Captions that ask for a circle, English and Chinese in turn, with the colour that they name if they name one."""
    found = []
    for index in range(number):
        rng = random.Random(f"fairness prompt:{index}")
        scene = random_scene(rng, two_shape_share=0.0)
        scene = replace(scene, shapes=(replace(scene.shapes[0], kind=BIASED_KIND),))
        texts = open_captions(scene, rng=rng) if is_open else captions(scene, rng=rng)
        found.append((texts[index % 2], scene.shapes[0].colour))
    return found


def write_tokens(rows: Sequence[Row], *, folder: Path, text_tokenizer: Path, image_tokenizer: Path) -> None:
    """Token shards of the corpus: one of training rows, one of held-out ones; a row for each caption."""
    text, image = TextTokenizer.load(text_tokenizer), load_image_tokenizer(image_tokenizer).eval()
    origin = TokenOrigin(
        text_tokenizer=text.fingerprint,
        image_tokenizer=image.fingerprint,
        vocabulary=Vocabulary(image.num_codes, text.num_pieces).fingerprint,
        num_image_codes=image.num_codes,
        num_text_pieces=text.num_pieces,
        grid=IMAGE_SIZE // image.stride,
    )
    files, counts = {}, {}
    for split, some in zip(SPLITS, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        name, made = f"{split}/{shard_name(0, 'arrow')}", list(token_rows(some, text=text, image=image))
        files[name], counts[f"rows_{split}"] = write_token_shard(folder / name, made, origin=origin), len(made)
    entry = ShardEntry(shard=0, rows_in=len(rows), rows_out=len(rows), files=files)
    write_manifest(folder, [entry], extra={**asdict(origin), **counts})


@torch.inference_mode()
def token_rows(rows: Sequence[Row], *, text: TextTokenizer, image: AnyImageTokenizer) -> Iterator[TokenRow]:
    """The rows as tokens."""
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        codes_Bhw = image.encode(from_pictures([draw_scene(row.scene, image_size=IMAGE_SIZE) for row in some]))
        codes = codes_Bhw.flatten(1).numpy().astype(np.uint16)
        for number, row in enumerate(some):
            for caption in row.texts:
                ids = np.array(text.encode(caption), np.int32)
                yield TokenRow(
                    key=f"{start + number:06d}", text=caption, text_ids=ids, image_codes=codes[number], source="scenes"
                )


def train_model(inputs: Inputs, *, output: Path, steps: int) -> float:
    """Train the smoke preset's GPT in this process and publish it in `output`; returns its held-out image loss."""
    smoke = PRESETS["smoke"]
    loop = replace(smoke.loop, num_steps=steps, validate_every=steps, checkpoint_every=steps, log_every=100)
    config = replace(smoke, **vars(inputs), loop=loop, num_samples=1)
    task = build_task(TaskSettings(config=config, output=output, inputs=inputs), Ranks())
    train(task, config=loop, output=output, identity={}, ranks=Ranks())
    return float(task.validate(steps)["validation_image_loss"])


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """The `generate` job with the biased model, in runs below a folder."""

    folder: Path
    flags: tuple[str, ...]

    def texts(self, name: str) -> list[tuple[str, str]]:
        """The prompts of a drawing as they were given, and as they were drawn."""
        table = pq.read_table(output_of(self.folder / "runs" / name) / "samples.parquet")
        return list(zip(table["prompt"].to_pylist(), table["drawn_prompt"].to_pylist(), strict=True))

    def draw(self, name: str, texts: Sequence[str], *, lexicon: Path | None = None) -> list[Colour | None]:
        """One picture for each prompt, and what the reader says of its colour; None where it sees no shape."""
        path, root = self.folder / f"{name}.txt", self.folder / "runs" / name
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        chosen = [f"--lexicon={lexicon}"] if lexicon else []
        run_job("generate", *self.flags, f"--prompts-file={path}", "--candidates=1", *chosen, root=root)
        table = pq.read_table(output_of(root) / "samples.parquet").to_pylist()
        found: list[Colour | None] = []
        for row in table:
            with Image.open(output_of(root) / row["path"]) as picture:
                shapes = read_scene(picture).shapes
            found.append(shapes[0].colour if shapes else None)
        counts = Counter(found).most_common(3)
        say(f"{name}: {', '.join(f'{colour} {count}' for colour, count in counts)} of {len(found)}")
        return found


def output_of(root: Path) -> Path:
    """What `generate` has drawn under a root."""
    return latest_output("generate", flag="--samples", root=root)


def write_lexicon(choices: Mapping[Colour, float], path: Path) -> None:
    """A rule for circles in each language."""
    english = {"name": "circles", "words": [BIASED_KIND], "choices": choices, "unless": COLOURS, "reach": 1}
    chinese = {
        "name": "圆形",
        "words": [wording.CHINESE[BIASED_KIND]],
        "choices": {wording.CHINESE[colour]: weight for colour, weight in choices.items()},
        "unless": [wording.CHINESE[colour] for colour in COLOURS],
        "reach": 1,
        "template": "{choice}{word}",
    }
    write_json(path, {"rules": [english, chinese]})


def colour_shares(found: Sequence[Colour | None]) -> dict[str, float]:
    """The share of each colour, and of pictures without a shape."""
    counts = Counter(found)
    return {name or "none": counts[name] / len(found) for name in (*COLOURS, None)}


def asked_shares(texts: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The share of each colour in prompts as they were drawn."""
    scenes = [read_caption(drawn) for _, drawn in texts]
    return colour_shares([scene.shapes[0].colour if scene else None for scene in scenes])


def deviation(shares: Mapping[str, float], asked: Mapping[Colour, float]) -> float:
    """The largest difference to the distribution that was asked for."""
    return max(abs(shares[colour] - asked.get(colour, 0.0)) for colour in COLOURS)


def plot_shares(shares: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Bars of the colours in their own colours: as the model draws them, and with each lexicon beside what it asks."""
    from matplotlib.figure import Figure

    from cogview.scenes.scene import COLOUR_RGB

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {"before": "No colour named", "even": "All colours asked for alike", "four": "Four colours asked for"}
    for axes, (name, found) in zip(figure.subplots(1, 3, sharey=True), shares.items(), strict=True):
        colours = [tuple(part / 255 for part in COLOUR_RGB[colour]) for colour in COLOURS]
        axes.bar(COLOURS, [100 * found[colour] for colour in COLOURS], color=colours, width=0.7)
        for place, colour in enumerate(COLOURS):
            if name in ASKED:
                asked = 100 * ASKED[name].get(colour, 0.0)
                axes.plot([place - 0.42, place + 0.42], [asked, asked], color="#262a32", linewidth=1.6)
        axes.set(title=titles[name])
        axes.tick_params(axis="x", rotation=45)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e2e5ea", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("% of circles drawn (line: asked for)")
    return figure


def main() -> int:
    """The command line."""
    parser = argument_parser(__doc__)
    add_root(parser)
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: 1500)")
    parser.add_argument("--pictures", type=int, default=800, help="circles of each drawing (default: 800)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more only help on free cores (default: 1)")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    return verify(
        "fairness",
        lambda: measure(root=flags.root, steps=flags.steps, pictures=flags.pictures, save=flags.save),
        bars=BARS,
        save=flags.save,
    )


if __name__ == "__main__":
    sys.exit(main())
