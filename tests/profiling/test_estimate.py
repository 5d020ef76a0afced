"""Estimates: bytes are the profiler's, FLOPs those of paper and pencil; nothing is allocated."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.costs import CellCost, without_gradients
from stagewise.errors import BatchError, DeviceError, ModelError
from stagewise.model.chain import chain_of
from stagewise.planning import load_devices, plan_from_costs
from stagewise.profiling.estimate import cell_work
from stagewise.profiling.trial_steps import profile
from tests.models import EXAMPLES, Call

BYTES = [f.name for f in fields(CellCost) if f.name.endswith("_bytes")] + ["far_outputs"]
# oneDNN's LSTM keeps a workspace whose size only its kernel knows.
CPU = load_devices()["cpu"]
COMPARED = sorted(set(EXAMPLES) - {"shared_modules"})


def by_name(costs: object) -> list[tuple[object, ...]]:
    """Name and bytes of each cell."""
    return [(cost.name, *(getattr(cost, name) for name in BYTES)) for cost in costs]  # type: ignore[attr-defined]


def measured_bytes(
    model: nn.Module,
    inputs: object,
    target: object,
    loss: Callable[..., Tensor] | None,
    **kwargs: object,
) -> list[tuple[object, ...]]:
    costs = profile(
        chain_of(model),
        (inputs, target, kwargs),
        loss=loss,
        device=torch.device("cpu"),
        seconds=0.0,
        split=True,
    )
    return by_name(costs)


@pytest.mark.parametrize("name", COMPARED)
def test_bytes_are_those_that_the_profiler_measures(name: str) -> None:
    example = EXAMPLES[name]
    torch.manual_seed(0)
    model, inputs, target = example.model(), example.inputs(8), example.target(8)
    loss: Callable[..., Tensor] | None = None
    if example.loss is not None:
        plain = example.loss
        # Real reductions to a mean on the CPU leave their scratch space behind the scalar.
        loss = lambda *arguments: plain(*arguments) * 1.0  # noqa: E731
    measured = measured_bytes(model, inputs, target, loss)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    work = cell_work(model, inputs, target=target, loss=loss, num_microbatches=1)
    assert by_name(without_gradients(cell.cost(CPU) for cell in work)) == measured
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_keyword_arguments_and_the_first_microbatch_count_as_measured() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x) * mask

    model = nn.Sequential(Masked(4, 4), nn.Tanh(), Masked(4, 4))
    inputs, mask = torch.ones(6, 4), torch.ones(6, 4)
    loss = nn.functional.cross_entropy
    target = torch.zeros(6, dtype=torch.long)
    work = cell_work(
        model, inputs, target=target, kwargs={"mask": mask}, loss=loss, num_microbatches=2
    )
    measured = measured_bytes(model, inputs[:3], target[:3], loss, mask=mask[:3])
    assert by_name(without_gradients(cell.cost(CPU) for cell in work)) == measured


class TwoProducts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


class UsedTwice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight.sum()


@pytest.mark.parametrize(
    ("module", "inputs", "kept"),
    [
        (nn.Linear(6, 4), torch.ones(5, 6), 5 * 6 + 5 * 4),
        (nn.Linear(6, 4).requires_grad_(False), torch.ones(5, 6), 0),
        (nn.LayerNorm(6), torch.ones(5, 6), 0),
        (TwoProducts(), torch.ones(5, 6), 5 * 6 + 2 * 5 * 4),  # its input once
        (UsedTwice(6, 4), torch.ones(5, 6), 5 * 6 + 5 * 4),  # for the bias, with all of its product
        (nn.Conv1d(2, 3, 1), torch.ones(5, 2, 7), 5 * 2 * 7 + 5 * 3 * 7),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_waits_for_weights_is_what_the_engine_keeps(
    module: nn.Module, inputs: Tensor, kept: int
) -> None:
    model = nn.Sequential(nn.PReLU(), module, nn.Tanh())
    loss = lambda output: (output * 1.0).mean()  # noqa: E731
    work = cell_work(model, inputs, loss=loss, num_microbatches=1)
    cells = [cell.cost(load_devices()["cpu"]) for cell in work]
    assert by_name(cells) == measured_bytes(model, inputs, None, loss)
    assert cells[1].deferred_bytes == 4 * kept
    assert cells[1].deferred_input_bytes in (0, inputs.nbytes)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, s, width = x.shape
        parts = self.qkv(x).view(n, s, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        return x + self.out(mixed.transpose(1, 2).reshape(n, s, width))


def test_flops_are_those_of_paper_and_pencil() -> None:
    n, s, d = 2, 16, 8
    model = nn.Sequential(Attention(d, 2), Attention(d, 2), nn.Linear(d, 32))
    inputs = torch.empty(n, s, d, device="meta")
    work = cell_work(model, inputs, loss=lambda output: output.mean(), num_microbatches=1)
    products, scores = 2 * n * s * 4 * d * d, 2 * 2 * n * s * s * d
    assert [cell.forward_flops for cell in work] == [products + scores] * 2 + [2 * n * s * d * 32]
    # The first cell's input gets no gradient, but its queries, keys and values do.
    first = 2 * products - 2 * n * s * d * 3 * d + scores * 5 // 2
    assert work[0].backward_flops == first
    assert work[1].backward_flops == 2 * products + scores * 5 // 2
    assert work[2].backward_flops == 2 * work[2].forward_flops


def test_backward_splits_by_operator() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)), nn.LayerNorm(64))
    inputs = torch.empty(32, 64, device="meta")
    cells = cell_work(model, inputs, loss=lambda output: output.mean(), num_microbatches=1)
    product = 2 * 32 * 64 * 64
    flops = [sum(op.count * op.flops for op in cell.input_backward) for cell in cells]
    assert flops == [0, product, product, 0]
    assert [cell.backward_flops for cell in cells] == [product, 2 * product, 2 * product, 0]
    assert cells[1].deferred_bytes == 2 * 4 * 32 * 64
    norm = cells[3].cost(load_devices()["h100"])
    assert norm.weight_seconds == 0.0 and norm.kept_for_weights == 0


def test_alike_cells_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        runs.append(1)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    counts = []
    for depth in (5, 400):
        runs.clear()
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))
        cells = cell_work(
            model, torch.empty(4, 8), loss=lambda output: output.mean(), num_microbatches=1
        )
        assert len(cells) == depth
        assert len({cell.forward for cell in cells[1:-1]}) == 1
        counts.append(len(runs))
    assert counts[0] == counts[1] == 3 * 4  # three kinds: first, last, all others


def test_what_differs_is_not_taken_for_alike() -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 16)]
    model = nn.Sequential(*layers, nn.Linear(16, 8), Call(lambda x: x), Call(lambda x: x * x))
    cells = cell_work(
        model, torch.empty(4, 8), loss=lambda output: output.mean(), num_microbatches=1
    )
    assert len({(cell.forward, cell.output_bytes) for cell in cells}) == len(cells)


HUGE = """
import resource
import torch
from torch import nn
import stagewise
from stagewise.planning import plan_from_costs

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
run = dict(loss=lambda output: output.mean(), device="h100")
stagewise.estimate(small, torch.empty(4, 8), num_microbatches=4, **run)  # what torch loads late
before = peak()
with torch.device("meta"):
    layer = nn.TransformerEncoderLayer
    model = nn.Sequential(*(layer(16384, 128, 65536, batch_first=True) for _ in range(64)))
    inputs = torch.empty(32, 2048, 16384)
