"""A recipe: a plain Python file that says what to train.

Problem: a user's file can be wrong in many ways, and a traceback through our loader helps little.
Idea: the user's code runs under `Recipe.blame`, which turns an error into a RecipeError that names
the file, the line and what is needed.
"""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stagewise.batch.markers import along
from stagewise.engine.watch.now import NOW
from stagewise.errors import RecipeError, StagewiseError
from stagewise.training.mesh.recipe_mesh import Parallelize, RecipeMesh
from stagewise.training.recipe_values import (
    OPTIONAL,
    REQUIRED,
    SCHEDULER,
    VALUES,
    check_spelling,
    checked_function,
    checked_optimizer,
    checked_value,
)
from stagewise.training.state.optimizers import Groups, empty_lists_allowed, grouped
from stagewise.training.state.own_objects import Objects, Stateful, checked_objects
from stagewise.training.state.pretrained import Savable
from stagewise.training.state.random_states import seed_everything

# Inputs, target and output are the user's own: any pytree that the model and the loss agree on.
Tree = Any
Batch = tuple[Tree, Tree]
Model = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `stagewise train` takes from a recipe file.

    With `meta = True` in the file, `model()` is called under `torch.device("meta")`, so that a
    worker never holds more than its own stage; initial values come from the modules'
    `reset_parameters()` and the recipe's `init(module)`, if any: see `stagewise.Pipeline`. `cells`
    names the modules that become the model's cells: see `stagewise.capture_cells`. `tokenizer` is
    exported with a model of transformers.

    `optimizer(parameters)` may return several. `data("validation")` may return several sets by
    name; the first has the validation loss, and all are among the metrics. `callback(record)` hears
    on every rank what the log gets of a step or validation; True ends the run. With `groups`,
    options by patterns of parameters' names, `optimizer` is given groups instead of parameters: of
    each pattern those that it matches first, and last the rest.

    `scheduler(optimizer)` is a schedule of torch.optim.lr_scheduler, stepped once after every step;
    ReduceLROnPlateau after every due validation, with its loss or the `scheduler_metric`.
    `state(module)` returns objects by name that checkpoints hold too, for this rank's part of the
    model; one with `update_parameters`, such as AveragedModel, is called with it after every step.
    A step uses `accumulate` batches of `data("train")` as one minibatch. `autocast` is the dtype of
    `torch.autocast`. `grad_scaler` holds options of `stagewise.GradScaler`, which is enabled if
    they are given, and with `autocast = torch.float16`. `accumulate_in_float32`, `find_nonfinite`,
    `compare_batches`, `batch_dim` and `loss_reduction` are those of `stagewise.Pipeline`.

    On a mesh `parallelize(module, mesh, stage_index)` is called for each stage, see
    `stagewise.Pipeline`; `data_axes` names axes besides those called dp... along which batches are
    divided, with the dimension that is: {"ep": 0, "sp": 1} (0: the samples).
    """

    path: Path
    model: Callable[[], Model]
    data: Callable[[str], Iterable[Batch] | Mapping[str, Iterable[Batch]] | None]
    loss: Callable[[Tree, Tree], Tensor | Mapping[str, Tensor]]
    optimizer: Callable[[list[nn.Parameter]], Optimizer | Sequence[Optimizer]]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    state: Callable[[nn.Module], Mapping[str, Stateful]] | None = None
    generate: Callable[[Callable[[Tree], Tree]], str] | None = None
    callback: Callable[[Mapping[str, object]], object] | None = None
    metrics: Callable[[Tree, Tree], Mapping[str, float]] | None = None
    weight: Callable[[Tree], float | Tensor | Mapping[str, float | Tensor]] | None = None
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    accumulate: int = 1
    autocast: torch.dtype | None = None
    grad_scaler: Mapping[str, float | int | bool] | None = None
    accumulate_in_float32: bool = False
    find_nonfinite: bool = False
    compare_batches: bool = False
    batch_dim: int = 0
    loss_reduction: Literal["mean", "sum"] | None = None
    meta: bool = False
    init: Callable[[nn.Module], object] | None = None
    cells: Sequence[str] | None = None
    tokenizer: Savable | None = None
    parallelize: Parallelize | None = None
    data_axes: Mapping[str, int] = field(default_factory=dict)
    groups: Groups = field(default_factory=dict)
    scheduler_metric: str = ""

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def mesh(self) -> RecipeMesh:
        """What it does with the axes of a mesh."""
        return RecipeMesh(self.path, self.parallelize, self.data_axes, self.accumulate_in_float32)

    @property
    def scaler_options(self) -> Mapping[str, float | int | bool]:
        """The options of `stagewise.GradScaler`."""
        if self.grad_scaler is not None:
            return self.grad_scaler
        return {"enabled": self.autocast is torch.float16}

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Enter autocast, if the recipe asks for it."""
        with ExitStack() as stack:
            if self.autocast is not None:
                here = torch.accelerator.current_accelerator(check_available=True)
                for kind in ("cpu",) if here is None else ("cpu", here.type):
                    stack.enter_context(torch.autocast(kind, dtype=self.autocast))
            yield

    @contextmanager
    def blame(self, what: str) -> Iterator[None]:
        """Turn an error in the recipe's code into a RecipeError that names `what` was running."""
        try:
            yield
        except StagewiseError:
            raise
        except (Exception, SystemExit) as error:
            where = _place(self.path, error)
            place = f" ({NOW.outside()})" if NOW.is_numbered else ""
            message = f"{what} failed in {where}{place}: {type(error).__name__}: {error}"
            raise RecipeError(message) from error

    def make_optimizer(
        self, parameters: list[nn.Parameter], names: Sequence[str] = ()
    ) -> Optimizer | None:
        """Return the optimizer of this rank's parameters; None if it uses none of them.

        A rank may hold no parameters, or none that the recipe selects. Those without `names` are in
        no group but the last.
        """
        if not parameters:
            return None
        given: list[Any] = grouped(parameters, names, self.groups) if self.groups else parameters
        with self.blame("optimizer(parameters)"), empty_lists_allowed():
            made = self.optimizer(given)
        whole = checked_optimizer(self.path, made, has_schedule=self.scheduler is not None)
        return whole if any(group["params"] for group in whole.param_groups) else None

    def make_scheduler(self, optimizer: Optimizer | None) -> LRScheduler | None:
        """Return the schedule of this rank's optimizer, or None if either is missing."""
        if self.scheduler is None or optimizer is None:
            return None
        with self.blame("scheduler(optimizer)"):
            made = self.scheduler(optimizer)
        if not isinstance(made, LRScheduler):
            raise RecipeError(
                f"scheduler(optimizer) in {self.path} returned a {type(made).__name__}; it must "
                f"return a schedule of torch.optim.lr_scheduler, for example:\n\n{SCHEDULER}"
            )
        return made

    def hear(self, record: Mapping[str, object]) -> bool:
        """Let the callback have a record of the log; return whether it asks for the run's end."""
        if self.callback is None:
            return False
        with self.blame("callback(record)"):
            return self.callback(record) is True

    def make_objects(self, module: nn.Module) -> Objects:
        """Return the recipe's own objects for this rank's part of the model, by name.

        None for a part without parameters, which torch's averages do not take.
        """
        if self.state is None or not any(True for _ in module.parameters()):
            return {}
        with self.blame("state(module)"):
            return checked_objects(self.state(module), self.path)


