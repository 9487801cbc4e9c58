"""The memory of training steps beside the plan's estimate, for models of several shapes, each in a process of its own.

Command: make verify NAME=memory_plan
On a CPU every allocation of torch is counted, by its profiler; on a GPU the allocator's own peak is taken. Two steps
of the real loop are run: forward, backward, optimizer, checkpoint. The growth of the process (RSS) is a cross-check: it
also holds what the libraries allocate for themselves.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import REPOSITORY, Bar, Figures, UnmeasuredError, argument_parser, say, verify
from cogview.models.gpt import GPT, GPTConfig
from cogview.models.lora import LoRAConfig, add_lora
from cogview.training.cross_entropy import LOGITS_BYTES, token_losses
from cogview.training.language_model import LanguageModelLoss
from cogview.training.loop import LoopConfig, WeightedBatch, train
from cogview.training.memory_plan import StepShape, plan_memory
from cogview.training.precision import DTYPES, Precision
from cogview.training.ranks import Ranks

LENGTH = 288  # 28 text tokens, 256 codes, 4 command tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = GPTConfig(vocab_size=8192, max_positions=LENGTH + 1, num_layers=6, hidden_size=384, num_heads=6, dropout=0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    model: GPTConfig
    rows: int
    precision: Precision = "fp32"
    ema_decay: float = 0.0
    logits_bytes: int = LOGITS_BYTES
    lora: LoRAConfig = LoRAConfig()

    @property
    def step(self) -> StepShape:
        """As the plan wants it."""
        return StepShape(
            rows=self.rows,
            length=LENGTH,
            precision=self.precision,
            is_averaging=self.ema_decay > 0,
            is_cuda=DEVICE == "cuda",
            logits_bytes=self.logits_bytes,
            lora=self.lora,
        )

    def build(self) -> GPT:
        """The model, with the adapters if it is these that are trained."""
        gpt = GPT(self.model)
        if self.lora.rank:
            gpt.to(DTYPES[self.precision])
            add_lora(gpt, self.lora, seed=0)
        return gpt


CASES: Mapping[str, Case] = {
    "6x384_2_rows": Case(model=SMALL, rows=2),
    "6x384_8_rows": Case(model=SMALL, rows=8),
    "6x384_8_rows_remade": Case(model=replace(SMALL, activation_checkpointing=True), rows=8),
    "6x384_4_rows_written_out": Case(model=replace(SMALL, attention="pb_relax", dropout=0.1), rows=4),
    "6x384_4_rows_chunks": Case(model=replace(SMALL, vocab_size=32_768), rows=4, logits_bytes=16 * 2**20),
    "6x384_4_rows_bf16": Case(model=SMALL, rows=4, precision="bf16"),
    "6x384_2_rows_average": Case(model=SMALL, rows=2, ema_decay=0.99),
    "6x384_8_rows_lora": Case(model=SMALL, rows=8, lora=LoRAConfig(rank=8)),
    "6x384_4_rows_lora_bf16": Case(
        model=replace(SMALL, activation_checkpointing=True), rows=4, precision="bf16", lora=LoRAConfig(rank=8)
    ),
    "12x512_2_rows": Case(model=replace(SMALL, num_layers=12, hidden_size=512, num_heads=8), rows=2),
}
BARS = (Bar(figure="worst_error", op="<=", value=0.15), Bar(figure="cases", op="==", value=len(CASES)))


class RandomRows:
    """The GPT on random tokens, as the loop sees it."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.rows, self.vocabulary = case.rows, case.model.vocab_size
        self.module: nn.Module = LanguageModelLoss(case.build(), logits_bytes=case.logits_bytes)

    def batch(self, step: int, ranks: Ranks) -> WeightedBatch:
        """Random ids, all of which count."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(self.vocabulary, (self.rows, LENGTH + 1), generator=generator)
        positions = torch.arange(LENGTH).expand(self.rows, -1)
        tensors = {"ids": ids[:, :-1], "positions": positions, "labels": ids[:, 1:]}
        tensors |= {"loss_weights": torch.ones(self.rows, LENGTH), "image_part": positions > 31}
        return WeightedBatch(tensors, float(self.rows * LENGTH))

    def validate(self, step: int) -> Mapping[str, Any]:
        """Nothing is held out."""
        return {}

    def publish(self, output: Path) -> None:
        """Nothing is kept."""


def measure() -> Figures:
    """Every case in a fresh process."""
    figures: dict[str, float] = {}
    for name, case in CASES.items():
        plan = plan_memory(case.model, case.step)
        found = run_apart(name)
        figures[f"{name}/measured_mib"] = found["peak"] / 2**20
        figures[f"{name}/planned_mib"] = plan.peak / 2**20
        figures[f"{name}/error"] = plan.peak / found["peak"] - 1
        figures[f"{name}/kept_error"] = plan.activations / found["kept"] - 1
        figures[f"{name}/rss_over_measured"] = found["resident"] / found["peak"]
        say(f"{name}: {plan.peak / 2**20:.0f} MiB planned, {found['peak'] / 2**20:.0f} measured")
    worst = max(abs(value) for name, value in figures.items() if name.endswith("/error"))
    return {"worst_error": worst, "cases": len(CASES), **figures}


def run_apart(name: str) -> dict[str, float]:
    """What `measure_case` gives, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--case", name]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnmeasuredError(f"{name} ended with {done.returncode}: {done.stderr[-400:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_case(case: Case) -> dict[str, float]:
    """Bytes: `peak` of torch's allocations, `resident` growth of the process, `kept` by autograd for the backward."""
    before = psutil.Process().memory_info().rss
    train_two_steps(case)
    resident = psutil.Process().memory_info().rss if DEVICE == "cuda" else _peak_resident()
    peak = gpu_peak(case) if DEVICE == "cuda" else cpu_peak(case)
    gpt = case.build().to(DEVICE, DTYPES[case.precision]).train()
    kept = kept_bytes(gpt, rows=case.rows, length=LENGTH)
    return {"peak": peak, "resident": resident - before, "kept": kept}


def train_two_steps(case: Case) -> None:
    """The loop, from an empty folder."""
    loop = LoopConfig(
        num_steps=2, global_batch_size=case.rows, precision=case.precision, ema_decay=case.ema_decay, log_every=1
    )
    with tempfile.TemporaryDirectory() as folder:
        train(RandomRows(case), config=loop, output=Path(folder), identity={}, ranks=Ranks(device=DEVICE))


def gpu_peak(case: Case) -> int:
    """The allocator's own peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train_two_steps(case)
    return torch.cuda.max_memory_allocated()


def cpu_peak(case: Case) -> int:
    """The largest sum of all allocations and releases so far, in the order in which the profiler saw them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_two_steps(case)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    if not events:
        raise UnmeasuredError("the profiler saw no allocation")
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: float(event["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def kept_bytes(gpt: GPT, *, rows: int, length: int) -> int:
    """Distinct storages that autograd keeps after a forward pass, but for the parameters'."""
    own = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    kept: WeakSet[Kept] = WeakSet()

    def keep(tensor: Tensor) -> Kept:
        holder = Kept(tensor.detach())
        kept.add(holder)
        return holder

    device = gpt.word_embeddings.weight.device
    ids = torch.randint(gpt.config.vocab_size, (rows, length)).to(device)
    positions = torch.arange(length, device=device).expand(rows, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
        hidden = gpt(ids, positions)[positions >= 0]  # as the loss does: real tokens are gathered
        losses = token_losses(hidden, gpt.word_embeddings.weight, ids.flatten())
    storages = [holder.tensor.untyped_storage() for holder in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del losses  # until here they held the graph
    return sum(sizes.values())


class Kept:
    """A tensor for as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _peak_resident() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> int:
    """The command line; with `--case` one case is measured, in this process."""
    parser = argument_parser(__doc__)
    parser.add_argument("--case", choices=list(CASES), help="measure only this, here")
    flags = parser.parse_args()
    if flags.case:
        print(json.dumps(measure_case(CASES[flags.case])), flush=True)
        return 0
    return verify("memory_plan", measure, bars=BARS, save=flags.save)


if __name__ == "__main__":
    sys.exit(main())
