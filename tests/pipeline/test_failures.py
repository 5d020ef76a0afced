"""A call that fails on one rank fails on all, hangs on none, and leaves no trace.

Every instruction of a step is made to fail in turn, before messages have a known form and after;
all ranks catch the error and go on, and must end with the bits of a run in which nothing failed.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stagewise
from stagewise.engine.stage.stage import Action, Stage
from stagewise.engine.stage.work import Work
from stagewise.engine.transport.failure import is_out_of_memory
from stagewise.engine.transport.message_form import TensorLayout
from stagewise.errors import CellError, StagewiseError
from stagewise.schedule import Instruction
from tests.harness import Pools
from tests.models import batch
from tests.pipeline.runs import (
    Record,
    Run,
    assert_identical,
    even,
    looked_at,
    merged,
    num_cells,
    pipeline,
)

pytestmark = pytest.mark.filterwarnings("ignore:cell .* changes count:UserWarning")

MSE = nn.functional.mse_loss


class Broken(Exception):
    """What the saboteur raises."""


@contextlib.contextmanager
def sabotaged(
    pipe: stagewise.Pipeline, text: str, error: Callable[[], Exception], *, after: bool
) -> Iterator[None]:
    """The instruction `text` raises inside, before or after its work."""
    runner = pipe._runner
    stages = runner.stages.values()

    def wrapped(action: Callable[[Instruction], Action]) -> Callable[[Instruction], Action]:
        def saboteur(run: Action, received: list[object], work: Work) -> object:
            if not after:
                raise error()
            run(received, work)
            raise error()

        return lambda instruction: (
            partial(saboteur, action(instruction))
            if str(instruction) == text
            else action(instruction)
        )

    for stage in stages:
        stage.action = wrapped(stage.action)  # type: ignore[method-assign]
    runner.use(runner.schedule, runner.stages)  # which binds the actions anew
    try:
        yield
    finally:
        for stage in stages:
            del stage.action
        runner.use(runner.schedule, runner.stages)


def error_of(action: Callable[[], object]) -> tuple[str, str]:
    """The type and text of the StagewiseError that `action` must raise."""
    try:
        action()
    except StagewiseError as error:
        return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def stepped(pipe: stagewise.Pipeline, run: Run, index: int, record: Record) -> None:
    """One training step, and an evaluation; noted in `record`."""
    inputs, target = batch(run.example, run.sizes[index], run.dtype, seed=4 + index)
    pipe.zero_grad()
    record.losses.append(pipe.step(inputs, target=target))
    for name, parameter in pipe.named_parameters():
        gradient = parameter.grad
        record.gradients[f"{index}: {name}"] = None if gradient is None else gradient.clone()
    record.buffers |= {f"{index}: {n}": b.clone() for n, b in pipe.named_buffers()}
    record.losses.append(pipe.evaluate(inputs, target=target))


def undisturbed(run: Run) -> Record:
    pipe, record = pipeline(run), Record()
    for index in range(len(run.sizes)):
        stepped(pipe, run, index, record)
    return record


def disturbed(run: Run) -> list[tuple[str, Record, list[tuple[str, str]]]]:
    """For every instruction of the schedule: a run in which it fails in every step."""
    results = []
    schedule = pipeline(run).plan.built_schedule
    instructions = [i for program in schedule.programs for i in program]
    for number, instruction in enumerate(instructions):
        pipe = pipeline(replace(run, examined=looked_at(number)))
        record, errors, text = Record(), list[tuple[str, str]](), str(instruction)
        for index, size in enumerate(run.sizes):
            inputs, target = batch(run.example, size, run.dtype, seed=4 + index)
            with sabotaged(pipe, text, lambda: Broken("no more"), after=number % 2 == 1):
                pipe.zero_grad()
                errors.append(error_of(lambda: pipe.step(inputs, target=target)))  # noqa: B023
                if text.endswith("F0"):
                    errors.append(error_of(lambda: pipe.evaluate(inputs, target=target)))  # noqa: B023
                    errors.append(error_of(lambda: pipe.predict(inputs)))  # noqa: B023
            assert all(p.grad is None for p in pipe.parameters()), text
            stepped(pipe, run, index, record)
        results.append((text, record, errors))
    return results


def check(run: Run, ranks: list[Any], wanted: Record, owner: Callable[[int, int], int]) -> None:
    """`ranks` are what `disturbed` gave on each."""
    assert ranks[0]
    for results in zip(*ranks, strict=True):
        text, _, _ = results[0]
        assert_identical(merged([record for _, record, _ in results]), wanted)
        stage, m = Instruction.parse(text).stage, Instruction.parse(text).microbatch
        culprit = owner(stage, m)
        for rank, (_, _, errors) in enumerate(results):
            assert len(errors) == (3 if text.endswith("F0") else 1) * len(run.sizes)
            for kind, message in errors:
                assert f"stage {stage} failed on microbatch {m} (instruction " in message
                assert "Broken: no more" in message
                assert kind == ("CellError" if rank == culprit else "PeerError"), (rank, text)
                if rank != culprit:
                    assert f"rank {culprit} failed, so this call is undone" in message


RUNS = {
    "1f1b, tied, float32 sums": dict(
        example="tied_dropout", dtype=torch.bfloat16, accumulate_in_float32=True
    ),
    "recomputation, skips": dict(example="unet_dropout", recompute="always"),
    "BatchNorm": dict(example="conv_batchnorm", schedule="gpipe"),
    "buffers": dict(example="buffers", recompute="except_last"),
    "I and W": dict(example="mlp_dropout", schedule="zb_h1"),
    "interleaved": dict(example="language_dropout", schedule="interleaved"),
}


def run_of(name: str, num_devices: int) -> Run:
    from tests.schedules import stages_on

    options: dict[str, Any] = RUNS[name]
    stages = stages_on(options.get("schedule", "1f1b"), num_devices)
    balance = even(num_cells(options["example"]), stages)
    return Run(balance=balance, sizes=(10, 10), num_microbatches=3, **options)


@pytest.mark.filterwarnings("ignore:BatchNorm")
@pytest.mark.parametrize("name", RUNS)
def test_every_instruction_may_fail_on_real_ranks(pools: Pools, name: str) -> None:
    run = run_of(name, 2)
    wanted = merged(pools[2].run(undisturbed, run))
    placement = pipeline(run).plan.built_schedule.placement
    ranks = pools[2].run(disturbed, run, seconds=120)
    check(run, ranks, wanted, lambda stage, m: placement[stage][0])


@pytest.mark.filterwarnings("ignore:BatchNorm")
@pytest.mark.parametrize("name", RUNS)
def test_every_instruction_may_fail_in_one_process(name: str) -> None:
    run = run_of(name, 2)
    check(run, [disturbed(run)], undisturbed(run), lambda stage, m: 0)


def test_replicas_take_part_in_a_sum_that_is_of_no_use(pools: Pools) -> None:
    run = Run(
        example="tied_dropout",
        balance=even(num_cells("tied_dropout"), 2),
        replicas=(2, 1),
        sizes=(10, 10),
        num_microbatches=3,
    )
    wanted = merged(pools[3].run(undisturbed, run))
    ranks = pools[3].run(disturbed, run, seconds=120)
    check(run, ranks, wanted, lambda stage, m: m % 2 if stage == 0 else 2)


class Explodes(nn.Module):
    """Raises `error` in forward or in backward, once, on the microbatch of `value`."""

    def __init__(self, value: float, error: Exception, *, backward: bool = False) -> None:
        super().__init__()
        self.value, self.error, self.backward = value, error, backward

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) != self.value:
            return x
        if not self.backward:
            self.value = float("nan")
            raise self.error
        y = x.clone()

        def explode(gradient: Tensor) -> None:
            self.value = float("nan")
            raise self.error

        y.register_hook(explode)
        return y


def no_memory() -> Exception:
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("that fits")


def test_running_out_of_memory_is_recognised() -> None:
    assert is_out_of_memory(no_memory())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    for text in (
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "NCCL error: ... Cuda failure 2 'out of memory'",
        "MPS backend out of memory (MPS allocated: 8 GB)",
    ):
        assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    named = CellError("cell failed")
    named.__cause__ = no_memory()
    assert is_out_of_memory(named)


def plan_of(num_stages: int, **options: Any) -> stagewise.Plan:
    return stagewise.Plan(
        balance=(1,) * num_stages,
        **{"schedule": "1f1b", "num_microbatches": 4, **options},
    )


X = torch.arange(8.0)[:, None].repeat(1, 3)  # microbatch m of 4 starts with 2m


def exhausted(backward: bool) -> list[tuple[str, str]]:
    """Rank 1 has no memory for microbatch 2; then for nothing, and all goes well."""
    cells = [nn.Identity(), Explodes(4.0, no_memory(), backward=backward), nn.Linear(3, 3)]
    x = X.clone().requires_grad_(backward)
    pipe = stagewise.Pipeline(cells, plan_of(3), loss=MSE)
    errors = [error_of(lambda: pipe.step(x, target=X))]
    pipe.step(x, target=X)
    return errors


@pytest.mark.parametrize("backward", [False, True])
def test_all_ranks_raise_where_one_has_no_memory(pools: Pools, backward: bool) -> None:
    for errors in pools[3].run(exhausted, backward):
        ((kind, text),) = errors
        assert kind == "OutOfMemoryError"
        assert "rank 1 ran out of memory; train with more microbatches" in text
        assert "device cpu" in text and "microbatch 2" in text and "stage 1" in text


def no_room() -> list[tuple[list[tuple[str, str]], bool]]:
    """For each room that rank 1 makes for a message: errors, and whether the next step is right.

    From that room on it has no memory, until it drops what its stages hold.
    """
    empty, clear, found = TensorLayout.empty, Stage.clear, []
    torch.manual_seed(0)  # the same cells on every rank
    cells = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)]
    wanted = MSE(nn.Sequential(*cells)(X), X).item()
    for num_known, first in itertools.product(range(2), range(4)):
        pipe, errors, rooms = stagewise.Pipeline(cells, plan_of(3), loss=MSE), [], 0
        for _ in range(num_known):  # messages' forms are then known, and rooms are made ahead
            pipe.step(X, target=X)

        def scarce(layout: TensorLayout, device: torch.device) -> Tensor:
            nonlocal rooms
            rooms += 1
            if dist.get_rank() == 1 and rooms > first:  # noqa: B023
                raise torch.OutOfMemoryError("no room, says the test")
            return empty(layout, device)

        def cleared(stage: Stage) -> None:
            nonlocal rooms
            rooms = -1000
            clear(stage)

        with (
            mock.patch.multiple(TensorLayout, empty=scarce),
            mock.patch.object(Stage, "clear", cleared),
        ):
            errors.append(error_of(lambda: pipe.step(X, target=X)))  # noqa: B023
        after = pipe.step(X, target=X).item()
        found.append((errors, abs(after - wanted) < 1e-6 * wanted))
    return found


def test_a_message_without_room_fails_on_all_ranks_and_the_next_call_works(pools: Pools) -> None:
    for rows in zip(*pools[3].run(no_room), strict=True):
        for ((kind, text),), next_is_right in rows:
            assert next_is_right
            assert kind == "OutOfMemoryError"
            assert "rank 1 ran out of memory; train with more microbatches" in text


class Alarmed(nn.Module):
    """Refuses zeros, which come in place of what another rank failed to compute."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.any():
            raise ValueError("zeros")
        return x


