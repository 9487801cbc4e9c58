"""Released GPT weights: CogView's checkpoint folders, their copies under other names, CogView2's with extras.

In: `NAME/latest_checkpointed_iteration.txt` beside `NAME/ITERATION/mp_rank_XX_model_states.pt`, the iteration's folder,
or one file (`pytorch_model.bin`, safetensors). Out: a GPT, or its tensors one by one, each merged from its
model-parallel parts when it is asked for. And back: a GPT in the released layout.

Each rank of model parallelism holds a share of the heads, of the MLP's width and of the vocabulary, so rows of
`query_key_value` are [its queries; its keys; its values]: the three are joined each for itself.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT, GPTConfig
from cogview.weight_files import check_layout, read_weights

TRACKERS = ("latest_checkpointed_iteration.txt", "latest")  # CogView's, and DeepSpeed's own
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
SINGLE_FILES = ("pytorch_model.bin", "model.safetensors")
HEAD_SIZE = 64  # of every released model
ROW_MULTIPLE = 128  # vocabulary rows of each rank are a multiple of this
WORDS, POSITIONS = "word_embeddings.weight", "transformer.position_embeddings.weight"
SAT_WORDS = f"transformer.{WORDS}"  # where copies in SwissArmyTransformer's naming keep the table
EXTRAS = "mixins."  # CogView2's second position table and second attention; not part of a GPT
LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
THIRDS = re.compile(r"\bquery_key_value\.")
ROW_PARALLEL = re.compile(r"(\battention\.dense|\bdense_4h_to_h|\battention_plus\.dense\.\d+)\.weight$")
COLUMN_PARALLEL = re.compile(r"(\bdense_h_to_4h\.|^word_embeddings\.)")
Naming = Literal["released", "sat"]


@dataclass(frozen=True, kw_only=True)
class ReleasedGPT:
    """A released model, its numbers still in its files.

    config: follows from the shapes; ranks: for each model-parallel rank, tensors by our names; extras: likewise, what
    is no part of a GPT; iteration: of the training, where the folder tells; files: what was opened.
    """

    config: GPTConfig
    ranks: tuple[Mapping[str, Tensor], ...]
    extras: tuple[Mapping[str, Tensor], ...]
    iteration: int | None
    files: tuple[Path, ...]

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and merged tensor, one by one; `dtype=None` leaves the numbers as they are stored."""
        return _merged(self.ranks, dtype)

    def extra_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The same of what is no part of a GPT: CogView2's additions, under their own names."""
        return _merged(self.extras, dtype)


def open_released_gpt(path: Path, *, num_heads: int = 0, unsafe_pickle: bool = False) -> ReleasedGPT:
    """Find the files, read their names and shapes, and check them; numbers are read when they are used.

    num_heads: 0 for hidden / 64, as in every released model. unsafe_pickle: see `read_weight_file`. Raises
    CheckpointError for a rank or tensor that is missing, of another shape, or unknown.
    """
    files, iteration = _find_files(path)
    states = [_our_names(read_weights(file, unsafe_pickle=unsafe_pickle)) for file in files]
    ranks = tuple({name: value for name, value in state.items() if not name.startswith(EXTRAS)} for state in states)
    extras = tuple({name: value for name, value in state.items() if name.startswith(EXTRAS)} for state in states)
    config = _config_of(ranks, path=files[0], num_heads=num_heads)
    shapes = _shapes(config)
    for file, rank in zip(files, ranks, strict=True):
        wanted = {name: _share(name, shape, num_ranks=len(ranks)) for name, shape in shapes.items()}
        check_layout(rank, wanted=wanted, path=file, layout=f"a GPT in {len(ranks)} parts")
    if any(extra.keys() != extras[0].keys() for extra in extras):
        raise CheckpointError(f"{files[0].parent}: the ranks differ in what they have beside the GPT; fetch it again")
    return ReleasedGPT(config=config, ranks=ranks, extras=extras, iteration=iteration, files=tuple(files))


def load_released_gpt(
    path: Path, *, dtype: torch.dtype | None = torch.float32, num_heads: int = 0, unsafe_pickle: bool = False
) -> GPT:
    """A released model in evaluation mode, in the precision of `dtype`, or None for that of the file.

    The model is laid out without memory and then takes tensor after tensor, so that it is never held twice. Where
    nothing is merged or converted its weights stay mapped to the file, which must not be altered meanwhile.
    """
    released = open_released_gpt(path, num_heads=num_heads, unsafe_pickle=unsafe_pickle)
    with torch.device("meta"):
        model = GPT(released.config)
    model.load_state_dict(dict(released.tensors(dtype)), assign=True)
    return model.eval()


def save_released_gpt(
    model: GPT, folder: Path, *, iteration: int = 0, num_ranks: int = 1, naming: Naming = "released"
) -> Path:
    """Write a GPT in the released layout, cut over `num_ranks` files; returns the iteration's folder.

    Rows of zeros fill the vocabulary up to a multiple of 128 for each rank. ConfigError if the heads do not divide.
    """
    if num_ranks < 1 or model.config.num_heads % num_ranks:
        raise ConfigError(f"num_ranks={num_ranks}: choose a divisor of the {model.config.num_heads} heads")
    target = folder / str(iteration)
    target.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        parts = {name: _part(name, value, rank, num_ranks) for name, value in model.state_dict().items()}
        if naming == "sat":
            parts[SAT_WORDS] = parts.pop(WORDS)
        torch.save({"module": parts, "iteration": iteration}, target / f"mp_rank_{rank:02d}_model_states.pt")
    (folder / TRACKERS[0]).write_text(str(iteration))
    return target


