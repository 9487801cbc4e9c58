"""Turn released weights, which you have fetched yourself, into folders that the other jobs read.

Command: python -m pipelines import_weights paper --gpt FOLDER --image-tokenizer FILE --text-tokenizer FILE
Reads:   CogView's checkpoint folder (mp_rank_XX_model_states.pt), its VQ-VAE (or DALL-E's dVAE, or a VQGAN of
         taming-transformers) and SentencePiece model
         With the preset coglm CogView2's: CogLM's folder, in SwissArmyTransformer's naming, and icetk's two files
Writes:  gpt/ (model.safetensors, model.json), image_tokenizer/, text_tokenizer/, manifest.json
Time:    as long as the disk needs to read the files twice and to write them once: a few minutes for the 8 GB model
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file

from cogview.config import input_field, later_field
from cogview.errors import CheckpointError, ConfigError, VocabularyError
from cogview.models.gpt import GPTConfig, count_parameters
from cogview.models.local_super_resolution import LocalSuperResolutionConfig, Stage
from cogview.models.published import save_weights
from cogview.models.published_stage import publish_mixins, stage_config
from cogview.models.released import ReleasedGPT, open_released_gpt
from cogview.sampling.coglm import TASK as COGLM
from cogview.sampling.hierarchical_magnifier import form_of
from cogview.sequences.coglm import CogLMLayout
from cogview.sequences.layout import TASKS
from cogview.shards.manifest import MANIFEST_NAME, ShardEntry, file_record, write_manifest
from cogview.tokenizers.bilingual_vocabulary import BilingualVocabulary
from cogview.tokenizers.icetk_image import from_icetk, is_icetk
from cogview.tokenizers.released import from_released_vqvae, load_released_dvae
from cogview.tokenizers.stored import AnyImageTokenizer, load_image_tokenizer
from cogview.tokenizers.taming import from_taming, is_taming
from cogview.tokenizers.text import TextTokenizer
from cogview.tokenizers.tokenizer_files import SETTINGS_NAME as IMAGE_SETTINGS
from cogview.tokenizers.vocabulary import Vocabulary
from cogview.weight_files import read_weights, require_sha256
from pipelines.runtime.jobs import Job, JobRun

Kind = Literal["cogview", "coglm"]
Precision = Literal["stored", "fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype | None] = {
    "stored": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
EXTRAS_NAME = "extras.safetensors"
RELEASED_TEXT: Mapping[Stage, int] = {"direct": 96, "iterative": 16}  # slots for text in CogView2's stages
PADDED_FOR = (1, 2, 4, 8, 16)  # model-parallel sizes for which a vocabulary may have been padded
LAYOUT = TASKS["text_to_image"]
# Each part is an input field and an output folder; with it, the flag that other jobs take the folder by.
PARTS = {"text_tokenizer": "--text-tokenizer", "image_tokenizer": "--image-tokenizer", "gpt": "--checkpoint"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to import. A tokenizer can be imported alone; a GPT needs both, which its folder then names.

    gpt: folder with latest_checkpointed_iteration.txt or mp_rank_00_model_states.pt, or one file; image_tokenizer: the
    file of a VQ-VAE or VQGAN, a folder with a dVAE's encoder and decoder, or the output of train_image_tokenizer;
    text_tokenizer: a SentencePiece .model.
    image_sha256, text_sha256: what the files must be, if given. num_heads: 0 for hidden / 64. grid: image codes along
    one side of a picture. precision: of the GPT that is written. kind: whose GPT it is, and so what its ids mean.
    unsafe_pickle: RUNS THE CODE in files that the safe reader refuses; only for files of someone you trust.
    """

    gpt: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    text_tokenizer: Path | None = input_field(default=None)
    image_sha256: str = ""
    text_sha256: str = ""
    num_heads: int = 0
    grid: int = 32
    precision: Precision = "stored"
    unsafe_pickle: bool = False
    kind: Kind = later_field("cogview")

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ConfigError(f"precision={self.precision!r}: choose one of {', '.join(DTYPES)}")
        if self.kind not in get_args(Kind):
            raise ConfigError(f"kind={self.kind!r}: choose one of {', '.join(get_args(Kind))}")
        if self.grid < 1 or self.num_heads < 0:
            raise ConfigError(
                f"grid={self.grid}, num_heads={self.num_heads}: give a grid of 1 or more, heads of 0 or more"
            )


