"""What stands out in recorded steps: one sentence each, with its number and what to do.

The limits are those of `stagewise advise` (GPipe, arXiv:1811.06965), applied to measurements.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean

from stagewise.diagnosis.measured_plan import MeasuredSteps
from stagewise.errors import StagewiseError
from stagewise.planning import plan_from_costs
from stagewise.planning.advice.advise_rules import (
    MICROBATCHES_PER_STAGE,
    SAMPLES_FOR_BATCHNORM,
    TRANSFER_SHARE,
)
from stagewise.planning.partition.place import best_balance
from stagewise.planning.refit import with_microbatches
from stagewise.recording import Cause
from stagewise.units import format_seconds, size_in_words

_SLOWER = 1.25  # times the mean of the other stages
_DATA, _LAUNCH, _HOST = 0.05, 0.1, 0.1  # shares of a step
_ONE_MICROBATCH = 0.5  # of the peak
_AS_FAST = 1.02


@dataclass(frozen=True, kw_only=True)
class Hint:
    """One sentence; `about` names the condition, which is told once in a run."""

    about: str
    sentence: str


def advice_for(measured: MeasuredSteps) -> list[Hint]:
    """Return the advice that applies, in a fixed order."""
    found = []
    for about, rule in _RULES.items():
        with suppress(StagewiseError):  # a plan that would not be possible
            found += [Hint(about=about, sentence=sentence) for sentence in rule(measured)]
    return found


def _transfers(measured: MeasuredSteps) -> Iterator[str]:
    idle = measured.idle
    share = idle.total[Cause.TRANSFERS] / max(1, sum(idle.busy_ns))
    if share > TRANSFER_SHARE:
        yield (
            f"messages hold devices up for {share:.0%} of the time that they compute (above "
            f"{TRANSFER_SHARE:.0%}): cut where less crosses, or use faster links (stagewise "
            f"doctor --devices {measured.plan.num_devices} measures them)"
        )


def _microbatches(measured: MeasuredSteps) -> Iterator[str]:
    plan, idle = measured.plan, measured.idle
    wanted = MICROBATCHES_PER_STAGE * plan.num_devices
    if plan.num_devices > 1 and plan.num_microbatches < wanted:
        share = idle.total[Cause.FILL_AND_DRAIN] / max(1, sum(idle.window_ns))
        yield (
            f"{plan.num_microbatches} microbatches on {plan.num_devices} devices leave {share:.0%} "
            f"of their time to filling and draining: try {wanted}, "
            f"{measured.command(with_microbatches(plan, wanted))}"
        )


def _slow_stage(measured: MeasuredSteps) -> Iterator[str]:
    plan = measured.plan
    if plan.num_stages < 2 or plan.segments:
        return
    devices = [len(on) for on in plan.built_schedule.placement]  # of each stage's replicas
    whole = [cost.forward_seconds + cost.backward_seconds for cost in plan.stage_costs]
    seconds = [each / number for each, number in zip(whole, devices, strict=True)]
    slow = max(range(len(seconds)), key=seconds.__getitem__)
    others = fmean(each for stage, each in enumerate(seconds) if stage != slow)
    if seconds[slow] > _SLOWER * others > 0:
        balance = best_balance(
            plan.built_schedule,
            plan.cells,
            recompute=plan.recompute,
            link=plan.link,
            speeds=plan.speeds,
        )
        better = "no cut between its cells is better"
        if balance != plan.balance:
            other = replace(plan, balance=balance)
            better = f"cut anew, {measured.command(other, cut=True)}"
        yield (
            f"stage {slow} takes {seconds[slow] / others:.1f} times as long as the mean of the "
            f"others ({format_seconds(whole[slow])} for a microbatch"
            + f", on {devices[slow]} devices" * (devices[slow] > 1)
            + f"): {better}"
        )


def _recomputation(measured: MeasuredSteps) -> Iterator[str]:
    plan = measured.plan
    if not plan.recomputes or plan.segments or not measured.planned.cells:
        return
    peaks, costs = plan.peak_activation_bytes, plan.stage_costs
    again = {stage for stage, _ in plan.built_schedule.recomputed}
    for device, peak in enumerate(peaks):
        own = [s for s in again if device in plan.built_schedule.placement[s]]
        most = max((costs[stage].activation_bytes for stage in own), default=0)
        if peak and most > _ONE_MICROBATCH * peak:
            yield (
                f"{size_in_words(most)} of the {size_in_words(peak)} of activations at the peak of "
                f"device {device} are those of one microbatch while it is recomputed: recompute in "
                "segments, stagewise plan RECIPE --memory SIZE"
            )
            return


def _batchnorm(measured: MeasuredSteps) -> Iterator[str]:
    facts = measured.recording.environment
    layers, samples = (facts.get(name, "")[:9] for name in ("batchnorm_layers", "samples"))
    if not (layers.isdecimal() and samples.isdecimal() and int(layers)):
        return
    each = int(samples) // measured.plan.num_microbatches
    if each < SAMPLES_FOR_BATCHNORM:
        yield (
            f"{layers} BatchNorm layers normalise over {each} samples, a microbatch (below "
            f"{SAMPLES_FOR_BATCHNORM}): use fewer microbatches or larger batches"
        )


def _devices(measured: MeasuredSteps) -> Iterator[str]:
    plan = measured.plan
    now = plan.timeline.duration_seconds
    if plan.replicas or plan.programs or plan.segments or measured.takes_turns:
        return
    for number in range(1, plan.num_devices):
        fewer = plan_from_costs(
            plan.cells,
            link=plan.link,
            input_bytes=plan.input_bytes,
            num_devices=number,
            num_microbatches=plan.num_microbatches,
            schedule=plan.schedule,
            recompute=plan.recompute,
            speeds=sorted(plan.speeds, reverse=True)[:number],
        )
        there = fewer.timeline.duration_seconds
        if there <= _AS_FAST * now:
            s = "s" if number > 1 else ""
            yield (
                f"{number} device{s} would take {format_seconds(there)} for a step, and "
                f"{plan.num_devices} take {format_seconds(now)}: use {number}, "
                f"{measured.command(fewer)}"
            )
            return


def _data(measured: MeasuredSteps) -> Iterator[str]:
    share = measured.idle.total[Cause.DATA] / max(1, sum(measured.idle.window_ns))
    if share > _DATA:
        yield (
            f"devices wait {share:.0%} of the time for data, and for what the loop does between "
            "calls: load batches in the background (DataLoader(num_workers=...))"
        )


def _launch(measured: MeasuredSteps) -> Iterator[str]:
    share = measured.idle.total[Cause.OVERHEAD] / max(1, sum(measured.idle.window_ns))
    if share > _LAUNCH:
        number = max(1, measured.plan.num_microbatches // 2)
        fewer = f"larger microbatches, {measured.command(with_microbatches(measured.plan, number))}"
        yield f"getting instructions going takes {share:.0%} of the time: use {fewer}"


def _host(measured: MeasuredSteps) -> Iterator[str]:
    idle = measured.idle
    lost = [
        (own + by[Cause.HOST]) / max(1, window)
        for own, by, window in zip(idle.lost_ns, idle.by_cause, idle.window_ns, strict=True)
    ]
    worst = max(range(len(lost)), key=lost.__getitem__)
    if lost[worst] > _HOST:
        yield (
            f"device {worst}'s process had no core for {lost[worst]:.0%} of the time that it could "
            "have used one: something else runs on this host, or it has fewer cores than workers"
        )


_RULES: dict[str, Callable[[MeasuredSteps], Iterator[str]]] = {
    "transfers": _transfers,
    "microbatches": _microbatches,
    "slow stage": _slow_stage,
    "recomputation": _recomputation,
    "BatchNorm": _batchnorm,
    "devices": _devices,
    "data": _data,
    "launch": _launch,
    "host": _host,
}
