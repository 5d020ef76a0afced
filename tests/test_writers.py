"""One writer: gradients are written by engine/gradients, buffers by engine/stage/buffers."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import stagewise

PACKAGE = Path(stagewise.__file__).parent
WRITERS = {
    "grad": {
        "engine/gradients": "what happens to a parameter's gradient in a step",
        "engine/stage/gradient.py": "taking one, and adding to one",
        "checker/references.py": "the plain model's, for an optimizer's step",
        "profiling/estimate_cell.py": "of fakes, so that a backward adds to something",
        "profiling/in_turn.py": "zeros, so that a backward adds to something",
        "model/verify/situation.py": "taken away before a comparison, and put back",
        "training/recipe_costs.py": "of a probe, which weighs the optimizer's state",
    },
    "_buffers": {
        "engine/stage/buffers.py": "what changes in forward",
        "model": "cells are made of modules here, and compared with them",
    },
}


def written(tree: ast.AST) -> Iterator[str]:
    """Attributes that are assigned, or items of them, or that a call changes in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            target = node.value if isinstance(node, ast.Subscript) else node
            if isinstance(target, ast.Attribute):
                yield target.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changed, method = node.func.value, node.func.attr
            in_place = method == "update" or (method.endswith("_") and not method.endswith("__"))
            if in_place and isinstance(changed, ast.Attribute):
                yield changed.attr


def is_in(name: str, writers: Collection[str]) -> bool:
    return any(name == writer or name.startswith(f"{writer}/") for writer in writers)


def test_gradients_and_buffers_have_one_writer_each() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for attribute in written(ast.parse(path.read_text(encoding="utf-8"))):
            if attribute in WRITERS and not is_in(name, WRITERS[attribute]):
                found.append(f"{name} writes {attribute}")
    assert not found, f"{found}; let one of {WRITERS} do it"


def test_every_writer_is_one() -> None:
    for attribute, writers in WRITERS.items():
        for writer in writers:
            at = PACKAGE / writer
            files = at.rglob("*.py") if at.is_dir() else [at]
            trees = (ast.parse(file.read_text(encoding="utf-8")) for file in files)
            assert any(attribute in written(tree) for tree in trees), (attribute, writer)
