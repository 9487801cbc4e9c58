"""Every command of the pages is one that the program takes, and every link leads somewhere."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.harness import REPOSITORY
from benchmarks.pages import PAGES, broken_links, commands, links
from pipelines.runtime.flags import read_config, read_order

VERBS = {"status", "dashboard", "doctor"}  # commands that have no config of a job


def jobs_called(command: str) -> list[list[str]]:
    """The words after `python -m pipelines` of every job that a command calls."""
    if command.startswith("make "):
        shown = subprocess.run(
            ["make", "-n", *shlex.split(command)[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.replace("\\\n", " ")
    else:
        shown = command
    found = re.findall(r"python -m pipelines ([^\n&]*)", shown)
    return [shlex.split(words) for words in found]


def test_there_are_pages_with_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_is_understood(page: Path) -> None:
    for command in commands(page):
        for words in jobs_called(command):
            if words[0] in VERBS:
                continue
            order = read_order(words)
            read_config(order, importlib.import_module(f"pipelines.{order.job}"))


# One of each job: they differ in what a GPU is said to cost.
PLANS = {command.split()[3]: command for page in PAGES for command in commands(page) if "--plan" in command}


@pytest.mark.parametrize("command", PLANS.values(), ids=PLANS)
def test_every_plan_is_told(command: str, tmp_path: Path) -> None:
    table = {"url": ["https://example.org/a.jpg"] * 100, "caption": [f"picture {number}" for number in range(100)]}
    pq.write_table(pa.table(table), tmp_path / "urls.parquet")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:], "--root", "runs/paper"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_every_page_of_docs_is_in_the_list_of_pages() -> None:
    listed = links(REPOSITORY / "docs" / "README.md")
    assert {page.name for page in REPOSITORY.glob("docs/*.md")} - {"README.md"} <= set(listed)
