"""The plan request: one value from the command line to the planner, checked once.

Problem: schedule, microbatches, recomputation, cut and memory are requested on the command line, in
a training run and in `stagewise.plan`, and each may be left to the search.
Idea: one frozen request that checks its fields on creation, each alone and all together, so that
contradictory requests never reach the planner.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from types import NoneType
from typing import Literal, NotRequired, TypedDict

from stagewise.errors import PlanError, ScheduleError
from stagewise.planning.partition.balance import check_balance
from stagewise.planning.partition.speeds import check_speeds, relative_speeds
from stagewise.schedule import POLICIES, Schedule, check_replicas, schedule_row
from stagewise.schedule.recompute import check_policy

AUTO: Literal["auto"] = "auto"
MEASURED: Literal["measured"] = "measured"  # speeds
SEGMENTS = "segments"  # in addition to the recomputation policies: optimal parts of stages
ScheduleLike = str | Schedule | Callable[[int, int], Schedule]  # of devices and microbatches
Microbatches = int | Sequence[int] | Literal["auto"]

_PER_DEVICE = (1, 2, 4, 8)  # microbatches that the search tries
_CLOSED_FORM = ("1f1b", "interleaved", "zb_h1", "zb_v")  # schedules of which it tries several plans


def check_numbers(what: str, given: object, *, several: bool = False) -> None:
    """Raise PlanError unless `given` is a whole number, or a sequence of such; of `several` only
    a sequence will do.
    """
    is_sequence = isinstance(given, Iterable) and not isinstance(given, str)
    numbers = tuple(given) if is_sequence else (given,)  # type: ignore[arg-type]
    if (several and not is_sequence) or any(
        not isinstance(number, Integral) or isinstance(number, bool) for number in numbers
    ):
        example = "(2, 3)" if several else "4"
        raise PlanError(
            f"{what} is {given!r}; it must be made of whole numbers, such as {what}={example}"
        )


def _check_bytes(given: object) -> None:
    if type(given) is bool or not isinstance(given, Real):
        raise PlanError(f"memory_bytes has {given!r}; give a number of bytes, such as 8e9 for 8 GB")


class PlanWishes(TypedDict):
    """The fields of PlanRequest as keyword arguments."""

    num_microbatches: Microbatches
    num_stages: NotRequired[int | None]
    num_devices: NotRequired[int | None]
    replicas: NotRequired[Sequence[int] | Literal["auto"]]
    schedule: NotRequired[ScheduleLike]
    recompute: NotRequired[str]
    balance: NotRequired[Sequence[int] | None]
    memory_bytes: NotRequired[float | Sequence[float] | None]
    speeds: NotRequired[Sequence[float] | Literal["measured"] | None]
    state_factor: NotRequired[float]
    trial: NotRequired[bool | None]
    device_names: NotRequired[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The planning arguments of `stagewise.plan`, whose docstring explains each.

    The plan is `searched` for if `num_microbatches` (also: several numbers), `schedule`,
    `recompute` or `replicas` is "auto", or with segments or `memory_bytes`. Raises ScheduleError
    for an unknown schedule or policy or an impossible number, PlanError for other contradictions.
    """

    num_microbatches: Microbatches
    num_stages: int | None = None
    num_devices: int | None = None
    replicas: Sequence[int] | Literal["auto"] = ()
    schedule: ScheduleLike = "1f1b"
    recompute: str = "never"
    balance: Sequence[int] | None = None
    memory_bytes: float | Sequence[float] | None = None  # of every device, or of each
    speeds: Sequence[float] | Literal["measured"] | None = None  # None: as devices' kinds tell
    state_factor: float = 4
    trial: bool | None = None  # None: where every device is real
    device_names: Sequence[str] = ()  # as torch names them; (): what there is, in order

    def __post_init__(self) -> None:
        counts = self.num_microbatches
        check_numbers("num_microbatches", () if counts == AUTO else counts)
        check_numbers("num_stages", () if self.num_stages is None else self.num_stages)
        check_numbers("num_devices", () if self.num_devices is None else self.num_devices)
        if self.device_names and self.num_devices != len(self.device_names):
            raise PlanError(
                f"{len(self.device_names)} devices are named for {self.num_devices}; name each"
            )
        check_numbers("balance", () if self.balance is None else self.balance, several=True)
        check_numbers("replicas", () if self.replicas == AUTO else self.replicas, several=True)
        for cap in self.memory_bytes if isinstance(self.memory_bytes, list | tuple) else ():
            _check_bytes(cap)
        if not isinstance(self.memory_bytes, list | tuple | NoneType):
            _check_bytes(self.memory_bytes)
        if not (isinstance(self.schedule, str | Schedule) or callable(self.schedule)):
            raise PlanError(
                f"schedule is {self.schedule!r}; give a name, such as '1f1b', a Schedule, or a "
                "function (num_devices, num_microbatches) -> Schedule"
            )
        if not isinstance(counts, int | str):  # a single number leaves no choice
            counts = counts[0] if len(set(counts)) == 1 else tuple(counts)
            object.__setattr__(self, "num_microbatches", counts)
        if self.memory_bytes is not None and not isinstance(self.memory_bytes, int | float):
            caps = tuple(self.memory_bytes)
            object.__setattr__(self, "memory_bytes", caps[0] if len(set(caps)) == 1 else caps)
        if not isinstance(self.speeds, str | NoneType):
            self._check_number_of_speeds()
            object.__setattr__(self, "speeds", relative_speeds(self.speeds))
        if not isinstance(self.replicas, str):
            object.__setattr__(self, "replicas", tuple(self.replicas))
        if self.balance is not None:
            object.__setattr__(self, "balance", tuple(self.balance))
        self._check_each()
        if self.searched:
            self._check_searchable()
        else:
            self._check_together()

    def _check_number_of_speeds(self) -> None:
        """Also of equal ones, of which nothing is kept."""
        given = self.speeds if isinstance(self.speeds, list | tuple) else None
        if given is None:
            raise PlanError(
                f"speeds is {self.speeds!r}; give one for each device, such as (1, 0.5)"
            )
        number = self.num_devices
        if number is None and len(given) == 1 and self.num_stages is not None:
            number = self.num_stages
        if number is not None:
            check_speeds(given, number)

    @property
    def searched(self) -> bool:
        """Whether anything is left to the search."""
        wishes = (self.num_microbatches, self.schedule, self.recompute, self.replicas)
        return (
            any(isinstance(wish, str) and wish in (AUTO, SEGMENTS) for wish in wishes)
            or self.memory_bytes is not None
            or not isinstance(self.num_microbatches, int)
        )

    @property
    def schedules(self) -> tuple[str, ...] | None:
        """The schedules to search, by name; None for all."""
        assert isinstance(self.schedule, str)
        return None if self.schedule == AUTO else (self.schedule,)

    def counts(self, num_samples: int, parts: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the numbers of microbatches to try: the requested, or 1, 2, 4 and 8 per device.

        A batch given as Microbatches, of `parts` samples, fixes the number.
        """
        if parts is not None:
            return (len(parts),)
        if isinstance(self.num_microbatches, int):
            return (self.num_microbatches,)
        if not isinstance(self.num_microbatches, str):
            return tuple(self.num_microbatches)
        assert self.num_devices is not None
        numbers = [n for each in _PER_DEVICE if (n := each * self.num_devices) <= num_samples]
        return tuple(numbers) or (num_samples,)

    def fixed_with(self, count: int) -> "Iterator[PlanRequest]":
        """Yield requests that leave nothing to the search, with `count` microbatches."""
        schedules = _CLOSED_FORM if self.schedule == AUTO else (self.schedule,)
        policies = ("never", "always") if self.recompute in (AUTO, SEGMENTS) else (self.recompute,)
        for schedule, recompute in itertools.product(schedules, policies):
            yield replace(self, num_microbatches=count, schedule=schedule, recompute=recompute)

    def caps(self, num_devices: int) -> tuple[float, ...] | None:
        """Return every device's memory; None if there is no cap."""
        given = self.memory_bytes
        if given is None or isinstance(given, Sequence):
            return given if given is None else tuple(given)
        return (given,) * num_devices

    @property
    def known_speeds(self) -> tuple[float, ...]:
        """The speeds of the devices, of which the fastest has 1; empty if all are equal."""
        return () if isinstance(self.speeds, str | NoneType) else tuple(self.speeds)

    def _check_each(self) -> None:
        error = PlanError if self.searched else ScheduleError
        counts = self.num_microbatches
        if counts != AUTO:
            numbers = [counts] if isinstance(counts, int) else [*counts]
            if not numbers or min(numbers) < 1:
                got = counts if isinstance(counts, int) else numbers
                raise error(f"num_microbatches is {got}; give one or more numbers of at least 1")
        for what, number in (("num_stages", self.num_stages), ("num_devices", self.num_devices)):
            if number is not None and number < 1:
                raise PlanError(f"{what} is {number}; it must be at least 1")
        if isinstance(self.schedule, str) and self.schedule != AUTO:
            schedule_row(self.schedule)
        if not self.searched:
            check_policy(self.recompute)
        elif self.recompute not in (AUTO, SEGMENTS, *POLICIES):
            raise PlanError(
                f"recompute is {self.recompute!r}; choose 'auto', {SEGMENTS!r}, or one of "
                f"{', '.join(sorted(POLICIES))}"
            )
        if isinstance(self.speeds, str) and self.speeds != MEASURED:
            raise PlanError(f"speeds is {self.speeds!r}; give one for each device, or {MEASURED!r}")
        if self.speeds and self.replicas:
            raise PlanError(
                "replicas share a stage's microbatches equally, so their devices must be equally "
                "fast; leave speeds out, or replicas"
            )
        if self.num_devices is not None:
            check_speeds(self.known_speeds, self.num_devices)
        caps = self.caps(1)
        if caps is not None and not (caps and min(caps) > 0):
            raise PlanError(
                f"memory_bytes is {self.memory_bytes}; give the memory of a device in bytes, such "
                "as 8e9, or a list with that of each, or leave it out"
            )

    def _check_searchable(self) -> None:
        """Raise PlanError if something is given that the search would have to choose."""
        number = self.num_devices
        if number is not None and (caps := self.caps(number)) and len(caps) != number:
            raise PlanError(
                f"memory_bytes has {len(caps)} numbers for {number} devices; give one for each, "
                "or one for all"
            )
        given = {
            "num_stages": self.num_stages is not None,
            "balance": self.balance is not None,
            "replicas": self.replicas not in ((), AUTO),
            "a custom schedule": not isinstance(self.schedule, str),
        }
        if fixed := [what for what, is_given in given.items() if is_given]:
            raise PlanError(
                f"the search chooses the cut itself, but {' and '.join(fixed)} was given; leave it "
                "out (and give num_devices), or give num_microbatches, schedule and recompute "
                "explicitly, and no memory limit"
            )

    def _check_together(self) -> None:
        """Raise PlanError if the given numbers contradict each other."""
        num_stages = self.num_stages
        if self.replicas:
            assert not isinstance(self.replicas, str)
            check_replicas(self.replicas, len(self.replicas))
            for what, got, wanted in (
                ("stages", len(self.replicas), self.num_stages),
                ("devices", sum(self.replicas), self.num_devices),
            ):
                if wanted is not None and got != wanted:
                    raise PlanError(
                        f"replicas {list(self.replicas)} imply {got} {what}, but {wanted} were "
                        "asked for; give one number of devices per stage, and leave the rest out"
                    )
            num_stages = len(self.replicas)
        if self.balance is not None:
            check_balance(self.balance, sum(self.balance), num_stages)
