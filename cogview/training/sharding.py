"""Weights, gradients and optimizer states spread over the workers (FSDP2), for models that one GPU cannot hold.

Every worker keeps its share of each parameter in fp32, with that share of the gradient and of Adam's moments: 16 bytes
a parameter divided by the number of workers. A layer's whole weights exist, in `precision`, only while it computes.
Gradients are averaged in fp32. So this is the paper's "almost O2" with masters that are never in one place (CogView,
section 2.4; ZeRO by Rajbhandari et al. 2020).

Checkpoints are written by torch's distributed checkpointing, each worker its own share, and can be read by any number
of workers.
"""

import ctypes
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.checkpoint.state_dict_saver import save as save_shares
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cogview.errors import CheckpointError, ConfigError
from cogview.models.gpt import GPT
from cogview.training.background import on_cpu
from cogview.training.optimization import OptimizerConfig, build_optimizer, clip_gradients
from cogview.training.precision import DTYPES, Precision, check_precision

M_MMAP_THRESHOLD = -3  # glibc's number of the option
LARGE_BLOCK = 2**20  # bytes


class ShardedWeights:
    """A module around a GPT whose parameters are spread over all workers, and the optimizer of each worker's shares.

    Has the methods of `MasterWeights`, and all workers call them together. A lone worker holds everything.
    """

    def __init__(self, module: nn.Module, *, config: OptimizerConfig, precision: Precision, device: str) -> None:
        check_precision(precision)
        models = [part for part in module.modules() if isinstance(part, GPT)]
        if not models:
            raise ConfigError("sharding='full' spreads the layers of a GPT, and there is none; choose sharding='none'")
        self.module, self.model = module, models[0]
        if device == "cpu":
            give_back_large_blocks()
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        narrow = None if precision == "fp32" else DTYPES[precision]
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
        for layer in self.model.transformer.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.model, mesh=mesh, mp_policy=policy)
        self.optimizer = build_optimizer(module, config)
        self._named = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self._group: dist.ProcessGroup | None = None

    def named(self) -> dict[str, Tensor]:
        """This worker's fp32 shares under the names of their parameters."""
        return dict(self._named)

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def take_gradients(self, *, loss_scale: float) -> None:
        """Divide all gradients by the loss scale; they are fp32 already."""
        for parameter in self._named.values():
            if loss_scale != 1 and parameter.grad is not None:
                parameter.grad.div_(loss_scale)

    def clip_gradients(self, norm: float) -> Tensor:
        """Scale the gradients to at most `norm` over all workers (0: leave them); returns the norm before, a scalar."""
        found = clip_gradients(self.module, norm=norm)
        return found.full_tensor() if isinstance(found, DTensor) else found

    @torch.no_grad()
    def step(self, *, learning_rate: float) -> None:
        """One step of the optimizer on every worker's shares."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()

    def gather_no_more(self) -> None:
        """Give back the whole weights that a forward pass without a backward pass leaves."""
        self.model.reshard()  # type: ignore[operator]  # a method that fully_shard adds

    @torch.no_grad()
    def restore_fp32(self) -> None:
        """Put the whole weights in fp32 into the first worker's module, on its CPU; training ends with this."""
        self.gather_no_more()
        for module in self.module.modules():
            for name, share in list(module.named_parameters(recurse=False)):
                whole = share.full_tensor() if isinstance(share, DTensor) else share
                if dist.get_rank() == 0:
                    module.register_parameter(name, nn.Parameter(whole.cpu(), requires_grad=share.requires_grad))

    def write(self, folder: Path) -> None:
        """Write each worker's shares, and what they are shares of, into a folder."""
        self._write(self._state(), folder)

    def writing(self, folder: Path) -> Callable[[], None]:
        """The same of the shares as they are now, to be done by another thread while this one trains."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # whose words do not mix with those of the training
        return partial(self._write, on_cpu(self._state()), folder, group=self._group)

    def _write(self, state: dict[str, Any], folder: Path, *, group: dist.ProcessGroup | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_shares(state, storage_writer=FileSystemWriter(folder), process_group=group)

    def read(self, folder: Path) -> None:
        """Go on where `write` left off, with any number of workers. CheckpointError if it does not fit."""
        state = self._state()
        try:
            load_shares(state, storage_reader=FileSystemReader(folder))
        except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} does not fit the model of this config: {error}") from error
        for name, parameter in self._named.items():
            self.optimizer.state[parameter] = dict(state["optimizer"][name])

    def _state(self) -> dict[str, Any]:
        """Parameters and moments by name; zeros before the first step, as the optimizer itself would make them."""
        return {
            "model": dict(self._named),
            "optimizer": {name: self._moments(parameter) for name, parameter in self._named.items()},
        }

    def _moments(self, parameter: Tensor) -> Mapping[str, Tensor]:
        found: Mapping[str, Tensor] = self.optimizer.state.get(parameter, {})
        return found or {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def give_back_large_blocks() -> None:
    """Let this process return freed memory from 1 MiB upwards at once; without glibc, nothing.

    By itself glibc comes to keep freed blocks of up to 32 MiB for later. Whole weights that live for one layer then
    stay in the worker's memory, and sharding on a CPU saves nothing.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BLOCK)
