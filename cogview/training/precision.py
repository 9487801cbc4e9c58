"""Half precision with fp32 master weights: the paper's "almost O2" (CogView, section 2.4; the release's fp16 module).

Parameters, activations and gradients are 16 bit. The optimizer, with its own fp32 copy of every parameter, is not: an
update of 3e-4 of a weight would vanish in the 8 bits of a bf16 mantissa. Statistics of softmax and layer norm are kept
in fp32 by torch's kernels, and the cross-entropy by `cogview.training.cross_entropy`. Buffers are never converted, and
neither are parameters below a module with the attribute `keeps_fp32 = True`, such as a codebook.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogview.errors import ConfigError
from cogview.training.optimization import OptimizerConfig, build_optimizer, clip_gradients

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str) -> None:
    """ConfigError for one that we do not know."""
    if precision not in DTYPES:
        raise ConfigError(f"precision={precision!r}: choose {', '.join(get_args(Precision))}")


class MasterWeights:
    """A module in `precision`, and the optimizer of its weights in fp32.

    Between steps every 16-bit parameter is its master, rounded; so a checkpoint holds the masters alone. In fp32 (and
    below `keeps_fp32`) a parameter is its own master, and nothing is copied. Frozen parameters have no master, and are
    in no checkpoint: whoever builds the module brings them along.
    """

    def __init__(self, module: nn.Module, *, config: OptimizerConfig, precision: Precision) -> None:
        check_precision(precision)
        self.module = module
        self.optimizer = build_optimizer(module, config)
        self._master_of = _halve(module, dtype=DTYPES[precision])
        self._pairs = [(parameter, self._master_of.get(parameter, parameter)) for parameter in _trained(module)]
        self.masters = nn.ParameterList(master for _, master in self._pairs)
        for group in self.optimizer.param_groups:
            group["params"] = [self._master_of.get(parameter, parameter) for parameter in group["params"]]

    def named(self) -> dict[str, Tensor]:
        """The fp32 weights under the names of their parameters."""
        named = self.module.named_parameters()
        return {name: self._master_of.get(parameter, parameter) for name, parameter in named if parameter.requires_grad}

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        for parameter, master in self._pairs:
            parameter.grad = master.grad = None

    def take_gradients(self, *, loss_scale: float) -> None:
        """Move all gradients to the masters, in fp32 and divided by the loss scale; 16-bit ones are freed."""
        for parameter, master in self._pairs:
            if parameter is not master and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
            if loss_scale != 1 and master.grad is not None:
                master.grad.div_(loss_scale)

    def clip_gradients(self, norm: float) -> Tensor:
        """Scale the masters' gradients to at most `norm` (0: leave them); returns the norm before, a scalar."""
        return clip_gradients(self.masters, norm=norm)

    @torch.no_grad()
    def step(self, *, learning_rate: float) -> None:
        """One step of the optimizer, and the module's parameters follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self._round()

    @torch.no_grad()
    def restore_fp32(self) -> None:
        """Put the masters themselves in the places of what is trained, for publishing; training ends with this.

        Frozen parameters stay rounded: in fp32 those of a large model might not fit the GPU.
        """
        for parameter, master in self._pairs:
            parameter.data = master.data

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: `model`, what changes of the module's state, with masters in fp32, and `optimizer`."""
        state = self.module.state_dict(keep_vars=True)
        model = {
            name: self._master_of.get(tensor, tensor).detach()
            for name, tensor in state.items()
            if not _is_frozen(tensor)
        }
        return {"model": model, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises RuntimeError, ValueError or KeyError if it does not fit."""
        own = self.module.state_dict(keep_vars=True)
        missing, unknown = self.module.load_state_dict(state["model"], strict=False)
        if lacking := [name for name in missing if not _is_frozen(own[name])]:
            raise RuntimeError(f"the checkpoint lacks {', '.join(lacking)}")
        if unknown:
            raise RuntimeError(f"the model has no {', '.join(unknown)}")
        for name, tensor in own.items():
            if tensor in self._master_of:
                self._master_of[tensor].copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def _round(self) -> None:
        for parameter, master in self._master_of.items():
            parameter.copy_(master)


def reduce_in_fp32(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """For DistributedDataParallel: the mean over the workers of a bucket of 16-bit gradients, summed in fp32.

    A sum of many bf16 numbers in bf16 keeps two digits, and 512 fp16 shares of a gradient would each be 512 times
    closer to zero. It costs twice the bytes on the wire.
    """
    narrow: Tensor = bucket.buffer()
    shares = narrow.float().div_(dist.get_world_size())

    def round_into_bucket(summed: torch.futures.Future[list[Tensor]]) -> Tensor:
        return narrow.copy_(summed.value()[0])

    mean: torch.futures.Future[Tensor] = dist.all_reduce(shares, async_op=True).get_future().then(round_into_bucket)
    return mean


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _is_frozen(tensor: Tensor) -> bool:
    """Of a module's state: a parameter that is not trained (a buffer is none)."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _halve(module: nn.Module, *, dtype: torch.dtype) -> dict[Tensor, nn.Parameter]:
    """Round a module's fp32 parameters to `dtype`, in place; returns those that are trained with their masters."""
    master_of: dict[Tensor, nn.Parameter] = {}
    if dtype == torch.float32:
        return master_of
    apart = [part for part in module.modules() if getattr(part, "keeps_fp32", False)]
    kept = {parameter for part in apart for parameter in part.parameters()}
    for parameter in module.parameters():
        if parameter.dtype != torch.float32 or parameter in kept:
            continue
        if parameter.requires_grad:
            master_of[parameter] = nn.Parameter(parameter.data)
        parameter.data = parameter.data.to(dtype)
    return master_of
