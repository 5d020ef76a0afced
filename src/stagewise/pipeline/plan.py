"""`stagewise.plan`: measure the model where it will run, then cut it optimally.

Where something is "auto", or memory has a cap, it searches for the fastest plan that fits. Under
torch.distributed every rank must call it.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch.distributed as dist

from stagewise.batch.markers import along
from stagewise.costs import FREE_INSTRUCTION, CellCost, InstructionCost, LinkCost
from stagewise.engine.stage.stage import Loss
from stagewise.engine.transport.connect import Device
from stagewise.errors import PlanError
from stagewise.model.cells_of import chain_for
from stagewise.model.chain import Model
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.calibrate import instruction_cost, message_seconds, surrounded
from stagewise.planning.choice import ScheduleLike, choose_schedule
from stagewise.planning.interpolate import interpolated
from stagewise.planning.partition.balance import check_balance, check_counts
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.search.cuts import SEGMENTS
from stagewise.planning.search.search import CostsAt, Progress, SearchResult, search
from stagewise.profiling.example import Example, agreed, distributed, example_of, in_training_mode
from stagewise.schedule import with_recompute
from stagewise.told import told

Microbatches = int | Sequence[int] | Literal["auto"]


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
    num_microbatches: Microbatches,
    schedule: ScheduleLike = "1f1b",
    recompute: str = "never",
    balance: Sequence[int] | None = None,
    memory_bytes: float | None = None,
    state_factor: float = 4,
    device: Device | None = None,
    seconds: float = 3.0,
    cells: Sequence[str] | None = None,
    batch_dim: int = 0,
) -> Plan:
    """Choose the cut of `model` whose busiest stage has the least to do.

    Args:
        model: an `nn.Sequential`, a list of modules, or any module: that is captured from the
            example (see `stagewise.capture`). Left as it was (gradients, buffers, random state,
            mode).
        inputs, target: an example minibatch; its first microbatch is measured. They may be None
            if `balance` is given; then nothing is measured and the plan predicts nothing.
        kwargs: the example's keyword arguments, as for `Pipeline.step`.
        loss: as for Pipeline; counts to the last cell.
        num_stages, num_devices: into how many stages the model is cut, or on how many devices it
            will run; one follows from the other by the schedule.
        replicas: devices of each stage, which share its microbatches; in place of the two.
        num_microbatches, recompute: how the model will be run; policies are in
            `stagewise.schedule.POLICIES`, and "segments" recomputes what costs least time.
        schedule: a name in `stagewise.schedule.SCHEDULES`; or a Schedule, or a function
            (num_devices, num_microbatches) -> Schedule.
        balance: number of cells on each stage, in place of the optimal cut.
        memory_bytes: what a device has for parameters, their gradients and optimizer state
            (`state_factor` times the parameters: 4 for Adam in the parameters' dtype) and for
            activations.
        device: where to measure; by default where Pipeline would run.
        seconds: about how long to measure.
        cells: paths of the model's modules, or patterns such as `["embed", "layers.*", "head"]`,
            that are to be its cells, for a model that torch.export cannot trace; needs an
            example: see `stagewise.capture_cells`.
        batch_dim: along which dimension the example's samples lie, as for Pipeline.

    With "auto" for `num_microbatches` (or several numbers), `schedule`, `recompute` or `replicas`,
    with segments or with `memory_bytes`, the fastest plan on `num_devices` is searched for that
    fits; `balance` and `num_stages` are then the search's. The cells are measured with the largest
    and the smallest microbatch, and what lies between is taken to be linear.

    Raises:
        ModelError: the model cannot be captured, or cut into `cells`.
        PlanError: more stages than cells, a balance that does not fit, or a schedule that has
            other numbers of stages, devices or microbatches.
        ScheduleError: unknown schedule or policy, or a schedule that breaks a rule.
        BatchError: the example has fewer samples than microbatches.
    """
    inputs, target = along(inputs, batch_dim), along(target, batch_dim)
    kwargs = {name: along(value, batch_dim) for name, value in (kwargs or {}).items()}
    if cells is not None:
        chain_for(model, inputs, kwargs, cells)
    if not isinstance(num_microbatches, int | str) and len(set(num_microbatches)) == 1:
        num_microbatches = num_microbatches[0]  # nothing to choose
    wants = (num_microbatches, schedule, recompute, replicas)
    searches = any(isinstance(wish, str) and wish in ("auto", SEGMENTS) for wish in wants)
    if searches or memory_bytes is not None or not isinstance(num_microbatches, int):
        _check_searchable(schedule, num_stages, balance, replicas)
        return search_plan(
            model,
            inputs,
            target=target,
            kwargs=kwargs,
            loss=loss,
            num_devices=num_devices,
            num_microbatches=num_microbatches,
            schedules=None if schedule == "auto" else [str(schedule)],
            recompute=recompute,
            replicas=replicas == "auto",
            memory_bytes=memory_bytes,
            state_factor=state_factor,
            device=device,
            seconds=seconds,
        ).plan
    assert not isinstance(replicas, str)
    chain = chain_for(model, inputs, kwargs)
    choice = choose_schedule(
        schedule,
        num_microbatches,
        num_stages=num_stages,
        num_devices=num_devices,
        replicas=replicas,
    )
    check_counts(len(chain), choice.num_stages)
    if balance is not None:
        check_balance(balance, len(chain), choice.num_stages)
    built = with_recompute(choice.built, recompute)
    if inputs is None and not kwargs:
        if balance is None:
            raise PlanError(
                "plan() got neither an example batch nor a balance; pass inputs (and target) to "
                "measure the cells, or balance=[...] to cut by hand"
            )
        return Plan(
            balance=tuple(balance),
            schedule=choice.name,
            stages_per_device=choice.stages_per_device,
            replicas=choice.replicas,
            programs=choice.programs,
            num_microbatches=num_microbatches,
            recompute=recompute,
        )
    example = example_of(model, inputs, target, kwargs, loss, device)
    size = example.size_of(num_microbatches)
    costs, link = agreed(example.measured(size, seconds=seconds, split=built.splits_backward))

    def best(link: LinkCost, around: InstructionCost) -> Plan:
        return plan_from_costs(
            surrounded(costs, around),
            num_stages=choice.num_stages,
            num_devices=choice.num_devices,
            replicas=choice.replicas,
            num_microbatches=num_microbatches,
            schedule=choice.name if isinstance(schedule, str) else choice.built,
            recompute=recompute,
            link=link,
            balance=balance,
        )

    return best(*rehearsed(link, best(link, FREE_INSTRUCTION), example))


def _check_searchable(
    schedule: ScheduleLike,
    num_stages: int | None,
    balance: Sequence[int] | None,
    replicas: Sequence[int] | str,
) -> None:
    """Raise PlanError where the search would have to leave something as it is."""
    given = {
        "num_stages": num_stages is not None,
        "balance": balance is not None,
        "replicas": not isinstance(replicas, str) and len(replicas) > 0,
        "a schedule of one's own": not isinstance(schedule, str),
    }
    if fixed := [what for what, is_given in given.items() if is_given]:
        raise PlanError(
            f"the search chooses the cut itself, but {' and '.join(fixed)} was given; leave it out "
            "(give num_devices), or give num_microbatches, schedule and recompute by hand"
        )


def rehearsed(
    link: LinkCost,
    chosen: Plan,
    example: Example,
) -> tuple[LinkCost, InstructionCost]:
    """`link` with what trial steps of the chosen plan showed of it, on busy devices.

    And what instructions took there beyond their cells.
    """
    if not distributed() or dist.get_world_size() != chosen.num_devices:
        return link, FREE_INSTRUCTION
    args = () if example.inputs is None else (example.inputs,)
    with told("trying the plan for a few steps"), in_training_mode(example.model, example.chain):
        pipe = Pipeline(example.model, chosen, loss=example.loss)
        timelines = pipe.rehearse(*args, target=example.target, **example.keywords)  # type: ignore[arg-type]
    overhead, waited = message_seconds(chosen.built_schedule, timelines)
    num_bytes = [size for cell in chosen.cells for size in (cell.output_bytes, cell.gradient_bytes)]
    on_its_way = waited - overhead - statistics.fmean(num_bytes) * link.seconds_per_byte
    better_known = replace(
        link,
        latency_seconds=max(link.latency_seconds, on_its_way),
        overhead_seconds=overhead,
    )
    if example.where.type != "cpu":  # elsewhere instructions end before their kernels do
        return better_known, FREE_INSTRUCTION
    return better_known, instruction_cost(chosen.engine_costs, timelines)


_PER_DEVICE = (1, 2, 4, 8)  # microbatches, where the search chooses


def search_plan(
    model: Model,
    inputs: object,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_devices: int | None = None,
    num_microbatches: Microbatches = "auto",
    schedules: Sequence[str] | None = None,
    recompute: str = "auto",
    replicas: bool = False,
    memory_bytes: float | None = None,
    state_factor: float = 4,
    device: Device | None = None,
    seconds: float = 3.0,
    progress: Progress | None = None,
) -> SearchResult:
    """Measure `model` and search for the fastest plan; arguments as for `stagewise.plan`.

    `num_devices` is by default the number of ranks; `schedules` are all if None, and only then a
    schedule is made for the best cuts.
    """
    if num_devices is None:
        if not distributed():
            raise PlanError("the search needs to know for how many devices; give num_devices")
        num_devices = dist.get_world_size()
    example = example_of(model, inputs, target, kwargs, loss, device)
    counts = candidates(num_microbatches, num_devices, example.num_samples, example.parts)
    costs_at, link = _costs(example, counts, seconds)

    def best(link: LinkCost, around: InstructionCost) -> SearchResult:
        return search(
            lambda count: surrounded(costs_at(count), around),
            num_devices,
            num_microbatches=counts,
            memory_bytes=memory_bytes,
            link=link,
            schedules=schedules,
            recompute=recompute,
            replicas=replicas,
            synthesis=schedules is None,
            state_factor=state_factor,
            progress=progress,
        )

    found = best(link, FREE_INSTRUCTION)
    better_known = rehearsed(link, found.plan, example)
    return found if better_known == (link, FREE_INSTRUCTION) else best(*better_known)


def candidates(
    wanted: Microbatches, num_devices: int, num_samples: int, parts: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The numbers of microbatches to try: those asked for, or 1, 2, 4 and 8 for each device.

    A batch that is Microbatches already has its own number.
    """
    if parts is not None:
        return (len(parts),)
    if isinstance(wanted, int):
        return (wanted,)
    if wanted == "auto":
        numbers = [each * num_devices for each in _PER_DEVICE if each * num_devices <= num_samples]
        return tuple(numbers) or (num_samples,)
    return tuple(wanted)


def _costs(example: Example, counts: Sequence[int], seconds: float) -> tuple[CostsAt, LinkCost]:
    """What the cells cost for each number of microbatches, the same on every rank."""
    sizes = {count: example.size_of(count) for count in counts}
    small, large = min(sizes.values()), max(sizes.values())
    measured: dict[int, tuple[CellCost, ...]] = {}
    for size in sorted({small, large}):
        own = example.measured(size, seconds=seconds, split=True)
        measured[size], link = agreed(own)
    at = interpolated(measured[small], small, measured[large], large)
    return (lambda count: at(sizes[count])), link
