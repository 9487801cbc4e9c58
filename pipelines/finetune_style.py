"""Teach a trained model one or more styles, from pictures that need no captions.

Command: make finetune-style DATA=/folder STYLE="oil painting"
Reads:   pictures of a style; or a folder with a sub-folder for each style, or tars with a JSON field `style`; the
         outputs of pretrain, train_text_tokenizer, train_image_tokenizer (without flags: of the chain that ran last)
Writes:  model.safetensors, model.json (and lora.safetensors, lora.json with --lora.rank), styles.png, tokens/,
         metrics.jsonl, checkpoints/
Time:    smoke: about a minute on two cores
Before:  --plan [--gpu-memory 24] [--gpu-tflops 60 --gpu-price 0.8] tells memory, tokens, steps, days and price
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError
from cogview.evaluation.grids import Tile, draw_sheet, to_pictures
from cogview.models.lora import LoRAConfig
from cogview.models.published import SETTINGS_NAME, WEIGHTS_NAME, read_settings, shape_of
from cogview.models.sizes import SIZES
from cogview.records.styles import check_template
from cogview.sampling.choice import SamplingConfig
from cogview.sampling.text_to_image import TextToImage
from cogview.training.loop import LoopConfig
from cogview.training.optimization import OptimizerConfig
from pipelines.runtime.chain import CHAIN_NAME, fill_from_chain
from pipelines.runtime.gpus import GPUs
from pipelines.runtime.jobs import Job, JobRun, given_folders
from pipelines.runtime.plan import plan_lines
from pipelines.tasks.finetuning import SOURCES, Finetuning, finetune
from pipelines.tasks.language_model import Inputs
from pipelines.tasks.style_rows import StyleData, write_style_rows

SHEET_NAME = "styles.png"
TOKENS_FOLDER = "tokens"
MODELS = {name: job for name, job in SOURCES.items() if name != "tokens"}
MAX_PICTURES_AT_ONCE = 60
Picture = Image.Image


@dataclass(frozen=True, kw_only=True)
class Config:
    """The styles, and how they are learned.

    data: the pictures; style: what all of them show, empty for the names of folders in `data` or the JSON field `style`
    of tars; max_images: of each style. sentence: the caption of all pictures of a style; prompt: what is drawn
    afterwards, for the sheet, of each of the `objects` in each style, beside the same object without a style (`plain`).
    checkpoint, text_tokenizer, image_tokenizer: the model to finetune; without them, that of the chain that ran last.
    lora: with a rank, only adapters on the linear layers are trained; they and the merged model are published.
    text_loss_weight: the sentence is soon known by heart. sampling, seed: of the sheet; device: encodes and draws.
    """

    data: Path | None = input_field(default=None)
    style: str = ""
    checkpoint: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    sentence: str = "An image of {style} style"
    prompt: str = "A {object} of {style} style"
    plain: str = "A {object}"
    objects: tuple[str, ...] = ("cat", "house", "tree", "car")
    max_images: int = 1000
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    text_loss_weight: float = 1.0
    activation_checkpointing: bool = False
    loop: LoopConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    num_workers: int = runtime_field(1)
    device: str = runtime_field("cpu")
    num_validation_rows: int = runtime_field(256)

    def __post_init__(self) -> None:
        for name, needed in (("sentence", ("style",)), ("prompt", ("style", "object")), ("plain", ("object",))):
            check_template(getattr(self, name), name=name, needed=needed)
        if self.max_images < 4:
            raise ConfigError(f"max_images={self.max_images}: a style needs 4 pictures or more; the paper takes 1000")


PAPER = Config(
    max_images=1000,
    activation_checkpointing=True,
    loop=LoopConfig(
        num_steps=1000,  # the paper does not say; 32 times through 1,000 pictures
        global_batch_size=32,
        optimizer=OptimizerConfig(learning_rate=1e-4, weight_decay=0.01, warmup_share=0.05),
        precision="bf16",
        checkpoint_every=250,
        validate_every=250,
    ),
    device="cuda",
)
SMOKE = replace(
    PAPER,
    activation_checkpointing=False,
    text_loss_weight=0.0,
    loop=LoopConfig(
        num_steps=120,  # twice through 1,000 pictures; many styles together need as many times more
        global_batch_size=16,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, warmup_share=0.05, final_share=0.02),
        log_every=20,
        validate_every=60,
        checkpoint_every=60,
    ),
    sampling=SamplingConfig(top_k=12),  # of 512 codes, as the release keeps 200 of 8192
    device="cpu",
)
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "paper_lora": replace(  # the 4B model on one GPU with 16 GB
        PAPER,
        lora=LoRAConfig(rank=16, dropout=0.05),
        loop=replace(PAPER.loop, global_batch_size=4, num_steps=8000, optimizer=OptimizerConfig(learning_rate=3e-4)),
    ),
    "smoke": SMOKE,
}


def main(config: Config, run: JobRun) -> None:
    """Encode the pictures, finetune on Ray, and draw objects in all styles."""
    folders = given_folders(config, MODELS)
    if config.data is None:
        raise ConfigError("data is not given; name a folder of pictures with --data")
    data = StyleData(
        data=config.data,
        style=config.style,
        sentence=config.sentence,
        max_images=config.max_images,
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
        grid=int(read_settings(folders["checkpoint"])["grid"]),
    )
    styles = write_style_rows(data, output=run.output / TOKENS_FOLDER, run=run, device=config.device)
    inputs = Inputs(
        tokens=run.output / TOKENS_FOLDER,
        text_tokenizer=folders["text_tokenizer"],
        image_tokenizer=folders["image_tokenizer"],
    )
    finetuning = Finetuning(
        checkpoint=folders["checkpoint"],
        inputs=inputs,
        task="text_to_image",
        loop=config.loop,
        output=run.output,
        text_loss_weight=config.text_loss_weight,
        num_validation_rows=config.num_validation_rows,
        model_changes={"activation_checkpointing": config.activation_checkpointing},
        lora=config.lora,
        published={"styles": styles, "prompt": config.prompt},
    )
    finetune(finetuning, run=run, num_workers=config.num_workers)
    sheet = draw_styles(config, styles, finetuned=run.output, folders=folders)
    sheet.save(run.output / SHEET_NAME)
    run.tracker.log_image(sheet, SHEET_NAME)
    run.scores["styles"] = len(styles)
    example = config.prompt.format(object=config.objects[0], style=styles[0]) if config.objects else ""
    run.say(f'now draw with it: make generate PROMPT="{example}" ARGS="--checkpoint {run.output}"')


def resolve(config: Config, *, root: Path) -> Config:
    """Fill in the folders of the model from the chain that ran last under `root`, if one did."""
    filled: Config = fill_from_chain(config, MODELS, root=root) if (root / CHAIN_NAME).is_file() else config
    return filled


def plan(config: Config, *, gpus: GPUs) -> Iterator[str]:
    """What `--plan` tells: of the given checkpoint, else of the released 4B model."""
    model, length = SIZES["4b"], SIZES["4b"].max_positions
    if config.checkpoint is not None:
        settings = read_settings(config.checkpoint)
        model, length = shape_of(settings), settings["length"]
    return plan_lines(
        replace(model, activation_checkpointing=config.activation_checkpointing),
        loop=config.loop,
        length=length - 1,
        num_workers=config.num_workers,
        gpus=gpus,
        lora=config.lora,
    )


def draw_styles(config: Config, styles: Sequence[str], *, finetuned: Path, folders: dict[str, Path]) -> Picture:
    """A sheet with a row for each object: first as the model drew it before, then in each style."""
    tokenizers = {name: folders[name] for name in ("text_tokenizer", "image_tokenizer")}
    before = TextToImage.load(folders["checkpoint"], **tokenizers, device=config.device)
    plain = draw(before, [config.plain.format(object=name) for name in config.objects], config=config)
    del before
    after = TextToImage.load(finetuned, **tokenizers, device=config.device)
    prompts = [config.prompt.format(object=name, style=style) for name in config.objects for style in styles]
    styled = draw(after, prompts, config=config)
    tiles = []
    for number, name in enumerate(config.objects):
        row = styled[number * len(styles) : (number + 1) * len(styles)]
        captions = [config.plain.format(object=name), *prompts[number * len(styles) :][: len(styles)]]
        tiles += [
            Tile(images=(image,), caption=caption)
            for image, caption in zip([plain[number], *row], captions, strict=True)
        ]
    return draw_sheet(tiles, columns=1 + len(styles))


def draw(painter: TextToImage, captions: Sequence[str], *, config: Config) -> list[Picture]:
    """One picture for each caption, with seeds that depend on its place alone."""
    pictures: list[Picture] = []
    for start in range(0, len(captions), MAX_PICTURES_AT_ONCE):
        batch = captions[start : start + MAX_PICTURES_AT_ONCE]
        seeds = [config.seed * 1_000_003 + start + number for number in range(len(batch))]
        codes_Bhw = painter.codes(batch, seeds=seeds, sampling=config.sampling)
        with torch.inference_mode():
            pictures += to_pictures(painter.decode(codes_Bhw))
    return pictures


JOB = Job(name="finetune_style", version=1, products=(WEIGHTS_NAME, SETTINGS_NAME, SHEET_NAME), main=main)
