"""Pipelines side by side on a mesh, on real processes, in float64: the plain model's steps.

The cells of `benchmarks.mesh` are a table of their own (`make test-mesh`); some of them run here.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import stagewise
from benchmarks.mesh.compare import Cell, Outcome, differences, on_mesh, plain
from benchmarks.mesh.inner import INNER, sharded
from benchmarks.mesh.table import TOLERANCE, plan_of
from stagewise.costs import FREE_LINK, CellCost
from stagewise.mesh import MeshShape
from stagewise.parallel import shard_cells
from stagewise.planning.alternatives import Room
from stagewise.planning.meshes.mesh_cost import MeshCost
from stagewise.schedule.sharded import num_gathers, with_gathers
from tests.harness import Pools

pytestmark = [
    pytest.mark.filterwarnings("ignore:BatchNorm layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning"),
]

CELLS = {
    4: [
        Cell(2, "DDP", "gpipe", "tied"),
        Cell(2, "FSDP2", "zb_v", "tied"),
        Cell(2, "TP", "zb_v", "lora"),
        Cell(1, "HSDP", "1f1b", "tied"),
        Cell(1, "FSDP2+TP", "gpipe", "decoder"),
        Cell(1, "USP", "1f1b", "encoder-decoder"),
        Cell(2, "ring", "zb_v", "tied"),
        Cell(2, "EP", "zb_v", "moe"),
    ],
}
AGAIN = [
    Cell(2, "FSDP2", "interleaved", "tied"),
    Cell(2, "FSDP2", "zb_v", "lora"),
]  # those of eight ranks take `make test-mesh`
NUM_STEPS = 2  # the first makes messages known, the second has them posted ahead
OPTIONS = {"schedule": "1f1b", "num_microbatches": 2}


def several(cells: list[Cell], plans: list[stagewise.Plan]) -> list[Outcome]:
    return [on_mesh(cell, plan, NUM_STEPS) for cell, plan in zip(cells, plans, strict=True)]


@pytest.mark.parametrize("num_ranks", CELLS)
def test_two_steps_are_the_plain_models(num_ranks: int, own_pools: Pools) -> None:
    cells = [*CELLS[num_ranks], *AGAIN]
    plans = [plan_of(cell) for cell in cells]
    again = [replace(plan, regathered=(0, 1, 2, 3)) for plan in plans[-len(AGAIN) :]]
    again[0] = replace(again[0], gathers_ahead=False)
    plans[-len(AGAIN) :] = again
    ranks = own_pools[num_ranks].run(several, cells, plans, seconds=120)
    for cell, outcomes in zip(cells, zip(*ranks, strict=True), strict=True):
        found = differences(outcomes, plain(cell, num_steps=NUM_STEPS))
        assert max(found.loss, found.gradient, found.parameter) <= TOLERANCE, (cell, found)


class Noisy(nn.Module):
    """With dropout, an added loss, and a parameter that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.3)
        self.rare = nn.Parameter(torch.ones(6))
        self.never = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        stagewise.add_loss(x.square().mean() / 10, "size")
        x = self.drop(self.linear(x).tanh())
        return x * self.rare if x[0, 0] > 0 else x


def noisy() -> nn.Sequential:
    torch.manual_seed(0)
    cells = [nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), Noisy(), Noisy(), nn.Linear(6, 2)]
    return nn.Sequential(*cells).double()


def samples() -> tuple[list[Tensor], list[Tensor]]:
    """Four batches, of which two are one step."""
    torch.manual_seed(1)
    inputs = [torch.randn(number, 6, dtype=torch.float64) for number in (20, 12, 20, 16)]
    return inputs, [torch.randn(len(x), 2, dtype=torch.float64) for x in inputs]


def heavy(target: Tensor) -> Tensor:
    return target.square().sum()


def mean_by_weight(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target).square().sum(1) * target.square().sum(1)).sum() / heavy(target)


