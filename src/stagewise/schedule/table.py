"""The table of named schedules. To add a schedule, add a row; the contract suite then tests it.

Each row's `build` is a pure function of any number of devices, microbatches and stages per device;
`tests/schedule/test_contract.py` checks that its result is valid, and has the bubble and the
microbatches in flight that the row states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagewise.errors import ScheduleError
from stagewise.habits import meant_schedule
from stagewise.schedule import published as forms
from stagewise.schedule.dualpipe import dualpipe_v
from stagewise.schedule.fill_drain import gpipe, one_f_one_b
from stagewise.schedule.interleaved import breadth_first, interleaved, interleaved_v
from stagewise.schedule.placement import check_replicas
from stagewise.schedule.published import Bubble, InFlight
from stagewise.schedule.schedule import Schedule
from stagewise.schedule.zero_bubble import v_half, v_min, zb_h1, zb_v


@dataclass(frozen=True, kw_only=True)
class NamedSchedule:
    """A row of SCHEDULES.

    `build(num_devices, num_microbatches, stages_per_device)` returns the schedule. Each device has
    `stages_per_device` stages; other numbers are possible if `takes_any`. `placement` names the
    function in `stagewise.schedule.placement` that places them. `last_first` gives the order in
    which a stage's gradients are summed. `replicated(num_stages, num_microbatches, replicas)`
    returns the schedule with several devices per stage, where that is possible.
    """

    build: Callable[[int, int, int], Schedule]
    summary: str
    source: str
    placement: str
    bubble: Bubble
    in_flight: InFlight
    stages_per_device: int = 1
    takes_any: bool = False
    splits_backward: bool = False
    last_first: bool = False  # whether backwards start with the last microbatch
    replicated: Callable[[int, int, tuple[int, ...]], Schedule] | None = None

    @property
    def takes_replicas(self) -> bool:
        """Whether a stage may have several devices."""
        return self.replicated is not None


SCHEDULES: dict[str, NamedSchedule] = {
    "gpipe": NamedSchedule(
        build=lambda devices, m, _: gpipe(devices, m),
        summary="all forwards, then all backwards",
        source="arXiv:1811.06965",
        placement="looped",
        bubble=forms.FILL,
        in_flight=forms.ALL,
        last_first=True,
        replicated=gpipe,
    ),
    "1f1b": NamedSchedule(
        build=lambda devices, m, _: one_f_one_b(devices, m),
        summary="one forward, one backward in turn: gpipe's time, less memory",
        source="arXiv:2006.09503",
        placement="looped",
        bubble=forms.FILL,
        in_flight=forms.ONE_F_ONE_B,
        replicated=one_f_one_b,
    ),
    "interleaved": NamedSchedule(
        build=interleaved,
        summary="1f1b with several stages a device: a smaller bubble, more messages",
        source="arXiv:2104.04473",
        placement="looped",
        bubble=forms.LOOPED,
        in_flight=forms.INTERLEAVED,
        stages_per_device=2,
        takes_any=True,
    ),
    "interleaved_v": NamedSchedule(
        build=interleaved_v,
        summary="the same in a zigzag: no message at the turns, equal memory on all devices",
        source="arXiv:2308.15762, arXiv:2405.15362",
        placement="zigzag",
        bubble=forms.ZIGZAG,
        in_flight=forms.INTERLEAVED_V,
        stages_per_device=2,
        takes_any=True,
    ),
    "breadth_first": NamedSchedule(
        build=breadth_first,
        summary="all microbatches through one stage, then through the device's next",
        source="arXiv:2211.05953",
        placement="looped",
        bubble=forms.LOOPED,
        in_flight=forms.ALL,
        stages_per_device=2,
        takes_any=True,
        last_first=True,
    ),
    "zb_h1": NamedSchedule(
        build=lambda devices, m, _: zb_h1(devices, m),
        summary="1f1b with weight gradients filling the cool-down: a third of its bubble",
        source="arXiv:2401.10241",
        placement="looped",
        bubble=forms.ZB_H1,
        in_flight=forms.ONE_F_ONE_B_FIRST,
        splits_backward=True,
    ),
    "zb_v": NamedSchedule(
        build=lambda devices, m, _: zb_v(devices, m),
        summary="weight gradients fill nearly all of the bubble, with 1f1b's memory",
        source="arXiv:2401.10241",
        placement="zigzag",
        bubble=forms.ZB_V,
        in_flight=forms.V_AS_1F1B,
        stages_per_device=2,
        splits_backward=True,
    ),
    "v_half": NamedSchedule(
        build=lambda devices, m, _: v_half(devices, m),
        summary="half of 1f1b's memory",
        source="arXiv:2405.15362",
        placement="zigzag",
        bubble=forms.V_HALF,
        in_flight=forms.V_AS_HALF,
        stages_per_device=2,
        splits_backward=True,
    ),
    "v_min": NamedSchedule(
        build=lambda devices, m, _: v_min(devices, m),
        summary="a third of 1f1b's memory, at about its time",
        source="arXiv:2405.15362",
        placement="zigzag",
        bubble=forms.V_MIN,
        in_flight=forms.V_AS_THIRD,
        stages_per_device=2,
        splits_backward=True,
    ),
    "dualpipe_v": NamedSchedule(
        build=lambda devices, m, _: dualpipe_v(devices, m),
        summary="DualPipe cut in half: forwards beside backwards of the other stage",
        source="arXiv:2412.19437",
        placement="zigzag",
        bubble=forms.DUALPIPE_V,
        in_flight=forms.DUALPIPE,
        stages_per_device=2,
        splits_backward=True,
    ),
}


MOST_FORWARDS = 1 << 22  # of a schedule; 1,024 stages and 4,096 microbatches


def schedule_row(name: str) -> NamedSchedule:
    """Return the row called `name`; raise ScheduleError listing the names if there is none."""
    if name not in SCHEDULES:
        raise ScheduleError(unknown_schedule(name))
    return SCHEDULES[name]


def unknown_schedule(name: str) -> str:
    """Return the message that there is no such schedule, with the one that is meant and all."""
    meant, names = meant_schedule(str(name), SCHEDULES), ", ".join(sorted(SCHEDULES))
    here = f": here it is {meant!r}" if meant else ""
    return f"there is no schedule {name!r}; choose one of {names}{here}"


def stages_per_device(name: str, wanted: int | None = None) -> int:
    """Return the stages per device; raise ScheduleError if `name` cannot have `wanted`."""
    row = schedule_row(name)
    if wanted is None or wanted == row.stages_per_device:
        return row.stages_per_device
    if not row.takes_any or wanted < 1:
        need = "at least 1" if row.takes_any else f"exactly {row.stages_per_device}"
        raise ScheduleError(f"{name} was asked for {wanted} stages per device but needs {need}")
    return wanted


def named_schedule(
    name: str,
    num_devices: int,
    num_microbatches: int,
    per_device: int | None = None,
    replicas: Sequence[int] = (),
) -> Schedule:
    """Build the schedule called `name`; raise ScheduleError listing the names if there is none.

    It has `num_devices * per_device` stages; `per_device` defaults to the row's. With `replicas`
    (devices per stage), `num_devices` is the number of stages.
    """
    wanted = stages_per_device(name, per_device)
    for what, number in (("num_devices", num_devices), ("num_microbatches", num_microbatches)):
        if number < 1:
            raise ScheduleError(f"{what} is {number}; a schedule needs at least 1")
    for what, number in (("stages", num_devices * wanted), ("devices", sum(replicas))):
        if number * num_microbatches > MOST_FORWARDS:
            raise ScheduleError(
                f"{number} {what} and {num_microbatches} microbatches are more than can be "
                f"scheduled: their product is at most {MOST_FORWARDS}"
            )
    if not replicas:
        return SCHEDULES[name].build(num_devices, num_microbatches, wanted)
    check_replicas(replicas, num_devices)
    replicated = SCHEDULES[name].replicated
    if replicated is None:
        able = ", ".join(sorted(n for n, row in SCHEDULES.items() if row.takes_replicas))
        raise ScheduleError(
            f"{name} has one device per stage but was given replicas {list(replicas)}; choose one "
            f"of {able}, or leave replicas out"
        )
    return replicated(num_devices, num_microbatches, tuple(replicas))
