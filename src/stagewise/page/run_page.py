"""The page of one or several runs: the predicted step above the measured one, and their losses."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from stagewise.diagnosis import predicted_step
from stagewise.errors import PlanError
from stagewise.page.page_contents import Around, Losses, Page, Section, ShownStep
from stagewise.page.plan_page import rival_steps, short_name
from stagewise.planning import Plan
from stagewise.recording import Phase, RecordedStep, Recording, RunFiles, recording_to_json
from stagewise.recording.recorded import SECOND
from stagewise.report.run_report import RunReport
from stagewise.timeline import Curve
from stagewise.units import format_seconds

_MOST_STEPS = 6  # measured ones of a run


def run_page(runs: Sequence[RunFiles]) -> Page:
    """Return the page of the first run, with the measured steps and losses of all."""
    names = _names(runs)
    marks = [f" ({name})" * (len(runs) > 1) for name in names]
    first = next((run.recording for run in runs if run.recording is not None), None)
    steps = [step for run, mark in zip(runs, marks, strict=True) for step in _steps(run, mark)]
    return Page(
        title=f"stagewise report: {', '.join(names)}",
        summary=_summary(runs[0], steps),
        record={"runs": [_record(run, name) for run, name in zip(runs, names, strict=True)]},
        steps=_in_order(steps, None if first is None else _plan_of(first)),
        sections=[*chain.from_iterable(map(_sections, runs, marks))],
        losses=[_losses(run, name) for run, name in zip(runs, names, strict=True)],
        environment={} if first is None else _environment(first),
    )


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Return each run's folder, with its parents where two have the same name."""
    short = [run.path.resolve().name for run in runs]
    return [
        name if short.count(name) == 1 else str(run.path)
        for name, run in zip(short, runs, strict=True)
    ]


def _steps(run: RunFiles, mark: str) -> Iterator[ShownStep]:
    """Yield the predicted step, the usual measured one, and others."""
    recording = run.recording
    if recording is None:
        return
    usual = recording.usual_step
    plan = _plan_of(recording)
    if plan is not None and plan.cells:
        predicted = predicted_step(recording)
        timeline = plan.timeline if predicted is None else predicted.timeline
        costs = plan.engine_costs if predicted is None else predicted.costs
        yield ShownStep(f"predicted: {short_name(plan)}{mark}", timeline, costs)
    if usual is None:
        return
    others = [step for step in recording.steps if step is not usual]
    memory = _memory(recording)
    for step in [usual, *others][:_MOST_STEPS]:
        median = ", the median" if step is usual and others else ""
        yield ShownStep(
            f"measured: step {step.step}{median}{mark}",
            step.timeline,
            costs=plan.engine_costs if plan is not None and plan.cells and not memory else (),
            measured=memory,
            around=tuple(_around(step)),
        )


def _sections(run: RunFiles, mark: str) -> Iterator[Section]:
    """Yield what the terminal shows of a run besides its timelines."""
    if found := [*RunReport(run).tables()]:
        yield Section(f"Why devices were idle, and what would help{mark}", found)


def _in_order(steps: Sequence[ShownStep], plan: Plan | None) -> list[ShownStep]:
    """Return predicted and measured steps, then what other schedules would do."""
    rivals = [] if plan is None or not plan.cells else rival_steps(plan)
    return [*steps, *(ShownStep(f"predicted: {r.name}", r.timeline, r.costs) for r in rivals)]


def _plan_of(recording: Recording) -> Plan | None:
    """Return the plan of the usual step, or before any step the last plan."""
    usual = recording.usual_step
    index = len(recording.plans) - 1 if usual is None else usual.plan
    if not 0 <= index < len(recording.plans):
        return None
    try:
        return Plan.from_json(json.dumps(dict(recording.plans[index])))
    except PlanError:
        return None  # a measured step is shown without it


def _around(step: RecordedStep) -> Iterator[Around]:
    """Yield what ranks did around instructions, in seconds from the first instruction."""
    ran = [event.start_ns for event in step.events if not isinstance(event.what, Phase)]
    origin = min(ran, default=0)
    for event in step.events:
        if isinstance(event.what, Phase):
            start, end = ((at - origin) / SECOND for at in (event.start_ns, event.end_ns))
            yield Around(event.device, str(event.what), start, end)


def _memory(recording: Recording) -> tuple[Curve, ...]:
    """Return the live bytes of each device in the trial step: the sum over its stages."""
    curves = []
    for device in range(recording.num_devices):
        own = [stage.live for stage in recording.memory if stage.device == device]
        changes = sorted(change for live in own for change in _changes(live))
        level, curve = 0, []
        for at, by in changes:
            level += by
            curve.append((at / SECOND, level))
        curves.append(tuple(curve))
    return tuple(curves) if any(curves) else ()


def _changes(live: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    before = 0
    for at, level in live:
        yield at, level - before
        before = level


def _losses(run: RunFiles, name: str) -> Losses:
    return Losses(name, _points(run.rows, "loss"), _points(run.rows, "validation_loss"))


def _points(rows: Iterable[Mapping[str, object]], field: str) -> list[tuple[int, float]]:
    """Return (step, value) of the rows that have finite numbers for both."""
    return [
        (step, float(value))
        for row in rows
        if isinstance(step := row.get("step"), int)
        and isinstance(value := row.get(field), int | float)
        and math.isfinite(value)
    ]


def _summary(run: RunFiles, steps: Sequence[ShownStep]) -> dict[str, str]:
    """Return the run's main figures, predicted ones beside them."""
    summary: dict[str, str] = {}
    losses = _losses(run, "")
    if losses.training:
        step, loss = losses.training[-1]
        summary |= {"steps": str(step), "loss": f"{loss:.4f}"}
    if losses.validation:
        summary["validation loss"] = f"{losses.validation[-1][1]:.4f}"
    for shown in steps[:2]:
        kind, timeline = shown.name.partition(":")[0], shown.timeline
        summary[f"step, {kind}"] = format_seconds(timeline.duration_seconds)
        summary[f"bubble, {kind}"] = f"{timeline.bubble_fraction:.1%}"
    return summary


def _record(run: RunFiles, name: str) -> dict[str, object]:
    recorded = None if run.recording is None else json.loads(recording_to_json(run.recording))
    report = RunReport(run).record()
    return {"name": name, "report": report, "log": list(run.rows), "recording": recorded}


def _environment(recording: Recording) -> dict[str, str]:
    clocks = {
        f"rank {clock.rank}": f"{clock.device} on {clock.host}, clock "
        f"{clock.offset_ns / 1000:+.0f} us (within {clock.error_ns / 1000:.0f} us)"
        for clock in recording.clocks
    }
    return {**recording.environment, **clocks}
