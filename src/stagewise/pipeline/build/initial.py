"""A Pipeline's initial values: for a model on the meta device, or from a checkpoint.

Every rank creates and fills only its own cells; the values do not depend on the cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stagewise.checkpoints.loading import check, fill
from stagewise.checkpoints.names import Aliases
from stagewise.checkpoints.renamed import Renamed
from stagewise.checkpoints.sources import State, open_source
from stagewise.engine.stage.randomness import generators_kept, seed_initialisation
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.ranks import Ranks
from stagewise.model.cell import Chain
from stagewise.model.chain import Model, module_tree
from stagewise.model.materialise import materialise
from stagewise.model.meta_tensors import Init, is_meta
from stagewise.pipeline.build.places import ranks_of_cells
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
    aliases: Aliases,
    given: Given,
) -> None:
    """Give this rank's cells their initial values; collective.

    Raises ModelError or CheckpointError, on every rank, before a cell is changed on any.
    """
    runs = [ranks.rank in own for own in ranks_of_cells(plan, ranks)]
    own = [cell.index for cell in chain if runs[cell.index]]
    source, found = None, {}
    with agreed(ranks, "Pipeline: initial state"):
        on_meta = is_meta(chain)
        if given.state is not None:
            source = open_source(given.state, aliases)
            tensors, new = _tensors(chain, own), dict[str, Any]()
            if isinstance(given.state, Renamed):  # of a folder for a model of any dtype
                named = given.state.saved_name
                new = {"is_new": lambda name: named(name) is None, "convert": True}
            found = check(source, tensors, aliases, **new)
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
            )
        if source is not None:
            fill(source, _tensors(chain, own), found)


def _tensors(chain: Chain, cells: Sequence[int]) -> dict[str, torch.Tensor]:
    return module_tree([chain[index] for index in cells]).state_dict()
