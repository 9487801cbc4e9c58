"""What benchmarks of jobs share: running one as a user would, and the folders that a finished chain left."""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import REPOSITORY, UnmeasuredError
from pipelines.runtime.chain import chain_outputs

MODELS = {
    "checkpoint": "pretrain",
    "text_tokenizer": "train_text_tokenizer",
    "image_tokenizer": "train_image_tokenizer",
}


def add_root(parser: argparse.ArgumentParser, *, preset: str = "smoke") -> None:
    """The flag --root; whatever is given, `root` is an absolute path, which workers with other folders find too."""
    parser.add_argument(
        "--root",
        type=lambda given: Path(os.path.abspath(given)),
        default=REPOSITORY / "runs" / preset,
        metavar="FOLDER",
        help=f"a finished chain (default: runs/{preset})",
    )


def run_job(job: str, *flags: str, root: Path, preset: str = "smoke") -> None:
    """Run a job or a chain of ours; what it says goes to standard error. UnmeasuredError if it fails."""
    command = [sys.executable, "-m", "pipelines", job, preset, "--root", str(root), *flags]
    done = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    if done.returncode:
        raise UnmeasuredError(f"{job} ended with {done.returncode}")


def stage_folders(root: Path, *needed: str) -> dict[str, Path]:
    """The output of each stage of the chain under a root, by job. UnmeasuredError if a needed one is not there."""
    if not (root / "chain.json").is_file():
        raise UnmeasuredError(f"{root} holds no chain; run `make pretrain` first, or name another with --root")
    folders = chain_outputs(root)
    missing = [job for job in needed if job not in folders]
    if missing:
        raise UnmeasuredError(f"{root}: the chain has not come to {', '.join(missing)}; run `make pretrain`")
    return folders


def model_folders(root: Path) -> dict[str, Path]:
    """The model and both tokenizers of the chain under a root, by the field of a config that takes them."""
    return folders_by_field(root, MODELS)


def folders_by_field(root: Path, fields: Mapping[str, str]) -> dict[str, Path]:
    """The same for any fields, each with the job whose output it takes."""
    folders = stage_folders(root, *fields.values())
    return {name: folders[job] for name, job in fields.items()}
