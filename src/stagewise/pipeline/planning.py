"""`stagewise.plan`: measure the model where it will run, then cut it optimally.

Where something is "auto", or memory has a cap, it searches for the fastest plan that fits. Under
torch.distributed every rank must call it.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from stagewise.costs import FREE_INSTRUCTION, InstructionCost, LinkCost
from stagewise.engine.stage import Loss
from stagewise.errors import PlanError
from stagewise.model.chain import Model
from stagewise.pipeline.capturing import chain_for
from stagewise.pipeline.connect import Device
from stagewise.pipeline.measuring import agreed, example_of, rehearsed
from stagewise.pipeline.searching import Microbatches, search_plan
from stagewise.planning.choice import ScheduleLike, choose_schedule
from stagewise.planning.cutting import SEGMENTS
from stagewise.planning.partition import check_balance, check_counts
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.rehearsal import surrounded
from stagewise.schedule import with_recompute


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
    if cells is not None:
        chain_for(model, inputs, kwargs or {}, cells)
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
    chain = chain_for(model, inputs, kwargs or {})
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

    return best(*rehearsed(link, best(link, FREE_INSTRUCTION), model, example))


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
