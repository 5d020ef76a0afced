"""`stagewise.plan`: measure the model where it will run, then cut it optimally.

If something is "auto", or memory is limited, it searches for the fastest plan that fits. Under
torch.distributed every rank must call it.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

from stagewise.batch.markers import along
from stagewise.engine.stage.loss import Loss
from stagewise.engine.transport.connect import Device
from stagewise.errors import PlanError
from stagewise.free_pages import HEAP
from stagewise.model.cell import Chain
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import Model
from stagewise.pipeline.build.places import first_devices
from stagewise.pipeline.build.refusals import check_buffers
from stagewise.pipeline.device_speeds import on_fastest, with_speeds
from stagewise.pipeline.plan_keywords import check_keywords
from stagewise.pipeline.searched_plan import MEASURING_CELLS, agreed_request, search_plan
from stagewise.pipeline.trials import corrected_costs, devices_are_real, try_plans
from stagewise.planning.calibrate import with_engine_overhead
from stagewise.planning.choice import ScheduleChoice, requested_schedule
from stagewise.planning.partition.balance import check_balance, check_counts
from stagewise.planning.plan import Plan, plan_for, plan_of
from stagewise.planning.request import Microbatches, PlanRequest, ScheduleLike
from stagewise.planning.search.stage_blocks import in_blocks
from stagewise.profiling.example import Example, agreed_costs, example_of

_REHEARSED = 4  # steps of a plan that nothing is compared with


def plan(
    model: Model,
    inputs: object = None,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_stages: int | None = None,
    num_devices: int | None = None,
    replicas: Sequence[int] | Literal["auto"] = (),
    num_microbatches: Microbatches | None = None,
    schedule: ScheduleLike = "1f1b",
    recompute: str = "never",
    balance: Sequence[int] | None = None,
    memory_bytes: float | Sequence[float] | None = None,
    speeds: Sequence[float] | Literal["measured"] | None = None,
    state_factor: float = 4,
    device: Device | Sequence[Device] | None = None,
    seconds: float | None = None,
    cells: Sequence[str] | None = None,
    batch_dim: int = 0,
    trial: bool | None = None,
    **keywords: object,
) -> Plan:
    """Choose the cut of `model` that minimises the load of the busiest device.

    Args:
        model: an `nn.Sequential`, a list of modules, or any other module, which is captured from
            the example (see `stagewise.capture`). Left unchanged (gradients, buffers, random state,
            mode).
        inputs, target: an example minibatch; its first microbatch is measured. They may be None
            if `balance` is given; then nothing is measured and the plan predicts nothing.
        keywords: the example's keyword arguments, as for `Pipeline.step`: `plan(model, **batch,
            num_stages=2, ...)`. One that is called as an argument of `plan` is given in `kwargs`.
        loss: as for Pipeline; its cost is added to the last cell's.
        num_stages, num_devices: the number of stages, or of devices; the schedule derives one from
            the other.
        replicas: the number of devices of each stage, which share its microbatches; replaces the
            two.
        num_microbatches, recompute: how the model will be run; policies are in
            `stagewise.schedule.POLICIES`, and "segments" recomputes what takes least time. Under a
            policy, stages recompute in blocks, and keep some of them, if by the measured costs that
            takes less memory and no more time (`Plan.segments`).
        schedule: a name in `stagewise.schedule.SCHEDULES`; or a Schedule, or a function
            (num_devices, num_microbatches) -> Schedule.
        balance: number of cells on each stage, instead of the optimal cut.
        memory_bytes: a device's memory for parameters, their gradients and optimizer state
            (`state_factor` times the parameters: 4 for Adam in the parameters' dtype) and for
            activations, or a list with that of each. Receives that ranks post ahead count, and on
            accelerators estimates of contexts, workspaces and communicators.
        speeds: how fast each device is, such as (1, 0.5) if the second takes twice as long, or
            "measured": by the same cells timed on each. By default devices of one kind are equal,
            and others are measured.
        device: where to measure, or one for each device of the plan, all driven by one process; one
            cell at a time unless on the CPU; by default where Pipeline would run.
        seconds: roughly how long to measure; where plans are tried, for how long in all. By
            default 3 seconds, or ten steps' worth and at least 2 seconds where plans are tried;
            little time leaves at least two plans, and one step of each that counts.
        cells: paths of the model's modules, or patterns such as `["embed", "layers.*", "head"]`,
            to use as its cells, for a model that torch.export cannot trace; needs an example: see
            `stagewise.capture_cells`.
        batch_dim: the dimension of the example's samples, as for Pipeline.
        trial: whether the few best plans that a search finds, of different kinds, are run for some
            steps, which leave no trace, and the fastest is kept; by default where every device is
            real: one process each, or an accelerator each. The costs are then corrected, the plan
            has `measured_seconds`, and names the `machine`.

    With "auto" for `num_microbatches` (or several numbers), `schedule`, `recompute` or `replicas`,
    with segments or with `memory_bytes`, a search finds the fastest plan on `num_devices` that
    fits; it then also chooses `balance` and `num_stages`. The cells are measured with the largest
    and the smallest microbatch, and interpolated linearly in between.

    Raises:
        ModelError: the model cannot be captured, or cut into `cells`.
        PlanError: more stages than cells, a balance that does not fit, or a schedule with other
            numbers of stages, devices or microbatches.
        ScheduleError: unknown schedule or policy, or an invalid schedule.
        BatchError: the example has fewer samples than microbatches.
    """
    check_keywords(model, keywords, inspect.signature(plan).parameters)
    if num_microbatches is None:
        raise PlanError(
            "plan() needs num_microbatches, into how many parts a batch is split: a number such as "
            "8, several to choose from, or 'auto'"
        )
    request = PlanRequest(
        num_stages=num_stages,
        num_devices=num_devices,
        replicas=replicas,
        num_microbatches=num_microbatches,
        schedule=schedule,
        recompute=recompute,
        balance=balance,
        memory_bytes=memory_bytes,
        speeds=speeds,
        state_factor=state_factor,
        trial=trial,
    )
    inputs, target = along(inputs, batch_dim), along(target, batch_dim)
    keywords.update(kwargs or {})
    kwargs = {name: along(value, batch_dim) for name, value in keywords.items()}
    chain = chain_for(model, inputs, kwargs, cells)
    if inputs is None and not kwargs and not request.searched:
        return _unmeasured(request, len(chain))
    example = example_of(model, inputs, target, kwargs, loss, device)
    if request.searched:
        found = search_plan(request, example, seconds=seconds).plan
        return found if found.segments else _in_blocks(found, chain)
    return measured_plan(request, example, seconds=MEASURING_CELLS if seconds is None else seconds)


def _unmeasured(request: PlanRequest, num_cells: int) -> Plan:
    """Return the plan that the request fully specifies."""
    choice = _checked(request, num_cells)
    if request.balance is None:
        raise PlanError(
            "plan() got neither an example batch nor a balance; pass inputs (and target) to "
            "measure the cells, or balance=[...] to cut by hand"
        )
    return plan_of(choice, request.balance, recompute=request.recompute)


def measured_plan(
    request: PlanRequest, example: Example, *, seconds: float = MEASURING_CELLS
) -> Plan:
    """Return the plan for `request`, cut by costs measured on `example`; collective."""
    request = agreed_request(request, example.chain)
    choice = _checked(request, len(example.chain))
    assert isinstance(request.num_microbatches, int)
    size = example.size_of(request.num_microbatches)
    splits = choice.built.splits_backward
    request = with_speeds(request, example, size, seconds=seconds / 2)
    measured = on_fastest(request, example.measured(size, seconds=seconds, split=splits))
    costs, link = agreed_costs(measured, example.where)

    plan = plan_for(request, costs, link=link)
    if devices_are_real(request, plan.num_devices):
        found = try_plans({plan.schedule: plan}, example, seconds=0, least=_REHEARSED)
        link, engine = corrected_costs(link, lambda _: costs, [*found.values()], example.where)
        plan = plan_for(request, with_engine_overhead(costs, engine), link=link)
    HEAP.give_back()
    return _in_blocks(plan, example.chain)


def _in_blocks(plan: Plan, chain: Chain) -> Plan:
    """Let `plan` recompute in blocks if that is free and splits no buffer's users."""
    blocks = in_blocks(plan)
    with suppress(PlanError):
        check_buffers(chain, blocks, first_devices(blocks))
        return blocks
    return plan


def _checked(request: PlanRequest, num_cells: int) -> ScheduleChoice:
    """Return the schedule, after checking that `num_cells` cells fill its stages."""
    choice = requested_schedule(request)
    check_counts(num_cells, choice.num_stages)
    if request.balance is not None:
        check_balance(request.balance, num_cells, choice.num_stages)
    return choice
