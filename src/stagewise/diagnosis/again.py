"""The command line, or the arguments, that train with another plan."""

import shlex
from collections.abc import Iterator

from stagewise.planning import Plan
from stagewise.schedule import SCHEDULES

# Options that determine the plan; those of the new plan take their place.
_OF_THE_PLAN = {
    "--plan",
    "--stages",
    "--devices",
    "--replicas",
    "--microbatches",
    "--schedule",
    "--recompute",
    "--balance",
}
_WORDS = {"--plan": "plan", "--devices": "num_devices", "--microbatches": "num_microbatches"}


def command_for(command: str, plan: Plan, *, cut: bool = False) -> str:
    """Return `command` with the options of `plan`; its balance too if `cut`.

    Without a command, the arguments of `stagewise.plan`.
    """
    options = dict(_options(plan, cut))
    if not command:
        given = ", ".join(f"{_keyword(name)}={_value(value)}" for name, value in options.items())
        return f"plan(..., {given})"
    kept, words = list[str](), iter(shlex.split(command))
    for word in words:
        if word in _OF_THE_PLAN:
            next(words, None)
        elif word.partition("=")[0] not in _OF_THE_PLAN:
            kept.append(word)
    return shlex.join([*kept, *(word for option in options.items() for word in option)])


def _options(plan: Plan, cut: bool) -> Iterator[tuple[str, str]]:
    if plan.replicas:
        yield "--replicas", ",".join(map(str, plan.replicas))
    else:
        yield "--devices", str(plan.num_devices)
    yield "--microbatches", str(plan.num_microbatches)
    if plan.schedule != "1f1b":
        yield "--schedule", plan.schedule
    row = SCHEDULES.get(plan.schedule)  # None: a schedule of the user's own
    if row is not None and plan.stages_per_device not in (None, row.stages_per_device):
        yield "--stages", str(plan.num_stages)
    if plan.recompute != "never":
        yield "--recompute", plan.recompute
    if cut:
        yield "--balance", ",".join(map(str, plan.balance))


def _keyword(option: str) -> str:
    return _WORDS.get(option, option.removeprefix("--"))


def _value(text: str) -> str:
    if "," in text:
        return f"({text.replace(',', ', ')})"
    return text if text.isdigit() else repr(text)
