"""Try plans: run a few steps of each on the real devices, and see what they cost there.

Problem: predictions leave out what only shows when all devices are busy: messages that wait for a
core, caches that neighbours evict, the engine's own work.
Idea: all plans run in turn, so that noise affects all alike, each for as many turns as fit into the
time; medians are compared. A turn is two steps, of which the second counts: the first one finds
caches as another plan has left them, which happens to nobody in training. Steps are not looked at
for what would be wrong in training, which takes several steps' time. Gradients, buffers, random
states and modes are left as they were.
"""

import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from stagewise.batch.lanes import has_streams
from stagewise.costs import LinkCost
from stagewise.engine.stage.gradient import gradients_aside
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.engine.transport.connect import values_of_all
from stagewise.engine.transport.failure import is_out_of_memory
from stagewise.engine.transport.processes import devices_here, is_first, num_processes
from stagewise.errors import PlanError
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.calibrate import (
    FREE_ENGINE,
    EngineOverhead,
    engine_overhead,
    message_seconds,
)
from stagewise.planning.plan import Plan
from stagewise.planning.request import PlanRequest
from stagewise.planning.search.search import CostsAt
from stagewise.profiling.example import Example, in_training_mode
from stagewise.profiling.trial_steps import trial_step, untouched
from stagewise.slow_notice import notice_if_slow
from stagewise.timeline import Timeline

MAX_TURNS = 9
_SLOWER = 1.25  # times the fastest: not tried further
TellTrial = Callable[[str], None]


class NoMemoryError(PlanError):
    """Memory is not enough for any of the plans."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan's steps: seconds of each, on the slowest rank, and timelines of all ranks."""

    plan: Plan
    step_seconds: list[float] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.step_seconds)


def devices_are_real(request: PlanRequest, num_devices: int) -> bool:
    """Return whether plans are to be tried here: by default where each device is a device."""
    if request.known_speeds:
        return False  # what steps show corrects costs of equal devices
    if request.trial is not None:
        return request.trial and num_processes() in (1, num_devices)
    if num_processes() > 1:
        return num_processes() == num_devices
    return len(set(devices_here(num_devices) or ())) == num_devices > 1


def try_plans(
    plans: Mapping[str, Plan],
    example: Example,
    *,
    seconds: float,
    least: int = 1,
    tell: TellTrial = lambda what: None,
    warm: dict[str, "Running"] | None = None,
) -> dict[str, Measured]:
    """Run `plans`, by their words, for about `seconds`, at least `least` turns each; collective.

    Those in `warm` are built already, and those that are built are put there. A plan for which
    memory is not enough is left out. Any other failure is a PlanError that names the plan, on every
    rank.
    """
    start = time.perf_counter()
    own = dict.fromkeys(p for cell in example.chain for p in cell.module.parameters())
    with (
        notice_if_slow(f"trying {len(plans)} plan{'s' * (len(plans) > 1)} for a few steps"),
        in_training_mode(example.model, example.chain),
        gradients_aside(own),
    ):
        warm = {} if warm is None else warm
        left = {w: warm.get(w) or Running.of(plan, example) for w, plan in plans.items()}
        found = {what: Measured(plan=plan) for what, plan in plans.items()}
        for number in range(1, 1 + max(least, MAX_TURNS)):
            began = time.perf_counter()
            for what, each in [*left.items()]:
                tell(f"trying {what}, step {number}")
                alone = number > 1 and len(left) == 1
                took = each.step(what) if alone or each.step(what) else None
                warm[what] = each
                if took is None:
                    del left[what], found[what], warm[what]
                else:
                    found[what].timelines.append(took[0])
                    found[what].step_seconds.append(took[1])
            now = time.perf_counter()
            is_late = values_of_all(now - start + (now - began) > seconds, "trying plans")[0]
            if not left or (number >= least and is_late):
                break
            fastest = min(found[what].seconds for what in left)
            left = {w: e for w, e in left.items() if found[w].seconds <= _SLOWER * fastest}
    if not found:
        raise NoMemoryError(
            f"none of the plans ({', '.join(plans)}) could be run for want of memory; give "
            "memory_bytes (--memory), so that only plans that fit are compared"
        )
    return found


@dataclass
class Running:
    """A plan's runner and the request of a step, ready to be run on this rank."""

    runner: Runner
    request: Request

    @staticmethod
    def of(plan: Plan, example: Example) -> "Running":
        where = devices_here(plan.num_devices) or [example.where] * plan.num_devices
        pipe = Pipeline(example.model, plan, loss=example.loss, devices=where)
        args = () if example.inputs is None else (example.inputs,)
        return Running(pipe._runner, pipe._trial(args, example.target, example.keywords))

    def step(self, what: str) -> tuple[Timeline, float] | None:
        """Return a step's timeline, and its seconds on the slowest rank; None without memory."""
        error: Exception | None = None
        try:
            with untouched(self.runner.stages):  # also for the other plans
                timeline, seconds = trial_step(self.runner, self.request)
        except Exception as raised:  # on every rank, as a step's failure is
            error = raised
        lacks = any(values_of_all(error is not None and is_out_of_memory(error), "trying plans"))
        if error is not None and not lacks:
            raise PlanError(f"trying {what} failed: {error}") from error
        if lacks:
            return None
        return timeline, max(values_of_all(seconds, "trying plans: a step"))


def corrected_costs(
    link: LinkCost, costs_at: CostsAt, measured: Sequence[Measured], where: torch.device
) -> tuple[LinkCost, EngineOverhead]:
    """Return what messages and instructions cost beside busy devices, from plans that were tried.

    `link` and `costs_at` are what messages and cells cost alone.
    """
    messages = [message_seconds(m.plan.needed_schedule, m.timelines) for m in measured]
    overhead, waited = map(statistics.fmean, zip(*messages, strict=True))
    latency = (
        waited
        - overhead
        - link.seconds_per_byte
        * statistics.fmean(
            size
            for m in measured
            for cost in m.plan.engine_costs
            for size in (cost.output_bytes, cost.gradient_bytes)
        )
    )
    better_known = replace(
        link, latency_seconds=max(link.latency_seconds, latency), overhead_seconds=overhead
    )
    if num_processes() == 1:
        better_known = link  # nothing is sent
    if where.type != "cpu" and not has_streams(where):  # times of launches
        return better_known, FREE_ENGINE
    trials = [
        (costs_at(m.plan.num_microbatches), m.plan.engine_balance, m.timelines) for m in measured
    ]
    return better_known, engine_overhead(trials)


def machine_here(where: torch.device) -> str:
    """Return what the ranks' devices are, and the software that times depend on; collective."""
    name = f"{where.type} ({platform.machine()})"
    if where.type == "cuda":
        name = torch.cuda.get_device_name(where)
    devices = Counter(values_of_all(name, "the machine"))
    listing = ", ".join(f"{number} x {name}" for name, number in sorted(devices.items()))
    return f"{listing}, torch {torch.__version__}"


def warn_elsewhere(plan: Plan, where: torch.device) -> None:
    """Warn on rank 0 if `plan` was tried on other devices or software than these; collective."""
    here = machine_here(where) if plan.machine else ""
    if plan.machine != here and is_first():
        warnings.warn(
            f"this plan was tried on {plan.machine}, but this is {here}: another plan may be "
            "faster here; make one with stagewise plan RECIPE --schedule auto --json",
            stacklevel=2,
        )
