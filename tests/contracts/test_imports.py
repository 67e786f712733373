"""What may import what, and what `import jaxlocal` brings along."""

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxlocal

PACKAGE = Path(jaxlocal.__file__).parent
PROJECT = PACKAGE.parent

# A room imports from the rooms before it only; "training" and "methods" do not know each other.
FLOORS = (
    ("errors",),
    ("types",),
    ("parallel",),
    ("communication", "compression", "periods"),
    ("stages",),
    ("methods", "training"),
)
# Rooms off the stairs, and what of the rest they may import.
ALSO = {
    "nn": {"errors", "types", "parallel"},
    "models": {"errors", "types", "nn", "parallel"},
    "data": {"errors", "types"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The module on a floor, or the package beside them, that a file belongs to; "" for the top."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path, module_level_only: bool = False) -> set[str]:
    """The full names of what a file imports; `from jaxlocal import mixing` is jaxlocal.mixing."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if module_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """The parts of jaxlocal that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("jaxlocal.")}


def allowed(name: str) -> set[str]:
    if name in ALSO:
        return ALSO[name] | {name}
    number = next(n for n, floor in enumerate(FLOORS) if name in floor)
    return {room for floor in FLOORS[:number] for room in floor} | {name}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def test_every_file_has_its_floor():
    listed = {room for floor in FLOORS for room in floor} | set(ALSO)
    assert {part(path) for path in FILES} - {""} == listed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    if part(path):  # jaxlocal/__init__.py shows what there is
        assert own(path) <= allowed(part(path))


EXPERIMENTS = PROJECT / "experiments"
COMMANDS = {"train", "plan", "tune", "compare", "benchmark", "prepare", "reproduce", "theory"}
# Rooms of experiments, as FLOORS; the commands are above them.
EXPERIMENT_FLOORS = (
    ("building", "plotting"),
    ("launching",),
    ("running",),
    ("benchmarks",),
    ("comparing", "planning", "preparing", "bounding"),
    ("tuning",),
    ("reproducing",),
)


def experiment_rooms(path: Path) -> set[str]:
    """The rooms, or commands, of experiments that a file imports."""
    names = {name for name in imported(path) if name.startswith("experiments.")}
    return {name.split(".")[1] for name in names}


def test_the_root_of_experiments_holds_commands_only():
    assert {path.stem for path in EXPERIMENTS.glob("*.py")} - {"__init__"} == COMMANDS
    rooms = {path.parent.name for path in EXPERIMENTS.glob("*/__init__.py")}
    assert rooms == {room for floor in EXPERIMENT_FLOORS for room in floor}


@pytest.mark.parametrize("number", range(len(EXPERIMENT_FLOORS) + 1))
def test_imports_of_experiments_go_down_only(number):
    below = {room for floor in EXPERIMENT_FLOORS[:number] for room in floor}
    if number == len(EXPERIMENT_FLOORS):  # the commands, which do not import each other
        assert all(experiment_rooms(path) <= below for path in EXPERIMENTS.glob("*.py"))
        return
    for room in EXPERIMENT_FLOORS[number]:
        for path in (EXPERIMENTS / room).rglob("*.py"):
            assert experiment_rooms(path) <= below | {room}, path


@pytest.mark.parametrize("package", ["jaxlocal", "experiments"])
def test_no_files_import_each_other_in_a_circle(package):
    files = {module_name(path): path for path in (PROJECT / package).rglob("*.py")}
    module = lambda target: target if target in files else target.rpartition(".")[0]
    wanted = {
        name: {module(target) for target in imported(path, module_level_only=True)} & set(files)
        for name, path in files.items()
    }
    wanted.pop("jaxlocal", None)  # shows what there is
    graphlib.TopologicalSorter(wanted).prepare()  # raises CycleError


def test_jaxlocal_imports_its_declared_dependencies_only():
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    known = {re.match(r"[\w-]+", requirement)[0] for requirement in declared} | {"jaxlocal"}
    for path in FILES:
        roots = {name.split(".")[0] for name in imported(path, module_level_only=True)}
        assert roots - set(sys.stdlib_module_names) <= known, path


def test_jaxlocal_never_imports_the_experiments():
    assert not [path for path in FILES for name in imported(path) if name.startswith("experiments")]


def brought_along(statement: str) -> set[str]:
    """The top-level names and submodules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


HEAVY = {
    "absl.app",
    "cv2",
    "experiments",
    "grain",
    "matplotlib",
    "pandas",
    "PIL",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
}


def test_importing_jaxlocal_brings_neither_flax_nor_anything_of_the_experiments():
    assert not brought_along("import jaxlocal") & (HEAVY | {"flax", "networkx", "rich"})


def test_importing_all_of_it_brings_nothing_of_the_experiments():
    # Flax itself brings rich.
    everything = "import jaxlocal.data, jaxlocal.models.supervised, jaxlocal.training.evaluation"
    modules = brought_along(everything)
    assert {"jaxlocal.training.round", "jaxlocal.nn", "flax"} <= modules
    assert not modules & HEAVY
