"""An import goes down only, and what is pure loads without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stagewise

PACKAGE = Path(stagewise.__file__).parent

# From the top down: a room may import rooms of lower lines only. A room is a folder, or a file of
# its own; "" is stagewise/__init__.py. What a package's `__init__` gathers stands above its parts.
LEVELS = [
    ["__main__"],
    ["cli/shown", "cli/train"],
    ["cli"],
    ["training/trainer"],
    ["training/pace"],
    ["training/pricing"],
    ["starters", "integrations", "training", "doctor"],
    ["training/state", "training/mesh", "training/metrics"],
    ["page"],
    ["training/workers", "report", "testing"],
    ["checker", "models", "parallel"],
    [""],
    ["pretrained"],
    ["pipeline"],
    ["pipeline/build", "pipeline/generation", "pipeline/record"],
    ["checkpoints", "profiling"],
    ["engine/step"],
    ["engine/gradients", "engine/looks"],
    ["engine/stage"],
    ["engine/transport"],
    ["engine/transport/wires"],
    ["engine/watch"],
    ["model/cells_of"],
    ["model/export"],  # a refusal says which cells replay takes
    ["model/replay"],
    ["model/verify"],
    ["model"],
    ["model/forward"],
    ["batch"],
    ["diagnosis"],
    ["planning/__init__"],
    ["planning/advice"],
    ["planning/meshes", "planning/search"],
    ["planning"],
    ["planning/partition", "planning/synthesis"],
    ["recording"],
    ["timeline"],
    ["schedule/sharded"],
    ["schedule"],
    ["costs", "free_pages", "habits", "mesh", "units", "parity", "slow_notice"],
    ["errors", "html_parts"],
]
DEPTH = {room: depth for depth, rooms in enumerate(LEVELS) for room in rooms}
APART = [
    "model/cells_of",
    "planning/__init__",
    "training/trainer",
]  # files with a line of their own
PURE = set().union(*LEVELS[DEPTH["diagnosis"] :])
NO_TORCH = [
    "stagewise",
    "stagewise.errors",
    "stagewise.costs",
    "stagewise.parity",
    "stagewise.timeline",
    "stagewise.schedule",
    "stagewise.diagnosis",
    "stagewise.planning",
    "stagewise.recording",
    "stagewise.report",
    "stagewise.page.plan_page",
    "stagewise.page.run_page",
    "stagewise.page.document",
    "stagewise.cli.main",
    "stagewise.cli.simulate_command",
    "stagewise.cli.shown.report_command",
    "stagewise.cli.shown.schedules_command",
]


def room_of(module: str) -> str:
    """`stagewise.engine.stage.work` -> `engine/stage`; `stagewise.costs` -> `costs`."""
    at = PACKAGE.joinpath(*module.split(".")[1:])
    if not at.is_dir() and not at.with_suffix(".py").exists():
        at = at.parent  # a name that the module defines
    if at.is_dir():
        at /= "__init__"
    name, folder = at.relative_to(PACKAGE).as_posix(), at.parent.relative_to(PACKAGE).as_posix()
    if folder == ".":
        return "" if name == "__init__" else name
    return name if name in APART else folder


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            assert node.module is not None
            if PACKAGE.parent.joinpath(*node.module.split(".")).is_dir():  # names, or submodules
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down_only(path: Path) -> None:
    here = room_of(module_of(path))
    for module in imports_of(path):
        if module.split(".")[0] == "stagewise":
            there = room_of(module)
            assert there == here or DEPTH[there] > DEPTH[here], f"{here} imports {module}"
            assert here != "report" or there in {*PURE, "report"}, f"report imports {module}"


def test_a_chain_is_planned_and_run_without_sympy() -> None:
    """Capturing takes it, and 37 MiB: nothing that every rank loads may import it at once."""
    loaded, waiting = set[str](), ["stagewise.pipeline.plan_model", "stagewise.training.trainer"]
    while waiting:
        module = waiting.pop()
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module in loaded or not path.exists():
            loaded.add(module)
            continue
        loaded.add(module)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # not inside functions
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting.append(node.module)
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    assert "stagewise.model.cells_of" in loaded and "torch" in loaded
    assert not {name for name in loaded if "sympy" in name or "symbolic_shapes" in name}


def test_timeline_sees_instructions_only() -> None:
    seen = {
        name
        for name in imports_of(PACKAGE / "timeline" / "timeline.py")
        if name.startswith("stagewise")
    }
    assert seen == {
        "stagewise.costs",
        "stagewise.schedule.instruction",
        "stagewise.timeline.notebook_picture",
        "stagewise.timeline.timeline_picture",
        "stagewise.units",
    }


@pytest.mark.parametrize("room", ["testing", "models"])
def test_nothing_inside_imports(room: str) -> None:
    """Neither what users test with, nor the model zoo."""
    importers = {room_of(module_of(path)) for path in FILES if room in map(room_of, own(path))}
    assert importers == {room}


def own(path: Path) -> list[str]:
    return [name for name in imports_of(path) if name.split(".")[0] == "stagewise"]


def test_the_levels_name_every_room_once() -> None:
    assert sorted(DEPTH) == sorted({room_of(module_of(path)) for path in FILES} - {"engine"})
    assert len(DEPTH) == sum(map(len, LEVELS))


def test_the_picture_shows_every_room_from_the_top_down() -> None:
    """A room within another may be left out, and so may small files and what only forwards."""
    page = (PACKAGE.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    lines = page.split("## The layers")[1].split("```")[1].splitlines()
    shown = [name for line in lines for name in line[:26].replace(",", " ").split()]
    shown = [name for name in shown if "─" not in name]
    assert [*map(DEPTH.__getitem__, shown)] == sorted(map(DEPTH.__getitem__, shown))
    small = {"", "__main__", "free_pages", "habits", "slow_notice"}
    rooms = {room for room in DEPTH if room.count("/") == room.startswith("engine/")}
    assert rooms - small == set(shown)


def test_pure_layers_load_without_torch() -> None:
    """One after another in one process: the first that loads torch is named."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    if 'torch' in sys.modules:\n        sys.exit(name)"
    ran = subprocess.run([sys.executable, "-c", code, *NO_TORCH], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_simulate_runs_without_torch() -> None:
    code = """
import atexit, sys
from stagewise.cli.main import main

atexit.register(lambda: print("torch" in sys.modules))
sys.argv = ["stagewise", "simulate", "--text"]
main()
"""
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.splitlines()[-1] == "False"
