"""Materialise a model that was built on the meta device, cell by cell.

Problem: tensors on the meta device only have shapes, so the values that constructors drew are lost.
PyTorch's remedy (`to_empty`, then `reset_parameters`) unties weights, and leaves tensors that it
does not reach uninitialised. Idea: a cell's tensors get memory full of NaN, then its modules'
`reset_parameters` run, then the `init` of the user or of the model; a remaining NaN is an error
that names the tensor.
Invariants: while a cell is initialised every other one is on the meta device, and a tied tensor
everywhere but at its first place, so its values only depend on the cell's seed. The model is
changed only after all its cells have been initialised.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from stagewise.errors import ModelError
from stagewise.model.cell import Cell, Chain
from stagewise.model.meta_tensors import Init, MetaTensor, Part, entries_of, parts_of

_NUM_SHOWN = 5


@torch.no_grad()
def materialise(
    chain: Chain,
    own: Collection[int],
    *,
    seed_cell: Callable[[str], None],
    init: Init | None = None,
    model: nn.Module | None = None,
    given: Collection[str] = (),
    later: Collection[str] = (),
) -> None:
    """Give the cells with indices `own` memory and values; all others stay on the meta device.

    Args:
        seed_cell: called with a cell's name right before it is initialised.
        init: called with every module of a cell, children first, and with the modules around it,
            after all `reset_parameters`; by default a module's own or its nearest ancestor's
            `_init_weights(module)`, if any, as in transformers.
        model: the model of the chain, whose other modules may have such an `_init_weights`.
        given: names of tensors that only get memory, since the caller fills them.
        later: names of tensors that stay on the meta device, since the caller makes them.

    Raises:
        ModelError: a tensor of these cells has no initialisation, its initialisation failed, or
            a constructor initialised it in a way that is lost.
    """
    entries = [e for e in entries_of(chain, model) if not set(later).intersection(e.names)]
    by_cell: dict[int, list[MetaTensor]] = {}
    for entry in entries:
        by_cell.setdefault(min(entry.cells), []).append(entry)
    made: dict[int, torch.Tensor] = {}
    for cell in chain:
        needed = by_cell.get(cell.index, [])
        if cell.index not in own:  # a table that cells here share with it; parameters are copied
            needed = [e for e in needed if e.is_buffer and not e.cells.isdisjoint(own)]
        if needed or cell.index in own:
            parts = list(parts_of(cell, model, init))
            made |= _initialised(cell, needed, parts, seed_cell, set(given))
    for entry in entries:
        if entry.cells.isdisjoint(own):
            continue
        # A tied tensor that a cell of another rank initialises only gets memory here, for a copy.
        real = made[id(entry.tensor)] if id(entry.tensor) in made else _room(entry.tensor)
        for place in entry.places:
            place.put(real)


def _initialised(
    cell: Cell,
    entries: Sequence[MetaTensor],
    parts: Sequence[Part],
    seed_cell: Callable[[str], None],
    given: set[str],
) -> dict[int, torch.Tensor]:
    """Return new tensors for `entries`, initialised by the cell, keyed by the old ones' id."""
    rooms = [(entry, _room(entry.tensor)) for entry in entries]
    missing = [
        (entry, room)
        for entry, room in rooms
        if not (entry.is_saved and given.intersection(entry.names))
    ]
    try:
        for entry, room in rooms:
            entry.places[0].put(room)
        for _, room in missing:
            room.fill_(float("nan") if _has_nan(room) else 0)
        versions = [room._version for _, room in missing]
        seed_cell(cell.name)
        if missing:
            _run(parts, {entry.places[0].module for entry, _ in missing})
        made = {id(entry.tensor): entry.places[0].get() for entry, _ in rooms}
        hooked = {part.module for part in parts if part.init is not None}
        unfilled, lost = [], []
        for (entry, room), version in zip(missing, versions, strict=True):
            real, place = made[id(entry.tensor)], entry.places[0]
            num_writes = room._version - version if real is room else None
            if not _is_filled(real, num_writes):
                unfilled.append(entry)
            elif (
                isinstance(room, nn.Parameter)
                and num_writes is not None
                and place.module not in hooked
                and _num_writes(entry.tensor) > num_writes
            ):
                lost.append(entry)
        _check_filled(unfilled)
        _check_constructors(lost)
        _check_attributes(cell)
    finally:
        for entry in entries:
            entry.places[0].put(entry.tensor)
    return {key: real for key, real in made.items() if real is not None}


