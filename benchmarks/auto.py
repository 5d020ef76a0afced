"""Is the plan that `auto` chooses the fastest one measured?

`auto` beside every named schedule with its best cut, and beside the schedules of
torch.distributed.pipelining on the same cuts, in the same processes, in turns of two steps, of
which the second is timed. The fastest of many rows is partly the luckiest: `auto` and the fastest
two others then run four times as many turns in a final, and for them only these count. A run of all
workloads takes more than an hour; each one's rows are printed when they are there, and `--workload`
runs some of them, so that a table may be made in parts.
"""

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.auto_workloads import DEVICE, WORKLOADS, Task, Workload
from benchmarks.torch_schedules import TORCH_SCHEDULES, torch_step
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers
from stagewise.errors import PlanError, ScheduleError
from stagewise.planning import Plan, search
from stagewise.schedule import SCHEDULES

Found = TypeVar("Found")
# Steps: in the first eight and in every 16th, stagewise looks at what cells do. An even number, so
# that looks fall on those that are not timed.
WARM_UP = 10
TORCH_WARM_UP = 2
NUM_FINALISTS, FINAL = 3, 4  # rows that run once more; times as many steps as in the first rounds
QUICK = "demo", "24 unequal emulated cells"
NOTES = (
    "ratio: over the fastest row of the final; predicted_seconds: before any row was measured, "
    "with costs that auto's trials corrected",
    "planning_seconds: of auto, with measuring and trials; trial_seconds: its step in these trials",
    "pace: what a fixed computation on all ranks took during the steps, over what it took before "
    "and after planning: away from 1, the machine has changed since the predictions were made",
    "waited: the share of the steps' time that rank 0's threads waited for a core; well above 0 "
    "with no more workers than cores, other work ran on this machine, and the times mean little",
)


@dataclass
class Contender:
    """A row, and what runs its step on this rank."""

    system: str
    schedule: str
    step: Callable[[], object]
    predicted_seconds: float | None
    planning_seconds: float | None = None
    trial_seconds: float | None = None
    warm_up: int = WARM_UP  # steps that it needs


