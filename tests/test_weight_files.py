"""Weight files of others: what is read, that no code in them runs, and what is said of damaged ones."""

import argparse
import collections
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cogview.errors import CheckpointError
from cogview.weight_files import Shell, check_layout, read_weight_file, require_sha256, state_of

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).half()}


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path, *, by: str) -> None:
        self.path, self.by = path, by

    def __reduce__(self):
        if self.by == "os.system":
            return os.system, (f"touch {self.path}",)
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


def write(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def state(path: Path, **kwargs: bool) -> dict[str, torch.Tensor]:
    return state_of(read_weight_file(path, **kwargs), path=path)


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {f"module.{name}": tensor for name, tensor in WEIGHTS.items()},
        {"module": WEIGHTS, "iteration": 20000},
        {"module": {f"module.module.{name}": tensor for name, tensor in WEIGHTS.items()}, "skipped_steps": 3},
        collections.OrderedDict(WEIGHTS),
    ],
)
def test_weights_are_found_wherever_writers_put_them(content: object, legacy: bool, tmp_path: Path) -> None:
    assert same(state(write(tmp_path / "x.pt", content, legacy=legacy)))


def test_safetensors_are_read_as_well(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    assert same(state(tmp_path / "x.safetensors"))


def test_random_states_and_unknown_objects_do_not_stand_in_the_way(tmp_path: Path) -> None:
    beside = {
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "client_lr_scheduler": argparse.Namespace(step=3),
        "csr_tensor_module_names": {"x"},
    }
    assert same(state(write(tmp_path / "x.pt", {"module": WEIGHTS, **beside})))


def test_a_pickled_module_is_read_without_its_class(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    found = read_weight_file(write(tmp_path / "module.pt", module))
    assert isinstance(found, Shell)
    assert {name: tensor.shape for name, tensor in state_of(found, path=tmp_path).items()} == {
        name: tensor.shape for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("by", ["os.system", "exec"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_never_runs_unless_it_is_asked_for(by: str, form: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "x.pt", tmp_path / "exploded"
    content = {"module": WEIGHTS, "scheduler": Bomb(trace, by=by)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace, by=by), protocol=2))
    else:
        write(path, content, legacy=form == "legacy")
    if (form, by) == ("zip", "exec"):
        assert same(state(path))  # an empty shell took its place
    else:
        with pytest.raises(
            CheckpointError, match=r"asks for .*(system|exec).*--unsafe-pickle|damaged or no weight file"
        ):
            state(path)
    assert not trace.exists()
    if form != "pickle":
        assert same(state(path, unsafe_pickle=True))
        assert trace.exists()


def test_files_that_cannot_be_read_are_named_with_a_remedy(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.pt", {"module": WEIGHTS}).read_bytes()
    cases = {
        "cut short": whole[: len(whole) // 2],
        "damaged": whole[:40] + b"\xff" * 60 + whole[100:],
        "no weight file": b"<html>not found</html>",
        "no weight": b"",
    }
    for message, data in cases.items():
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            state(tmp_path / "x.pt")
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match="safetensors"):
            state(tmp_path / "x.safetensors")
    for path in (tmp_path, tmp_path / "absent.pt", tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=r"cannot be read|safetensors"):
            state(path)


def test_no_damage_gets_past_the_reader_as_another_error(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.pt", {"module": WEIGHTS, "rng": random.Random(0).getstate()[1][:9]}).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "x.pt").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            state(tmp_path / "x.pt")
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_what_holds_no_weights_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a list"):
        state(write(tmp_path / "x.pt", [1, 2]))
    with pytest.raises(CheckpointError, match=r"no tensors .*iteration"):
        state(write(tmp_path / "x.pt", {"iteration": 1}))


def test_a_sha256_is_required_to_the_letter(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", WEIGHTS)
    found = require_sha256(path)
    assert require_sha256(path, found.upper()) == found
    with pytest.raises(CheckpointError, match=f"{found}, not {'0' * 64}"):
        require_sha256(path, "0" * 64)


def test_a_layout_names_what_is_missing_unknown_or_misshapen(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_layout(WEIGHTS, wanted={"a": (3, 2), "c": (1,)}, path=tmp_path, layout="a thing")
    for part in ("missing: c", "unknown: b", "a [2, 3] instead of [3, 2]", "layout of a thing"):
        assert part in str(caught.value)
    check_layout(WEIGHTS, wanted={"a": (2, 3), "b": (4,)}, path=tmp_path, layout="a thing")
