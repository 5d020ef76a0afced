"""What a recipe's `parallelize` makes of its cells along axes such as tp, sp and ep.

It is called for the whole model on the meta device, on a mesh that is only pretended; then cells
are estimated as they are, with the exchanges inside them. What it refuses is refused in its words.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stagewise.batch.layouts import num_bytes
from stagewise.costs import without_gradients
from stagewise.engine.gradients.shards import divided_along
from stagewise.engine.transport.pretended import Beside, pretended_mesh
from stagewise.errors import PlanError, StagewiseError
from stagewise.mesh import is_data_axis
from stagewise.model.cell import Chain
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import module_tree
from stagewise.planning.devices import DeviceSpec
from stagewise.planning.meshes.divided_cells import DividedCells
from stagewise.planning.meshes.mesh_search import DATA_AXES
from stagewise.profiling.estimate import cell_work
from stagewise.training.batches import TrainingBatches
from stagewise.training.recipe import Batch, Model, Recipe
from stagewise.training.recipe_costs import meta_model

_SHARED, _SHARDS = "tp", DATA_AXES[-1]


def axes_of(recipe: Recipe) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """Return the axes that a recipe has a use for, and why others are left out.

    Along dp_shard and tp its `parallelize` must spread parameters; others it names in `data_axes`.
    """
    own = [name for name in recipe.mesh.data_axes if not is_data_axis(name)]
    without = {n: why for n in (_SHARDS, _SHARED) if (why := _no_use(recipe, n)) is not None}
    return [n for n in (*DATA_AXES, *own, _SHARED) if n not in without], [*without.items()]


def _no_use(recipe: Recipe, axis: str) -> str | None:
    """Return why a recipe has no use for an axis; None if it has."""
    if recipe.mesh.parallelize is None:
        why = f"nothing in {recipe.path} divides cells; define parallelize(module, mesh, index)"
        return why if axis == _SHARED else None
    try:
        batch = TrainingBatches(recipe, seed=0).first
        with _parallelised(recipe, meta_model(recipe), batch, [Beside(axis, 2, 2)]) as chain:
            is_used = any(_own_bytes(chain, axis))
    except StagewiseError as error:
        return str(error).splitlines()[0]
    return None if is_used else f"parallelize in {recipe.path} spreads no parameters along it"


def divided_cells(
    recipe: Recipe, batch: Batch, count: int, device: DeviceSpec, divided: Sequence[Beside]
) -> DividedCells:
    """Estimate a rank's cells for one of `count` microbatches of its own part of the batch."""
    model = meta_model(recipe)
    with _parallelised(recipe, model, batch, divided) as chain:
        with recipe.precision():
            work = cell_work(
                model, batch[0], target=batch[1], loss=recipe.loss, num_microbatches=count
            )
        data = [name for name, *_ in divided if name in recipe.mesh.data_axes]
        return DividedCells(
            costs=without_gradients([cell.cost(device) for cell in work]),
            exchange_seconds=tuple(cell.exchange_seconds(device) for cell in work),
            own_bytes={name: _own_bytes(chain, name) for name in data},
            shared=tuple(name for name, *_ in divided if name not in data),
        )


@contextmanager
def _parallelised(
    recipe: Recipe, model: Model, batch: Batch, divided: Sequence[Beside]
) -> Iterator[Chain]:
    """Within, the model is as `parallelize` makes it for the rank of a mesh of these axes."""
    chain = chain_for(model, batch[0], {}, recipe.cells)
    parallelize = recipe.mesh.parallelize
    if not divided or parallelize is None:
        yield chain
        return
    with pretended_mesh(divided) as mesh:
        try:
            parallelize(module_tree(chain), mesh, 0)
        except StagewiseError:
            raise
        except Exception as error:
            raise PlanError(
                f"parallelize in {recipe.path} fails on a mesh of {mesh.mesh_dim_names}: "
                f"{type(error).__name__}: {error}"
            ) from error
        _check_equal(recipe, chain)
        yield chain


def _check_equal(recipe: Recipe, chain: Chain) -> None:
    """Raise PlanError for a parameter of which ranks would have unequal parts."""
    for cell in chain:
        for name, parameter in cell.module.named_parameters():
            for axis, dim, length in divided_along(parameter):
                if parameter.shape[dim] % length:
                    raise PlanError(
                        f"{name} of {cell.in_words} is {tuple(parameter.shape)}, and {length} "
                        f"ranks along {axis!r} cannot share its dimension {dim} equally"
                    )


def _own_bytes(chain: Chain, axis: str) -> tuple[int, ...]:
    """Return, by cell, the bytes of trained parameters that ranks along an axis have others of."""
    return tuple(
        sum(
            num_bytes(p)
            for p in cell.module.parameters()
            if p.requires_grad and axis in {name for name, *_ in divided_along(p)}
        )
        for cell in chain
    )