def main(
    quick: bool = typer.Option(False, help="Two workloads, few rows; less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
    workload: list[str] = typer.Option([], help="Only these: a part of the name is enough."),
    steps: int = typer.Option(
        0,
        help="Measured steps of every row, whose median is shown; by "
        "default 5, and 7 where cells compute.",
    ),
) -> None:
    """Compare auto with every named schedule and with torch's."""
    chosen = [
        at
        for at, each in enumerate(WORKLOADS)
        if any(part in each.name for part in workload or (QUICK if quick else ("",)))
    ]
    if quick:
        chosen = [at for at in chosen if WORKLOADS[at].num_devices <= 4]
    for at in chosen:
        rows = run_workers(
            WORKLOADS[at].num_devices, measure, at, quick, steps or _num_steps(at, quick)
        )
        print_rows("auto beside named schedules", rows, as_json=json, notes=NOTES)
        if not json:
            print(_summary(rows))


def _summary(rows: list[Row]) -> str:
    """Say whether auto is the fastest, and how wrong predictions are."""
    auto, *_ = rows
    over = [
        float(row["predicted_seconds"]) / float(row["step_seconds"] or 0)
        for row in rows
        if row["predicted_seconds"] is not None
    ]
    common = statistics.median(over)
    torchs = [float(row["ratio"] or 0) for row in rows if str(row["system"]).startswith("torch")]
    said = [f"auto takes {auto['ratio']:.3f} of the fastest row's time"]
    if torchs:
        said.append(f"torch's fastest {min(torchs) / float(auto['ratio'] or 0):.3f} of auto's")
    for what, by in (("predictions", 1.0), (f"over their common {common:.3f}, they", common)):
        errors = [abs(each / by - 1) for each in over]
        median, worst = statistics.median(errors), max(errors)
        said.append(f"{what} are wrong by {median:.1%} (median), {worst:.1%} (worst)")
    return f"{auto['workload']}: {'; '.join(said)}"


def _num_steps(at: int, quick: bool) -> int:
    return 2 if quick else 5 if WORKLOADS[at].is_emulated else 7


def measure(at: int, quick: bool, num_steps: int) -> list[Row]:
    """Run on every rank: all contenders of one workload, in turn."""
    workload = WORKLOADS[at]
    if workload.is_emulated:
        keep_to_core()
    paces, later = [_pace()], list[float]()
    contenders = [*_contenders(workload, quick, paces)]
    times, waited = _race(workload, contenders, range(-WARM_UP, num_steps), later)
    medians = [*map(statistics.median, times)]
    auto, *others = range(len(medians))
    finalists = [auto, *sorted(others, key=medians.__getitem__)[: NUM_FINALISTS - 1]]
    rounds = range(num_steps, (1 + FINAL) * num_steps)
    again, more = _race(workload, [contenders[at] for at in finalists], rounds, later)
    for at, own in zip(finalists, again, strict=True):
        medians[at] = statistics.median(own)
    share = (waited + more) / sum(map(sum, [*times, *again]))
    return [
        {
            "workload": f"{workload.name}, K={workload.num_devices}",
            "system": contender.system,
            "schedule": contender.schedule,
            "step_seconds": seconds,
            "ratio": seconds / min(medians[at] for at in finalists),
            "predicted_seconds": contender.predicted_seconds,
            "planning_seconds": contender.planning_seconds,
            "trial_seconds": contender.trial_seconds,
            "final": at in finalists,
            "waited": share,
            "pace": statistics.median(later) / statistics.fmean(paces),
        }
        for at, (contender, seconds) in enumerate(zip(contenders, medians, strict=True))
    ]


def _race(
    workload: Workload, contenders: Sequence[Contender], rounds: range, paces: list[float]
) -> tuple[list[list[float]], float]:
    """Return the seconds of each row's steps, and those that rank 0's threads waited for a core.

    Rounds below 0 warm up, and are not among them; the pace of the others is added to `paces`.
    """
    times: list[list[float]] = [[] for _ in contenders]
    waited = 0.0
    for number in rounds:
        DEVICE.speed = math.inf if number < -1 else 1.0
        if number >= 0:
            paces.append(_pace())
        turns = [*zip(contenders, times, strict=True)]
        random.Random(number).shuffle(turns)  # no row always follows the same other one
        for contender, own in turns:
            if number < -contender.warm_up:
                continue
            if number >= 0 and not workload.is_emulated:
                contender.step()  # the others have emptied the caches; in training nobody does
            dist.barrier()
            start, before = time.perf_counter(), _waited()
            contender.step()
            seconds = _together(start, time.perf_counter())
            if number >= 0:
                own.append(seconds)
                waited += _waited() - before
    return times, waited


def _contenders(workload: Workload, quick: bool, paces: list[float]) -> Iterator[Contender]:
    task = workload.task(quick)
    start = time.perf_counter()
    auto = stagewise.plan(
        task.model,
        task.inputs,
        target=task.target,
        loss=task.loss,
        num_devices=workload.num_devices,
        num_microbatches=workload.num_microbatches,
        schedule="auto",
    )
    planning_seconds = time.perf_counter() - start
    paces.append(_pace())
    yield _ours("auto", auto, workload.task(quick), planning_seconds)
    named = _on_first(lambda: _named(auto, ["1f1b", "zb_v"] if quick else [*SCHEDULES]))
    for plan in named.values():
        yield _ours("stagewise", plan, workload.task(quick))
    for row in TORCH_SCHEDULES if workload.chain else ():
        if row.ours in named:
            task, plan = workload.task(quick), named[row.ours]
            # Its zero-bubble backward wants gradients of the stage's inputs and weights alone.
            step = torch_step(
                row,
                copy.deepcopy(task.model) if not workload.is_emulated else task.model,
                plan.balance,
                plan.built_schedule.placement,
                plan.num_microbatches,
                task.loss,
                task.inputs,
                task.target,
            )
            yield Contender(
                "torch.distributed.pipelining", row.name, step, None, warm_up=TORCH_WARM_UP
            )


def _on_first(function: Callable[[], Found]) -> Found:
    """Return rank 0's result on all, since ranks share the machine's cores."""
    found = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _named(auto: Plan, names: Sequence[str]) -> dict[str, Plan]:
    return {name: plan for name in names if (plan := _best_named(name, auto)) is not None}


def _best_named(name: str, auto: Plan) -> Plan | None:
    """Return the named schedule with its best cut, by the costs that `auto` was made from."""
    try:
        return search(
            lambda _: auto.cells,
            auto.num_devices,
            num_microbatches=[auto.num_microbatches],
            recompute="never",
            link=auto.link,
            schedules=[name],
            synthesis=False,
        ).plan
    except (PlanError, ScheduleError):  # not for these numbers
        return None


def _ours(system: str, plan: Plan, task: Task, planning_seconds: float | None = None) -> Contender:
    pipe = stagewise.Pipeline(task.model, plan, loss=task.loss, weight=task.weight)
    each = plan.num_stages // plan.num_devices
    return Contender(
        system,
        f"{plan.schedule}, {each} stages per device" if each > 1 else plan.schedule,
        lambda: pipe.step(task.inputs, target=task.target),
        plan.timeline.duration_seconds,
        planning_seconds,
        plan.measured_seconds,
    )


def _pace() -> float:
    """Return the seconds of a fixed computation that all ranks run at once: a median of several."""
    a, times = torch.ones(192, 192), list[float]()
    for _ in range(9):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(8):
            a = (a @ a).clamp(max=1)
        times.append(_together(start, time.perf_counter()))
    return statistics.median(times)


def _waited() -> float:
    """Return the seconds that this process's threads have been ready to run, but without a core.

    Linux counts them; elsewhere 0.
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            total += int(path.read_text().split()[1])
    return total / 1e9


def _together(start: float, end: float) -> float:
    """From when the last rank began to when the last one ended, on the clock they share."""
    stamps = torch.tensor([start, end], dtype=torch.float64)
    dist.all_reduce(stamps, dist.ReduceOp.MAX)
    return float(stamps[1] - stamps[0])


if __name__ == "__main__":
    typer.run(main)