def alarmed() -> list[tuple[str, str]]:
    cells = [nn.Sequential(Explodes(4.0, ValueError("first"))), Alarmed(), Alarmed()]
    x = X + 1
    pipe = stagewise.Pipeline(cells, plan_of(3, num_microbatches=4), loss=MSE)
    pipe.step(x.requires_grad_(), target=X)
    return [error_of(lambda: pipe.step((X.clone()).requires_grad_(), target=X))]


def test_the_first_failure_wins_over_those_that_it_causes(pools: Pools) -> None:
    for rank, errors in enumerate(pools[3].run(alarmed)):
        ((kind, text),) = errors
        assert kind == ("PeerError" if rank else "CellError")
        assert "ValueError: first" in text and "zeros" not in text


def test_gradients_of_earlier_steps_cannot_be_put_back_and_the_error_says_so() -> None:
    pipe = stagewise.Pipeline([nn.Linear(3, 3), nn.Linear(3, 3)], plan_of(2), loss=MSE)
    failing_at = partial(sabotaged, pipe, error=lambda: Broken("no more"), after=False)
    pipe.step(X, target=X)
    with failing_at("0B3"), pytest.raises(CellError) as caught:
        pipe.step(X, target=X)
    assert "include parts of this failed step: clear them" in caught.value.__notes__[0]
    pipe.zero_grad()
    with failing_at("0B3"), pytest.raises(CellError) as caught:
        pipe.step(X, target=X)
    assert not hasattr(caught.value, "__notes__"), "what was None is None again"


def unsendable(index: int) -> list[tuple[str, str]]:
    """A stage hands on what cannot travel: refused in words, then all goes on."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> object:
            self.calls += 1
            return (x, lambda: 1) if self.calls == index + 1 else (x, None)

    class Takes(nn.Module):
        def forward(self, pair: tuple[Tensor, object]) -> Tensor:
            return pair[0]

    pipe = stagewise.Pipeline([Hidden(), Takes()], plan_of(2), loss=MSE)
    errors = [error_of(lambda: pipe.step(X, target=X))]
    pipe.step(X, target=X)
    return errors


def test_what_cannot_be_sent_is_refused_and_the_next_step_works(pools: Pools) -> None:
    first, second = pools[2].run(unsendable, 2)
    assert first[0][0] == "CellError" and second[0][0] == "PeerError"
    assert "pickle" in first[0][1] and "pickle" in second[0][1]
