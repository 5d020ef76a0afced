"""Every schedule on eight emulated devices, against the best plan, its bound and torch's schedules.

Cells sleep, so eight processes, each pinned to one core, can run in parallel on two cores, and one
device's time is known. The cost of a message on this machine, and the overhead per instruction,
are measured first, by rehearsals, as in `stagewise.plan`; the search, the simulations and the
bounds include them. Three profiles: 24 equal cells, 24 unequal ones, and eight unequal ones, for
which only replicas help.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
import typer

import stagewise
from benchmarks.torch_schedules import TORCH_SCHEDULES, TorchSchedule, torch_step
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers
from stagewise.costs import CellCost, LinkCost
from stagewise.planning import Plan, lower_bound_seconds, plan_from_costs
from stagewise.planning.calibrate import (
    EngineOverhead,
    engine_overhead,
    message_seconds,
    with_engine_overhead,
)
from stagewise.planning.search.search import search
from stagewise.schedule import SCHEDULES
from stagewise.testing import EmulatedDevice, emulated_model

NUM_DEVICES, NUM_MICROBATCHES = 8, 32
WARM_UP = 9  # steps
DEVICE = EmulatedDevice()
WORK_SECONDS = 6.56  # of all microbatches on one device, forward and backward; as in `overhead`
UNEQUAL = (50.0, 200.0, 80.0, 300.0, 60.0, 150.0, 90.0, 250.0)
WEIGHTS = {"equal": (1.0,) * 24, "unequal": UNEQUAL * 3, "once": UNEQUAL}
QUICK_PROFILES, QUICK_SCHEDULES = ("unequal",), ("zb_v",)
NOTES = (
    "simulated_seconds and lower_bound_seconds reckon with what messages and instructions cost, "
    "measured first",
    "GPipe's paper at K=8, M=32: speedup 6.3 (Transformer), 3.48 (AmoebaNet-D)",
    "unequal: the best contiguous cut allows 6.1; once: 3.9 without replicas",
    "a plan of replicas is capped at half of the parameters a device, since pure data parallelism "
    "would else win; the row `data parallel` shows it",
)


@dataclass(frozen=True)
class Case:
    """A row to measure: one of our plans, or a schedule of torch's on the same cut."""

    profile: str
    name: str
    plan: str  # as JSON
    words: str
    lower_bound_seconds: float
    peer: TorchSchedule | None = None


