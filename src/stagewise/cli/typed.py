"""From typed options to a PlanRequest, and back to a worker's command line, without torch."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stagewise.errors import PlanError, ScheduleError, UsageError, is_number
from stagewise.planning.devices import parse_bytes
from stagewise.planning.plan import Plan
from stagewise.planning.request import AUTO, MEASURED, Microbatches, PlanRequest
from stagewise.schedule import SCHEDULES, Schedule, parse_schedule
from stagewise.schedule.table import unknown_schedule

DEFAULT_MICROBATCHES, DEFAULT_DEVICES = 8, 2
_NAME = re.compile(r"[a-z]+(:\d+)?")  # of a device, as torch has it

_OPTIONS = {"num_stages": "--stages", "balance": "--balance", "replicas": "--replicas"}


class NumDevices(int):
    """A number of devices, which were perhaps told by their names."""

    names: tuple[str, ...] = ()

    @staticmethod
    def of(number: int, names: Iterable[str]) -> "NumDevices":
        """Return a number with the devices' names, if they have any."""
        found = NumDevices(number)
        found.names = tuple(names)
        return found

    @property
    def share_a_process(self) -> bool:
        """Whether one process must drive them: of several kinds, or one more than once."""
        kinds = {name.split(":")[0] for name in self.names}
        repeated = len(set(self.names)) < len(self.names)
        return len(kinds) > 1 or (repeated and kinds != {"cpu"})


def device_names_of(devices: int | None) -> tuple[str, ...]:
    """Return the names by which devices were told, if they were."""
    return devices.names if isinstance(devices, NumDevices) else ()


def check_unnamed(devices: int | None, why: str) -> None:
    """Raise UsageError if devices are named where only their number can be told."""
    if names := device_names_of(devices):
        raise UsageError(
            f"--devices {','.join(names)} names devices of this machine, but {why}; give their "
            f"number, --devices {len(names)}"
        )


def num_devices(text: object) -> NumDevices:
    """Return how many devices `--devices` means: a number, or names; UsageError."""
    names = tuple(str(text).strip().split(","))
    if is_number(str(text)) and int(str(text)) > 0:
        return NumDevices(str(text))
    if not all(map(_NAME.fullmatch, names)):
        raise UsageError(
            f"--devices is {text!r}; give a number of at least 1, such as 4, or names, such as "
            "cuda:0,cuda:1 or cuda:0,cpu"
        )
    return NumDevices.of(len(names), names)


@dataclass(frozen=True, kw_only=True)
class Typed:
    """The planning options shared by several commands, as typed."""

    schedule: str = "1f1b"
    recompute: str = "never"
    stages: int | None = None
    devices: int | None = None
    replicas: str | None = None
    microbatches: str | None = None
    balance: str | None = None
    memory: str | None = None
    speeds: str | None = None
    trial: bool | None = None

    def request(self, *, default_devices: int = DEFAULT_DEVICES) -> PlanRequest:
        """Return the request; raise UsageError naming the option that is wrong."""
        schedule = AUTO if self.schedule == AUTO else named_or_read(self.schedule)
        unsized = self.stages is None and self.devices is None and self.replicas in (None, AUTO)
        named = isinstance(schedule, str)
        try:
            return PlanRequest(
                schedule=schedule,
                recompute=self.recompute,
                num_stages=self.stages,
                num_devices=default_devices if unsized and named else self.devices,
                device_names=device_names_of(self.devices),
                replicas=AUTO if self.replicas == AUTO else parsed_replicas(self.replicas),
                num_microbatches=self._microbatches(schedule),
                balance=_balance(self.balance),
                memory_bytes=None if self.memory is None else _caps(self.memory),
                speeds=_speeds(self.speeds),
                trial=self.trial,
            )
        except PlanError as error:
            raise PlanError(_by_option(str(error))) from None

    def fixed(self, *, default_devices: int = DEFAULT_DEVICES) -> PlanRequest:
        """Return a request for one schedule; raise UsageError if anything is left to the search."""
        request = self.request(default_devices=default_devices)
        if replace(request, memory_bytes=None).searched:
            raise UsageError(
                "this command needs one schedule, policy and number of microbatches; search with "
                "stagewise plan RECIPE --json > plan.json, and train with --plan plan.json"
            )
        return request

    def _microbatches(self, schedule: str | Schedule) -> Microbatches:
        if self.microbatches is None:
            if isinstance(schedule, Schedule):
                return schedule.num_microbatches
            return DEFAULT_MICROBATCHES
        if self.microbatches == AUTO:
            return AUTO
        example = "8, several, such as 4,8,16, or auto"
        return numbers_in(
            "--microbatches", self.microbatches, "one, such as", example, what="positive integer"
        )


