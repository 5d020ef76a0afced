"""What runs on streams of its own: copies ahead of their use, and the events that time kernels."""

import itertools

import pytest
import torch
from torch import nn

import stagewise
from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Block, Result, Subject, mse, pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]
CYCLES = 20_000_000  # of a kernel that spins, about 10 ms


@pytest.mark.parametrize("pinned", [False, True])
def test_a_batch_on_the_host_arrives_whole_and_may_change_at_once(
    machine: Machine, pinned: bool
) -> None:
    subject = Subject(machine, "no dropout")
    there = subject.batch()
    wanted = subject.result(2, num_microbatches=8)
    pipe = pipeline(subject.model(), 2, num_microbatches=8)
    for _ in range(3):
        inputs, target = (part.cpu().pin_memory() if pinned else part.cpu() for part in there)
        pipe.zero_grad()
        torch.cuda._sleep(CYCLES)  # the host is ahead
        loss = pipe.step(inputs, target=target)
        inputs.zero_()
        target.zero_()
    assert wanted.difference(Result.of(loss, pipe)) == 0


class Spins(nn.Module):
    def __init__(self, cycles: int) -> None:
        super().__init__()
        self.linear, self.cycles = nn.Linear(8, 8), cycles

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(self.cycles)
        output: torch.Tensor = self.linear(x)
        return output


def test_times_are_those_of_kernels(machine: Machine) -> None:
    """A cell that takes three times as long is measured, and timed, as about that."""
    model = nn.Sequential(Spins(CYCLES), Spins(3 * CYCLES)).to(machine.device)
    x = torch.ones(4, 8, device=machine.device)
    plan = stagewise.plan(model, x, target=x, loss=mse, num_stages=2, num_microbatches=2)
    short, long = (cell.forward_seconds for cell in plan.cells)
    assert short > 2e-3 and long == pytest.approx(3 * short, rel=0.2)
    pipe = stagewise.Pipeline(model, plan, loss=mse)
    for _ in range(3):
        pipe.step(x, target=x)
    timeline = pipe.timeline()
    forwards = [s.seconds for s in timeline.spans if str(s.instruction) in ("0F1", "1F1")]
    assert forwards == pytest.approx([short, long], rel=0.2)
    in_order = sorted(timeline.spans, key=lambda span: span.start_seconds)
    for one, other in itertools.pairwise(in_order):  # one stream runs all
        assert one.end_seconds <= other.start_seconds + 1e-4


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_v"])
def test_two_gpus_in_one_process_give_the_bits_of_one(machine: Machine, schedule: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    stages_per_device = 1 if schedule == "1f1b" else 2
    plan = stagewise.Plan(
        balance=(1,) * (2 * stages_per_device),
        schedule=schedule,
        num_microbatches=8,
        stages_per_device=stages_per_device,
    )
    x, results = torch.randn(16, 16, 64), []
    for devices in (["cuda:0", "cuda:0"], ["cuda:0", "cuda:1"]):
        torch.manual_seed(0)
        model = nn.Sequential(*(Block(64, dropout=0.1) for _ in plan.balance))
        pipe = stagewise.Pipeline(model, plan, loss=mse, devices=devices)
        for _ in range(3):
            pipe.zero_grad()
            loss = pipe.step(x, target=x)
        results.append(Result.of(loss, pipe))
    assert results[0].difference(results[1]) == 0
