"""How fast a training runs and how much memory it takes, from one line of the metrics to the next.

Validation and checkpoints lie in these times too: it is what a user waits for. `data_wait` is the share of the time in
which the training waited for batches. The share of the device's peak (MFU, as Chowdhery et al. 2022 define it for PaLM)
counts the operations of the model alone, not those that activation checkpointing does again.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cogview.training.precision import Precision

# Dense 16-bit matrix products, by the makers' data sheets; the first name that a device's own contains.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}


class Speed:
    """A worker's clock. first_step: steps that were done before it was started."""

    def __init__(self, *, first_step: int, device: str, precision: Precision) -> None:
        self._step, self._device = first_step, torch.device(device)
        self._started = time.monotonic()
        self._operations = self._waited = 0.0
        self._peak = peak_tflops(device) if precision != "fp32" else None

    def add(self, operations: float) -> None:
        """Count what this worker's batch of a step takes; 0 where nobody knows."""
        self._operations += operations

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The body waits for a batch."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    def read(self, done: int, *, global_batch_size: int, tokens_per_row: float | None) -> dict[str, float]:
        """What goes into the line after `done` steps; the clock begins anew."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        rows = (done - self._step) * global_batch_size / seconds
        found = {"rows_per_second": rows, "data_wait": self._waited / seconds, "memory_gib": self._memory() / 2**30}
        if tokens_per_row is not None:
            found["tokens_per_second"] = rows * tokens_per_row
        if self._operations:
            tflops = self._operations / seconds / 1e12
            found["tflops_per_worker"] = tflops
            if self._peak is not None:
                found["mfu"] = tflops / self._peak
        self._step, self._started = done, now
        self._operations = self._waited = 0.0
        return {name: float(f"{value:.4g}") for name, value in found.items()}

    def _memory(self) -> int:
        """Bytes at this worker's peak: of the GPU, or else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_tflops(device: str) -> float | None:
    """What the device's matrix units do at most in 16 bits; None for those that are not known here."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
