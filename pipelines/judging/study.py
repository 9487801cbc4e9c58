"""A study: groups of pictures for one caption each, from several models and from the truth, ready to be judged.

In: the pictures of each model, reference pictures, the image tokenizer. Out: a folder with every picture encoded anew
(what a file says of its maker would end the blindness), and `study.json`, sealed, which alone knows whose they are. The
reference is not shown as it is but "recovered", encoded and decoded by the image tokenizer, which is the most that a
model with this tokenizer can reach (CogView, section 4.2).
"""

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cogview.config import input_field, runtime_field
from cogview.errors import ConfigError, ManifestError
from cogview.evaluation.attributes import scene_from_json
from cogview.evaluation.human_votes import RIGHT
from cogview.records.images import decode_image, encode_image, fit_image
from cogview.records.pair import Unusable
from cogview.scenes.scene import draw_scene
from cogview.shards.manifest import atomic_file, file_record, read_sealed, write_sealed
from pipelines.judging.entrants import Entrant, Entry, read_entrant, read_references, shared_captions
from pipelines.runtime.jobs import Job, JobRun

if TYPE_CHECKING:
    from cogview.tokenizers.stored import AnyImageTokenizer  # brings torch, which serving and counting do not need

STUDY_NAME = "study.json"
PICTURES = "pictures"
RECOVERED = "recovered ground truth"
BLOCKS = 8  # a scrambled picture is cut into 8 x 8
_NAME = re.compile(r"[\w][\w .-]{0,60}")  # what MLflow takes as part of a name
LARGEST_SIDE = 512  # pixels; all pictures of a study together go to each evaluator


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What decides the pictures of a study; whom it asks, and where it listens, do not.

    names, folders, contents: the models, and the digests of their folders; references: pictures of the truth (else the
    scenes that a model's table names); image_tokenizer: through which the truth passes, None to leave the truth out;
    image_size: of references, 0 for that of the first model's; num_groups: 0 for all captions; num_planted: groups for
    attention checks.
    """

    names: tuple[str, ...]
    folders: tuple[Path, ...] = runtime_field()
    contents: tuple[str, ...]
    references: Path | None = input_field(default=None)
    image_tokenizer: Path | None = input_field(default=None)
    image_size: int = 0
    num_groups: int = 0
    num_planted: int = 12
    seed: int = 0
    device: str = runtime_field("cpu")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Pictures to compare. pictures: model -> file in the study's folder, with its size and sha256.

    In a planted group the whole picture's model is `right`, the others are scrambled.
    """

    id: str
    caption: str
    pictures: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A prepared study, as its folder has it."""

    folder: Path
    digest: str
    seed: int
    models: tuple[str, ...]
    groups: Mapping[str, Group]
    planted: Mapping[str, Group]

    @classmethod
    def open(cls, folder: Path) -> "Study":
        """Read a study. ManifestError if it is damaged, or if a picture is missing."""
        content = read_sealed(folder / STUDY_NAME)
        groups, planted = ({plain["id"]: Group(**plain) for plain in content[name]} for name in ("groups", "planted"))
        for group in (*groups.values(), *planted.values()):
            for record in group.pictures.values():
                path = folder / record["file"]
                if not path.is_file() or path.stat().st_size != record["bytes"]:
                    raise ManifestError(f"{path} is missing or cut; delete {folder / STUDY_NAME} and prepare it again")
        return cls(
            folder=folder,
            digest=content["digest"],
            seed=content["seed"],
            models=tuple(content["models"]),
            groups=groups,
            planted=planted,
        )

    def group(self, name: str) -> Group:
        """A group of either kind by its id."""
        return self.groups.get(name) or self.planted[name]

    def picture(self, group: Group, model: str) -> bytes:
        """A picture's PNG. ManifestError if it is not what was prepared."""
        record = group.pictures[model]
        path = self.folder / str(record["file"])
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != record["sha256"]:
            raise ManifestError(f"{path} has changed; prepare the study again")
        return data


def prepare(config: StudyConfig, run: JobRun) -> None:
    """Write the pictures of every group, then `study.json`."""
    entrants = read_entrants(config, run=run)
    keys = shared_captions(entrants)
    maker = _Maker(config=config, run=run, truth=_Truth.load(config, entrants, keys=keys))
    chosen = list(keys)
    random.Random(f"groups:{config.seed}").shuffle(chosen)
    groups, left_out = maker.groups(entrants, chosen)
    if not groups:
        reason = left_out[0]["reason"] if left_out else "there is no caption"
        raise ConfigError(f"models: no group is whole; the first was left out for {reason}")
    planted = maker.planted(groups)
    models = [*config.names, *([RECOVERED] if config.image_tokenizer else [])]
    write_sealed(
        run.output / STUDY_NAME,
        {
            "digest": run.digest,
            "seed": config.seed,
            "models": models,
            "groups": [asdict(group) for group in groups],
            "planted": [asdict(group) for group in planted],
            "left_out": left_out,
        },
    )
    run.scores.update(groups=len(groups), models=len(models), left_out=len(left_out), planted=len(planted))
    run.say(f"{len(groups)} groups of {len(models)} pictures: {', '.join(models)}")


def read_entrants(config: StudyConfig, *, run: JobRun) -> list[Entrant]:
    """The models' pictures; says what of them cannot be used."""
    if len(set(config.names)) < len(config.names) or RECOVERED in config.names or RIGHT in config.names:
        raise ConfigError(f"models: {', '.join(config.names)}: every model needs a name of its own, not {RECOVERED!r}")
    strange = next((name for name in config.names if not _NAME.fullmatch(name)), None)
    if strange is not None:
        raise ConfigError(f"models: {strange!r} names a metric as well; use letters, digits, spaces and . _ -")
    if len(config.names) + (config.image_tokenizer is not None) < 2:
        raise ConfigError("models: there is nothing to compare; give two or more as NAME=FOLDER")
    entrants = [read_entrant(name, folder) for name, folder in zip(config.names, config.folders, strict=True)]
    shared = set(shared_captions(entrants))
    for entrant in entrants:
        alone = len(entrant.entries.keys() - shared)
        if alone or entrant.unused:
            run.say(
                f"{entrant.name}: {alone} captions that others lack, {entrant.unused} further pictures of a caption"
            )
    return entrants


@dataclass(frozen=True, kw_only=True)
class _Truth:
    """Reference pictures by caption, from a folder or from the scenes that captions stand for."""

    references: Entrant | None
    scenes: Mapping[str, str]
    tokenizer: "AnyImageTokenizer"
    image_size: int

    @classmethod
    def load(cls, config: StudyConfig, entrants: Sequence[Entrant], *, keys: Sequence[str]) -> "_Truth | None":
        """ConfigError if the truth is wanted and nobody knows it."""
        if config.image_tokenizer is None:
            return None
        from cogview.tokenizers.stored import load_image_tokenizer

        references = read_references(config.references, wanted=set(keys)) if config.references else None
        scenes = {key: entry.scene for entrant in entrants for key, entry in entrant.entries.items() if entry.scene}
        if references is None and not scenes:
            raise ConfigError(
                "references: the truth of these captions is not known; give --references FOLDER of pictures with the "
                "same captions, or leave it out with --no-recovered"
            )
        tokenizer = load_image_tokenizer(config.image_tokenizer).to(config.device).eval()
        size = config.image_size or _first_side(entrants[0])
        if size % tokenizer.stride:
            raise ConfigError(f"image_size={size} is no multiple of {tokenizer.stride}, the image tokenizer's stride")
        return cls(references=references, scenes=scenes, tokenizer=tokenizer, image_size=size)

    def recover(self, key: str) -> Image.Image | Unusable:
        """The truth of a caption, encoded and decoded."""
        from cogview.evaluation.reconstruction import reconstruct
        from cogview.tokenizers.pixels import square_pixels

        if self.references is not None and key in self.references.entries:
            picture = _open(self.references.entries[key])
        elif key in self.scenes:
            picture = draw_scene(scene_from_json(self.scenes[key]), image_size=self.image_size)
        else:
            return Unusable("reference_missing")
        if isinstance(picture, Unusable):
            return picture
        square = Image.fromarray(square_pixels(picture, image_size=self.image_size))
        return reconstruct([square], tokenizer=self.tokenizer)[0]


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Writes groups into a study's folder."""

    config: StudyConfig
    run: JobRun
    truth: _Truth | None

    def groups(self, entrants: Sequence[Entrant], keys: Sequence[str]) -> tuple[list[Group], list[dict[str, str]]]:
        """Groups of the captions in this order, up to the number asked for; and those left out, with the reason."""
        wanted = self.config.num_groups or len(keys)
        groups: list[Group] = []
        left_out: list[dict[str, str]] = []
        for key in keys:
            if len(groups) == wanted:
                break
            caption = entrants[0].entries[key].caption
            pictures: dict[str, Image.Image] = {}
            reasons = []
            for name, picture in self._pictures(entrants, key):
                if isinstance(picture, Unusable):
                    reasons.append(f"{name}: {picture.reason}")
                else:
                    pictures[name] = picture
            if reasons:
                left_out.append({"caption": caption, "reason": "; ".join(reasons)})
                continue
            groups.append(self._write(f"group-{len(groups):05d}", caption, pictures))
            self.run.progress(len(groups), wanted, "groups")
        return groups, left_out

    def planted(self, groups: Sequence[Group]) -> list[Group]:
        """Attention checks: the caption's own picture whole, those of other captions scrambled."""
        rng = random.Random(f"planted:{self.config.seed}")
        number = len(groups[0].pictures)
        sources = rng.sample(groups, min(self.config.num_planted, len(groups)))
        return [
            self._write(
                f"planted-{place:05d}",
                group.caption,
                {RIGHT: self._best_known(group)}
                | {
                    f"scrambled {n}": scrambled(self._best_known(rng.choice(groups)), rng=rng) for n in range(1, number)
                },
            )
            for place, group in enumerate(sources)
        ]

    def _pictures(self, entrants: Sequence[Entrant], key: str) -> Iterator[tuple[str, Image.Image | Unusable]]:
        for entrant in entrants:
            yield entrant.name, _open(entrant.entries[key])
        if self.truth is not None:
            yield RECOVERED, self.truth.recover(key)

    def _best_known(self, group: Group) -> Image.Image:
        """The truth as it is shown; without it, the picture of the model that was named first."""
        name = RECOVERED if RECOVERED in group.pictures else self.config.names[0]
        return Image.open(self.run.output / group.pictures[name]["file"]).convert("RGB")

    def _write(self, name: str, caption: str, pictures: Mapping[str, Image.Image]) -> Group:
        records = {}
        for place, (model, picture) in enumerate(pictures.items()):
            path = f"{PICTURES}/{name}/{place}.png"
            small = fit_image(picture, image_size=LARGEST_SIDE)
            with atomic_file(self.run.output / path) as file:
                file.write(encode_image(small, encoding="png").data)
            records[model] = {"file": path, **file_record(self.run.output / path)}
        return Group(id=name, caption=caption, pictures=records)


def scrambled(picture: Image.Image, *, rng: random.Random) -> Image.Image:
    """The picture cut into blocks that have changed places."""
    width, height = picture.width // BLOCKS, picture.height // BLOCKS
    if not width or not height:
        return scrambled(picture.resize((64, 64)), rng=rng)
    boxes = [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in range(BLOCKS) for x in range(BLOCKS)]
    mixed = list(boxes)
    rng.shuffle(mixed)
    made = picture.crop((0, 0, BLOCKS * width, BLOCKS * height))
    for box, other in zip(boxes, mixed, strict=True):
        made.paste(picture.crop(other), box[:2])
    return made


def _open(entry: Entry) -> Image.Image | Unusable:
    data = entry.read()
    return data if isinstance(data, Unusable) else decode_image(data, short_side=LARGEST_SIDE)


def _first_side(entrant: Entrant) -> int:
    """The shorter side of the first picture that can be read."""
    for entry in entrant.entries.values():
        picture = _open(entry)
        if not isinstance(picture, Unusable):
            return min(picture.size)
    raise ConfigError(f"models: no picture of {entrant.name} can be read")


STUDY = Job(name="human_evaluation", version=1, products=(STUDY_NAME,), main=prepare)
