"""Let the caller shard a rank's own stages, and find out what that has made of their parameters.

`parallelize(stage, mesh, index)` changes a stage in place, once its values are there and equal on
all ranks that hold it. It may change what parameters are, but not what they are called, nor replace
the cells, which run as they were given.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from stagewise.batch.layouts import is_sharded
from stagewise.engine.gradients.policy import ParameterPolicy
from stagewise.engine.gradients.shards import Axes, Sharding, form_of, spread_over
from stagewise.engine.stage.stage import Stage
from stagewise.engine.step.agreement import agreed
from stagewise.engine.step.digest import fingerprint
from stagewise.engine.transport.device_mesh import DeviceMesh, exchanges_noted
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import ModelError, PlanError, UsageError
from stagewise.model.cell import Cell
from stagewise.model.chain import module_tree

Parallelize = Callable[[nn.Module, DeviceMesh, int], object]
_WHAT = "Pipeline: parallelize"


def parallelised(
    stages: Mapping[int, Stage], mesh: DeviceMesh, parallelize: Parallelize, ranks: Ranks
) -> list[nn.Module]:
    """Call `parallelize` for each of this rank's stages; return the modules that it was given.

    ModelError on every rank if it fails, renames a parameter or replaces a cell on any; PlanError
    if ranks that hold the same stage differ afterwards.
    """
    made: list[nn.Module] = []
    with exchanges_noted() as exchanged, agreed(ranks, _WHAT):
        for index, stage in stages.items():
            whole = module_tree(stage.cells)
            before, roots = _names(whole), _roots(stage.cells, whole)
            with _told(index):
                returned = parallelize(whole, mesh, index)
            after = module_tree(stage.cells)
            if changed := before ^ (_names(after) | _names(whole)):
                raise ModelError(
                    f"parallelize renamed parameters of stage {index}: {sorted(changed)[:3]}; "
                    "change modules in place (module.compile(), checkpoint(module) of "
                    "torch.distributed._composable, fully_shard), so that names stay the model's"
                )
            if returned is not None and returned is not whole:
                raise ModelError(
                    f"parallelize returned another module for stage {index}, but its cells run as "
                    "they were given; change them in place (module.compile(), fully_shard), and "
                    "return None or the module itself"
                )
            if roots != _roots(stage.cells, whole):
                raise ModelError(
                    f"parallelize replaced a cell of stage {index}, which runs as it was given; "
                    "change it in place (module.compile(), fully_shard)"
                )
            made.append(whole)
        _check_exchanged(exchanged, mesh, ranks.slices.data_axes)
    _compare([f"parts exchanged along {sorted(exchanged)}", *_described(stages.values())], ranks)
    every = [] if not ranks.slices.data_axes else ranks.gather_all(exchanged, f"{_WHAT}: axes")
    whole_mesh: dict[str, bool] = {}
    for axis, is_alike in (pair for noted in every for pair in noted.items()):
        whole_mesh[axis] = whole_mesh.get(axis, False) or is_alike
    ranks.slices = replace(ranks.slices, exchanged=whole_mesh)
    return made


def _check_exchanged(
    exchanged: Mapping[str, bool], mesh: DeviceMesh, data_axes: Sequence[str]
) -> None:
    """Raise PlanError if cells exchange parts along an axis whose ranks have the same one."""
    own = mesh.mesh_dim_names or ()
    if wrong := [name for name in exchanged if name in own and name not in data_axes]:
        raise PlanError(
            f"parallelize divides sequences or experts over {wrong[0]!r}, but the Pipeline's data "
            f"axes are {[*data_axes]}, along which alone ranks have parts of their own; give "
            f"data_axes={[*data_axes, wrong[0]]}, or divide over another axis than the pipeline's"
        )


def sharding_of(
    trees: Sequence[nn.Module], mesh: DeviceMesh, ranks: Ranks
) -> tuple[Sharding, list[ParameterPolicy]]:
    """Return what is known of the stages' sharded parameters, and the policy that reduces them."""
    slices = ranks.slices
    over = {name: {*mesh[name].mesh.flatten().tolist()} for name in slices.data_axes}
    reduced: Mapping[nn.Parameter, frozenset[int]] = {}
    policies: list[ParameterPolicy] = []
    with agreed(ranks, _WHAT), _told(None):
        from stagewise.engine.gradients.fully_sharded import FullySharded, refuse_own_sums

        refuse_own_sums(trees)
        if any(is_sharded(p) for tree in trees for p in tree.parameters()):
            whole = FullySharded(trees, ranks.group([ranks.rank], slices.data_axes))
            reduced = whole.parameters
            policies = [whole] if reduced else []
    axes: dict[nn.Parameter, Axes] = {}
    for parameter in dict.fromkeys(p for tree in trees for p in tree.parameters()):
        if is_sharded(parameter):
            done = reduced.get(parameter, spread_over(parameter))
            axes[parameter] = tuple(a for a in slices.data_axes if not over[a] <= done)
    return Sharding(axes, frozenset(reduced)), policies


def refuse_float32(sharding: Sharding, in_float32: bool, ranks: Ranks) -> None:
    """Raise PlanError on all ranks if sharded parameters are to be summed in float32 here."""
    with agreed(ranks, _WHAT):
        if in_float32 and sharding.axes:
            raise PlanError(
                "accumulate_in_float32=True was given, but parallelize has sharded parameters, "
                "whose gradients their owner sums; give fully_shard "
                "MixedPrecisionPolicy(reduce_dtype=torch.float32) and leave "
                "accumulate_in_float32 out"
            )


def _compare(words: Sequence[str], ranks: Ranks) -> None:
    """Raise PlanError on every rank if those that hold the same stages have made others of them."""
    marks = [row[0] for row in ranks.exchange_all([fingerprint([*words])], f"{_WHAT}: parameters")]
    seatings = ranks.slices.seatings
    first = {seating.stage: rank for rank, seating in reversed([*enumerate(seatings)])}
    differing = [r for r, s in enumerate(seatings) if marks[r] != marks[first[s.stage]]]
    if not differing:
        return
    every = ranks.gather_all(words, f"{_WHAT}: differences")
    rank = differing[0]
    other = first[seatings[rank].stage]
    pairs = zip(every[rank], every[other], strict=False)
    here, there = next((pair for pair in pairs if pair[0] != pair[1]), ("more", "fewer"))
    raise PlanError(
        f"ranks {differing} parallelise their stages differently from others that hold the same: "
        f"rank {rank} has {here}, rank {other} {there}; let parallelize depend on the stage's "
        "index only, not on the rank"
    )


def _described(stages: Iterable[Stage]) -> Iterator[str]:
    for stage in stages:
        for name, parameter in module_tree(stage.cells).named_parameters():
            yield f"{name}: {form_of(parameter)}"


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


def _roots(cells: Iterable[Cell], whole: nn.Module) -> list[nn.Module]:
    """Return the cells' modules that `whole` has."""
    known = {*whole.modules()}
    return [module for cell in cells for _, module in cell.roots() if module in known]


@contextmanager
def _told(stage: int | None) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        where = "the stages after parallelize" if stage is None else f"stage {stage}"
        raise ModelError(
            f"parallelize failed for {where}: {type(error).__name__}: {error}; it gets the stage "
            "(a module with the model's names), the mesh and the stage's index"
        ) from error
