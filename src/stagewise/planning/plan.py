"""A plan: everything that determines how a model will run, frozen, with its predictions.

A plan is data (JSON in and out). It contains the measured cell costs, so its predictions can be
recomputed anywhere, without the model.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Unpack

from stagewise.costs import FREE_LINK, NOT_AS_WRITTEN, CellCost, LinkCost, StageCost, stage_costs
from stagewise.errors import PlanError, why_unreadable
from stagewise.habits import in_our_words
from stagewise.planning.choice import ScheduleChoice, choose_schedule, requested_schedule
from stagewise.planning.partition.balance import check_balance
from stagewise.planning.partition.place import best_balance
from stagewise.planning.partition.speeds import check_speeds, on_devices
from stagewise.planning.request import PlanRequest, PlanWishes, check_numbers
from stagewise.planning.simulate import simulate
from stagewise.planning.written_costs import read_fields
from stagewise.schedule import (
    Schedule,
    Segments,
    check_replicas,
    consecutive,
    named_schedule,
    needed_for,
    parse_programs,
    refine,
    schedule_of,
    stages_per_device,
    validate,
    with_recompute,
)
from stagewise.schedule.schedule import IDLE
from stagewise.timeline import Timeline


@in_our_words
@dataclass(frozen=True, kw_only=True)
class Plan:
    """Partition, schedule, microbatches and recomputation for one model.

    `balance[s]` is the number of cells on stage s. `schedule` names one of SCHEDULES, with
    `stages_per_device` stages on each device (None: the schedule's default), or `replicas[s]`
    devices for stage s, numbered stage by stage (empty: one each). With `programs` (one line of
    `str(Schedule)` per device), `schedule` is only their name. `segments[s]` are the parts of stage
    s as (number of cells, recomputed); the engine runs every part as a separate stage
    (`engine_balance`), and recomputes the marked parts for the microbatches of the policy
    `recompute`, or for all if that is "never". `cells` holds the costs of one microbatch that the
    plan was made from; it is empty if a `balance` was given and nothing was measured. Of the
    devices' `speeds` the fastest is 1, and `cells` are its costs (empty: all are equally fast). If
    the plan was tried, its steps took `measured_seconds` on the `machine`. Where a mesh shards
    parameters, those of the engine's stages in `regathered` are gathered whenever their device
    comes to them (`gathers_ahead`: one instruction ahead), others once a step.
    """

    balance: tuple[int, ...]
    num_microbatches: int
    schedule: str = "1f1b"
    recompute: str = "never"
    stages_per_device: int | None = None
    replicas: tuple[int, ...] = ()
    programs: tuple[str, ...] = ()
    segments: tuple[Segments, ...] = ()
    cells: tuple[CellCost, ...] = ()
    input_bytes: int = 0
    link: LinkCost = FREE_LINK
    speeds: tuple[float, ...] = ()
    measured_seconds: float | None = None
    machine: str = ""
    regathered: tuple[int, ...] = ()
    gathers_ahead: bool = True

    def __post_init__(self) -> None:
        check_numbers("balance", self.balance, several=True)
        check_numbers("num_microbatches", self.num_microbatches)
        check_balance(self.balance, len(self.cells) or sum(self.balance))
        self._check_segments()
        _ = self.built_schedule
        check_speeds(self.speeds, self.built_schedule.num_devices)

    def __repr__(self) -> str:
        from stagewise.planning.plan_words import plan_in_short

        return plan_in_short(self)

    def __str__(self) -> str:
        from stagewise.planning.plan_words import plan_in_words

        return plan_in_words(self)

    def _repr_html_(self) -> str:
        from stagewise.planning.plan_words import plan_in_html

        return plan_in_html(self)

    def show(self) -> None:
        """Print the cut, the predictions and, if the cells were measured, the predicted step."""
        print(self)
        if self.cells:
            print()
            self.timeline.show()

    @property
    def num_stages(self) -> int:
        return len(self.balance)

    @cached_property
    def built_schedule(self) -> Schedule:
        """The validated schedule of the engine's stages, including recomputations."""
        again, ahead = self.regathered, self.gathers_ahead
        plain = replace(self.plain_schedule, regathered=again, gathers_ahead=ahead)
        if not self.segments:
            return validate(with_recompute(plain, self.recompute))
        policy = "always" if self.recompute == "never" else self.recompute
        return validate(refine(plain, self.segments, policy))

    @cached_property
    def needed_schedule(self) -> Schedule:
        """`built_schedule` without what the cells that train nothing do not need."""
        schedule = self.built_schedule
        return needed_for(schedule, self.engine_costs) if self.cells else schedule

    @cached_property
    def recomputes(self) -> bool:
        """Whether any microbatch is recomputed on any stage."""
        return bool(self.built_schedule.recomputed)

    @property
    def engine_balance(self) -> tuple[int, ...]:
        """The number of cells on each of the engine's stages, those of `built_schedule`."""
        if not self.segments:
            return self.balance
        return tuple(size for parts in self.segments for size, _ in parts)

    @property
    def num_devices(self) -> int:
        return self.built_schedule.num_devices

    @property
    def stage_costs(self) -> tuple[StageCost, ...]:
        """The costs per stage; raises PlanError if nothing was measured."""
        return self._costs(self.balance, self.plain_schedule)

    @property
    def engine_costs(self) -> tuple[StageCost, ...]:
        """The costs per stage of the engine; raises PlanError if nothing was measured."""
        return self._costs(self.engine_balance, self.built_schedule)

    @cached_property
    def timeline(self) -> Timeline:
        """The predicted step."""
        return simulate(self.needed_schedule, self.engine_costs, self.link)

    def _costs(self, balance: Sequence[int], schedule: Schedule) -> tuple[StageCost, ...]:
        if not self.cells:
            raise PlanError(
                "this plan was made from a balance without measured costs, so it has no "
                "predictions; give plan() an example batch"
            )
        costs = stage_costs(self.cells, balance, input_bytes=self.input_bytes)
        return on_devices(costs, schedule.placement, self.speeds)

    def _check_segments(self) -> None:
        if not self.segments:
            return
        sizes = tuple(sum(size for size, _ in parts) for parts in self.segments)
        if sizes != self.balance or any(size < 1 for size in self.engine_balance):
            raise PlanError(
                f"the segments {self.segments} have {list(sizes)} cells on the stages, but the "
                f"balance is {list(self.balance)}; give every stage segments of all its cells"
            )

    @cached_property
    def plain_schedule(self) -> Schedule:
        """The schedule of the plan's stages, before recomputation by segments or policy."""
        if self.replicas:
            check_replicas(self.replicas, self.num_stages)
        if self.programs:
            programs = parse_programs("\n".join(line or IDLE for line in self.programs))
            made = schedule_of(self.schedule, programs, consecutive(self.replicas))
            for what, got, need in (
                ("stages", made.num_stages, self.num_stages),
                ("microbatches", made.num_microbatches, self.num_microbatches),
            ):
                if got != need:
                    raise PlanError(
                        f"the programs of schedule {self.schedule!r} have {got} {what}, but the "
                        f"plan has {need}; the numbers must be equal"
                    )
            return made
        each = stages_per_device(self.schedule, self.stages_per_device)
        if self.num_stages % each:
            raise PlanError(
                f"{self.schedule} has {each} stages on each device, but the plan has "
                f"{self.num_stages} stages; use a multiple of {each}"
            )
        return named_schedule(
            self.schedule, self.num_stages // each, self.num_microbatches, each, self.replicas
        )

    @property
    def peak_activation_bytes(self) -> tuple[int, ...]:
        """The predicted peak of what each device keeps for the backward pass."""
        return self.timeline.peak_activation_bytes(self.engine_costs)

    @staticmethod
    def from_schedule(
        schedule: Schedule,
        *,
        balance: Sequence[int],
        recompute: str = "never",
        cells: Sequence[CellCost] = (),
        input_bytes: int = 0,
        link: LinkCost = FREE_LINK,
    ) -> "Plan":
        """Return a plan that runs a custom schedule; raise ScheduleError if it is invalid."""
        measured = {"cells": tuple(cells), "input_bytes": input_bytes, "link": link}
        choice = choose_schedule(schedule, schedule.num_microbatches)
        return plan_of(choice, balance, recompute=recompute, **measured)

    def to_json(self) -> str:
        """Return the plan's fields as JSON."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """Read what `to_json` wrote; raise PlanError if `text` is not a plan."""
        try:
            return Plan(**read_fields(json.loads(text)))
        except NOT_AS_WRITTEN as error:
            raise PlanError(
                f"this is not a plan ({why_unreadable(error)}); give the text that "
                "Plan.to_json() or `stagewise plan --json` wrote"
            ) from error


def plan_of(choice: ScheduleChoice, balance: Sequence[int], **rest: Any) -> Plan:
    """Return the plan that runs the chosen schedule with `balance[s]` cells on stage s."""
    return Plan(
        balance=tuple(balance),
        schedule=choice.name,
        stages_per_device=choice.stages_per_device,
        replicas=choice.replicas,
        programs=choice.programs,
        num_microbatches=choice.built.num_microbatches,
        **rest,
    )


def plan_for(
    request: PlanRequest,
    cells: Sequence[CellCost],
    *,
    link: LinkCost = FREE_LINK,
    input_bytes: int = 0,
) -> Plan:
    """Return the plan with the request's balance, or else with the least load on any device."""
    choice, balance, recompute = requested_schedule(request), request.balance, request.recompute
    check_speeds(request.known_speeds, choice.num_devices)
    if balance is None:
        balance = best_balance(
            choice.built, cells, recompute=recompute, link=link, speeds=request.known_speeds
        )
    check_balance(balance, len(cells), choice.num_stages)
    measured = {"cells": tuple(cells), "input_bytes": input_bytes, "link": link}
    speeds = request.known_speeds
    return plan_of(choice, balance, recompute=recompute, speeds=speeds, **measured)


def plan_from_costs(
    cells: Sequence[CellCost],
    *,
    link: LinkCost = FREE_LINK,
    input_bytes: int = 0,
    **wishes: Unpack[PlanWishes],
) -> Plan:
    """Return a plan for these `wishes`, such as `num_stages=4, num_microbatches=8`."""
    return plan_for(PlanRequest(**wishes), cells, link=link, input_bytes=input_bytes)