def load_recipe(path: Path) -> Recipe:
    """Run the file at `path` and return its recipe; raise RecipeError if it is not one."""
    RecipeError.unless_file(path)
    module = _run(path)
    for name, example in REQUIRED.items():
        checked_function(path, name, _get(module, name, f"for example:\n\n{example}"))
    check_spelling(path, vars(module))
    optional = {
        name: checked_function(path, name, getattr(module, name))
        for name in OPTIONAL
        if hasattr(module, name)
    }
    values = {
        name: checked_value(path, name, getattr(module, name))
        for name in VALUES
        if getattr(module, name, None) is not None
    }
    if "cells" in values and values.get("meta"):
        raise RecipeError(
            f"{path} has both meta = True and cells, but cutting by cells needs a model with "
            "values; leave one of them out"
        )
    return Recipe(
        path=path,
        model=module.model,
        data=module.data,
        loss=module.loss,
        optimizer=module.optimizer,
        **optional,
        **values,
    )


def checked_batch(recipe: Recipe, split: str, batch: object) -> Batch:
    """Return `batch` as a pair, marked if samples are not along dimension 0.

    Raises RecipeError unless it is (inputs, target).
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return along(batch[0], recipe.batch_dim), along(batch[1], recipe.batch_dim)
    got = f"a {type(batch).__name__}"
    if isinstance(batch, tuple | list | dict):
        got += f" of {len(batch)}"
    raise RecipeError(
        f"data({split!r}) in {recipe.path} returned {got} as a batch; every batch must be a pair "
        "(inputs, target): put several inputs in a tuple or dict"
    )


def _get(module: ModuleType, name: str, remedy: str) -> object:
    if not hasattr(module, name):
        raise RecipeError(f"the recipe {module.__file__} has no {name}; add it, {remedy}\n")
    return getattr(module, name)


def _run(path: Path) -> ModuleType:
    name = f"stagewise_recipe_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} is not a Python file; a recipe's name must end in .py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # where pickle and dataclasses look up the recipe's classes
    directory = str(path.resolve().parent)
    if directory not in sys.path:  # a recipe may import its neighbours, as a script may
        sys.path.insert(0, directory)
    try:
        spec.loader.exec_module(module)
    except StagewiseError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"the recipe cannot be loaded: {type(error).__name__}: {error}, at "
            f"{_place(path, error)}"
        ) from error
    return module


def _place(path: Path, error: Exception | SystemExit) -> str:
    """Return the recipe's line that led to `error`."""
    at = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        at.append((error.filename or "", error.lineno))
    own = [line for name, line in at if Path(name).resolve() == path.resolve()]
    return f"{path}, line {own[-1]}" if own else f"a function of {path}"


def build_model(recipe: Recipe, *, seed: int, meta: bool = False) -> Model:
    """Build the recipe's model, the same on every rank; on the meta device it uses no memory."""
    seed_everything(seed)
    if meta:
        what = "model() under torch.device('meta'), as meta = True asks for,"
        with recipe.blame(what), torch.device("meta"):
            return recipe.model()
    with recipe.blame("model()"):
        return recipe.model()
