"""What the benchmark of the pages does to a command before it is carried out, and what it makes for it."""

import json
import re
import shlex
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from benchmarks.docs import NEWEST, Outcome, counted, longest
from benchmarks.harness import UnmeasuredError
from benchmarks.page_rules import rule_of, treated, with_flags
from benchmarks.pages import all_commands, broken_links, commands
from benchmarks.stand_ins import LOOPBACK, NUM_WEB, web

INPUTS = Path("/stand-ins")
PLACES = {"web": 8000, "port": 8001, "cluster": "http://127.0.0.1:8002"}


def carried_out(command: str) -> str:
    return treated(command, inputs=INPUTS, places=PLACES)


def test_commands_are_taken_from_code_without_remarks_and_in_parts(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Say `make alone`.\n\n```\nmake one && make two A=1     # a remark\nls\n"
        "python -m pipelines road\n```\nmake no\n"
    )
    assert commands(page) == ["make one", "make two A=1", "python -m pipelines road"]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#b) [c](https://example.org) [d](missing.md) [e](http://a.org)\n")
    assert [words.split()[-1] for words in broken_links(page, root=tmp_path)] == ["heading", "missing.md", "encrypted"]


@pytest.mark.parametrize("command", all_commands())
def test_nothing_is_left_that_only_a_reader_has(command: str) -> None:
    """A new page needs a rule here, and a stand-in for each of its own folders, sites and files."""
    named = NEWEST.sub("newest", carried_out(command))
    assert "..." not in named
    assert "s3://" not in named
    for word in shlex.split(named):
        for found in re.findall(r"(?<![\w:.])/[\w./-]+", re.sub(r"https?://\S+", "", word)):
            assert found.startswith(f"{INPUTS}/") or word.startswith("ExampleBot"), command
    for needed in rule_of(command).first:
        assert needed in all_commands(), "what comes first is a command of the pages, too"


def test_an_unknown_command_has_no_rule() -> None:
    with pytest.raises(UnmeasuredError, match="make coffee"):
        rule_of("make coffee")


def test_flags_are_joined_to_those_that_are_there() -> None:
    assert with_flags("make test", "tests/a") == 'make test ARGS="tests/a"'
    assert with_flags('make test ARGS="-k b"', "tests/a") == 'make test ARGS="-k b tests/a"'
    assert with_flags("python -m pipelines road", "--a 1") == "python -m pipelines road --a 1"
    assert with_flags("make test", "") == "make test"


def test_stand_ins_take_whole_paths_only() -> None:
    words = carried_out("make pretrain DATA=/data/list.parquet")
    assert "DATA=/stand-ins/list.parquet " in words
    assert carried_out("make pretrain DATA=/data/photos").startswith("make pretrain DATA=/stand-ins/photos ARGS=")


def test_a_command_counts_as_it_stands_only_without_a_change() -> None:
    outcomes = [
        Outcome(command="make a", carried_out="make a", seconds=1.0),
        Outcome(command="make b", carried_out="make b ARGS=1", seconds=3.0, error="ended with 2"),
    ]
    figures = counted(["make a", "make b", "make c"], outcomes)
    assert figures == {
        "commands": 3,
        "commands/as they stand": 1,
        "commands/with stand-ins or cut": 1,
        "commands/not run": 1,
        "commands/failed": 1,
    }
    assert list(longest(outcomes).items()) == [("seconds/make b", 3.0), ("seconds/make a", 1.0)]


def test_the_site_answers_pages_pictures_and_searches() -> None:
    def get(path: str) -> bytes:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    with web() as port:
        assert get("/scenes.html").count(b"<img") == NUM_WEB
        assert b"/scenes.html</loc>" in get("/sitemap.xml")
        assert len(json.loads(get("/openverse?q=red"))["results"]) == NUM_WEB // 2
        assert len(json.loads(get("/wikimedia?action=query"))["query"]["pages"]) == NUM_WEB // 2
        assert get("/pictures/00000.png").startswith(b"\x89PNG")
        with pytest.raises(urllib.error.HTTPError):
            get("/missing")
