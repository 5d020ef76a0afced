"""A plan: everything that says how a model will run, frozen, with its predictions.

A plan is data (JSON in and out). Measured cell costs travel in it, so that any of its
predictions can be made again, anywhere, without the model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from stagewise.costs import (
    FREE_LINK,
    CellCost,
    InstructionCost,
    LinkCost,
    StageCost,
    boundary_seconds,
    load_seconds,
    scaled,
    stage_costs,
)
from stagewise.errors import PlanError
from stagewise.planning.choice import ScheduleChoice, choose_schedule, chosen
from stagewise.planning.partition.balance import check_balance
from stagewise.planning.partition.place import place
from stagewise.planning.request import PlanRequest
from stagewise.planning.simulate import simulate
from stagewise.schedule import (
    Schedule,
    Segments,
    check_replicas,
    consecutive,
    named_schedule,
    parse_programs,
    refine,
    schedule_of,
    stages_per_device,
    validate,
    with_recompute,
)
from stagewise.schedule.schedule import IDLE, Program
from stagewise.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Partition, schedule, microbatches and recomputation for one model.

    `balance[s]` is the number of cells on stage s. `schedule` names one of SCHEDULES, with
    `stages_per_device` stages on each device (None: as the schedule wants), or `replicas[s]`
    devices for stage s, numbered stage by stage (empty: one each); or, if `programs` are
    given, it is just their name: one text per device, as `str(Schedule)` has its lines.
    `segments[s]` are the parts of stage s as (number of cells, recomputed); the engine runs every
    part as a stage of its own (`engine_balance`), and recomputes those parts for the microbatches
    of the policy `recompute`, or for all if that is "never". `cells`
    holds the costs of one microbatch that the plan was made from; it is empty where `balance` was
    given and nothing measured.
    """

    balance: tuple[int, ...]
    schedule: str
    num_microbatches: int
    recompute: str = "never"
    stages_per_device: int | None = None
    replicas: tuple[int, ...] = ()
    programs: tuple[str, ...] = ()
    segments: tuple[Segments, ...] = ()
    cells: tuple[CellCost, ...] = ()
    input_bytes: int = 0
    link: LinkCost = FREE_LINK

    def __post_init__(self) -> None:
        check_balance(self.balance, len(self.cells) or sum(self.balance))
        self._check_segments()
        _ = self.built_schedule

    @property
    def num_stages(self) -> int:
        return len(self.balance)

    @cached_property
    def built_schedule(self) -> Schedule:
        """The validated schedule of the engine's stages, recomputations included."""
        plain = self.plain_schedule
        if not self.segments:
            return validate(with_recompute(plain, self.recompute))
        policy = "always" if self.recompute == "never" else self.recompute
        return validate(refine(plain, self.segments, policy))

    @cached_property
    def recomputes(self) -> bool:
        """Whether some microbatch is recomputed on some stage."""
        return bool(self.built_schedule.recomputed)

    @property
    def engine_balance(self) -> tuple[int, ...]:
        """Number of cells on each of the engine's stages: those of `built_schedule`."""
        if not self.segments:
            return self.balance
        return tuple(size for parts in self.segments for size, _ in parts)

    @property
    def num_devices(self) -> int:
        return self.built_schedule.num_devices

    @property
    def stage_costs(self) -> tuple[StageCost, ...]:
        """Costs per stage; raises PlanError where nothing was measured."""
        return self._costs(self.balance)

    @property
    def engine_costs(self) -> tuple[StageCost, ...]:
        """Costs per stage of the engine; raises PlanError where nothing was measured."""
        return self._costs(self.engine_balance)

    @cached_property
    def timeline(self) -> Timeline:
        """The predicted step."""
        return simulate(self.built_schedule, self.engine_costs, self.link)

    def _costs(self, balance: Sequence[int]) -> tuple[StageCost, ...]:
        if not self.cells:
            raise PlanError(
                "this plan was made from a balance without measured costs, so it predicts "
                "nothing; give plan() an example batch"
            )
        return stage_costs(self.cells, balance, input_bytes=self.input_bytes)

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
        """That of the plan's own stages, before segments and policy recompute anything."""
        if self.replicas:
            check_replicas(self.replicas, self.num_stages)
        if self.programs:
            programs, placement = _programs(self.programs), consecutive(self.replicas)
            made = schedule_of(self.schedule, programs, placement)
            for what, got, need in (
                ("stages", made.num_stages, self.num_stages),
                ("microbatches", made.num_microbatches, self.num_microbatches),
            ):
                if got != need:
                    raise PlanError(
                        f"the programs of schedule {self.schedule!r} have {got} {what}, but the "
                        f"plan has {need}; make them agree"
                    )
            return made
        each = stages_per_device(self.schedule, self.stages_per_device)
        if self.num_stages % each:
            raise PlanError(
                f"{self.schedule} has {each} stages on each device, but the plan has "
                f"{self.num_stages} stages; make that a multiple of {each}"
            )
        return named_schedule(
            self.schedule, self.num_stages // each, self.num_microbatches, each, self.replicas
        )

    @property
    def peak_activation_bytes(self) -> tuple[int, ...]:
        """Predicted peak of what each device keeps for the backward pass."""
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
        """The plan that runs a schedule of one's own; raises ScheduleError if it breaks a rule."""
        choice = choose_schedule(schedule, schedule.num_microbatches)
        measured = {"cells": tuple(cells), "input_bytes": input_bytes, "link": link}
        return plan_of(choice, balance, recompute=recompute, **measured)

    def to_json(self) -> str:
        """The plan's fields as JSON text."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """The inverse of `to_json`; raises PlanError when `text` is no plan."""
        try:
            fields = json.loads(text)
            return Plan(
                balance=tuple(fields["balance"]),
                schedule=fields["schedule"],
                num_microbatches=fields["num_microbatches"],
                recompute=fields["recompute"],
                stages_per_device=fields.get("stages_per_device"),
                replicas=tuple(fields.get("replicas", ())),
                programs=tuple(fields.get("programs", ())),
                segments=tuple(
                    tuple((int(size), bool(recomputed)) for size, recomputed in parts)
                    for parts in fields.get("segments", ())
                ),
                cells=tuple(map(_cell, fields["cells"])),
                input_bytes=fields["input_bytes"],
                link=LinkCost(**fields["link"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"this is no plan ({type(error).__name__}: {error}); give the text that "
                "Plan.to_json() or `stagewise plan --json` wrote"
            ) from error


def _cell(fields: Mapping[str, Any]) -> CellCost:
    """Older plans call the overhead `around`, or have none."""
    own = {"instruction_overhead": {}, **fields}
    given = own.pop("around", own["instruction_overhead"])
    own["instruction_overhead"] = InstructionCost(**{k: float(v) for k, v in given.items()})
    return CellCost(**own)


def _programs(lines: Sequence[str]) -> tuple[Program, ...]:
    return parse_programs("\n".join(line or IDLE for line in lines))


def with_microbatches(plan: Plan, count: int) -> Plan:
    """`plan` with `count` microbatches; measured costs are scaled by the microbatch's size."""
    ratio = plan.num_microbatches / count
    return replace(
        plan,
        num_microbatches=count,
        cells=tuple(scaled(cell, seconds=ratio, size=ratio) for cell in plan.cells),
        input_bytes=round(plan.input_bytes * ratio),
    )


