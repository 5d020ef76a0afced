"""Another plan between two steps: the run goes on as if it had been built with it."""

from dataclasses import replace

import pytest
import torch

import stagewise
from stagewise.errors import PlanError
from stagewise.schedule import Segments
from tests.harness import Pools
from tests.models import batch
from tests.pipeline.runs import Record, Run, assert_identical, even, merged, num_cells, pipeline

BALANCES = {example: even(num_cells(example), 2) for example in ("tied_dropout", "unet_dropout")}
CHANGES = [
    {"num_microbatches": 5},
    {"num_microbatches": 5, "recompute": "always"},
    {"num_microbatches": 2, "schedule": "gpipe", "recompute": "never"},
    {"num_microbatches": 4, "schedule": "zb_h1"},
    {"num_microbatches": 4, "schedule": "1f1b"},
]
RUN = Run(
    example="tied_dropout", balance=BALANCES["tied_dropout"], sizes=(10,) * (len(CHANGES) + 1)
)


def in_parts(balance: tuple[int, ...], *sizes: int) -> tuple[Segments, ...]:
    """The first parts of each stage of these sizes, recomputed and kept in turn, then the rest."""
    return tuple(
        (*((size, at % 2 == 0) for at, size in enumerate(sizes)), (cells - sum(sizes), True))
        for cells in balance
    )


def segmented(example: str) -> list[dict[str, object]]:
    """From whole stages to parts, to as many other parts, by another schedule, and back."""
    balance = BALANCES[example]
    return [
        {"segments": in_parts(balance, 2)},
        {"segments": in_parts(balance, 1)},
        {"segments": in_parts(balance, 1, 1), "schedule": "gpipe"},
        {"segments": (), "recompute": "always"},
    ]


def plans(run: Run, changes: list[dict[str, object]]) -> list[stagewise.Plan]:
    made = [pipeline(replace(run, transport="local")).plan]
    for change in changes:
        made.append(replace(made[-1], **change))  # type: ignore[arg-type]
    return made


def changing(run: Run, changes: list[dict[str, object]], anew: bool) -> Record:
    """A step by each plan: on one pipeline, or each on one built `anew` with the last's state."""
    record, pipe = Record(), pipeline(run)
    for index, plan in enumerate(plans(run, changes)):
        if anew:
            old = pipe
            pipe = pipeline(
                replace(
                    run,
                    num_microbatches=plan.num_microbatches,
                    schedule=plan.schedule,
                    recompute=plan.recompute,
                    segments=plan.segments,
                )
            )
            pipe.load_state_dict(old.state_dict())
            pipe.step_index = index
        else:
            pipe.use(plan)
        assert pipe.num_microbatches == plan.num_microbatches
        inputs, target = batch(run.example, 10, seed=4 + index)
        pipe.zero_grad()
        record.losses.append(pipe.step(inputs, target=target))
        record.losses.append(pipe.evaluate(inputs, target=target))
        assert len(pipe.timeline().spans) >= 2 * plan.num_microbatches
        for name, parameter in pipe.named_parameters():
            assert parameter.grad is not None
            record.gradients[f"{index}: {name}"] = parameter.grad.clone()
            with torch.no_grad():
                parameter -= 0.01 * parameter.grad
    record.parameters = {n: p.detach().clone() for n, p in pipe.named_parameters()}
    return record


def test_plans_change_from_step_to_step(pools: Pools) -> None:
    wanted = changing(RUN, CHANGES, True)
    assert_identical(changing(RUN, CHANGES, False), wanted)
    assert_identical(merged(pools[2].run(changing, RUN, CHANGES, False)), wanted)


@pytest.mark.parametrize("example", BALANCES)
def test_segments_change_from_step_to_step(pools: Pools, example: str) -> None:
    """Also where tied parameters, or skips, cross their boundaries."""
    run, changes = replace(RUN, example=example, balance=BALANCES[example]), segmented(example)
    wanted = changing(run, changes, True)
    assert_identical(changing(run, changes, False), wanted)
    assert_identical(merged(pools[2].run(changing, run, changes, False)), wanted)


def refused() -> list[str]:
    pipe = pipeline(RUN)
    small, *rest = pipe.plan.balance
    moved = (small - 1, rest[0] + 1)
    texts = []
    for plan in (
        replace(pipe.plan, balance=moved),
        replace(pipe.plan, num_microbatches=4 + pipe.rank),
    ):
        try:
            pipe.use(plan)
        except PlanError as error:
            texts.append(str(error))
        pipe.evaluate(*batch(RUN.example, 10)[:1], target=batch(RUN.example, 10)[1])
    return texts


def test_plans_that_would_move_cells_are_refused(pools: Pools) -> None:
    for texts in pools[2].run(refused):
        moved, differing = texts
        assert "the plan has the balance" in moved and "build another Pipeline" in moved
        assert "ranks [1] have different plans than rank 0" in differing
    pipe = pipeline(RUN)
    with pytest.raises(PlanError, match="the plan has the placement"):
        pipe.use(replace(pipe.plan, balance=pipe.plan.balance, schedule="gpipe", replicas=(2, 1)))
