"""`stagewise.plan`: measure the model where it will run, then cut it optimally.

If something is "auto", or memory is limited, it searches for the fastest plan that fits. Under
torch.distributed every rank must call it.
"""

import inspect
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal

from stagewise.batch.lanes import has_streams
from stagewise.batch.markers import along
from stagewise.costs import FREE_INSTRUCTION, CellCost, InstructionCost, LinkCost
from stagewise.engine.stage.loss import Loss
from stagewise.engine.transport.connect import Device, values_of_all
from stagewise.engine.transport.processes import num_processes
from stagewise.errors import PlanError
from stagewise.free_pages import FreePages, trim_of_glibc
from stagewise.model.cell import Chain
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import Model
from stagewise.pipeline.build.places import first_devices
from stagewise.pipeline.build.refusals import check_buffers
from stagewise.pipeline.pipeline import Pipeline
from stagewise.pipeline.plan_keywords import check_keywords
from stagewise.planning.calibrate import (
    instruction_cost,
    message_seconds,
    with_instruction_overhead,
)
from stagewise.planning.choice import ScheduleChoice, requested_schedule
from stagewise.planning.interpolate import interpolated
from stagewise.planning.partition.balance import check_balance, check_counts
from stagewise.planning.plan import Plan, plan_for, plan_of
from stagewise.planning.request import Microbatches, PlanRequest, ScheduleLike
from stagewise.planning.reserve import reserve_of
from stagewise.planning.search.search import CostsAt, Progress, SearchResult, search_for
from stagewise.planning.search.stage_blocks import in_blocks
from stagewise.profiling.example import Example, agreed_costs, example_of, in_training_mode
from stagewise.slow_notice import notice_if_slow


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
    state_factor: float = 4,
    device: Device | None = None,
    seconds: float = 3.0,
    cells: Sequence[str] | None = None,
    batch_dim: int = 0,
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
        device: where to measure, one cell at a time unless on the CPU; by default where Pipeline
            would run.
        seconds: roughly how long to measure.
        cells: paths of the model's modules, or patterns such as `["embed", "layers.*", "head"]`,
            to use as its cells, for a model that torch.export cannot trace; needs an example: see
            `stagewise.capture_cells`.
        batch_dim: the dimension of the example's samples, as for Pipeline.

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
        state_factor=state_factor,
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
    return measured_plan(request, example, seconds=seconds)


def _unmeasured(request: PlanRequest, num_cells: int) -> Plan:
    """Return the plan that the request fully specifies."""
    choice = _checked(request, num_cells)
    if request.balance is None:
        raise PlanError(
            "plan() got neither an example batch nor a balance; pass inputs (and target) to "
            "measure the cells, or balance=[...] to cut by hand"
        )
    return plan_of(choice, request.balance, recompute=request.recompute)


def _agreed(request: PlanRequest, chain: Chain) -> PlanRequest:
    """Raise PlanError on every rank unless all request the same plan of the same model; collective.

    Return the request with the memory of every rank's device, if they differ. A schedule that is
    no name is compared in its plan.
    """
    given = dict(vars(request))
    if not isinstance(request.schedule, str):
        given["schedule"] = None
    given["model"] = [[tuple(p.shape) for p in cell.module.parameters()] for cell in chain]
    rows = values_of_all(given, "plan")
    caps = [row.pop("memory_bytes") for row in rows]
    for row, cap in zip(rows, caps, strict=True):
        row["memory_bytes"] = cap if cap is None or isinstance(cap, Sequence) else "its own"
    for name in given:
        differing = [rank for rank, row in enumerate(rows) if row[name] != rows[0][name]]
        if differing:
            raise PlanError(
                f"ranks {differing} called plan with a different {name} than rank 0; call it with "
                "the same arguments on every rank"
            )
    if request.memory_bytes is None or len(set(caps)) == 1:
        return request
    each = request.num_devices in (None, len(caps))
    return replace(request, memory_bytes=caps if each else min(caps))


