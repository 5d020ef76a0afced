"""What would help, in seconds: the measured step replayed with one thing changed.

Each change is a row of a table: it makes another plan of the measured one, or none where it does
not apply. The gain is the difference of two replays, so what both get wrong cancels out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

from stagewise.costs import FREE_LINK, CellCost, scaled
from stagewise.diagnosis.measured_plan import MeasuredSteps
from stagewise.errors import StagewiseError
from stagewise.planning import Plan, plan_from_costs
from stagewise.planning.partition.place import best_balance
from stagewise.planning.refit import with_microbatches
from stagewise.schedule import SCHEDULES

_SLOW = 1.1  # times the pace of the others
_MOST_INSTRUCTIONS = 100_000  # of a plan that is replayed


@dataclass(frozen=True, kw_only=True)
class Help:
    """One change: what it is, the seconds of a step that it saves, and the command for it."""

    change: str
    plan: Plan
    seconds: float  # saved; negative if it would cost time
    share: float  # of the measured step
    command: str
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class _Changed:
    change: str
    plan: Plan
    command: str
    remark: str = ""


def what_would_help(measured: MeasuredSteps) -> list[Help]:
    """Return the changes that apply, the most useful first."""
    if measured.planned.programs or measured.planned.segments:
        return []  # a schedule of one's own, or blocks chosen for it, have no neighbours
    now = measured.plan.timeline.duration_seconds
    found = []
    for change in _CHANGES:
        with suppress(StagewiseError):  # too few cells, or a number that a schedule does not take
            for changed in change(measured):
                saved = now - changed.plan.timeline.duration_seconds
                found.append(
                    Help(
                        change=changed.change,
                        plan=changed.plan,
                        seconds=saved,
                        share=saved / measured.step_seconds if measured.step_seconds else 0.0,
                        command=changed.command,
                        remark=changed.remark,
                    )
                )
    return sorted(found, key=lambda one: -one.seconds)


def _twice_the_microbatches(measured: MeasuredSteps) -> Iterator[_Changed]:
    plan = measured.plan
    samples = measured.recording.environment.get("samples", "")
    number = 2 * plan.num_microbatches
    if (samples.isdecimal() and number > int(samples[:9])) or _is_large(plan, 2):
        return
    yield _Changed(
        change=f"{number} microbatches in place of {plan.num_microbatches}",
        plan=with_microbatches(plan, number),
        command=measured.command(with_microbatches(plan, number)),
        remark="if half a microbatch takes half the time",
    )


def _another_cut(measured: MeasuredSteps) -> Iterator[_Changed]:
    plan = measured.plan
    cells = _without_paces(measured)
    balance = best_balance(
        plan.built_schedule,
        cells,
        recompute=plan.recompute,
        link=plan.link,
        speeds=plan.speeds,
    )
    if balance != plan.balance:
        other = _on_its_devices(measured, replace(plan, balance=balance, cells=cells))
        yield _Changed(
            change=f"cells per stage {_listed(balance)} in place of {_listed(plan.balance)}",
            plan=other,
            command=measured.command(other, cut=True),
            remark=_if_equal(measured),
        )


def _free_messages(measured: MeasuredSteps) -> Iterator[_Changed]:
    if measured.plan.num_devices > 1:
        yield _Changed(
            change="messages that take no time",
            plan=replace(measured.plan, link=FREE_LINK),
            command=f"stagewise doctor --devices {measured.plan.num_devices}",
            remark="the most that faster links can save",
        )


def _slow_device(measured: MeasuredSteps) -> Iterator[_Changed]:
    plan, paces = measured.plan, _paces(measured)
    slow = max(range(len(paces)), key=paces.__getitem__)
    if paces[slow] > 1:
        yield _Changed(
            change=f"device {slow} at the pace of the others (it takes {paces[slow]:.2f} times as "
            "long, compared with the plan)",
            plan=replace(plan, cells=_without_paces(measured)),
            command=f"stagewise doctor --devices {plan.num_devices}",
            remark="what else runs there?",
        )


def _paces(measured: MeasuredSteps) -> list[float]:
    """Return how many times as long each device takes as the others; 1 but for a slow one.

    A device is slow if it takes longer than planned, and the others do not.
    """
    plan, paces = measured.plan, [1.0] * measured.plan.num_devices
    if not measured.planned.cells or plan.num_devices < 2:
        return paces
    planned, busy = measured.planned.timeline.busy_seconds, plan.timeline.busy_seconds
    found = [now / then if then else 1.0 for now, then in zip(busy, planned, strict=True)]
    slow = max(range(len(found)), key=found.__getitem__)
    usual = median(pace for device, pace in enumerate(found) if device != slow)
    if found[slow] > _SLOW * usual:
        paces[slow] = found[slow] / usual
    return paces


def _devices(plan: Plan) -> Iterator[int]:
    """Yield the (first) device of every cell."""
    for size, on in zip(plan.balance, plan.built_schedule.placement, strict=True):
        yield from (on[0] for _ in range(size))


def _without_paces(measured: MeasuredSteps) -> tuple[CellCost, ...]:
    """Return the cells as they would be on a usual device."""
    paces, plan = _paces(measured), measured.plan
    return tuple(
        scaled(cell, seconds=1 / paces[device])
        for cell, device in zip(plan.cells, _devices(plan), strict=True)
    )


def _on_its_devices(measured: MeasuredSteps, plan: Plan) -> Plan:
    """Return `plan`, of cells without paces, as its devices would run it: a slow one stays slow."""
    paces = _paces(measured)
    cells = (
        scaled(cell, seconds=paces[device])
        for cell, device in zip(plan.cells, _devices(plan), strict=True)
    )
    return replace(plan, cells=tuple(cells))


def _no_recomputation(measured: MeasuredSteps) -> Iterator[_Changed]:
    plan = measured.plan
    if plan.recomputes:
        other = replace(plan, recompute="never")
        times = [
            after / before if before else 1.0
            for before, after in zip(
                plan.peak_activation_bytes, other.peak_activation_bytes, strict=True
            )
        ]
        yield _Changed(
            change="no recomputation",
            plan=other,
            command=measured.command(other),
            remark=f"with up to {max(times):.1f} times the activations",
        )


def _other_schedules(measured: MeasuredSteps) -> Iterator[_Changed]:
    plan = measured.plan
    for name, row in SCHEDULES.items():
        if name == plan.schedule or plan.replicas or _is_large(plan, row.stages_per_device):
            continue
        with suppress(StagewiseError):
            found = plan_from_costs(
                _without_paces(measured),
                link=plan.link,
                input_bytes=plan.input_bytes,
                num_devices=plan.num_devices,
                num_microbatches=plan.num_microbatches,
                schedule=name,
                recompute=plan.recompute,
                speeds=plan.speeds,
            )
            each, other = row.stages_per_device, _on_its_devices(measured, found)
            yield _Changed(
                change=f"schedule {name}" + (f", {each} stages on a device" if each > 1 else ""),
                plan=other,
                command=measured.command(other),
                remark=_if_equal(measured),
            )


def _if_equal(measured: MeasuredSteps) -> str:
    return "" if measured.planned.cells else "if a stage's cells take equally long"


def _is_large(plan: Plan, times: int) -> bool:
    number = sum(map(len, plan.built_schedule.programs))
    return times * number > _MOST_INSTRUCTIONS


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


_CHANGES: tuple[Callable[[MeasuredSteps], Iterator[_Changed]], ...] = (
    _twice_the_microbatches,
    _another_cut,
    _free_messages,
    _slow_device,
    _no_recomputation,
    _other_schedules,
)