def accumulated(pipe: stagewise.Pipeline, part: int, num_parts: int) -> dict[str, Any]:
    """Two AdamW steps of two calls each, scaled as for half precision, then an evaluation."""
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01, foreach=False)
    found: dict[str, Any] = {}
    inputs, targets = samples()
    for start in (0, 2):
        totals = {
            "total_samples": sum(map(len, inputs[start : start + 2])),
            "total_weight": float(sum(map(heavy, targets[start : start + 2]))),
        }
        for index in (start, start + 1):
            x, y = (every[index].tensor_split(num_parts)[part] for every in (inputs, targets))
            found[f"loss {index}"] = pipe.step(x, target=y, loss_scale=4.0, **totals)
            found |= {f"{name} {index}": loss for name, loss in pipe.losses.items()}
        for parameter in pipe.parameters():
            if parameter.grad is not None:
                parameter.grad /= 4.0
        found[f"norm {start}"] = pipe.clip_grad_norm_(0.2, norm_type=3.0)
        optimizer.step()
        gradients = {name: parameter.grad for name, parameter in pipe.named_parameters()}
        optimizer.zero_grad()
    found["microbatches"] = [len(pipe.microbatch_losses())]
    x, y = (every[0].tensor_split(num_parts)[part] for every in (inputs, targets))
    found["evaluated"] = pipe.evaluate(x, target=y)
    for kind in (pipe.named_parameters(), pipe.named_buffers(), gradients.items()):
        for name, value in kind:
            key = f"{'gradient ' * (kind is not None and name in found)}{name}"
            found[key] = None if value is None else whole(value.detach())
    return found


def whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).clone()


def pipe_on(mesh: DeviceMesh | None, **options: Any) -> stagewise.Pipeline:
    plan = stagewise.Plan(balance=(3, 2), schedule="1f1b", num_microbatches=2)
    if mesh is None:
        plan = stagewise.Plan(balance=(5,), schedule="1f1b", num_microbatches=4)
    return stagewise.Pipeline(
        noisy(), plan, loss=mean_by_weight, weight=heavy, seed=3, mesh=mesh, **options
    )


def noise_on_data_ranks(parallelize: Callable[..., object] | None) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "pp"))
    pipe = pipe_on(mesh, parallelize=parallelize)
    return accumulated(pipe, mesh.get_local_rank("dp_shard"), 2)


@pytest.mark.parametrize("parallelize", [None, sharded], ids=["replicas", "fully sharded"])
def test_data_ranks_draw_weigh_and_normalise_as_one(
    parallelize: Callable[..., object] | None, own_pools: Pools
) -> None:
    """Dropout, weights, added losses, BatchNorm, accumulation, clipping; gradients some lack."""
    ranks = own_pools[4].run(noise_on_data_ranks, parallelize)
    expected = accumulated(pipe_on(None), 0, 1)
    assert expected["microbatches"] == [4]
    seen = set[str]()
    for found in ranks:
        for key, value in found.items():
            if isinstance(value, Tensor):
                assert torch.allclose(value, expected[key], rtol=1e-12, atol=1e-14), key
            else:
                assert value == expected[key], key
        seen |= found.keys()
    assert seen == expected.keys()


