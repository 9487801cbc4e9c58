"""The walls of the house. A table says which room may import which; the rest are habits that a test can hold.

Every rule is a function from a parsed source file to the sentences that say what is wrong, so that the rules themselves
can be tested with planted faults.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CHECKED_FOLDERS = ("cogview", "pipelines", "benchmarks")

# Room -> what it may import from cogview besides itself: rooms, or single modules of one.
ROOMS: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "config": frozenset({"errors"}),
    "weight_files": frozenset({"errors"}),
    "locations": frozenset({"errors"}),
    "records": frozenset({"errors", "config", "locations"}),
    "filters": frozenset({"records", "errors", "config", "shards.manifest"}),
    "tokenizers": frozenset({"errors", "config", "records.images", "weight_files"}),
    "shards": frozenset({"errors", "config"}),
    "sequences": frozenset(
        {"errors", "shards.schema", "tokenizers.vocabulary", "tokenizers.bilingual_vocabulary"}  # which id means what
    ),
    "models": frozenset({"errors", "config", "weight_files"}),
    "training": frozenset({"models", "sequences", "errors", "config", "shards"}),
    "sampling": frozenset({"models", "sequences", "tokenizers", "errors"}),
    "evaluation": frozenset({"models", "sequences", "tokenizers", "scenes", "errors", "sampling", "weight_files"}),
    "scenes": frozenset({"errors", "config"}),
}
RUNTIME_MAY_IMPORT = frozenset(
    {"config", "errors", "locations", "shards", "training", "sequences", "models", "records.containment"}
)
CHAINS = frozenset({"road", "reproduce"})  # the job files that join other jobs
SHARED_BY_JOBS = frozenset({"runtime", "tasks", "serving", "judging"})  # folders: how jobs run, train, answer and ask
STOREYS_ABOVE_COGVIEW = frozenset({"ray", "mlflow", "tyro", "pipelines", "benchmarks", "tests"})
ONLY_IN_RUNTIME = frozenset({"mlflow"})
ONLY_UNPICKLER = "cogview/weight_files.py"  # reads an ordinary pickle once, where its caller says so by name
LAST_LINE_OF_DEFENCE = "pipelines/runtime/command_line.py"  # turns whatever comes into words and an exit code
MAY_PRINT = ("pipelines/__main__.py", "benchmarks/")
NAMES_THAT_SAY_NOTHING = frozenset({"utils", "util", "helper", "helpers", "misc", "common", "manager"})
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A parsed file. path: relative to the repository, with forward slashes."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> tuple[str, ...]:
        """`("cogview", "shards", "manifest")`; a package's `__init__` stands for the package."""
        parts = self.path.removesuffix(".py").split("/")
        return tuple(parts[:-1] if parts[-1] == "__init__" else parts)


Rule = Callable[[SourceFile], Iterator[str]]


def walls_between_rooms(file: SourceFile) -> Iterator[str]:
    """A room imports what the table grants it, and nothing of the storey above."""
    if file.module[0] != "cogview":
        return
    room = ".".join(file.module[1:2])
    granted = ROOMS.get(room, frozenset())
    if room and room not in ROOMS:
        yield f"{file.path}:1 the room {room} is not in the table of walls"
    for line, target in imports(file):
        if target[0] in STOREYS_ABOVE_COGVIEW:
            yield f"{file.path}:{line} cogview imports {target[0]}, which belongs to the storey above"
        elif target[0] == "cogview" and not _is_granted(target[1:], granted | {room}):
            yield f"{file.path}:{line} {room or 'cogview'} imports {'.'.join(target[1:])}; the table does not grant it"


def walls_between_jobs(file: SourceFile) -> Iterator[str]:
    """A job knows no other job, tasks know none either, the runtime knows neither, and nothing imports tests."""
    if file.module[0] != "pipelines" or file.path == "pipelines/__main__.py":
        return
    own = file.module[1] if len(file.module) > 1 else ""
    known = {own} if own == "runtime" else {own, *SHARED_BY_JOBS}
    for line, target in imports(file):
        if target[0] in ("benchmarks", "tests"):
            yield f"{file.path}:{line} pipelines imports {target[0]}"
        elif target[0] == "cogview" and own == "runtime" and not _is_granted(target[1:], RUNTIME_MAY_IMPORT):
            yield f"{file.path}:{line} the runtime imports {'.'.join(target[1:])}; the table does not grant it"
        elif target[0] == "pipelines" and not known.issuperset(target[1:2]) and own not in CHAINS:
            yield f"{file.path}:{line} {own or 'pipelines'} imports the job {target[1]}"


def one_door_to_services(file: SourceFile) -> Iterator[str]:
    """MLflow is imported, and Ray started, in pipelines/runtime only."""
    if file.path.startswith("pipelines/runtime/"):
        return
    for line, target in imports(file):
        if target[0] in ONLY_IN_RUNTIME:
            yield f"{file.path}:{line} imports {target[0]}; only pipelines/runtime does"
    for line in ray_starts(file):
        yield f"{file.path}:{line} starts Ray; call pipelines.runtime.cluster.ensure_ray"