def measured_plan(request: PlanRequest, example: Example, *, seconds: float = 3.0) -> Plan:
    """Return the plan for `request`, cut by costs measured on `example`; collective."""
    request = _agreed(request, example.chain)
    choice = _checked(request, len(example.chain))
    assert isinstance(request.num_microbatches, int)
    size = example.size_of(request.num_microbatches)
    splits = choice.built.splits_backward
    measured = example.measured(size, seconds=seconds, split=splits)
    costs, link = agreed_costs(measured, example.where)

    def best(link: LinkCost, overhead: InstructionCost) -> Plan:
        return plan_for(request, with_instruction_overhead(costs, overhead), link=link)

    plan = best(*rehearsed(link, best(link, FREE_INSTRUCTION), example))
    FreePages(trim_of_glibc()).give_back(seconds)
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


def search_plan(
    request: PlanRequest,
    example: Example,
    *,
    seconds: float = 3.0,
    progress: Progress | None = None,
) -> SearchResult:
    """Search for the fastest plan by costs measured on `example`; collective.

    The request's `num_devices` defaults to the number of ranks.
    """
    request = _agreed(request, example.chain)
    if request.num_devices is None:
        if num_processes() == 1:
            raise PlanError("the search needs the number of devices; give num_devices")
        request = replace(request, num_devices=num_processes())
    counts = request.counts(example.num_samples, example.parts)
    costs_at, link = _costs(example, counts, seconds)

    def best(link: LinkCost, overhead: InstructionCost) -> SearchResult:
        return search_for(
            request,
            lambda count: with_instruction_overhead(costs_at(count), overhead),
            counts,
            link=link,
            reserve=reserve_of(example.where.type, posts=num_processes() > 1),
            progress=progress,
        )

    found = best(link, FREE_INSTRUCTION)
    better_known = rehearsed(link, found.plan, example)
    FreePages(trim_of_glibc()).give_back(seconds)
    return found if better_known == (link, FREE_INSTRUCTION) else best(*better_known)


def rehearsed(
    link: LinkCost,
    chosen: Plan,
    example: Example,
) -> tuple[LinkCost, InstructionCost]:
    """Run trial steps of the chosen plan, and refine `link` by what busy devices showed.

    Also returns the time that instructions took beyond their cells.
    """
    if num_processes() == 1 or num_processes() != chosen.num_devices:
        return link, FREE_INSTRUCTION
    args = () if example.inputs is None else (example.inputs,)
    with (
        notice_if_slow("trying the plan for a few steps"),
        in_training_mode(example.model, example.chain),
    ):
        where = [example.where] * chosen.num_devices
        pipe = Pipeline(example.model, chosen, loss=example.loss, devices=where)
        timelines = pipe.rehearse(*args, target=example.target, **example.keywords)  # type: ignore[arg-type]
    overhead, waited = message_seconds(chosen.built_schedule, timelines)
    num_bytes = [size for cell in chosen.cells for size in (cell.output_bytes, cell.gradient_bytes)]
    latency = waited - overhead - statistics.fmean(num_bytes) * link.seconds_per_byte
    better_known = replace(
        link,
        latency_seconds=max(link.latency_seconds, latency),
        overhead_seconds=overhead,
    )
    if example.where.type != "cpu" and not has_streams(example.where):  # times of launches
        return better_known, FREE_INSTRUCTION
    return better_known, instruction_cost(chosen.engine_costs, timelines)


def _costs(example: Example, counts: Sequence[int], seconds: float) -> tuple[CostsAt, LinkCost]:
    """Return the cells' costs for each number of microbatches, the same on every rank."""
    sizes = {count: example.size_of(count) for count in counts}
    small, large = min(sizes.values()), max(sizes.values())
    measured: dict[int, tuple[CellCost, ...]] = {}
    for size in sorted({small, large}):
        own = example.measured(size, seconds=seconds, split=True)
        measured[size], link = agreed_costs(own, example.where)
    at = interpolated(measured[small], small, measured[large], large)
    return (lambda count: at(sizes[count])), link
