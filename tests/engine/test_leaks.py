"""What recomputation keeps is what theory says, and nothing outlives its step."""

import gc

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.testing import LiveTensors, live_activation_bytes, live_tensors
from tests.harness import Pools

FLOAT, WIDTH, ROWS, CELLS = 4, 16, 8, 8  # one microbatch of ROWS x WIDTH floats
UNIT = ROWS * WIDTH * FLOAT


def blocks() -> list[nn.Module]:
    """Cells that save two tensors of a unit each: the linear's input and sigmoid's output."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(WIDTH, WIDTH), Sigmoid()) for _ in range(CELLS)]


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


def mean(output: Tensor, target: Tensor) -> Tensor:
    """A loss that saves nothing."""
    return output.mean()


def pipe_of(
    num_stages: int, schedule: str, num_microbatches: int, recompute: str
) -> stagewise.Pipeline:
    plan = stagewise.Plan(
        balance=(2 * CELLS // num_stages,) * num_stages,
        schedule=schedule,
        num_microbatches=num_microbatches,
        recompute=recompute,
    )
    return stagewise.Pipeline(nn.Sequential(*blocks()), plan, loss=mean)


def batch(num_microbatches: int) -> tuple[Tensor, Tensor]:
    return torch.ones(ROWS * num_microbatches, WIDTH), torch.ones(ROWS * num_microbatches, 1)


def peak(num_stages: int, schedule: str, num_microbatches: int, recompute: str) -> int:
    """In units, without what is far smaller: the losses."""
    pipe = pipe_of(num_stages, schedule, num_microbatches, recompute)
    inputs, target = batch(num_microbatches)
    pipe.step(inputs, target=target)
    (peak,) = pipe.measure_memory(inputs, target=target)
    return peak // UNIT


@pytest.mark.parametrize("num_microbatches", [1, 4, 8])
def test_without_recomputation_every_microbatch_keeps_every_cell(num_microbatches: int) -> None:
    # A sigmoid's output is the next linear's input; the batch itself is the caller's.
    assert peak(1, "gpipe", num_microbatches, "never") == num_microbatches * CELLS
    assert peak(1, "1f1b", num_microbatches, "never") == CELLS


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("num_microbatches", [4, 8])
def test_recomputation_keeps_boundaries_and_one_stages_activations(
    num_stages: int, num_microbatches: int
) -> None:
    """GPipe's O(N + L/K x N/M) on each of K devices; here one process holds all K."""
    boundaries = (num_stages - 1) * num_microbatches  # the first stage's inputs are the caller's
    found = peak(num_stages, "gpipe", num_microbatches, "always")
    assert found == boundaries + num_stages * (CELLS // num_stages)
    assert found < peak(num_stages, "gpipe", num_microbatches, "never")


@pytest.mark.parametrize("recompute", ["never", "always", "except_last"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_no_activation_outlives_the_step(schedule: str, recompute: str) -> None:
    pipe = pipe_of(4, schedule, 4, recompute)
    inputs, target = batch(4)
    gc.collect()
    gc.disable()  # reference counting alone must do
    try:
        with live_activation_bytes(pipe) as live:
            for call in (pipe.step, pipe.evaluate, pipe.step):
                call(inputs, target=target)
                assert live() == 0
            graph = inputs.clone().requires_grad_().sin().sum()
            assert live() > 0, "the counter must see a graph that is kept"
            del graph
            assert live() == 0
    finally:
        gc.enable()


def test_a_step_that_fails_keeps_nothing() -> None:
    class Fails(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("third microbatch")
            return x.exp()

    plan = stagewise.Plan(balance=(1, 1, 1), schedule="gpipe", num_microbatches=4)
    pipe = stagewise.Pipeline([nn.Linear(4, 4), Fails(), nn.Linear(4, 4)], plan, loss=mean)
    with live_activation_bytes(pipe) as live:
        with pytest.raises(stagewise.StagewiseError, match="third microbatch"):
            pipe.step(torch.ones(8, 4), target=torch.ones(8, 1))
        gc.collect()
        assert live() == 0


def alive_at(steps: tuple[int, ...], recompute: str, schedule: str) -> list[LiveTensors]:
    """What is alive on this rank after each of `steps`, training with batches of changing size."""
    import torch.distributed as dist

    num_stages = dist.get_world_size() if dist.is_initialized() else 4
    pipe = pipe_of(num_stages, schedule, 4, recompute)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-3)
    found = []
    for step in range(1, max(steps) + 1):
        inputs, target = batch(5 if step % 3 else 4)
        optimizer.zero_grad()
        pipe.step(inputs, target=target)
        pipe.clip_grad_norm_(1.0)
        optimizer.step()
        if step % 10 == 0:
            pipe.evaluate(inputs, target=target)
            pipe.predict(inputs)
        del inputs, target
        if step in steps:
            optimizer.zero_grad()
            found.append(live_tensors())
    return found


STEPS = (20, 40, 70)  # calls 32, 48 and 64, between these, are looked at


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("recompute", ["never", "except_last"])
def test_many_steps_leak_nothing(recompute: str, schedule: str) -> None:
    assert len(set(alive_at(STEPS, recompute, schedule))) == 1


@pytest.mark.parametrize("recompute", ["never", "always"])
def test_many_steps_leak_nothing_between_processes(pools: Pools, recompute: str) -> None:
    for found in pools[2].run(alive_at, STEPS, recompute, "1f1b"):
        assert len(set(found)) == 1, found


def test_live_tensors_counts_storages_once() -> None:
    before = live_tensors()
    kept = torch.ones(100)
    views = [kept[:50], kept[50:]]
    after = live_tensors()
    assert after.number - before.number == 3
    assert after.num_bytes - before.num_bytes == 400
    del kept, views
    assert live_tensors() == before
