"""The rules of the house: one name a thing, files and functions of a size one can read.

A public signature may be long: users write it by keyword.
"""

import ast
import importlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

import stagewise

PACKAGE = Path(stagewise.__file__).parent
TREES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
Function = ast.FunctionDef | ast.AsyncFunctionDef

FILE_LINES, FUNCTION_LINES, PARAMETERS, FOLDER_FILES = 300, 50, 7, 16

# Public or command-line signatures, which users write by keyword, and their bodies with docstring.
PUBLIC = {
    "checker/check_parity.py:check_parity",
    "cli/advise_command.py:advise_command",
    "cli/check_command.py:check_command",
    "cli/generate_command.py:generate_command",
    "cli/plan_command.py:plan_command",
    "cli/simulate_command.py:simulate_command",
    "cli/train/train_command.py:train",
    "model/replay/capture_cells.py:capture_cells",
    "models/amoebanet.py:amoebanet_d",
    "models/language.py:decoder_lm",
    "models/transformer.py:transformer",
    "parallel/split_sequences.py:_attend",  # torch's own signature
    "pipeline/gpipe.py:__init__",
    "pipeline/pipeline.py:__init__",
    "pipeline/plan_model.py:plan",
    "planning/choice.py:choose_schedule",
    "planning/search/search.py:search",
    "planning/synthesis/synthesise.py:synthesise",
    "profiling/op_counter.py:_convolution_backward",  # the operator's own signature
}


def functions() -> Iterator[tuple[str, Function]]:
    for where, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{where}:{node.name}", node


def over(budget: int, sizes: dict[str, int], waived: Collection[str] = ()) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > budget and name not in waived}


def test_no_file_is_too_long() -> None:
    lines = {
        where: len((PACKAGE / where).read_text(encoding="utf-8").splitlines()) for where in TREES
    }
    assert not over(FILE_LINES, lines)


def test_no_function_is_too_long() -> None:
    lines: dict[str, int] = defaultdict(int)
    for name, node in functions():
        assert node.end_lineno is not None
        lines[name] = max(lines[name], node.end_lineno - node.lineno + 1)
    assert not over(FUNCTION_LINES, lines, PUBLIC)


def test_no_function_takes_too_many_parameters() -> None:
    counts: dict[str, int] = defaultdict(int)
    for name, node in functions():
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        counts[name] = max(counts[name], sum(a.arg not in ("self", "cls") for a in given))
    assert not over(PARAMETERS, counts, PUBLIC)


def test_no_folder_holds_too_many_files() -> None:
    folders: dict[str, int] = defaultdict(int)
    for where in TREES:
        if not where.endswith("__init__.py"):
            folders[str(Path(where).parent)] += 1
    assert not over(FOLDER_FILES, folders)


def test_every_folder_tells_its_story_in_steps() -> None:
    for where, tree in TREES.items():
        if where.endswith("/__init__.py"):
            story = ast.get_docstring(tree) or ""
            steps = re.findall(r"^(\d)\. ", story, flags=re.MULTILINE)
            assert steps == [str(n + 1) for n in range(len(steps))] and len(steps) > 1, where


def test_every_story_names_every_file() -> None:
    for where, tree in TREES.items():
        if where.endswith("/__init__.py"):
            story = ast.get_docstring(tree) or ""
            files = [p.stem for p in (PACKAGE / where).parent.glob("*.py") if p.stem != "__init__"]
            untold = [name for name in files if not re.search(rf"\b{name}s?\b", story)]
            assert not untold, f"{where} does not say what is in {untold}"


def test_a_name_stands_for_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for where, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(where)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice


def test_a_file_name_stands_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for where in TREES:
        if not where.endswith("__init__.py"):
            places[Path(where).name].append(where)
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice


# torch.distributed.checkpoint is a format of files, as safetensors is; these read or write it.
# `parallel` holds what a user could write in a `parallelize`.
USERS_OF_DISTRIBUTED = ("engine/transport/", "engine/watch/", "training/workers/", "parallel/")
CHECKPOINT_FORMAT = {
    "checkpoints/sources.py",
    "checkpoints/untrusted.py",
    "training/checkpoint.py",
    "training/checkpoint_errors.py",
    "training/state/optimizer_state.py",
    "training/state/own_objects.py",
    "training/state/plain_values.py",
    "training/state/run_state.py",
    "training/state/schedules.py",
}