PAPER = Config()  # 32 x 32 codes of 8 x 8 pixels: pictures of 256 pixels a side
PRESETS: dict[str, Config] = {
    "paper": PAPER,
    "smoke": replace(PAPER, grid=8),  # the small pictures of the other smoke presets
    "coglm": replace(PAPER, grid=20, kind="coglm"),
}


def main(config: Config, run: JobRun) -> None:
    """Import what is given, part by part, and close the folder."""
    parts = require_parts(config)
    text = import_text(config.text_tokenizer, config=config, output=run.output) if config.text_tokenizer else None
    image = import_image(config.image_tokenizer, config=config, output=run.output) if config.image_tokenizer else None
    if config.gpt is not None and text is not None and image is not None:
        run.progress(0, 1, "reading names and shapes")
        released = open_released_gpt(config.gpt, num_heads=config.num_heads, unsafe_pickle=config.unsafe_pickle)
        import_gpt(released, text=text, image=image, config=config, run=run)
    close(run, parts)
    flags = " ".join(f"{PARTS[part]} {run.output / part}" for part in parts)
    run.say(f"imported: {', '.join(parts)}. For the other jobs: {flags}")


def require_parts(config: Config) -> list[str]:
    """The parts that are given. ConfigError when there is none, or a GPT without its tokenizers."""
    given = [part for part in PARTS if getattr(config, part) is not None]
    missing = [part for part in PARTS if part not in given]
    if not given or ("gpt" in given and missing):
        flags = ", ".join(f"--{part.replace('_', '-')}" for part in missing)
        why = "a GPT's ids mean nothing without both tokenizers" if given else "there is nothing to import"
        raise ConfigError(f"{' and '.join(missing)}: not given, but {why}; name your files with {flags}")
    return given


def import_text(path: Path, *, config: Config, output: Path) -> TextTokenizer:
    """The SentencePiece model, now in a folder of ours."""
    if config.text_sha256:
        require_sha256(path, config.text_sha256)
    tokenizer = TextTokenizer.load(path)
    tokenizer.save(output / "text_tokenizer", settings={"origin": path.name})
    return tokenizer


def import_image(path: Path, *, config: Config, output: Path) -> AnyImageTokenizer:
    """The image tokenizer, now in a folder of ours."""
    tokenizer: AnyImageTokenizer
    if (path / IMAGE_SETTINGS).is_file():
        tokenizer = load_image_tokenizer(path)
    elif path.is_dir():
        tokenizer = load_released_dvae(
            _only(path, "encoder.*"), _only(path, "decoder.*"), unsafe_pickle=config.unsafe_pickle
        )
    else:
        weights = read_weights(path, sha256=config.image_sha256, unsafe_pickle=config.unsafe_pickle)
        if is_icetk(weights):
            tokenizer = from_icetk(weights, path=path)
        else:
            tokenizer = from_taming(weights) if is_taming(weights) else from_released_vqvae(weights, path=path)
    tokenizer.save(output / "image_tokenizer")
    return tokenizer


def import_gpt(
    released: ReleasedGPT,
    *,
    text: TextTokenizer,
    image: AnyImageTokenizer,
    config: Config,
    run: JobRun,
) -> None:
    """Write the weights with what `generate` needs to know of them: tokenizers, grid and length."""
    describe = coglm_settings if config.kind == "coglm" else cogview_settings
    settings: dict[str, Any] = {
        **describe(released.config, text=text, image=image, grid=config.grid),
        "iteration": released.iteration,
        "sources": {file.name: require_sha256(file) for file in released.files},
    }
    folder, dtype = run.output / "gpt", DTYPES[config.precision]
    run.progress(0.3, 1, "writing weights")
    save_weights(dict(released.tensors(dtype)), folder, config=released.config, settings=settings)
    extras = dict(released.extra_tensors(dtype))
    if extras:
        save_file(extras, folder / EXTRAS_NAME)
        run.say(f"{len(extras)} tensors that are no part of a GPT are kept in {folder / EXTRAS_NAME}")
    shape = stage_config(extras, small_grid=config.grid) if config.kind == "coglm" else None
    if shape is not None:
        import_stage(extras, folder, config=shape, settings=settings, text=text, image=image)
        run.say(f"they are CogView2's {shape.stage} super-resolution: super_resolve and complete take {folder}")
    run.scores["parameters"] = count_parameters(released.config)
    run.scores["model_parallel_ranks"] = len(released.files)


