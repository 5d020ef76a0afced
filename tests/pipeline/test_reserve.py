"""What a plan counts besides state and activations: what the mailbox really posts ahead."""

from typing import Any

import pytest
import torch
from torch import nn

import stagewise
from stagewise.costs import CellCost
from stagewise.errors import PlanError
from stagewise.planning import search
from stagewise.planning.reserve import NO_RESERVE, RESERVES, Reserve, reserve_of, room_bytes
from tests.harness import Pools

MSE = nn.functional.mse_loss
X = torch.ones(16, 8)
CELL = 100 * 4 * (8 * 8 + 8)  # bytes of a cell's state, with a factor of 100


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))


def posted(plan: stagewise.Plan) -> int:
    """The most bytes of posted receives on this rank, after a first step."""
    pipe = stagewise.Pipeline(model(), plan, loss=MSE)
    pipe.step(X, target=X)
    mail: Any = pipe._runner.mail
    post, most = mail._post, 0

    def noting(incoming: Any, header: Any) -> None:
        nonlocal most
        post(incoming, header)
        most = max(most, sum(each.num_bytes for each in mail._incoming.values()))

    mail._post = noting
    pipe.step(X, target=X)
    return most


def cells_on(plan: stagewise.Plan) -> list[int]:
    placement = plan.plain_schedule.placement
    stages = [[s for s, on in enumerate(placement) if device in on] for device in range(2)]
    return [sum(plan.balance[s] for s in own) for own in stages]


def planned(memory_bytes: Any = None, state_factor: float = 1, **options: Any) -> stagewise.Plan:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if isinstance(memory_bytes, dict):
        memory_bytes = memory_bytes[rank]
    arguments = {
        "num_devices": 2,
        "num_microbatches": 4,
        "seconds": 0,
        **options,
    }
    arguments |= {"memory_bytes": memory_bytes, "state_factor": state_factor}
    return stagewise.plan(model(), X, target=X, loss=MSE, **arguments)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb_v"])
def test_rooms_are_those_that_the_mailbox_holds(pools: Pools, schedule: str) -> None:
    plan = planned(schedule=schedule, balance=None)
    rooms = Reserve(posts=True).on(plan.built_schedule.placement, plan.engine_costs, 4)
    held = pools[2].run(posted, plan)
    message = 4 * 4 * 8
    for forecast, real in zip(rooms, held, strict=True):
        assert 0 <= forecast - real <= message  # a first one may be used before others are posted


def test_large_messages_are_posted_two_at_a_time() -> None:
    large = 1 << 22
    assert room_bytes({large: 8}) == 2 * large and room_bytes({large: 1}) == large
    assert room_bytes({large: 1, 100: 9}) == large + 900  # small ones are posted further ahead
    assert room_bytes({0: 4}) == 0


def test_accelerators_have_estimates_and_one_process_posts_nothing() -> None:
    costs = planned().engine_costs
    assert reserve_of("cpu", posts=False) == NO_RESERVE and not str(NO_RESERVE)
    assert Reserve(posts=False).on(((0,), (1,)), costs, 4) == [0, 0]
    cuda = RESERVES["cuda"]
    fixed = cuda.context_bytes + cuda.workspace_bytes
    assert reserve_of("xpu", posts=False).on(((0,), (1,)), costs, 4) == [fixed] * 2
    both = reserve_of("cuda", posts=True)
    rooms = Reserve(posts=True).on(((0,), (1,)), costs, 4)
    assert both.on(((0,), (1,)), costs, 4) == [fixed + 2 * cuda.link_bytes + r for r in rooms]
    assert "estimated: a context of 512 MiB" in str(both)


def test_a_cut_leaves_room_for_what_is_posted() -> None:
    """The fastest cut receives large gradients, and does not fit with them; another one does."""
    cells = [
        CellCost(
            name=str(at),
            forward_seconds=1,
            backward_seconds=2,
            parameter_bytes=100,
            output_bytes=10,
            gradient_bytes=1000 if at == 3 else 10,
        )
        for at in range(8)
    ]
    options = {"num_microbatches": [2], "schedules": ["1f1b"], "recompute": "never"}
    reserve = Reserve(posts=True, context_bytes=500)
    found = {
        cap: search(lambda count: cells, 2, memory_bytes=cap, reserve=reserve, **options)  # type: ignore[arg-type]
        for cap in (8000, 2700)
    }
    assert found[8000].plan.balance == (4, 4) and found[8000].chosen.device_bytes[0] > 2700
    assert found[2700].plan.balance in ((3, 5), (5, 3))
    assert max(found[2700].chosen.device_bytes) <= 2700


def test_each_device_has_its_own_memory() -> None:
    small, large = 3.5 * CELL, 6.5 * CELL
    for schedule in ("1f1b", "auto"):
        plan, other = (
            planned(caps, state_factor=100, schedule=schedule)
            for caps in ([small, large], [large, small])
        )
        for balance in (cells_on(plan), cells_on(other)[::-1]):
            assert balance[0] <= 3 and balance[1] <= 6
    with pytest.raises(PlanError, match="memory_bytes has 3 numbers for 2 devices"):
        planned([1e9, 2e9, 1e9])
    with pytest.raises(PlanError, match="give the memory of a device"):
        planned([1e9, 0])


def test_ranks_may_have_different_memory_and_make_the_same_plan(pools: Pools) -> None:
    first, second = pools[2].run(planned, {0: 3.5 * CELL, 1: 1e9}, 100)
    assert first == second and first.balance[0] <= 3
    with pytest.raises(Exception, match="called plan with a different memory_bytes than rank 0"):
        pools[2].run(planned, {0: None, 1: 1e9})
