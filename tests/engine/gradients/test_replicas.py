"""When a stage's sum starts, and what it holds, with a group that notes what is asked of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stagewise.engine.gradients.policy import Settlement
from stagewise.engine.gradients.replicas import Replicas
from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.connect import in_one_process
from stagewise.engine.transport.ranks import Ranks
from stagewise.model.chain import chain_of
from stagewise.schedule import Instruction, parse_programs

CPU = torch.device("cpu")


class Noting:
    """A group of two, of which the other adds ones."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.pending = log, 0

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        self.log.append(f"start {tensor.dtype}".replace("torch.", ""))
        self.pending += 1

        def wait() -> None:
            self.log.append("wait")
            tensor.add_(1)

        return wait

    def copy_from_first(self, tensor: Tensor) -> None:
        self.log.append(f"copy {tuple(tensor.shape)}")

    def gather(self, numbers: Tensor) -> list[Tensor]:
        raise AssertionError("there is no BatchNorm")


class Meeting(Ranks):
    def __init__(self, log: list[str]) -> None:
        vars(self).update(vars(in_one_process([CPU]).ranks))
        self._log = log

    def group(self, ranks: Sequence[int]) -> Noting | None:
        self._log.append(f"group {tuple(ranks)}")
        return Noting(self._log) if self.rank in ranks else None


def made(*cells: nn.Module) -> tuple[Replicas, list[str]]:
    log: list[str] = []
    stage = Stage(0, chain_of(list(cells)), CPU, is_last=False, loss=None)
    return Replicas({0: stage}, [(0, 1), (2,), (3, 4)], Meeting(log)), log


def program(text: str) -> Sequence[Instruction]:
    return parse_programs(text)[0]


def step_of(
    replicas: Replicas, instructions: Sequence[Instruction], *, in_float32: bool = False
) -> Settlement:
    step = Settlement(
        ranks=Meeting([]),
        program=instructions,
        batchnorms=BatchNorms(()),
        in_float32=in_float32,
    )
    replicas.before_step(step)
    return step


def run(replicas: Replicas, text: str, log: list[str]) -> None:
    """Observe all of a program, the log behind the sums, then end the step."""
    step = step_of(replicas, program(text), in_float32=True)
    for instruction in program(text):
        for observe in (*step.observers, lambda done: log.append(str(done))):
            observe(instruction)
    log.append("end")
    replicas.settle(step)


def test_every_rank_makes_every_group_and_replicas_start_equal() -> None:
    replicas, log = made(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert log == ["group (0, 1)", "group (3, 4)"]
    log.clear()
    replicas.broadcast_initial_values()
    assert log == ["copy (3, 2)", *["copy (3,)"] * 5, "copy ()"]


def test_a_sum_starts_behind_the_last_backward_and_is_waited_for_at_the_end() -> None:
    replicas, log = made(nn.Linear(2, 2))
    for text, last in [("0F0 0F2 0B0 0B2 1F0 1B0", 3), ("0F0 0I0 1F0 0W0 1B0 1W0", 3)]:
        log.clear()
        run(replicas, text, log)
        words = text.split()
        assert log == [*words[:last], "start float32", *words[last:], "end", "wait"]


def test_a_replica_without_microbatches_starts_at_once() -> None:
    replicas, log = made(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).bfloat16())
    log.clear()
    step = step_of(replicas, ())
    assert log == ["start float32", "start float64", "start bfloat16"]
    replicas.settle(step)


def test_gradients_of_before_stay_apart() -> None:
    layer, frozen = nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)
    replicas, _ = made(layer, frozen)
    layer.weight.grad = torch.full((1, 1), 10.0)
    step = step_of(replicas, program("0F0 0B0"))
    assert layer.weight.grad is None
    layer(torch.full((1, 1), 3.0)).backward()
    step.observers[0](program("0B0")[0])
    assert layer.weight.grad is None  # it is on its way
    replicas.settle(step)
    assert layer.weight.grad is not None and float(layer.weight.grad) == 10 + 3 + 1
    assert layer.bias.grad is not None and float(layer.bias.grad) == 1 + 1
    assert frozen.weight.grad is None