def best_balance(
    schedule: Schedule, cells: Sequence[CellCost], *, recompute: str, link: LinkCost
) -> tuple[int, ...]:
    """The cut that leaves the busiest device of `schedule` least to do."""
    forwards, split = 1 if recompute == "never" else 2, schedule.splits_backward
    found = place(
        schedule.placement,
        [load_seconds(cell, forwards=forwards, split=split) for cell in cells],
        transfer_seconds=boundary_seconds(cells, link),
    )
    assert found is not None  # only a memory cap could leave none
    return found.balance


def plan_of(choice: ScheduleChoice, balance: Sequence[int], **rest: Any) -> Plan:
    """The plan that runs the chosen schedule with so many cells on each stage."""
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
    """The plan whose busiest device has the least load; or the one with the request's balance."""
    choice, balance, recompute = chosen(request), request.balance, request.recompute
    if balance is None:
        balance = best_balance(choice.built, cells, recompute=recompute, link=link)
    check_balance(balance, len(cells), choice.num_stages)
    measured = {"cells": tuple(cells), "input_bytes": input_bytes, "link": link}
    return plan_of(choice, balance, recompute=recompute, **measured)


def plan_from_costs(
    cells: Sequence[CellCost],
    *,
    link: LinkCost = FREE_LINK,
    input_bytes: int = 0,
    **wishes: Any,
) -> Plan:
    """`plan_for` a PlanRequest of these `wishes`, such as `num_stages=4, num_microbatches=8`."""
    return plan_for(PlanRequest(**wishes), cells, link=link, input_bytes=input_bytes)
