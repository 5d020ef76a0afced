"""`stagewise.capture_cells`: a model as a chain of the modules that the caller names.

For models that torch.export cannot trace. Every cell runs the model's own forward, with the blocks
of other cells replaced (see `replayed_call`), so the Python code around the blocks is arbitrary.
The chain is compared with the plain model before it is returned.
"""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stagewise.errors import BatchError, ModelError, StagewiseError
from stagewise.model.call_form import CallForm
from stagewise.model.captured import Captured, remember
from stagewise.model.cell import Cell
from stagewise.model.forward.asked import asks_for_flags
from stagewise.model.forward.users_code import users_place
from stagewise.model.namespace import CellNamespace
from stagewise.model.ownership import is_inside, owners_of
from stagewise.model.replay.handover import Required
from stagewise.model.replay.patterns import selected
from stagewise.model.replay.replayed_call import Run
from stagewise.model.replay.replayed_cell import ReplayedCell
from stagewise.model.replay.skeleton import Skeleton
from stagewise.model.verify.compare import Mismatch, mismatch
from stagewise.model.verify.model_errors import as_model_errors
from stagewise.model.verify.observed import check_effects, draws_around, observed
from stagewise.model.verify.situation import SITUATIONS, kept

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def capture_cells(
    model: nn.Module, cells: Sequence[str], *args: object, **kwargs: object
) -> Captured:
    """Use the modules named by `cells` as the cells of `model`, for models that `capture` refuses.

    `cells` are paths of modules, or patterns: `["embed", "layers.*", "norm", "head"]`. `args` and
    `kwargs` are an example of a call, which must call every one of these modules once. The code of
    `forward` after a block belongs to its cell (code before the first block to the first cell) and
    runs unchanged, including data-dependent control flow. Values computed from parameters, blocks
    or random numbers are computed in one cell and passed on; values computed from only the batch,
    in every cell. Each cell takes the whole batch by name.

    The chain and the plain model are run on the example, in both modes: outputs, gradients and
    buffers must agree. Afterwards `Pipeline(model, plan)` accepts the model. The model must be on
    a real device, and initially in memory as a whole.

    Raises:
        ModelError: a pattern matches no module, or one that the example does not call exactly
            once; a value that must be passed on cannot be; or the chain differs from the plain
            model.

    Example:
        >>> import torch, stagewise
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x) if x.sum() > 0 else -layer(x)
        ...         return x
        >>> captured = stagewise.capture_cells(Net(), ["layers.*"], torch.ones(2, 4))
        >>> [cell.name for cell in captured.chain]
        ['layers.0', 'layers.1', 'layers.2']
    """
    captured = replayed(model, cells, args, kwargs)
    remember(model, captured)
    return captured