def import_stage(
    extras: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    config: LocalSuperResolutionConfig,
    settings: Mapping[str, Any],
    text: TextTokenizer,
    image: AnyImageTokenizer,
) -> None:
    """Write what a super-resolution stage of CogView2 has beside its backbone."""
    form, found = form_of(settings, text=text, image=image)
    form = replace(form, max_text=RELEASED_TEXT[config.stage])
    stored = {"task": f"{config.stage}_super_resolution", "form": asdict(form), "fingerprints": found}
    publish_mixins(extras, folder, config=config, settings=stored)


def cogview_settings(model: GPTConfig, *, text: TextTokenizer, image: AnyImageTokenizer, grid: int) -> dict[str, Any]:
    """What `generate` needs to know of a CogView. ConfigError where the grid does not fit."""
    vocabulary = require_vocabulary(model, num_codes=image.num_codes, num_pieces=text.num_pieces)
    LAYOUT.text_budget(length=model.max_positions, num_image_tokens=grid**2)  # raises if the grid does not fit
    return {
        "fingerprints": fingerprints(text, image, vocabulary),
        "grid": grid,
        "length": model.max_positions,
        "is_image_fixed": False,
    }


def coglm_settings(model: GPTConfig, *, text: TextTokenizer, image: AnyImageTokenizer, grid: int) -> dict[str, Any]:
    """What `generate_coglm` needs to know of a CogLM; its captions have no end. Raises what does not fit."""
    vocabulary = BilingualVocabulary(num_image_codes=image.num_codes, text=text.ranges)
    if model.vocab_size < vocabulary.num_ids:
        raise VocabularyError(
            f"the GPT has {model.vocab_size:,} embedding rows; {image.num_codes:,} image codes and {text.num_pieces:,} "
            f"text pieces need {vocabulary.size:,}: give the tokenizers that it was trained with"
        )
    layout = CogLMLayout(grid=grid)
    if layout.num_positions > model.max_positions:
        raise ConfigError(
            f"grid={grid}: codes up to position {layout.num_positions - 1} do not fit the model's "
            f"{model.max_positions} positions; give the grid that it was trained with"
        )
    return {
        "task": COGLM,
        "fingerprints": fingerprints(text, image, vocabulary),
        "grid": grid,
        "layout": asdict(layout),
        "ends_text": False,
    }


def fingerprints(
    text: TextTokenizer, image: AnyImageTokenizer, vocabulary: Vocabulary | BilingualVocabulary
) -> dict[str, str]:
    """What a checkpoint carries and every reader checks."""
    return {
        "text_tokenizer": text.fingerprint,
        "image_tokenizer": image.fingerprint,
        "vocabulary": vocabulary.fingerprint,
    }


def require_vocabulary(model: GPTConfig, *, num_codes: int, num_pieces: int) -> Vocabulary:
    """The vocabulary of these tokenizers. VocabularyError unless the model's table was padded for that many ids."""
    tables = {Vocabulary(num_codes, num_pieces, parts).size for parts in PADDED_FOR}
    if model.vocab_size not in tables:
        raise VocabularyError(
            f"the GPT has {model.vocab_size:,} embedding rows; {num_codes:,} image codes and {num_pieces:,} text "
            f"pieces need {min(tables):,}: give the image_tokenizer and the text_tokenizer that it was trained with"
        )
    return Vocabulary(num_codes, num_pieces)


def close(run: JobRun, parts: list[str]) -> None:
    """Enter all that was written, so that it is verified like any job's output."""
    entries = []
    for number, part in enumerate(parts):
        files = sorted(path for path in (run.output / part).iterdir() if path.is_file())
        records = {f"{part}/{path.name}": file_record(path) for path in files}
        entries.append(ShardEntry(shard=number, rows_in=0, rows_out=0, files=records))
    write_manifest(run.output, entries, extra={"stage": JOB.name, "parts": parts})


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(f"image_tokenizer: {folder} has {len(found)} files {pattern}; there must be one of each")
    return found[0]


JOB = Job(name="import_weights", version=1, products=(MANIFEST_NAME,), main=main)