def _run(parts: Sequence[Part], holders: Collection[nn.Module]) -> None:
    """Initialise the modules that hold missing tensors, and those that contain them."""
    needed = [p for p in parts if p.is_around or any(m in holders for m in p.module.modules())]
    with torch.device("cpu"):
        for part in needed:
            for name in ("reset_parameters", "_reset_parameters"):  # the latter in nn.Transformer
                reset = getattr(part.module, name, None)
                if callable(reset):
                    _call(f"{name}()", part, reset)
                    break
        for part in needed:
            if part.init is not None:
                _call("init(module)", part, part.init, part.module)


def _call(what: str, part: Part, function: Callable[..., object], *args: object) -> None:
    """Call an initialiser; raises ModelError that names it and the module."""
    try:
        function(*args)
    except Exception as error:
        raise ModelError(
            f"{what} failed for {part.path or 'the model'} ({type(part.module).__name__}), built "
            f"on the meta device: {type(error).__name__}: {error}"
        ) from error


def _room(tensor: torch.Tensor) -> torch.Tensor:
    """Allocate a meta tensor on the CPU, with its class and attributes."""
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise ModelError(
            "a parameter on the meta device has hooks, which its materialised copy would lack; "
            "register them after building the Pipeline, on pipe.named_parameters()"
        )
    room = torch.empty_like(tensor, device="cpu", requires_grad=False)
    if isinstance(tensor, nn.Parameter):
        room = nn.Parameter(room, tensor.requires_grad)
    vars(room).update(vars(tensor))
    vars(room).pop("_is_hf_initialized", None)  # by transformers, on the meta device
    return room


def _has_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _is_filled(tensor: torch.Tensor | None, num_writes: int | None) -> bool:
    """Return whether a tensor of NaNs has been filled; `num_writes` is None if it was replaced."""
    if tensor is None or tensor.is_meta:
        return False
    if not _has_nan(tensor):
        return num_writes != 0 or bool(tensor.any())
    values = tensor.float() if tensor.element_size() == 1 else tensor
    # The sum allocates nothing, and is NaN if any element is.
    return not bool(values.sum().isnan()) or not bool(values.isnan().any())


def _num_writes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _check_filled(unfilled: Sequence[MetaTensor]) -> None:
    if not unfilled:
        return
    fleeting = [entry for entry in unfilled if not entry.is_saved]
    hint = (
        f"; {fleeting[0].places[0].name} is in no checkpoint (persistent=False): compute it in "
        "reset_parameters too, or build it on a real device: "
        'torch.arange(..., device="cpu")'
        if fleeting
        else ""
    )
    raise ModelError(
        f"{_listing(unfilled)} of a model on the meta device have no initialisation: give their "
        "modules a reset_parameters() that fills them, or give Pipeline init=function(module), "
        f"or state= with a checkpoint that holds them{hint}"
    )


def _check_constructors(lost: Sequence[MetaTensor]) -> None:
    if lost:
        raise ModelError(
            f"{_listing(lost)} were initialised again after reset_parameters() by the code that "
            "built the model on the meta device, which cannot be repeated: move that into "
            "reset_parameters() of the module that does it, or give Pipeline "
            "init=function(module), or state= with a checkpoint"
        )


def _check_attributes(cell: Cell) -> None:
    for path, module in cell.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ModelError(
                    f"{path}.{name} is a tensor on the meta device but not a buffer, so it "
                    "cannot be materialised: register it with register_buffer and fill it in "
                    "reset_parameters(), compute it in forward, or build it on a real device"
                )


def _listing(entries: Sequence[MetaTensor]) -> str:
    shown = ", ".join(str(entry.places[0]) for entry in entries[:_NUM_SHOWN])
    more = f" and {len(entries) - _NUM_SHOWN} more" if len(entries) > _NUM_SHOWN else ""
    return shown + more