cells = stagewise.estimate(model, inputs, num_microbatches=32, **run)
plan = plan_from_costs(cells, num_stages=16, num_microbatches=32)
print(sum(p.numel() for p in model.parameters()), peak() - before, plan.timeline.duration_seconds)
"""


def test_hundreds_of_billions_of_parameters_need_no_memory(tmp_path: Path) -> None:
    output = subprocess.check_output(
        [sys.executable, "-c", HUGE], text=True, timeout=60, cwd=tmp_path
    )
    num_parameters, grown, seconds = output.split()
    assert int(num_parameters) > 200e9  # 800 GB of parameters, and 4 GB of inputs
    assert int(grown) < 200e6
    # At the very least its matrix products at the rate of 16 devices take this long.
    assert float(seconds) > 6 * int(num_parameters) * 32 * 2048 / (16 * 67e12)


def test_what_needs_values_is_told_with_cell_and_operator() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(2, 2), Branching())
    with pytest.raises(
        ModelError, match=r"cell '1' \(Branching\) .* at aten\._local_scalar_dense.*\n.*measure"
    ):
        cell_work(model, torch.empty(4, 2), loss=torch.mean, num_microbatches=1)
    selecting = nn.Sequential(nn.Linear(2, 2), Call(lambda x: x[x > 0]))
    with pytest.raises(ModelError, match=r"cell '1' .* at aten\.nonzero|at aten\.index"):
        cell_work(selecting, torch.empty(4, 2), loss=torch.mean, num_microbatches=1)


def test_mistakes() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(DeviceError, match="known devices are"):
        stagewise.estimate(model, torch.empty(4, 2), num_microbatches=1, device="abacus")
    with pytest.raises(BatchError, match="cannot fill 8 microbatches"):
        stagewise.estimate(model, torch.empty(4, 2), num_microbatches=8, device="h100")
    with pytest.raises(BatchError, match="nothing in the example has samples"):
        stagewise.estimate(model, num_microbatches=1, device="h100")
    with pytest.raises(ModelError, match=r"cell '0' \(Linear\) cannot be estimated"):
        stagewise.estimate(model, torch.empty(4, 3), num_microbatches=1, device="h100")


def test_autocast_halves_what_it_casts() -> None:
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    inputs = torch.empty(256, 256, device="meta")

    def dtypes() -> set[str]:
        work = cell_work(model, inputs, loss=lambda y: y.float().mean(), num_microbatches=1)
        return {op.dtype for cell in work for op in (*cell.forward, *cell.backward) if op.flops}

    assert dtypes() == {"float32"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dtypes() == {"bfloat16"}


def test_a_plan_from_an_estimate_travels_and_predicts() -> None:
    model = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8)))
    inputs = torch.empty(32768, 4096, device="meta")
    h100 = load_devices()["h100"]
    cells = stagewise.estimate(
        model, inputs, loss=lambda output: output.mean(), num_microbatches=8, device=h100
    )
    plan = plan_from_costs(cells, num_stages=4, num_microbatches=8, link=h100.link(4))
    assert plan.balance == (2, 2, 2, 2)
    assert stagewise.Plan.from_json(plan.to_json()) == plan