def no_pickled_weights(file: SourceFile) -> Iterator[str]:
    """Nobody switches off torch's refusal to unpickle code, but for one reader that is asked to by name."""
    given = [node for node in ast.walk(file.tree) if isinstance(node, ast.keyword) and node.arg == "weights_only"]
    allowed = 1 if file.path == ONLY_UNPICKLER else 0
    for node in [node for node in given if not _is_true(node.value)][allowed:]:
        yield f"{file.path}:{node.value.lineno} weights_only must be True: a pickle runs code"


def errors_are_named(file: SourceFile) -> Iterator[str]:
    """No `except:`, no `except Exception`, but for the command line's last line of defence."""
    broad = [node for node in ast.walk(file.tree) if isinstance(node, ast.ExceptHandler) and _is_broad(node.type)]
    allowed = 1 if file.path == LAST_LINE_OF_DEFENCE else 0
    for node in broad[allowed:]:
        yield f"{file.path}:{node.lineno} catches everything; name the errors"


def only_the_command_line_prints(file: SourceFile) -> Iterator[str]:
    """Rooms and jobs log or return what they have to say."""
    if file.path.startswith(MAY_PRINT):
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{file.path}:{node.lineno} prints; log it, or return it to the command line"


def files_and_functions_are_short(file: SourceFile) -> Iterator[str]:
    """A file can be read in one sitting, a function on one screen."""
    length = len(file.text.splitlines())
    if length > MAX_FILE_LINES:
        yield f"{file.path}:1 has {length} lines; more than {MAX_FILE_LINES} are two files"
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{file.path}:{node.lineno} {node.name} has {length} lines; at most {MAX_FUNCTION_LINES}"


def names_say_something(file: SourceFile) -> Iterator[str]:
    """A file is named after its concept."""
    for name in set(file.module) & NAMES_THAT_SAY_NOTHING:
        yield f"{file.path}:1 {name} is no concept; name the file after what is in it"


RULES: tuple[Rule, ...] = (
    walls_between_rooms,
    walls_between_jobs,
    one_door_to_services,
    no_pickled_weights,
    errors_are_named,
    only_the_command_line_prints,
    files_and_functions_are_short,
    names_say_something,
)


def imports(file: SourceFile) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, dotted name in parts) of all that a file imports, also inside functions, relatively, or by a string."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute_base(file, node)
            yield from ((node.lineno, (*base, alias.name)) for alias in node.names)
        elif isinstance(node, ast.Call) and _called_name(node).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, tuple(first.value.split("."))


def ray_starts(file: SourceFile) -> Iterator[int]:
    """Lines with a call of `ray.init`, also where `init` was imported by name."""
    by_name = any(target == ("ray", "init") for _, target in imports(file))
    for node in ast.walk(file.tree):
        name = _called_name(node) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and (name == "ray.init" or (by_name and name == "init")):
            yield node.lineno


def read_source(path: Path, *, root: Path) -> SourceFile:
    """Read and parse a file below `root`."""
    text = path.read_text(encoding="utf-8")
    return SourceFile(path=path.relative_to(root).as_posix(), text=text, tree=ast.parse(text, filename=str(path)))


@cache
def source_files() -> tuple[SourceFile, ...]:
    """Every Python file of the checked folders."""
    paths = [path for folder in CHECKED_FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return tuple(read_source(path, root=REPOSITORY) for path in paths)


def _absolute_base(file: SourceFile, node: ast.ImportFrom) -> tuple[str, ...]:
    named = tuple(node.module.split(".")) if node.module else ()
    if not node.level:
        return named
    is_package = file.path.endswith("__init__.py")
    package = file.module if is_package else file.module[:-1]
    return (*package[: len(package) - node.level + 1], *named)


def _called_name(node: ast.Call) -> str:
    return ast.unparse(node.func) if isinstance(node.func, (ast.Name, ast.Attribute)) else ""


def _is_granted(target: tuple[str, ...], granted: frozenset[str]) -> bool:
    name = ".".join(target)
    return name == "__version__" or any(name == grant or name.startswith(f"{grant}.") for grant in granted if grant)


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(item) for item in caught.elts)
    return caught is None or ast.unparse(caught).removeprefix("builtins.") in ("Exception", "BaseException")


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps(rule: Rule) -> None:
    violations = [sentence for file in source_files() for sentence in rule(file)]
    assert not violations, "\n".join(["", *violations])


def test_there_is_code_to_check() -> None:
    rooms = {file.module[1] for file in source_files() if file.module[0] == "cogview" and len(file.module) > 1}
    assert {"errors", "config", "records", "shards", "tokenizers"} <= rooms


def test_ray_starts_in_one_place_and_mlflow_has_one_importer() -> None:
    files = source_files()
    starts = [f"{file.path}:{line}" for file in files for line in ray_starts(file)]
    importers = sorted({file.path for file in files for _, target in imports(file) if target[0] == "mlflow"})
    assert len(starts) == 1, starts
    assert len(importers) == 1, importers


