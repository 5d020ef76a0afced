"""A Pipeline's initial values: for a model on the meta device, or from a checkpoint.

Every rank creates and fills only its own cells; the values do not depend on the cut. Weights that
are made of what is saved, as quantised ones are, come last, one by one: none is ever here as saved
but the one that is being made.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stagewise.checkpoints.loading import check, fill
from stagewise.checkpoints.names import Aliases
from stagewise.checkpoints.renamed import Made, Renamed, TensorSource
from stagewise.checkpoints.sources import State, open_source
from stagewise.engine.stage.randomness import generators_kept, seed_initialisation
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError
from stagewise.free_pages import HEAP
from stagewise.model.cell import Chain
from stagewise.model.chain import Model, module_tree
from stagewise.model.materialise import materialise
from stagewise.model.meta_tensors import Init, entries_of, is_meta
from stagewise.pipeline.build.places import own_stages
from stagewise.planning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Given:
    """The caller's arguments for initial values."""

    seed: int
    init: Init | None = None
    state: State | None = None


def initialise(
    model: Model,
    chain: Chain,
    plan: Plan,
    ranks: Ranks,
    devices: Sequence[torch.device],
    aliases: Aliases,
    given: Given,
) -> None:
    """Give this rank's cells their initial values; collective.

    Raises ModelError or CheckpointError, on every rank, before a cell is changed on any.
    """
    stages = own_stages(plan, ranks, devices)
    own = {cell: device for _, cells, device in stages for cell in cells}
    source, found, made = None, {}, dict[str, Made]()
    with agreed(ranks, "Pipeline: initial state"):
        on_meta = is_meta(chain)
        if given.state is not None:
            path = given.state.path if isinstance(given.state, Renamed) else given.state
            source = whole = open_source(path, aliases)
            tensors, new = _tensors(chain, own), dict[str, Any]()
            if isinstance(given.state, Renamed):  # of a folder for a model of any dtype
                named = given.state.saved_name
                new = {"is_new": lambda name: named(name) is None, "convert": True}
                made = given.state.to_make(whole.names, tensors)
                source = given.state.over(whole, aliases)
            kept = {n: t for n, t in tensors.items() if n not in made or made[n].is_of_one}
            found = check(source, kept, aliases, **new)
            found = {name: saved for name, saved in found.items() if name not in made}
    with (
        agreed(ranks, "Pipeline: initial values"),
        generators_kept([]),
        torch.inference_mode(False),
    ):
        if on_meta:
            materialise(
                chain,
                own,
                seed_cell=lambda name: seed_initialisation(given.seed, name),
                init=given.init,
                model=model if isinstance(model, nn.Module) else None,
                given=found,
                later=made,
            )
        if source is not None:
            fill(source, _tensors(chain, own), found)
        if made:
            _put(model, chain, own, made, whole)


def _tensors(chain: Chain, cells: Iterable[int]) -> dict[str, torch.Tensor]:
    return module_tree([chain[index] for index in sorted(cells)]).state_dict()


def _put(
    model: Model,
    chain: Chain,
    own: Mapping[int, torch.device],
    made: Mapping[str, Made],
    source: TensorSource,
) -> None:
    """Make what is made, each on its cell's device."""
    for entry in entries_of(chain, model if isinstance(model, nn.Module) else None):
        name = next((name for name in entry.names if name in made), None)
        if name is None or entry.cells.isdisjoint(own):
            continue
        if len(entry.cells) > 1:
            raise ModelError(
                f"{name} is tied, and would be quantised for each cell that uses it; leave it out "
                "of quantisation (modules_to_not_convert or llm_int8_skip_modules)"
            )
        real = made[name].make(source, own[min(entry.cells)])
        for place in entry.places:
            place.put(real)
        HEAP.give_back()  # what making it has freed would stay resident, several times the weight
