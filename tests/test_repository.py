"""What the repository promises about itself: commands that exist, a changelog that keeps up, jobs of one shape."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]
MAKEFILE = REPOSITORY / "Makefile"
PAGES = ("README.md", "CONTRIBUTING.md")
LARGEST_FILE = 2 * 2**20
# Folders of one machine, and words that a text is not finished with.
UNFIT_FOR_OTHERS = re.compile(r"(?<![\w.:~/-])/(?:home|root|Users|work|mnt)/\w|\b(?:T[O]DO|F[I]XME|X{3})\b")
TEXT_SUFFIXES = {"", ".py", ".md", ".toml", ".txt", ".html", ".json", ".yaml", ".yml", ".cfg", ".sh"}
JOB_FILES = sorted(path for path in (REPOSITORY / "pipelines").glob("*.py") if not path.name.startswith("_"))
CHAINS = {
    "road",
    "reproduce",
    "serve",
    "human_evaluation",
}  # with Config and PRESETS, but they join jobs, or answer requests


def targets() -> dict[str, str]:
    """Every target of the Makefile that is a command, with the line that `make help` shows for it."""
    found = re.findall(r"^([a-z-]+):(?:.*?## (.*))?$", MAKEFILE.read_text(), flags=re.MULTILINE)
    return dict(found)


def tracked_files() -> list[Path]:
    """What git keeps. Skips the test outside a checkout."""
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    paths = [REPOSITORY / name for name in listed.stdout.split("\0") if name]
    if not paths:
        pytest.skip("nothing is committed yet")
    return [path for path in paths if path.is_file()]


def pyproject() -> dict[str, object]:
    """The `[project]` table of pyproject.toml."""
    project: dict[str, object] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project


def pinned_versions() -> dict[str, str]:
    """constraints.txt: name -> version."""
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_name_only_commands_that_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    code = re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.MULTILINE | re.DOTALL)
    named = {name for piece in code for name in re.findall(r"(?:^|[`\n;&] *)make ([a-z-]+)", piece)}
    assert named, f"{page} names no command"
    assert named <= targets().keys()


def test_make_help_explains_every_command() -> None:
    shown = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target, explanation in targets().items():
        assert explanation, f"make {target} has no line for make help"
        assert f"make {target} " in shown


def test_make_without_a_target_helps() -> None:
    alone = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert alone == subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "DATA=/a b/it's"], """road 'smoke' --data '/a b/it'\\''s'"""),
        (["pretrain", "DATA=x", "CAPTIONS=zh,the other"], "--captions 'zh,the other'"),
        (["generate", 'PROMPT=a $5 "box"'], """--prompt 'a $5 "box"'"""),
        (["generate", "PROMPTS=/a b.txt", "BEST=8"], "--prompts-file '/a b.txt'"),
        (["caption", "IMAGES=/a b"], "caption 'smoke' --images '/a b'"),
        (["finetune-direct-sr"], "finetune_direct_sr 'smoke' --root 'runs/smoke'"),
        (["super-resolve-at-once", "PRESET=emoji"], "--root 'runs/emoji'"),
        (["finetune-iterative-sr", "ROOT=/a b/$5"], "--root '/a b/$5'"),
        (["pretrain", "PRESET=emoji", "ARGS=--pretrain.loop.num-steps 5"], "road 'emoji'"),
    ],
)
def test_make_hands_words_over_as_they_are(arguments: list[str], expected: str) -> None:
    shown = subprocess.run(["make", "-n", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert expected in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["verify", "NAME=nothing"], "road"),
        (["generate"], "PROMPT="),
        (["caption"], "IMAGES="),
        (["setup", "PYTHON=no-such-python"], "3.11"),
    ],
)
def test_make_says_what_is_missing(tmp_path: Path, arguments: list[str], expected: str) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_changelog_knows_this_version() -> None:
    version = pyproject()["version"]
    assert re.search(rf"^## {re.escape(str(version))}\b", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_versions_agree() -> None:
    assert importlib.import_module("cogview").__version__ == pyproject()["version"]


def test_the_lock_pins_every_requirement_inside_its_range() -> None:
    project = pyproject()
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    requirements = [Requirement(str(line)) for line in (*project["dependencies"], *extras["dev"])]  # type: ignore[misc]
    pinned = pinned_versions()
    outside = [str(line) for line in requirements if pinned.get(canonicalize_name(line.name), "") not in line.specifier]
    assert not outside


def test_the_lock_covers_everything_that_is_installed_through_us() -> None:
    pinned = pinned_versions()
    seen: set[str] = set()
    waiting = [canonicalize_name(name) for name in ("torch", "ray", "mlflow", "pytest", "mypy")]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        needs = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        waiting += [
            canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})
        ]
    brought_by_torch = ("nvidia-", "cuda-", "triton")
    assert sorted(name for name in seen - pinned.keys() if not name.startswith(brought_by_torch)) == []


def test_tracked_texts_name_no_machine_and_leave_nothing_undone() -> None:
    found = []
    for path in tracked_files():
        if path.suffix in TEXT_SUFFIXES:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if UNFIT_FOR_OTHERS.search(line):
                    found.append(f"{path.relative_to(REPOSITORY)}:{number} {line.strip()}")
    assert not found, "\n".join(["", *found])


def test_no_large_or_generated_file_is_tracked() -> None:
    files = tracked_files()
    assert [str(path) for path in files if path.stat().st_size > LARGEST_FILE] == []
    generated = {".venv", "runs", "__pycache__", ".mypy_cache", "mlruns"}
    assert [str(path) for path in files if generated & set(path.relative_to(REPOSITORY).parts)] == []


def test_the_checks_of_a_change_can_be_run() -> None:
    script = REPOSITORY / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()
    assert {f"make {name}" for name in ("lint", "test")} <= set(script.read_text().splitlines())


def test_there_are_jobs() -> None:
    assert {"scrape_pairs", "filter_pairs", "pretrain", "generate", "evaluate"} <= {path.stem for path in JOB_FILES}


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_a_job_file_has_its_parts_in_order(path: Path) -> None:
    """Docstring, Config, PRESETS, main, stages, and JOB at the end."""
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert all(word in docstring for word in ("Command:", "Reads:", "Writes:", "Time:"))
    names = [name for node in tree.body for name in defined_names(node)]
    parts = ["Config", "PRESETS", "main"] + ([] if path.stem in CHAINS else ["JOB"])
    assert [name for name in names if name in parts] == parts
    assert path.stem in CHAINS or names[-1] == "JOB"


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.stem)
def test_a_job_has_presets_of_its_config_and_its_own_name(path: Path) -> None:
    module = importlib.import_module(f"pipelines.{path.stem}")
    assert "smoke" in module.PRESETS
    assert all(isinstance(preset, module.Config) for preset in module.PRESETS.values())
    if path.stem not in CHAINS:
        assert module.JOB.name == path.stem
        assert module.JOB.main is module.main
        assert module.JOB.products


def defined_names(node: ast.stmt) -> list[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
