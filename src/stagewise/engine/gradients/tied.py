"""Tied parameters: one parameter in several cells, on one rank or on many.

Problem: autograd sums such a parameter's gradient in an order that depends on where the chain
is cut, and copies on several ranks would each get a part of it and drift apart.
Idea: while a using cell runs, a stand-in (a separate leaf on the same memory) takes the parameter's
place, so that each cell's gradient accumulates separately. At the end of a step they are summed in
cell order: partial sums travel along the users' ranks, and the total goes to all of them.
Invariant: every copy gets the same bits, once per step, so optimizers keep the copies equal.
"""

import itertools
import weakref
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from stagewise.batch.layouts import is_sharded
from stagewise.engine.gradients.part_sum import sums_over
from stagewise.engine.gradients.policy import ParameterPolicy, Settlement
from stagewise.engine.gradients.shards import like, local_of
from stagewise.engine.stage.gradient import (
    Gradient,
    dense_like,
    plus,
    taken,
    wide,
)
from stagewise.engine.stage.stand_ins import StandIns, _places
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.wires.group import Group
from stagewise.errors import CellError
from stagewise.model.tied_parameters import Tied


class TiedParameters(ParameterPolicy):
    """The tied parameters that cells of this rank use.

    `cells` are this rank's cells with their devices, `ranks[c]` the ranks that run cell c of the
    chain (several if its stage is replicated), `others` the parameters that no cell of this rank
    has. Those in `within` are only used in one replicated stage: `Replicas` sums them. Of sharded
    ones it sums this rank's parts over data axes, before the parts are summed over stages here; any
    others' sums are summed `over_data` by the last rank.
    """

    def __init__(
        self,
        ties: Sequence[Tied] = (),
        cells: Mapping[int, tuple[nn.Module, torch.device]] | None = None,
        ranks: Sequence[Sequence[int]] = (),
        others: Mapping[str, nn.Parameter] | None = None,
        within: Collection[nn.Parameter] = (),
        over_data: Group | None = None,
    ) -> None:
        cells, self._over_data = cells or {}, over_data
        self.ties = tuple(tied for tied in ties if not cells.keys().isdisjoint(tied.cells))
        self._ranks = ranks
        self._devices = {index: device for index, (_, device) in cells.items()}
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}  # keyed by using cells
        for tied in self.ties:
            if tied.parameter not in within:
                self._groups.setdefault(tied.cells, []).append(tied.parameter)
        self._copies = {tied.parameter: tied.copies for tied in self.ties}
        self._others = {
            name: weakref.ref(parameter)
            for name, parameter in (others or {}).items()
            if parameter.grad is None
        }
        self._given_outside: set[str] = set()  # of `others`, with a gradient before the first step
        known = {tied.parameter for tied in self.ties if not is_sharded(tied.parameter)}
        self._places = {
            index: places
            for index, (root, _) in cells.items()
            for places in [[place for place in _places(root) if place.parameter in known]]
            if places
        }

    @property
    def is_needed(self) -> bool:
        """Whether a parameter is tied here, or one elsewhere might be used by a cell of ours."""
        return bool(self.ties or self._others)

    @torch.no_grad()
    def broadcast_initial_values(self, ranks: Ranks) -> None:
        """Copy the first user's values to every copy."""
        for cells, parameters in self._groups.items():
            first = self._ranks[cells[0]][0]
            own = [dense_like(p, p.detach()) for p in parameters]
            values = self._spread(cells, first, own, parameters, ranks)
            for parameter, value in zip(parameters, values, strict=True):
                if first != ranks.rank and value is not None:
                    parameter.copy_(value)
        ranks.finish()

    def before_step(self, step: Settlement) -> None:
        """Let stand-ins collect the gradients, low-precision ones in float32 if asked for."""
        others = ((name, reference()) for name, reference in self._others.items())
        self._given_outside = {n for n, p in others if p is not None and p.grad is not None}
        plain = [tied.parameter for tied in self.ties if not is_sharded(tied.parameter)]
        before = {parameter: taken(parameter) for parameter in plain}
        step.stand_ins = StandIns(self._places, self._leaves(training=True), before)
        if step.in_float32:
            step.stand_ins.sum_in_float32()

    def before_inference(self, call: Settlement) -> None:
        """Make stand-ins only for cells on another device than the parameter's."""
        call.stand_ins = StandIns(self._places, self._leaves(training=False))

    def _leaves(self, *, training: bool) -> dict[tuple[int, nn.Parameter], nn.Parameter]:
        return {
            (cell, place.parameter): nn.Parameter(
                place.parameter.detach().to(self._devices[cell]),
                requires_grad=place.parameter.requires_grad,
            )
            for cell, places in self._places.items()
            for place in places
            if training or place.parameter.device != self._devices[cell]
        }

    def check(self, step: Settlement) -> None:
        """Raise CellError after the first step if a cell used an unregistered parameter of another
        rank.
        """
        for name, reference in self._others.items():
            parameter = reference()
            if parameter is None or parameter.grad is None:
                continue
            if name in self._given_outside:
                raise CellError(
                    f"the parameter {name}, which rank {step.ranks.rank} does not hold in this "
                    "Pipeline, was given a gradient there by something else (another Pipeline "
                    "that holds it on this rank, or a backward pass of your own); if both train "
                    "it, its copies drift apart: cut both Pipelines so that one rank holds it, or "
                    "set its .grad to None"
                )
            raise CellError(
                f"a cell on rank {step.ranks.rank} uses the parameter {name}, which none of "
                "its modules holds, so its gradient would be lost; register it in that cell "
                "(self.weight = other.weight), and it is tied"
            )
        self._others = {}

    @torch.no_grad()
    def settle(self, step: Settlement) -> None:
        """Sum the gradients of all users, and add the sum to the earlier gradient."""
        for cells, parameters in self._groups.items():
            forms = [*map(wide if step.in_float32 else local_of, parameters)]
            totals = self._sum(cells, parameters, forms, step)
            for parameter, total in zip(parameters, totals, strict=True):
                if parameter in step.stand_ins.before:
                    parameter.grad = step.stand_ins.before[parameter]
                if total is None:
                    continue
                step.add(parameter, like(parameter, total))
                for copy in self._copies[parameter]:
                    step.add(copy, like(copy, total.clone()))

    def undo(self, step: Settlement, error: BaseException) -> None:
        for parameter, gradient in step.stand_ins.before.items():
            parameter.grad = gradient

    def _sum(
        self,
        cells: tuple[int, ...],
        parameters: Sequence[nn.Parameter],
        forms: Sequence[torch.Tensor],
        step: Settlement,
    ) -> list[Gradient]:
        """Return each parameter's gradient summed over `cells`, left to right, on every user."""
        legs, ranks = self._legs(cells), step.ranks
        sums: list[Gradient] = [None] * len(parameters)
        for index, (rank, own) in enumerate(legs):
            if rank != ranks.rank:
                continue
            if index > 0:
                sums = ranks.take(legs[index - 1][0], forms)
            for number, parameter in enumerate(parameters):
                if is_sharded(parameter):
                    for copy in (parameter, *self._copies[parameter]):
                        sums[number] = plus(sums[number], step.parts.pop(copy, None))
                    continue
                for cell in own:
                    gradient = step.stand_ins.take_gradient(cell, parameter)
                    sums[number] = plus(sums[number], gradient)
                # Reentrant checkpointing reruns a cell during backward, without stand-ins.
                sums[number] = plus(sums[number], dense_like(parameter, taken(parameter)))
            if index + 1 < len(legs):
                ranks.give(legs[index + 1][0], sums)
            elif self._over_data is not None:
                own_parts = {n for n, p in enumerate(parameters) if is_sharded(p)}
                sums = sums_over(self._over_data, forms, sums, without=own_parts)
        return self._spread(cells, legs[-1][0], sums, forms, ranks)

    def _legs(self, cells: tuple[int, ...]) -> list[tuple[int, list[int]]]:
        """Return the route of the partial sums: in cell order, then from replica to replica."""
        stops = [
            (rank, cell)
            for ranks, same in itertools.groupby(cells, self._ranks.__getitem__)
            for own in [list(same)]
            for rank in ranks
            for cell in own
        ]
        by_rank = itertools.groupby(stops, lambda stop: stop[0])
        return [(rank, [cell for _, cell in stops]) for rank, stops in by_rank]

    def _spread(
        self,
        cells: tuple[int, ...],
        source: int,
        values: list[Gradient],
        like: Sequence[torch.Tensor],
        ranks: Ranks,
    ) -> list[Gradient]:
        """Return rank `source`'s values on every rank that runs one of `cells`."""
        users = sorted({rank for cell in cells for rank in self._ranks[cell]} - {source})
        if ranks.rank != source:
            return ranks.take(source, like)
        for user in users:
            ranks.give(user, values)
        return values
