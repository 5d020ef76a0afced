"""`stagewise.capture`: any module as a chain of cells, through torch.export.

The model is traced in training and in eval mode; both traces are cut at the same places, and every
cell gets its share of the parameters, under the plain model's names, and its code for both modes.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from stagewise.errors import ModelError
from stagewise.model.call_form import CallForm
from stagewise.model.captured import Captured, remember
from stagewise.model.cell import Cell
from stagewise.model.export.cell_code import programs_of
from stagewise.model.export.comparison import Comparison, allowing_one_sample
from stagewise.model.export.cut_points import cut_points, matching_cuts, names_of
from stagewise.model.export.dataflow import Flow
from stagewise.model.export.disk_cache import CellBlueprint, Entry
from stagewise.model.export.exported_cell import CapturedCell
from stagewise.model.export.opaque_modules import check_hooks, leaves_of
from stagewise.model.export.suggestion import with_way_out
from stagewise.model.export.trace import traced
from stagewise.model.namespace import CellNamespace
from stagewise.model.ownership import owners_of
from stagewise.model.verify.model_errors import as_model_errors
from stagewise.model.verify.situation import Situation, kept, surroundings


def capture(model: nn.Module, *args: object, **kwargs: object) -> Captured:
    """Capture `model` as a chain of cells, from one example call.

    `args` and `kwargs` are those of the model's `forward`, with the samples along dimension 0 of
    every tensor: a batch that the model can run. Afterwards `Pipeline(model, plan)` accepts the
    model; `stagewise.plan` captures by itself. The model keeps its parameters, which the cells
    share. Decisions of `forward` by flags and attributes are fixed now; a batch whose sizes would
    lead to other decisions is refused. The number of samples may change, as may, in tensors of up
    to three dimensions, every size that `forward` does not fix, such as sequence lengths.

    Captures are cached on disk (`stagewise.model.export.disk_cache`), and compared with the model
    on a few samples, in training mode, eval mode and without gradients (not on the meta device):
    outputs, gradients, added losses and buffers must agree. Pipeline also accepts the result.

    Raises:
        ModelError: torch.export cannot trace the model, or the trace differs from the model; names
            module, line and a remedy.

    Example:
        >>> import torch, stagewise
        >>> class Net(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(x).relu())
        >>> net = Net()
        >>> captured = stagewise.capture(net, torch.ones(2, 4))
        >>> [cell.name for cell in captured.chain]
        ['up', 'down']
        >>> plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
        >>> loss = lambda output, target: (output - target).square().mean()
        >>> pipe = stagewise.Pipeline(net, plan, loss=loss)
        >>> float(pipe.step(torch.ones(6, 4), target=net(torch.ones(6, 4))))
        0.0
    """
    _check(model)
    form = CallForm(model, args, kwargs)
    example = _copied(form.named(args, kwargs), _device(model))
    try:
        with as_model_errors(f"capturing {type(model).__name__}"):
            check_hooks(model)
            if _device(model).type == "meta":
                captured = _assembled(model, form, _blueprints(model, form, example))
            else:
                captured = _compared(model, form, example)
    except ModelError as error:
        raise with_way_out(error, model, example) from (error.__cause__ or error)
    remember(model, captured)
    return captured


def _compared(model: nn.Module, form: CallForm, example: Mapping[str, object]) -> Captured:
    """Return the capture on disk if it equals this model bit for bit, else a new one."""
    comparison = Comparison(model, example, leaves_of(model).values())
    entry = Entry(model, form)
    blueprints = entry.read()
    if blueprints is not None:
        with suppress(Exception):  # another model's cells may not fit
            captured = _assembled(model, form.again(), blueprints)
            comparison.configure(captured)
            if comparison.same_bits(captured):
                return captured
        entry.discard()
    blueprints = _blueprints(model, form, example)
    captured = _assembled(model, form, blueprints)
    comparison.configure(captured)
    is_exact = comparison.check(captured)
    freed = allowing_one_sample(blueprints)
    if freed is not None:
        other = _assembled(model, form.again(), freed)
        comparison.configure(other)
        if comparison.holds_for_one(other):
            captured, blueprints = other, freed
    if is_exact:
        entry.write(blueprints)
    return captured


def _blueprints(
    model: nn.Module, form: CallForm, example: Mapping[str, object]
) -> list[CellBlueprint]:
    """Trace the model and cut it."""
    device = _device(model)
    example, leaves = _doubled(example), leaves_of(model)
    flows = {}
    with torch.device("meta") if device.type == "meta" else nullcontext():
        for training in (True, False):
            with kept(model, training), surroundings(model, Situation(training=training)):
                trace = traced(model, leaves, (), example)
            buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
            flows[training] = Flow(trace, leaves, buffers)
    for flow in flows.values():
        flow.memory.check_inputs()
    form.check_batch(flows[True].trace.inputs, type(model).__name__)
    main = flows[True].main
    cuts = cut_points(model, flows[True], main)
    begins: dict[bool, list[fx.Node | None]] = {
        True: [main[cut] for cut in cuts],
        False: _begins(cuts, main, flows[True], flows[False]),
    }
    changed = {name for flow in flows.values() for name in flow.changed_states()}
    namespaces = [CellNamespace(device, changed=changed) for _ in range(len(cuts) + 1)]
    programs = {
        training: programs_of(flow, begins[training], namespaces, form.leaves)
        for training, flow in flows.items()
    }
    names = names_of(model, flows[True], main, cuts)
    return [
        CellBlueprint(name, namespace, {mode: own[index] for mode, own in programs.items()})
        for index, (name, namespace) in enumerate(zip(names, namespaces, strict=True))
    ]


def _assembled(model: nn.Module, form: CallForm, blueprints: Sequence[CellBlueprint]) -> Captured:
    """Build the cells, with the model's own modules and parameters."""
    owners = owners_of(model, leaves_of(model), [blueprint.namespace for blueprint in blueprints])
    cells = []
    for index, blueprint in enumerate(blueprints):
        taken = {t.name for p in blueprint.programs.values() for t in (*p.taken, *p.compared)}
        names = [name for name in form.names if name in taken]
        # The first cell must take something, since the batch enters there.
        names = names or list(form.names[:1] if index == 0 else ())
        module = CapturedCell(
            blueprint.namespace, owners[index], blueprint.programs, names, is_first=index == 0
        )
        module.training = model.training
        cells.append(Cell(index, blueprint.name, module))
    for program in blueprints[0].programs.values():
        form.add_promise(program.batch, program.conditions)
    form.taken = frozenset(n for cell in cells for n in cell.keywords(cell.index and 1))
    return Captured(tuple(cells), form)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"capture() got a {type(model).__name__}; pass an nn.Module")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ModelError(
            f"{type(model).__name__} is lazy: some parameters have no shape yet; run the model "
            "once on a sample, then capture it"
        )


def _copied(example: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """Return the example with copied tensors, each separately, so that none share memory."""
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        torch.Tensor, lambda t: t.detach().clone().to(device), dict(example)
    )


def _doubled(example: Mapping[str, object]) -> Mapping[str, object]:
    """Return the example with at least two samples: torch.export specialises a size of one."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, torch.Tensor) and t.dim()]
    if any(tensor.shape[0] != 1 for tensor in tensors):
        return example
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        torch.Tensor, lambda t: torch.cat([t, t]) if t.dim() else t, dict(example)
    )


def _device(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _begins(
    cuts: Sequence[int], main: tuple[fx.Node, ...], flow: Flow, other: Flow
) -> list[fx.Node | None]:
    theirs = other.main
    found = matching_cuts(cuts, main, flow, theirs, other)
    return [theirs[cut] if cut < len(theirs) else None for cut in found]
