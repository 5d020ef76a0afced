"""The schedules and numbers of stages that a parity check runs."""

from collections.abc import Sequence

from stagewise.engine.transport.processes import num_processes
from stagewise.errors import UsageError
from stagewise.planning.choice import ScheduleChoice, choose_schedule
from stagewise.planning.partition.balance import check_counts
from stagewise.schedule import SCHEDULES, Schedule, schedule_row

NUM_DEVICES = (1, 2, 4)  # by default


def choices_of(
    schedules: Sequence[str | Schedule] | None,
    num_stages: Sequence[int] | None,
    num_devices: Sequence[int] | None,
    num_microbatches: int,
    num_cells: int,
    transport: str,
    replicas: Sequence[int] = (),
) -> list[list[ScheduleChoice]]:
    """Return, per schedule, what to run, in the order of the given numbers or of devices.

    Without `schedules`, all named ones that fit the numbers. Schedules that support `replicas` also
    run with them; under "distributed" only with them, unless other numbers are given, because no
    other number fits the ranks.
    """
    if schedules is not None and not schedules:
        raise UsageError("schedules is empty; name at least one, or leave it out for the default")
    if transport not in ("local", "distributed"):
        raise UsageError(f"transport is {transport!r}; choose 'local' or 'distributed'")
    for what, given in (("stages", num_stages), ("devices", num_devices)):
        if given is not None and not given:
            raise UsageError(f"num_{what} is empty; name at least one number of {what}")
    if num_stages is not None and num_devices is not None:
        raise UsageError("num_stages and num_devices are both given; leave one out")
    for number in num_stages or ():
        check_counts(num_cells, number)
    only_replicas = bool(replicas) and transport == "distributed"
    only_replicas &= num_stages is None and num_devices is None
    found = []
    for schedule in SCHEDULES if schedules is None else schedules:
        if isinstance(schedule, str):
            row = schedule_row(schedule)
            replicated = bool(replicas) and row.takes_replicas
            numbers: Sequence[int] = ()
            if num_stages is not None:
                numbers = [n for n in num_stages if n % row.stages_per_device == 0]
            elif not only_replicas:
                numbers = _numbers(row.stages_per_device, num_devices, num_cells, transport)
            if not (numbers or replicated) and schedules is not None:
                numbers = num_stages or (row.stages_per_device,)
            chosen = [choose_schedule(schedule, num_microbatches, num_stages=n) for n in numbers]
            if replicated:
                chosen.append(choose_schedule(schedule, num_microbatches, replicas=replicas))
        else:
            chosen = [choose_schedule(schedule, num_microbatches)]
        for choice in chosen:
            check_counts(num_cells, choice.num_stages)
        if chosen:
            found.append(chosen)
    return found


def alone(choice: ScheduleChoice) -> ScheduleChoice:
    """Return the same schedule on one device; a custom schedule unchanged."""
    if choice.programs:
        return choice
    row = schedule_row(choice.name)
    each = choice.stages_per_device or row.stages_per_device
    built = row.build(1, choice.built.num_microbatches, each)
    return ScheduleChoice(built=built, stages_per_device=choice.stages_per_device)


def _numbers(
    each: int, num_devices: Sequence[int] | None, num_cells: int, transport: str
) -> Sequence[int]:
    """Return the numbers of stages for these devices; by default those with enough cells."""
    if num_devices is not None:
        return [each * number for number in num_devices]
    if transport == "distributed":
        return [each * num_processes()]
    return [each * number for number in NUM_DEVICES if each * number <= num_cells]