def main(
    quick: bool = typer.Option(False, help="Few rows, one repetition; takes less than a minute."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
    schedule: list[str] = typer.Option([], help="Only these named schedules."),
) -> None:
    """Measure every schedule and the best plans on emulated devices."""
    link, overhead = run_workers(NUM_DEVICES, rehearse)
    names = schedule or (QUICK_SCHEDULES if quick else sorted(SCHEDULES))
    profiles = QUICK_PROFILES if quick else tuple(WEIGHTS)
    cases = [case for profile in profiles for case in _cases(profile, names, link, overhead)]
    rows = run_workers(NUM_DEVICES, measure, cases, 1 if quick else 5)
    message = f"a message: {link.overhead_seconds * 1e6:.0f} us of its sender's time, then "
    message += f"{link.latency_seconds * 1e6:.0f} us on its way"
    words = ", ".join(
        f"{kind} {cost * 1e6:.0f} us" for kind, cost in asdict(overhead.per_stage).items()
    )
    notes = (*NOTES, message, f"overhead per instruction: {words}")
    print_rows("schedules on 8 emulated devices", rows, as_json=json, notes=notes)


def rehearse() -> tuple[LinkCost, EngineOverhead]:
    """Run on every rank: what messages and instructions cost between devices that are busy.

    With two stages per device, as in the best plans here: `stagewise.plan`, too, rehearses the plan
    that it is about to choose.
    """
    keep_to_core()
    cells, batch = cell_costs("equal"), torch.zeros(NUM_MICROBATCHES, 1024)
    tried, messages = [], []
    for schedule in ("interleaved_v", "zb_v"):  # all kinds of instructions
        plan = plan_from_costs(
            cells,
            num_stages=2 * NUM_DEVICES,
            num_devices=NUM_DEVICES,
            balance=(2, 1) * NUM_DEVICES,
            num_microbatches=NUM_MICROBATCHES,
            schedule=schedule,
        )
        trials = _pipeline("equal", plan).rehearse(batch, target=batch)
        messages.append(message_seconds(plan.built_schedule, trials))
        tried.append((cells, plan.balance, trials))
    overhead, waited = map(statistics.fmean, zip(*messages, strict=True))
    link = LinkCost(latency_seconds=max(0.0, waited - overhead), overhead_seconds=overhead)
    return link, replace(engine_overhead(tried), factors={})  # of this profile's cells


def measure(cases: Sequence[Case], num_steps: int) -> list[Row]:
    """Run on every rank: all cases, and one device for the speedup."""
    keep_to_core()
    alone_seconds = _one_device_seconds()
    return [_measure_case(case, num_steps, alone_seconds) for case in cases]


def cell_costs(profile: str) -> list[CellCost]:
    """Backward takes twice the forward's time, half of it for the weights."""
    weights = WEIGHTS[profile]
    forward = WORK_SECONDS / NUM_MICROBATCHES / 3 / sum(weights)
    return [
        CellCost(
            name=str(index),
            forward_seconds=weight * forward,
            backward_seconds=2 * weight * forward,
            input_seconds=weight * forward,
            weight_seconds=weight * forward,
            parameter_bytes=1,
        )
        for index, weight in enumerate(weights)
    ]


def _cases(
    profile: str, names: Sequence[str], link: LinkCost, overhead: EngineOverhead
) -> list[Case]:
    cells = with_engine_overhead(cell_costs(profile), overhead)

    def best(name: str, **options: object) -> Case:
        found = search(
            lambda _: cells,
            NUM_DEVICES,
            num_microbatches=[NUM_MICROBATCHES],
            recompute="never",
            link=link,
            state_factor=1,
            **options,  # type: ignore[arg-type]
        )
        return _case(profile, name, found.plan, str(found.chosen))

    if profile == "once":
        everywhere = Plan(
            balance=(len(cells),),
            replicas=(NUM_DEVICES,),
            schedule="1f1b",
            num_microbatches=NUM_MICROBATCHES,
            cells=tuple(cells),
            link=link,
        )
        return [
            best("best without replicas"),
            best("best", replicas=True, memory_bytes=len(cells) / 2),
            _case(profile, "data parallel", everywhere, "one stage on 8 devices"),
        ]
    named = {name: best(name, schedules=[name], synthesis=False) for name in names}
    peers = [
        replace(named[peer.ours], name=f"torch {peer.name.removeprefix('Schedule')}", peer=peer)
        for peer in TORCH_SCHEDULES
        if peer.ours in named
    ]
    return [best("best"), *named.values(), *peers]


def _case(profile: str, name: str, plan: Plan, words: str) -> Case:
    bound = lower_bound_seconds(
        plan.built_schedule.placement, plan.stage_costs, NUM_MICROBATCHES, plan.link
    )
    return Case(profile, name, plan.to_json(), words, bound.seconds)


def _measure_case(case: Case, num_steps: int, alone_seconds: float) -> Row:
    plan = Plan.from_json(case.plan)
    batch = torch.zeros(NUM_MICROBATCHES, 1024)
    if case.peer is None:
        pipe = _pipeline(case.profile, plan)

        def step() -> object:
            return pipe.step(batch, target=batch)
    else:
        placement = plan.built_schedule.placement
        arguments = (plan.balance, placement, NUM_MICROBATCHES, _loss, batch)
        step = torch_step(case.peer, _model(case.profile), *arguments)  # type: ignore[assignment]
    times = []
    for number in range(WARM_UP + num_steps):
        DEVICE.speed = math.inf if number < WARM_UP - 1 else 1.0
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(_together(start, time.perf_counter()))
    simulated, measured = plan.timeline.duration_seconds, statistics.median(times[WARM_UP:])
    return {
        "profile": case.profile,
        "schedule": case.name,
        "recompute": plan.recompute,
        "num_stages": plan.num_stages,
        "num_microbatches": plan.num_microbatches,
        "lower_bound_seconds": case.lower_bound_seconds,
        "simulated_seconds": simulated,
        "measured_seconds": measured,
        "ratio": measured / simulated,
        "speedup": alone_seconds / measured,
        "plan": case.words,
    }


def _pipeline(profile: str, plan: Plan) -> stagewise.Pipeline:
    return stagewise.Pipeline(_model(profile), plan, loss=_loss)


def _model(profile: str) -> torch.nn.Sequential:
    cells = cell_costs(profile)
    return emulated_model(
        [cell.forward_seconds for cell in cells],
        [cell.backward_seconds for cell in cells],
        DEVICE,
        [cell.split_seconds[1] for cell in cells],
    )


def _one_device_seconds() -> float:
    """A microbatch through the whole chain on one device, on rank 0, times their number.

    All profiles have the same sum.
    """
    seconds = 0.0
    if dist.get_rank() == 0:
        plan = plan_from_costs(cell_costs("equal"), num_stages=1, num_microbatches=1)
        pipe = stagewise.Pipeline(_model("equal"), plan, loss=_loss, transport="local")
        batch = torch.zeros(1, 1024)
        start = time.perf_counter()
        pipe.step(batch, target=batch)
        seconds = NUM_MICROBATCHES * (time.perf_counter() - start)
    dist.barrier()
    return seconds


def _together(start: float, end: float) -> float:
    """From when the last rank began to when the last one ended, on the clock they share."""
    stamps = torch.tensor([start, end], dtype=torch.float64)
    dist.all_reduce(stamps, dist.ReduceOp.MAX)
    return float(stamps[1] - stamps[0])


def _loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.mean()


if __name__ == "__main__":
    typer.run(main)