class Counting(TorchDispatchMode):
    """Counts what is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


def reductions(names: tuple[str, ...], plan: stagewise.Plan, size: int = 16) -> dict[str, Any]:
    """Count collectives of a step on `size` samples, of which data rank 1 has two only if that is
    odd; and how far gradients are from the plain model's.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4).double() for _ in range(4)])
    inputs = torch.randn(2 * size, 4, dtype=torch.float64)
    inputs = inputs[: size + 2] if size % 2 else inputs
    plain = copy.deepcopy(model)

    def each(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
        for cell in stage.children():
            fully_shard(cell, mesh=mesh["dp_shard"], mp_policy=MixedPrecisionPolicy())

    loss = nn.functional.mse_loss
    loss(plain(inputs), torch.zeros_like(inputs)).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    pipe = stagewise.Pipeline(model, plan, loss=loss, mesh=mesh, parallelize=each)
    kept = sum(p.to_local().numel() for p in pipe.parameters())  # type: ignore[attr-defined]
    own = (inputs[:size], inputs[size:])[mesh.get_local_rank("dp_shard")]
    with Counting() as counting:
        pipe.step(own, target=torch.zeros_like(own))
    worst = 0.0
    for name, parameter in pipe.named_parameters():
        assert parameter.grad is not None
        difference = whole(parameter.grad) - gradients[name]  # type: ignore[operator]
        worst = max(worst, float(difference.abs().max()))
    gathers = num_gathers(with_gathers(plan.built_schedule, {s: s for s in range(plan.num_stages)}))
    planned = [gathers[s] for s in plan.built_schedule.stages_of(mesh.get_local_rank("pp"))]
    counts = {name: counting.calls[name] for name in names}
    return counts | {"parameters": kept, "planned": planned, "difference": worst}


NAMES = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_")


def test_a_step_gathers_and_reduces_once(own_pools: Pools) -> None:
    """Two layers a stage: two of each, whatever the number of microbatches; half of each layer."""
    plan = stagewise.Plan(balance=(2, 2), schedule="zb_h1", num_microbatches=8)
    for found in own_pools[4].run(reductions, NAMES, plan):
        assert [found[name] for name in NAMES] == [2, 2, 1]  # one: which gradients there are
        assert found["parameters"] == 20 and found["planned"] == [1]
        assert found["difference"] < 1e-15


@pytest.mark.parametrize("size", [16, 9])
def test_a_step_gathers_as_often_as_the_plan_says(size: int, own_pools: Pools) -> None:
    """Also where a data rank has two microbatches, and the other eight; reduced once all the same.

    Each stage is one layer; rank 0 has stages 0 and 2, rank 1 has 1 and 3.
    """
    plan = stagewise.Plan(
        balance=(1, 1, 1, 1), schedule="interleaved", num_microbatches=8, regathered=(0, 1, 3)
    )
    for rank, found in enumerate(own_pools[4].run(reductions, NAMES, plan, size)):
        planned = [[12, 1], [5, 4]][rank // 2]
        assert found["planned"] == planned
        assert [found[name] for name in NAMES] == [sum(planned), 2, 1]
        assert found["difference"] < 1e-15


def kept() -> int:
    """The bytes that this rank keeps after a step: parameters, gradients and AdamW's state."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
    plan = stagewise.Plan(balance=(2, 2), schedule="1f1b", num_microbatches=2)
    model, loss = nn.Sequential(*[nn.Linear(30, 30) for _ in range(4)]), nn.functional.mse_loss
    pipe = stagewise.Pipeline(model, plan, loss=loss, mesh=mesh, parallelize=shard_cells)
    optimizer = torch.optim.AdamW(pipe.parameters())
    pipe.step(torch.ones(4, 30), target=torch.zeros(4, 30))
    optimizer.step()
    tensors = [*pipe.parameters(), *(p.grad for p in pipe.parameters())]
    tensors += [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    storages = [t.to_local().untyped_storage() for t in tensors]  # type: ignore[union-attr]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def test_a_rank_keeps_the_quarter_that_is_predicted(own_pools: Pools) -> None:
    """Two stages, sharded over two: a quarter of four times the parameters."""
    costs = [
        CellCost(name=str(i), forward_seconds=1, backward_seconds=2, parameter_bytes=930 * 4)
        for i in range(4)
    ]
    predicted = MeshCost(
        shape=MeshShape.of("pp=2,dp_shard=2"),
        plan=stagewise.Plan(balance=(2, 2), num_microbatches=2, cells=tuple(costs)),
        room=Room(device="cpu", memory_bytes=1 << 30, state_factor=4.0),
        link_over=lambda _: FREE_LINK,
    )
    assert predicted.kept_bytes == (4 * 930 * 4,) * 2  # of 16 times as much in all
    for rank, found in enumerate(own_pools[4].run(kept)):
        assert found == pytest.approx(predicted.kept_bytes[rank // 2], rel=0.1)


def between_stages() -> nn.Sequential:
    torch.manual_seed(0)
    cells = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4)]
    return nn.Sequential(*cells).double()


def spread(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    """The value between the stages is divided by samples, of which there may be an odd number."""
    first = {
        "0": ColwiseParallel(use_local_output=False),
        "1": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
    }
    second = {"3": ColwiseParallel(input_layouts=Shard(0)), "4": RowwiseParallel()}
    parallelize_module(stage, mesh["tp"], second if index else first)


def across_stages(num_samples: int) -> float:
    """The largest difference of losses and gradients to the plain model's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    plan = stagewise.Plan(balance=(3, 2), schedule="zb_h1", num_microbatches=4)
    loss = nn.functional.mse_loss
    pipe = stagewise.Pipeline(between_stages(), plan, loss=loss, mesh=mesh, parallelize=spread)
    torch.manual_seed(1)
    x, target = (torch.randn(num_samples, n, dtype=torch.float64) for n in (6, 4))
    reference = between_stages()
    expected = loss(reference(x), target)
    expected.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    worst = abs(float(pipe.step(x, target=target)) - float(expected.detach()))
    for name, parameter in pipe.named_parameters():
        assert parameter.grad is not None
        difference = whole(parameter.grad) - gradients[name]  # type: ignore[operator]
        worst = max(worst, float(difference.abs().max()))
    return worst


def test_values_between_stages_may_be_spread_over_ranks(own_pools: Pools) -> None:
    assert max(own_pools[4].run(across_stages, 13)) < 1e-14


class Failing(nn.Module):
    """Fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.fails = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and x[0, 0] > 1:
            raise ValueError("too much")
        return self.linear(x)


def a_failure(inner: str) -> Mapping[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp_shard"))
    plan = stagewise.Plan(balance=(1, 1), **OPTIONS)
    torch.manual_seed(0)
    model = nn.Sequential(Failing(), Failing())
    parallelize = INNER[inner].parallelize
    loss = nn.functional.mse_loss
    pipe = stagewise.Pipeline(model, plan, loss=loss, mesh=mesh, parallelize=parallelize)
    x, target = torch.full((4, 4), 2.0 * mesh.get_local_rank("dp_shard")), torch.zeros(4, 4)
    first = float(pipe.step(x, target=target))
    before = [whole(p.grad) for p in pipe.parameters() if p.grad is not None]
    for module in pipe.module.modules():
        if isinstance(module, Failing):
            module.fails = True
    try:
        pipe.step(x, target=target)
        said = ""
    except stagewise.StagewiseError as error:
        said = str(error)
    after = [whole(p.grad) for p in pipe.parameters() if p.grad is not None]
    for module in pipe.module.modules():
        if isinstance(module, Failing):
            module.fails = False
    equal = len(before) == 2 and all(map(torch.equal, before, after))
    pipe.zero_grad()
    return {"said": said, "kept": equal, "again": float(pipe.step(x, target=target)) == first}


@pytest.mark.parametrize("inner", ["DDP", "FSDP2"])
def test_a_failure_of_one_data_rank_is_undone_on_all(inner: str, own_pools: Pools) -> None:
    for found in own_pools[4].run(a_failure, inner):
        assert "too much" in found["said"]
        assert found["kept"] and found["again"]


def with_unequal_groups() -> float:
    """Ranks have other groups, as many as their number, before the pipeline is built."""
    own = [dist.get_rank()]
    made = [dist.new_group(own, use_local_synchronization=True) for _ in range(own[0])]
    found = a_failure("DDP")
    for group in made:
        dist.destroy_process_group(group)
    return float(found["again"])


def test_ranks_may_have_other_groups_of_their_own(own_pools: Pools) -> None:
    assert own_pools[4].run(with_unequal_groups, seconds=40) == [1.0] * 4


def refused(what: str) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    options: dict[str, Any] = {"mesh": mesh}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plan = stagewise.Plan(balance=(1, 1), **OPTIONS)
    batch = torch.ones(4, 4)
    match what:
        case "axis":
            options["pipeline_axis"] = "stage"
        case "data axis":
            options["data_axes"] = ("data",)
        case "no names":
            options["mesh"] = init_device_mesh("cpu", (2, 2))
        case "unclear":
            options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "x"))
        case "no mesh":
            options["mesh"] = (2, 2)
        case "size":
            plan = stagewise.Plan(balance=(1,), **OPTIONS)
            model = nn.Sequential(nn.Linear(4, 4))
        case "sharded before":
            fully_shard(model, mesh=mesh["dp"])
        case "differently":
            options["parallelize"] = differently
        case "renamed":
            options["parallelize"] = renamed
        case "fails":
            options["parallelize"] = fails
        case "averages":
            options["parallelize"] = averages
        case "no mesh for it":
            options = {"parallelize": fails, "transport": "local"}
        case "float32":
            options |= {"parallelize": sharded, "accumulate_in_float32": True}
        case "without mesh":
            del options["mesh"]
        case "local":
            options["transport"] = "local"
        case "tied apart":
            model[1].weight = model[0].weight
            options["parallelize"] = differently_by_stage
        case "empty part":
            batch = torch.ones(4 * mesh.get_local_rank("dp"), 4)
    try:
        pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, **options)
        pipe.step(batch, target=batch)
    except (stagewise.StagewiseError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def differently(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    if mesh.get_local_rank("dp") == 1:
        fully_shard(stage, mesh=mesh["dp"])


def differently_by_stage(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    if index == 1:
        fully_shard(stage, mesh=mesh["dp"])


def renamed(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    for name, cell in [*stage.named_children()]:
        setattr(stage, name, nn.Sequential(cell))


def fails(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    if index == 1:
        fully_shard(nn.ModuleList(stage.children()), mesh=mesh["dp"])


def averages(stage: nn.Module, mesh: DeviceMesh, index: int) -> None:
    for cell in stage.children():
        replicate(cell)


REFUSALS = {
    "axis": "PlanError: the mesh has the axes ('pp', 'dp'), none of which is 'stage'",
    "data axis": "PlanError: data_axes names ['data']",
    "no names": "PlanError: the mesh has the axes (), none of which is 'pp'",
    "unclear": "PlanError: the mesh's axes ['x'] may have ranks with a part of the batch each",
    "no mesh": "PlanError: mesh is a tuple; give a DeviceMesh",
    "size": "PlanError: the plan needs 1 ranks, one per device, but the mesh has 2 along 'pp'",
    "sharded before": "ModelError: 0.weight, 0.bias, 1.weight (4 parameters) are DTensors already",
    "differently": "PlanError: ranks [1, 3] parallelise their stages differently",
    "renamed": "parallelize renamed parameters of stage ",
    "fails": "parallelize failed for stage 1: ValueError: fully_shard does not support",
    "averages": "ModelError: a DDPLinear averages its gradients over ranks",
    "no mesh for it": "PlanError: parallelize was given without a mesh",
    "float32": "PlanError: accumulate_in_float32=True was given, but parallelize has sharded",
    "without mesh": "PlanError: the plan needs 2 ranks, one per device, but 4 are running",
    "local": "PlanError: transport is 'local' and a mesh was given",
    "tied apart": "ModelError: 0.weight, 1.weight are one parameter, but parallelize has sharded",
    "empty part": "",
}


def every_refusal(names: list[str]) -> list[str]:
    return [refused(name) for name in names]


def test_what_does_not_fit_is_refused_on_every_rank(own_pools: Pools) -> None:
    for said in own_pools[4].run(every_refusal, [*REFUSALS]):
        for one, (name, expected) in zip(said, REFUSALS.items(), strict=True):
            assert one and expected in one, (name, one)