# What torch's own sharded parameters are, and when they are gathered and reduced.
SHARDED_PARAMETERS = {"engine/gradients/fully_sharded.py", "engine/gradients/shards.py"}


def test_torch_distributed_is_called_in_one_room() -> None:
    used = defaultdict(set)
    for where, tree in TREES.items():
        for node in ast.walk(tree):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            used[where] |= {name for name in names if name.startswith("torch.distributed")}
    elsewhere = {
        where: {name.startswith("torch.distributed.checkpoint") for name in names}
        for where, names in used.items()
        if names and not where.startswith(USERS_OF_DISTRIBUTED) and where not in SHARDED_PARAMETERS
    }
    assert elsewhere == {where: {True} for where in CHECKPOINT_FORMAT}


# Strings that name a module of ours: what is imported lazily, and what keys a cache.
NAMED_IN_STRINGS = {"__init__.py", "cli/main.py", "model/export/fingerprint.py"}


def test_no_string_names_a_module_of_ours() -> None:
    for where, tree in TREES.items():
        if where in NAMED_IN_STRINGS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.fullmatch(r"stagewise((?:\.\w+)+)\.?", node.value)
                parts = named[1].split(".")[1:] if named else []
                path = PACKAGE.joinpath(*parts)
                is_module = bool(parts) and (path.is_dir() or path.with_suffix(".py").exists())
                assert not is_module, f"{where}:{node.lineno} names {node.value}"


# Attributes of others' objects that happen to be called like ours.
OTHERS_ATTRIBUTES = {
    "failures": "of torch's CheckpointException",
    "nbytes": "of tensors and arrays",
}


def test_no_room_asks_for_our_attributes_by_a_string() -> None:
    """`getattr(x, "name", default)` hides who needs what; a class or protocol says it."""
    ours, asked = set[str](), dict[str, str]()
    for where, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own = [n for n in ast.walk(node) if isinstance(n, Function | ast.Name)]
                ours |= {n.name if isinstance(n, Function) else n.id for n in own if is_made(n)}
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                ours.add(node.attr)
            is_getattr = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
            if is_getattr and isinstance(name := node.args[1], ast.Constant):
                asked[name.value] = where
    of_ours = {name for name in asked.keys() & ours if not name.startswith("__")}
    assert of_ours == OTHERS_ATTRIBUTES.keys(), {name: asked[name] for name in of_ours}


def is_made(node: ast.AST) -> bool:
    return isinstance(node, Function) or isinstance(getattr(node, "ctx", None), ast.Store)


# Private in torch, but the only name there is, and as stable as what is public.
SETTLED = (
    "torch._ops",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
)


def torchs(tree: ast.AST) -> Iterator[str]:
    """The names of torch that a file uses, with the module of each."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {a.asname: a.name for a in node.names if a.asname} | {
                a.name.split(".")[0]: a.name.split(".")[0] for a in node.names if not a.asname
            }
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            known |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", name := ast.unparse(node)):
            first, _, rest = name.partition(".")
            yield f"{known.get(first, first)}.{rest}"


def test_torchs_private_names_exist_and_stand_in_one_file_a_room() -> None:
    used: dict[str, set[str]] = defaultdict(set)
    for where, tree in TREES.items():
        for name in torchs(tree):
            if re.match(r"torch\..*\b_[a-zA-Z]", name) or name.startswith("torch._"):
                used[name].add(where)
    gone = {name: where for name, where in used.items() if not is_there(name)}
    assert not gone, f"torch {torch.__version__} no longer has {gone}"
    for name, files in used.items():
        rooms = [str(Path(where).parent) for where in files]
        assert name.startswith(SETTLED) or len(set(rooms)) == len(rooms), (name, files)


def is_there(name: str) -> bool:
    at: object = torch
    for part in name.split(".")[1:]:
        if not hasattr(at, part):
            try:
                importlib.import_module(f"{at.__name__}.{part}")  # type: ignore[attr-defined]
            except (ImportError, AttributeError):
                return False
        at = getattr(at, part)
    return True
