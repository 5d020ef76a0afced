"""An import goes down only, and what is pure loads without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stagewise

PACKAGE = Path(stagewise.__file__).parent

# layer -> the layers that it may import, besides itself; "" is stagewise/__init__.py.
BASE = {"costs", "errors"}
PURE = {"parity", "planning", "schedule", "timeline", *BASE}
MODEL = {"model", *PURE}
ENGINE = {"engine", *MODEL}
PIPELINE = {"pipeline", *ENGINE}
FACADE = {"", *PIPELINE}
ALLOWED = {
    "errors": set(),
    "costs": {"errors"},
    "parity": {"errors"},
    "schedule": BASE,
    "timeline": {"schedule", *BASE},
    "planning": {"schedule", "timeline", *BASE},
    "model": PURE,
    "models": {"model", "errors"},
    "engine": MODEL,
    "pipeline": ENGINE,
    "report": PURE,
    "training": {"report", *FACADE},
    "cli": {"report", "training", *FACADE},
    "testing": FACADE,
    "__main__": {"cli"},
    "": PIPELINE,
}
NO_TORCH = [
    "stagewise",
    "stagewise.errors",
    "stagewise.costs",
    "stagewise.parity",
    "stagewise.timeline",
    "stagewise.schedule",
    "stagewise.planning",
    "stagewise.report",
    "stagewise.cli.main",
    "stagewise.cli.simulate",
]


def layer_of(module: str) -> str:
    """`stagewise.schedule.grid` -> `schedule`; `stagewise` itself -> ``."""
    return [*module.split("."), ""][1]


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
            if node.module == "stagewise":  # names of the facade, or submodules
                yield from (f"stagewise.{alias.name}" for alias in node.names)
            else:
                yield node.module


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_imports_go_down_only(path: Path) -> None:
    here = layer_of(module_of(path))
    for module in imports_of(path):
        if module.split(".")[0] == "stagewise":
            there = layer_of(module)
            assert there == here or there in ALLOWED[here], f"{here} imports {module}"


def test_timeline_sees_instructions_only() -> None:
    seen = {name for name in imports_of(PACKAGE / "timeline.py") if name.startswith("stagewise")}
    assert seen == {"stagewise.costs", "stagewise.schedule.instruction"}


def test_nothing_inside_imports_testing() -> None:
    assert not [here for here, allowed in ALLOWED.items() if "testing" in allowed]


def test_nothing_inside_imports_the_model_zoo() -> None:
    assert not [here for here, allowed in ALLOWED.items() if "models" in allowed]


def test_the_table_names_every_layer() -> None:
    assert {layer_of(module_of(path)) for path in FILES} <= ALLOWED.keys()


@pytest.mark.parametrize("module", NO_TORCH)
def test_pure_layers_load_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