def replayed(
    model: nn.Module, cells: Sequence[str], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Captured:
    """Return the capture, without remembering it for `model`."""
    _check(model)
    form = AnyForm(model, args, kwargs, cells)
    with as_model_errors(
        f"cutting {type(model).__name__} into the modules of cells=",
        "name other modules (which take and return tensors, tuples or dicts, and do not contain "
        "the failing code), or move that code into one of them",
    ):
        return _replayed(model, form, args, kwargs)


def _replayed(
    model: nn.Module, form: "AnyForm", args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Captured:
    named = form.named(args, kwargs)
    chosen = selected(form.cells, [path for path, _ in model.named_modules()])
    names = _in_running_order(model, chosen, named)
    blocks = {index: model.get_submodule(name) for index, name in enumerate(names)}
    skeleton = Skeleton(model, names)
    required = Required.none(len(names))
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    states = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for training in (True, False):
        with kept(model, training):
            skeleton.train(training)
            run = Run(skeleton, names, None, blocks, states.get, required)
            try:
                run.run(named, device)
            except StagewiseError:
                raise
            except Exception as error:
                raise ModelError(
                    f"with its blocks replaced, forward failed ({type(error).__name__}: {error}, "
                    f"{users_place(error.__traceback__) or 'in no line of its own'}); it must only "
                    "call blocks, not use their attributes, or else name the module around them "
                    "in cells"
                ) from error
    namespaces = [CellNamespace(device) for _ in names]
    for namespace, name, used in zip(namespaces, names, required.states, strict=True):
        namespace.leaves.add(name)
        namespace.states |= {state for state in used if not state.startswith(f"{name}.")}
        constants = skeleton.constant & states.keys()
        namespace.states |= {state for state in constants if not is_inside(state, names)}
    leaves = {name: blocks[index] for index, name in enumerate(names)}
    owners = owners_of(model, leaves, namespaces)
    modules = [
        ReplayedCell(index, skeleton, names, owners[index], required, form.input_names)
        for index in range(len(names))
    ]
    for module in modules:
        module.training = model.training
    chain = tuple(Cell(index, name, modules[index]) for index, name in enumerate(names))
    captured = Captured(chain, form)
    _check_captured(model, captured, named, list(blocks.values()))
    return captured


def _check_captured(
    model: nn.Module, captured: Captured, named: Mapping[str, object], blocks: Sequence[nn.Module]
) -> None:
    """Raise ModelError if the cells differ from the model, or would in later calls."""
    effects = observed(model, named, [module for block in blocks for module in block.modules()])
    check_effects(model, effects, draws=draws_around(model, named, blocks))
    captured.own_changes = effects.touched
    captured.asks_flags = asks_for_flags(effects.asked)
    for situation in SITUATIONS:
        found = mismatch(model, captured, named, situation, apart=True)
        if found is not None:
            raise _differs(found)


def _differs(found: Mismatch) -> ModelError:
    return ModelError(
        f"cut into the modules of cells=, the model differs from the plain model in "
        f"{found.situation}: the {found.what} differs ({found.how}). Something reaches it other "
        "than through the blocks' outputs: a tensor in an attribute, a hook, an object other than "
        "a tuple, dict or dataclass (use_cache=False for a transformers model), a buffer assigned "
        "or a torch.autograd function used outside the blocks. Pass it to the blocks and return "
        "it, or name the module around them in cells"
    )


class AnyForm(CallForm):
    """The arguments of a model that runs its own forward: those of its signature, in any form.

    `cells` are the patterns by which it was cut.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        cells: Sequence[str],
    ) -> None:
        super().__init__(model, args, kwargs)
        self.cells = tuple(cells)

    @property
    def input_names(self) -> tuple[str, ...]:
        """All argument names of the cells, the example's first."""
        others = (p.name for p in self._signature.parameters.values() if p.kind in _BY_NAME)
        return tuple(dict.fromkeys((*self.names, *others)))

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, object]:
        named = self.named(args, kwargs)
        for name in named:
            if not self.takes(name):
                raise BatchError(
                    f"the example had no {name!r}; give capture_cells (or stagewise.plan) an "
                    "example with it"
                )
        return named

    def takes(self, name: str) -> bool:
        return name in self.input_names

    def matches(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        try:
            self.bind(args, kwargs)
        except BatchError:
            return False
        return True


def _check(model: nn.Module) -> None:
    tensors = (*model.parameters(), *model.buffers())
    if any(map(is_lazy, tensors)) or any(t.is_meta for t in tensors):
        raise ModelError(
            f"{type(model).__name__} has parameters without values (lazy, or on the meta device), "
            "but cells= runs it once; build it on a real device, or capture it without cells="
        )


def _in_running_order(
    model: nn.Module, chosen: Sequence[str], named: Mapping[str, object]
) -> list[str]:
    """Return the blocks in the order of their calls; ModelError unless each is called once."""
    order: list[str] = []
    with ExitStack() as hooks:
        for path in chosen:
            record = _RecordCall(order, path)
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(record).remove)
        for training in (False, True):
            order.clear()
            with kept(model, training), torch.no_grad():
                model(**named)
            if not training:
                first = list(order)
    counts = Counter(first)
    several = [path for path, count in counts.items() if count > 1]
    if several:
        raise ModelError(
            f"{', '.join(several)} is called {counts[several[0]]} times in forward; a cell runs "
            "once, so name the module around the calls in cells instead"
        )
    missing = [path for path in chosen if path not in counts]
    if missing:
        path = missing[0]
        children = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
        hint = f"; it is a container: name {path}.*" if children else ""
        raise ModelError(
            f"cells names {', '.join(missing)}, which the example does not call in eval mode{hint}"
            "; name modules that forward calls once"
        )
    if order != [path for path in first if path in order]:
        raise ModelError(
            f"the blocks run in a different order in training mode ({', '.join(order)}) than in "
            f"eval mode ({', '.join(first)}); name the module around them in cells"
        )
    return first


class _RecordCall:
    """A hook that records a call of the module at `path`."""

    def __init__(self, order: list[str], path: str) -> None:
        self._order, self._path = order, path

    def __call__(self, module: nn.Module, args: object) -> None:
        self._order.append(self._path)