def test_the_library_imports_without_ray_mlflow_or_the_jobs() -> None:
    """What a laptop with torch alone can do: import every module of cogview."""
    modules = [".".join(file.module) for file in source_files() if file.module[0] == "cogview"]
    blocked = sorted(STOREYS_ABOVE_COGVIEW)
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PLANTED = {
    "a wall": ("cogview/records/a.py", "def f():\n    from cogview.models.gpt import GPT\n", "imports models.gpt.GPT"),
    "a module beside the granted one": ("cogview/tokenizers/a.py", "import cogview.records.tars", "records.tars"),
    "a relative import": ("cogview/shards/a.py", "from ..training import loop", "training.loop"),
    "an import of everything": ("cogview/shards/a.py", "import cogview", "does not grant"),
    "an import by string": ("cogview/shards/a.py", "import importlib\nimportlib.import_module('ray.data')", "ray"),
    "a room without walls": ("cogview/attic/a.py", "x = 1", "not in the table"),
    "ray in the library": ("cogview/training/a.py", "def f():\n    import ray.train", "storey above"),
    "a job in a job": ("pipelines/evaluate.py", "from pipelines.generate import main", "the job generate"),
    "a job in a task": ("pipelines/tasks/a.py", "from pipelines.pretrain import main", "the job pretrain"),
    "a task in the runtime": ("pipelines/runtime/a.py", "import pipelines.tasks.image_tokenizer", "the job tasks"),
    "a job in the runtime": ("pipelines/runtime/a.py", "import pipelines.pretrain", "the job pretrain"),
    "a room that the runtime does not know": ("pipelines/runtime/a.py", "import cogview.sampling.x", "sampling"),
    "mlflow in a job": ("pipelines/generate.py", "from mlflow.entities import Param", "imports mlflow"),
    "ray started in a job": ("pipelines/generate.py", "import ray\nray.init()", "starts Ray"),
    "ray started by name": ("pipelines/generate.py", "from ray import init\ninit()", "starts Ray"),
    "a pickle": ("cogview/training/a.py", "import torch\ntorch.load('x', weights_only=False)", "weights_only"),
    "a second unpickler": (
        ONLY_UNPICKLER,
        "import torch\ntorch.load('x', weights_only=False)\ntorch.load('y', weights_only=False)",
        ":3 weights_only",
    ),
    "a bare except": ("cogview/records/a.py", "try:\n    pass\nexcept:\n    pass", "name the errors"),
    "a broad except": ("pipelines/a.py", "try:\n    pass\nexcept (OSError, Exception):\n    pass", "name the errors"),
    "a second last line of defence": (
        LAST_LINE_OF_DEFENCE,
        "try:\n    pass\nexcept Exception:\n    pass\ntry:\n    pass\nexcept Exception:\n    pass",
        ":7 catches everything",
    ),
    "a print": ("cogview/models/a.py", "print('here')", "prints"),
    "a long file": ("cogview/models/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), "two files"),
    "a long function": ("cogview/models/a.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES, "f has 61 lines"),
    "an empty name": ("cogview/models/utils.py", "x = 1", "no concept"),
}


@pytest.mark.parametrize(("path", "text", "expected"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_fault_is_found(tmp_path: Path, path: str, text: str, expected: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    file = read_source(planted, root=tmp_path)
    violations = [sentence for rule in RULES for sentence in rule(file)]
    assert len(violations) == 1
    assert expected in violations[0]


FINE = {
    "a granted room": ("cogview/training/a.py", "from cogview.shards.manifest import atomic_file"),
    "a granted module": ("cogview/sequences/a.py", "from cogview.tokenizers.vocabulary import Vocabulary"),
    "its own room": ("cogview/models/a.py", "from cogview.models import gpt\nfrom . import attention"),
    "the version": ("cogview/config.py", "from cogview import __version__"),
    "a chain of jobs": ("pipelines/road.py", "from pipelines import pretrain\nimport pipelines.runtime.chain"),
    "the runtime in a job": ("pipelines/pretrain.py", "from pipelines.runtime.jobs import Job"),
    "a task in a job": ("pipelines/pretrain.py", "from pipelines.tasks.image_tokenizer import build_task"),
    "the runtime in a task": ("pipelines/tasks/a.py", "from pipelines.runtime.jobs import JobRun"),
    "the last line of defence": (LAST_LINE_OF_DEFENCE, "try:\n    pass\nexcept Exception:\n    pass"),
    "a benchmark that prints": ("benchmarks/road.py", "print(1)"),
}


@pytest.mark.parametrize(("path", "text"), FINE.values(), ids=FINE.keys())
def test_what_is_allowed_passes(tmp_path: Path, path: str, text: str) -> None:
    allowed = tmp_path / path
    allowed.parent.mkdir(parents=True)
    allowed.write_text(text)
    file = read_source(allowed, root=tmp_path)
    assert [sentence for rule in RULES for sentence in rule(file)] == []