def saved_plan(path: Path, typed: Typed) -> Plan:
    """Return the plan in a file written by `stagewise plan --json`.

    Raises PlanError if it is not a plan, UsageError if other options contradict it.
    """
    defaults = vars(Typed())
    if others := [f"--{name}" for name, given in vars(typed).items() if given != defaults[name]]:
        raise UsageError(
            f"--plan {path} determines how the model is cut and run, but {', '.join(others)} was "
            "given too; leave it out, or leave --plan out"
        )
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"the plan {path} cannot be read ({error}); write one with stagewise plan RECIPE "
            f"--json > {path}"
        ) from error


def words_of(request: PlanRequest) -> dict[str, object]:
    """Return the options that give this request again; None where an option is not needed."""
    schedule = request.schedule
    assert isinstance(schedule, str | Schedule)
    return {
        "--stages": request.num_stages,
        "--devices": ",".join(request.device_names) or request.num_devices,
        "--replicas": _joined(request.replicas) or None,
        "--microbatches": _joined(request.num_microbatches),
        "--schedule": schedule if isinstance(schedule, str) else schedule.name,
        "--recompute": request.recompute,
        "--balance": None if request.balance is None else _joined(request.balance),
        "--speeds": _joined_speeds(request),
        "--memory": ",".join(f"{cap / 1e6!r}MB" for cap in request.caps(1) or ()) or None,
    }


def command_line(options: Mapping[str, object]) -> list[str]:
    """Return the options that are not None, as command-line words."""
    return [w for name, value in options.items() if value is not None for w in (name, str(value))]


def named_or_read(text: str) -> str | Schedule:
    """Return a schedule's name unchanged, or the schedule in the file of that name.

    Raises ScheduleError if there is neither, or the file does not hold a valid schedule.
    """
    if text in SCHEDULES:
        return text
    names, path = ", ".join(sorted(SCHEDULES)), Path(text)
    if path.suffix or path.parent != Path(".") or os.path.exists(text):  # False if too long
        try:
            content = path.read_text()
        except (OSError, ValueError) as error:
            raise ScheduleError(
                f"the schedule {text} cannot be read ({error}); give one of {names}, or write "
                f"a file to start from: stagewise simulate --text > {text}"
            ) from None
        return parse_schedule(text, content)
    raise ScheduleError(
        f"{unknown_schedule(text)}; or give a file that contains one, such as {text}.txt"
    )


def parsed_replicas(text: str | None) -> tuple[int, ...]:
    """Parse "1,2,1"; raise UsageError if it is anything else."""
    if text is None:
        return ()
    return numbers_in("--replicas", text, "the number of devices of each stage, such as", "1,2,1")


def _caps(text: str) -> list[float]:
    return [parse_bytes(cap, "--memory") for cap in text.split(",")]


def _speeds(text: str | None) -> list[float] | Literal["measured"] | None:
    if text is None or text == MEASURED:
        return MEASURED if text else None
    try:
        return [float(speed) for speed in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--speeds {text!r} is not a list of numbers; write one for each device, such as "
            f"--speeds 1,0.5, or --speeds {MEASURED}"
        ) from None


def _balance(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    return numbers_in("--balance", text, "the number of cells on each stage, such as", "4,6")


def numbers_in(
    option: str, text: str, write: str, example: str, *, what: str = "list of positive integers"
) -> tuple[int, ...]:
    """Parse "1,2,4"; raise UsageError that suggests `example`."""
    found = tuple(int(word) for word in text.split(",") if is_number(word.strip()))
    if len(found) != len(text.split(",")) or 0 in found:
        raise UsageError(f"{option} {text!r} is not a {what}; write {write} {option} {example}")
    return found


def _joined(numbers: str | int | Iterable[int]) -> str:
    return str(numbers) if isinstance(numbers, str | int) else ",".join(map(str, numbers))


def _joined_speeds(request: PlanRequest) -> str | None:
    given = request.speeds
    return given if given is None or isinstance(given, str) else ",".join(map(repr, given)) or None


def _by_option(message: str) -> str:
    """Replace the names of contradictory fields by those of the options."""
    return re.sub(
        r"(?<=but ).+?(?= was given)",
        lambda names: " and ".join(_OPTIONS.get(n, n) for n in names[0].split(" and ")),
        message,
    )
