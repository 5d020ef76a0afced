"""Whether a plan fits, what else would do, and how long the data takes, in sentences."""

from collections.abc import Iterator
from math import isfinite

from rich.text import Text

from stagewise.planning import Plan
from stagewise.planning.advice.advise_rules import MICROBATCHES_PER_STAGE
from stagewise.planning.advice.not_faster import not_faster
from stagewise.planning.alternatives import Outlook
from stagewise.units import duration_in_words, format_seconds, size_in_words

_LOUD, _WARN = "bold white on red", "bold yellow"


def outlook_in_words(outlook: Outlook, plan: Plan) -> Iterator[Text]:
    """Yield the alternatives, then loudly what is wrong with the plan."""
    room = outlook.room
    for other in outlook.alternatives:
        fits = "fits" if other.needed_bytes <= room.memory_bytes else "does not fit"
        excludes = f", without {other.excludes}" if other.excludes else ""
        yield Text(
            f"instead, {other.name}: step {format_seconds(other.step_seconds)}{excludes}; needs "
            f"{size_in_words(other.needed_bytes)} a device"
            + f", which {fits}"
            * isfinite(room.memory_bytes)
        )
    if outlook.fits and (reason := not_faster(plan, plan.timeline.duration_seconds)):
        yield Text(reason)
    depth, count, fill = plan.num_stages, plan.num_microbatches, plan.num_stages - 1
    if count < depth:
        wanted = MICROBATCHES_PER_STAGE * depth
        yield Text.assemble(
            ("few microbatches", _WARN),
            f": {count} for {depth} stages leave a bubble of about {fill / (count + fill):.0%}, "
            f"{wanted} would leave {fill / (wanted + fill):.0%}: --microbatches {wanted}",
        )
    if not outlook.fits:
        needs = outlook.device_bytes
        fullest = max(range(len(needs)), key=needs.__getitem__)
        over = sum(need > room.memory_bytes for need in needs)
        yield Text.assemble(
            (" DOES NOT FIT ", _LOUD),
            f" device {fullest} needs {size_in_words(needs[fullest])} (parameters, gradients, "
            f"optimizer state, activations) of the {size_in_words(room.memory_bytes)} of "
            f"{room.device}; {over} of {len(needs)} devices are too small. Recompute "
            "(--recompute always), take smaller microbatches (--microbatches N), more devices, or "
            "let the planner search (--memory SIZE); stagewise advise says what can fit at all",
        )
        return
    alone = outlook.alternatives[0]
    if plan.num_devices > 1 and alone.step_seconds <= plan.timeline.duration_seconds:
        holds = alone.needed_bytes <= room.memory_bytes
        why = ": the model is too small for a pipeline" if holds else ", but it does not fit there"
        yield Text.assemble(
            ("one device is faster", _WARN), f" than this plan on {plan.num_devices}{why}"
        )


def pace_in_words(seconds: float, amount: int, unit: str, num_steps: int | None) -> str:
    """Return how fast the data goes by, for steps of `seconds` with `amount` samples or tokens."""
    pace = f"predicted pace: {amount / seconds:,.0f} {unit}/s"
    if num_steps is None:
        return pace
    whole = duration_in_words(num_steps * seconds)
    return f"{pace}; one pass over the data, {num_steps} step{'s' * (num_steps != 1)}: {whole}"
