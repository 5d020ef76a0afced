"""Several GPUs, with a process each over NCCL or all in one, and processes that share a GPU.

Bits, and failures on all ranks.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stagewise
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block, Result, mse
from stagewise.errors import StagewiseError
from stagewise.planning.plan import Plan
from stagewise.schedule import SCHEDULES
from tests.harness import Pool, Pools

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]
WIDTH, MICROBATCHES, SECONDS = 64, 8, 120


def plan_of(schedule: str, num_devices: int, recompute: str = "never") -> Plan:
    per_device = SCHEDULES[schedule].stages_per_device
    return Plan(
        balance=(1,) * (num_devices * per_device),
        schedule=schedule,
        num_microbatches=MICROBATCHES,
        stages_per_device=per_device,
        recompute=recompute,
    )


def device_of_rank() -> torch.device:
    """The rank's GPU, the first again where there are fewer; without a group, the first."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Machine.here(False, rank % torch.cuda.device_count()).device


def model_of(plan: Plan) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(WIDTH, dropout=0.1) for _ in plan.balance)).to(device_of_rank())


def batch_of(length: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2 * MICROBATCHES, length, WIDTH).to(device_of_rank())


def trained(plan: Plan, gpus: list[int] | None = None) -> Result:
    """Three steps on this rank's stages; without a group on all. On one GPU, or on `gpus`."""
    Machine.use_repeatable_kernels(True)
    devices = None if gpus is None else [torch.device("cuda", gpu) for gpu in gpus]
    pipe, x = stagewise.Pipeline(model_of(plan), plan, loss=mse, devices=devices), batch_of()
    for _ in range(3):
        pipe.zero_grad()
        loss = pipe.step(x, target=x)
    Machine.use_repeatable_kernels(False)
    return Result.of(loss, pipe)


@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bits_are_those_of_one_process(schedule: str, recompute: str, ranks: Pool) -> None:
    plan = plan_of(schedule, ranks.num_ranks, recompute)
    results = ranks.run(trained, plan, seconds=SECONDS)
    gradients = {name: g for result in results for name, g in result.gradients.items()}
    assert trained(plan).difference(Result(results[0].loss, gradients)) == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bits_of_one_process_on_several_gpus(schedule: str) -> None:
    count = min(torch.cuda.device_count(), 4)
    if count < 2:
        pytest.skip("needs two GPUs")
    plan = plan_of(schedule, count)
    assert trained(plan).difference(trained(plan, list(range(count)))) == 0


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_bits_of_processes_that_share_a_gpu(
    schedule: str, num_processes: int, pools: Pools
) -> None:
    """Over gloo, so through the hosts' memory."""
    plan = plan_of(schedule, num_processes)
    results = pools[num_processes].run(trained, plan, [0] * num_processes, seconds=SECONDS)
    gradients = {name: g for result in results for name, g in result.gradients.items()}
    assert trained(plan).difference(Result(results[0].loss, gradients)) == 0


class FailsWhenTold(nn.Module):
    """Raises, or asks for more than any GPU has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.told = nn.Linear(WIDTH, WIDTH), ""

    def forward(self, x: Tensor) -> Tensor:
        if self.told == "raise":
            raise ValueError("as told")
        if self.told == "out of memory":
            torch.empty(1 << 50, dtype=torch.uint8, device=x.device)
        output: Tensor = self.linear(x)
        return output


def failed(plan: Plan, how: str) -> tuple[str, str, bool]:
    """A step, one that fails on the last rank, and another: the error, and whether that one ran."""
    torch.manual_seed(0)
    cells = [FailsWhenTold() for _ in plan.balance]
    pipe = stagewise.Pipeline(nn.Sequential(*cells).to(device_of_rank()), plan, loss=mse)
    x, error_of = batch_of(), ("", "")
    pipe.step(x, target=x)
    for cell in cells:
        cell.told = how if dist.get_rank() == dist.get_world_size() - 1 else ""
    try:
        pipe.step(x, target=x)
    except StagewiseError as error:
        error_of = type(error).__name__, str(error)
    for cell in cells:
        cell.told = ""
    pipe.zero_grad()
    return *error_of, bool(torch.isfinite(pipe.step(x, target=x)))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_a_failure_is_raised_on_all_ranks(schedule: str, ranks: Pool) -> None:
    plan = plan_of(schedule, ranks.num_ranks)
    *others, last = ranks.run(failed, plan, "raise", seconds=SECONDS)
    assert last[0] == "CellError" and "as told" in last[1] and last[2]
    assert all(kind == "PeerError" and "as told" in m and usable for kind, m, usable in others)


def test_out_of_memory_is_raised_on_all_ranks(ranks: Pool) -> None:
    plan = plan_of("1f1b", ranks.num_ranks)
    results = ranks.run(failed, plan, "out of memory", seconds=SECONDS)
    assert {kind for kind, _, _ in results} == {"OutOfMemoryError"}
    assert all(usable for _, _, usable in results)