def _find_files(path: Path) -> tuple[list[Path], int | None]:
    """The files of all ranks in their order, and the iteration if a folder is named after it."""
    if path.is_file() and RANK_FILE.fullmatch(path.name) is None:
        return [path], None
    folder = path.parent if path.is_file() else path
    tracker = next((folder / name for name in TRACKERS if (folder / name).is_file()), None)
    if tracker is not None and not _rank_files(folder):
        folder = folder / tracker.read_text().strip()
    ranks = _rank_files(folder)
    single = next((folder / name for name in SINGLE_FILES if (folder / name).is_file()), None)
    if not ranks and single is not None:
        return [single], None
    if not ranks:
        raise CheckpointError(
            f"{folder} holds no released GPT: give a folder with {TRACKERS[0]}, with mp_rank_00_model_states.pt or "
            f"with {SINGLE_FILES[0]}, or such a file"
        )
    missing = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if missing:
        raise CheckpointError(f"{folder}: mp_rank_{missing[0]:02d}_model_states.pt is missing; fetch all ranks")
    return [ranks[rank] for rank in sorted(ranks)], int(folder.name) if folder.name.isdecimal() else None


def _rank_files(folder: Path) -> dict[int, Path]:
    """Model-parallel rank -> its file."""
    found = ((RANK_FILE.fullmatch(file.name), file) for file in folder.glob("mp_rank_*.pt"))
    return {int(match[1]): file for match, file in found if match}


def _our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {WORDS if name == SAT_WORDS else name: value for name, value in state.items()}


def _config_of(ranks: tuple[Mapping[str, Tensor], ...], *, path: Path, num_heads: int) -> GPTConfig:
    """The model's config from the shapes of its tensors, with the switches of the released code."""
    first, inner = ranks[0], "transformer.layers.0.attention.dense.weight"
    for name in (WORDS, POSITIONS, inner):
        if name not in first or first[name].dim() != 2:
            raise CheckpointError(
                f"{path} holds no released GPT: it has no matrix {name}; its tensors: {', '.join(list(first)[:4])}, ..."
            )
    rows, hidden_size = first[WORDS].shape
    share = first[inner].shape[1]
    if len(ranks) * share != hidden_size:
        raise CheckpointError(
            f"{path} is one of {hidden_size // share} model-parallel ranks, but {len(ranks)} are here; fetch all ranks"
        )
    if not num_heads and hidden_size % HEAD_SIZE:
        raise CheckpointError(f"{path} has a hidden size of {hidden_size}, no multiple of {HEAD_SIZE}; give num_heads")
    return GPTConfig(
        vocab_size=rows * len(ranks),
        max_positions=first[POSITIONS].shape[0],
        num_layers=1 + max(int(match[1]) for match in map(LAYER.match, first) if match),
        hidden_size=hidden_size,
        num_heads=num_heads or hidden_size // HEAD_SIZE,
        sandwich_ln="transformer.layers.0.third_layernorm.weight" in first,
        embedding_gradient=1.0,  # the released code does not shrink it
    )


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def _cut_dim(name: str) -> int | None:
    """The dimension along which a tensor is cut over the ranks, or None if each rank has all of it."""
    if ROW_PARALLEL.search(name):
        return 1
    return 0 if THIRDS.search(name) or COLUMN_PARALLEL.search(name) else None


def _share(name: str, shape: tuple[int, ...], *, num_ranks: int) -> tuple[int, ...]:
    dim = _cut_dim(name)
    return tuple(size // num_ranks if index == dim else size for index, size in enumerate(shape))


def _merged(ranks: tuple[Mapping[str, Tensor], ...], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    for name in ranks[0]:
        parts, dim = [rank[name] for rank in ranks], _cut_dim(name)
        if len(parts) == 1 or dim is None:
            merged = parts[0]
        elif THIRDS.search(name):
            thirds = zip(*(part.chunk(3) for part in parts), strict=True)
            merged = torch.cat([piece for third in thirds for piece in third])
        else:
            merged = torch.cat(parts, dim=dim)
        yield name, merged.to(dtype or merged.dtype).contiguous()


def _part(name: str, tensor: Tensor, rank: int, num_ranks: int) -> Tensor:
    """A rank's own copy of its share of a tensor."""
    tensor, dim = tensor.detach().cpu(), _cut_dim(name)
    if name == WORDS:
        missing = -len(tensor) % (ROW_MULTIPLE * num_ranks)
        tensor = torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])
    if dim is None:
        return tensor.clone()
    if THIRDS.search(name):
        return torch.cat([third.chunk(num_ranks)[rank] for third in tensor.chunk(3)])
    return tensor.chunk(num_ranks, dim=dim)[rank].clone(memory_format=torch.contiguous_format)
