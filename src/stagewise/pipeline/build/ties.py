"""Tie parameters that cells of several stages share, and forbid replicas to change buffers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from stagewise.engine.gradients.float32 import Float32Sums
from stagewise.engine.gradients.policy import ParameterPolicy
from stagewise.engine.gradients.replicas import Replicas
from stagewise.engine.gradients.shards import NO_SHARDING, Sharding, form_of
from stagewise.engine.gradients.tied import TiedParameters
from stagewise.engine.stage.stage import Stage
from stagewise.engine.step.agreement import agreed
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError
from stagewise.model.cell import Chain
from stagewise.model.chain import module_tree
from stagewise.model.tied_parameters import Tied
from stagewise.pipeline.build.places import _stages, ranks_of_cells
from stagewise.planning.plan import Plan


@dataclass(frozen=True)
class Copies:
    """The parameters of this rank that other cells or ranks have as well."""

    tied: TiedParameters
    replicas: Replicas

    def broadcast_initial_values(self, ranks: Ranks) -> None:
        """Make all copies equal; collective."""
        self.replicas.broadcast_initial_values()
        self.tied.broadcast_initial_values(ranks)

    def policies(self, stages: Mapping[int, Stage], *, in_float32: bool) -> list[ParameterPolicy]:
        """Return a step's policies; `in_float32`: sum low-precision gradients in float32."""
        cells = [cell for stage in stages.values() for cell in stage.cells]
        sums: list[ParameterPolicy] = []
        if in_float32:
            sums.append(Float32Sums(dict.fromkeys(module_tree(cells).parameters())))
        return sums + [policy for policy in (self.tied, self.replicas) if policy.is_needed]


def copies_of(
    chain: Chain,
    plan: Plan,
    stages: Mapping[int, Stage],
    ranks: Ranks,
    ties: Sequence[Tied],
    sharding: Sharding = NO_SHARDING,
) -> Copies:
    """Find this rank's copies, and make the groups that sum their gradients; collective."""
    placement = () if ranks.is_alone else plan.built_schedule.placement
    cells = [cell for stage in stages.values() for cell in stage.cells]
    own = dict.fromkeys(module_tree(cells).parameters())
    others = {n: p for n, p in module_tree(chain).named_parameters() if p not in own}
    stage_of, data_axes = _stages(plan), ranks.slices.data_axes

    def is_within(tied: Tied) -> bool:
        used_in = {stage_of[cell] for cell in tied.cells}
        shares = placement and (data_axes or len(placement[min(used_in)]) > 1)
        return bool(shares) and len(used_in) == 1 and tied.parameter not in sharding.axes

    within = {tied.parameter: tied.cells for tied in ties if is_within(tied)}
    apart = {copy for tied in ties for copy in (tied.parameter, *tied.copies)} - within.keys()
    replicas = Replicas(stages, placement, ranks, apart=apart, within=within, sharding=sharding)
    tied = TiedParameters(
        ties,
        {c.index: (c.module, stage.device) for stage in stages.values() for c in stage.cells},
        ranks_of_cells(plan, ranks),
        others,
        within,
        ranks.group([ranks.rank], data_axes) if ties and ranks.is_on_mesh else None,
    )
    return Copies(tied, replicas)


def ties_after(ties: Sequence[Tied], stages: Mapping[int, Stage], ranks: Ranks) -> tuple[Tied, ...]:
    """Return `ties` with the parameters that this rank's stages have now, under the same names.

    Raises ModelError on every rank if a stage has made several of one, or stages differ in it.
    """
    now = [dict(_named(stage)) for stage in stages.values()]
    found, forms = [], []
    with agreed(ranks, "Pipeline: parallelize: tied parameters"):
        for tied in ties:
            own = [{id(at[n]): at[n] for n in tied.names if n in at} for at in now]
            if any(len(parts) > 1 for parts in own):
                raise ModelError(
                    f"{', '.join(tied.names)} are one parameter, but parallelize has made several "
                    "of it; shard the modules that share it together (fully_shard([one, other]), "
                    "or the whole stage)"
                )
            first, *copies = [p for parts in own for p in parts.values()] or [tied.parameter]
            distinct = {id(p): p for p in copies if p is not first}
            found.append(replace(tied, parameter=first, copies=tuple(distinct.values())))
            forms.append({form_of(p) for parts in own for p in parts.values()})
    for tied, *of_ranks in zip(found, *ranks.gather_all(forms, "Pipeline: ties"), strict=True):
        if len(every := set().union(*of_ranks)) > 1:
            raise ModelError(
                f"{', '.join(tied.names)} are one parameter, but parallelize has sharded it "
                f"differently on the stages that use it: {', '.join(sorted(every))}; treat it alike"
            )
    return tuple(found)


def _named(stage: Stage) -> Iterator[tuple[str, nn.Parameter]]:
    return module_tree(stage.cells).named_parameters(remove_duplicate=False)


def forbid_changing_buffers(stages: Mapping[int, Stage], plan: Plan, ranks: Ranks) -> None:
    """Make replicated stages raise if a cell's buffers change in forward."""
    for index, stage in stages.items():
        num_copies = len(ranks.slices.pipelines) * len(plan.built_schedule.placement[index])
        if num_copies == 1:
            continue
        names = {module: path for cell in stage.cells for path, module in cell.named_modules()}
        stage.buffers.forbid_changes(
            names,
            f"stage {index} has {num_copies} replicas, none of which sees all microbatches, so "
            "their copies would differ; give that stage one device, put the cell on a stage with "
            "one, or, if it is a constant, register it with persistent=False",
        )
