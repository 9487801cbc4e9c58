"""Other people's packages, to be measured beside ours: pinned versions in folders of their own, never in `.venv`.

They are installed without their dependencies (torch would come again, and older), so a list names every package that
is really imported. Delete `.rivals/` to fetch them anew.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import REPOSITORY, UnmeasuredError, say

FOLDER = REPOSITORY / ".rivals"


def installed(requirements: Sequence[str]) -> Path:
    """The folder in which exactly these requirements are, for `sys.path`. UnmeasuredError when they cannot be had."""
    digest = hashlib.sha256(" ".join([sys.version, *sorted(requirements)]).encode()).hexdigest()[:12]
    folder = FOLDER / digest
    if folder.exists():
        return folder
    say(f"fetching {', '.join(requirements)} into {folder.relative_to(REPOSITORY)}")
    unfinished = FOLDER / f"{digest}.{os.getpid()}"
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(unfinished), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnmeasuredError(f"pip could not install {', '.join(requirements)}: {done.stderr.strip()[-300:]}")
    unfinished.rename(folder)
    return folder
