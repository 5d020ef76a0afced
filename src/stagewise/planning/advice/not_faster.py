"""Why several devices are not faster than one, and what would change that.

Idle time is told by its cause, as in `bubble`; what is left is work that one device would not have.
The largest share is the reason, and has its remedy.
"""

from stagewise.planning.advice.advise_rules import MICROBATCHES_PER_STAGE
from stagewise.planning.alternatives import one_device_seconds
from stagewise.planning.bubble import bubble_causes
from stagewise.planning.plan import Plan
from stagewise.units import format_seconds

_FASTER = 1.05  # times as fast as one device


def not_faster(plan: Plan, step_seconds: float, step: str = "step") -> str | None:
    """Return why a plan whose steps take `step_seconds` is not faster than one device, with the
    remedy; None if it is, or if nothing was measured. `step` says which steps these are.
    """
    number = plan.num_devices
    if number == 1 or not plan.cells or step_seconds <= 0:
        return None
    alone = one_device_seconds(plan)
    if alone > _FASTER * step_seconds:
        return None
    share, cause = max(_causes(plan, step_seconds))
    return (
        f"{number} devices are not faster than one: a {step} takes {format_seconds(step_seconds)}, "
        f"one device would take {format_seconds(alone)}. {cause.format(share=f'{share:.0%}')}. If "
        f"the model fits one device, data parallelism (--replicas {number}) takes about "
        f"{format_seconds(alone / number)} and the sum of gradients"
    )


def _causes(plan: Plan, step_seconds: float) -> list[tuple[float, str]]:
    """Return every cause with its share of all devices' time, as a sentence."""
    causes, inside = bubble_causes(plan), plan.timeline.duration_seconds
    count, wanted = plan.num_microbatches, MICROBATCHES_PER_STAGE * plan.num_devices
    costs, schedule = plan.engine_costs, plan.built_schedule
    again = sum(costs[stage].recompute_seconds for stage, _ in schedule.recomputed)
    part = min(1.0, inside / step_seconds)
    more = (
        f"raise them to {wanted} (--microbatches {wanted})"
        if count < wanted
        else "use fewer devices, or larger batches with more microbatches"
    )
    return [
        (
            causes.fill_and_drain * part,
            f"Filling and draining with {count} microbatches takes {{share}} of the time: {more}",
        ),
        (
            causes.communication * part,
            "Transfers take {share} of the time: cut where less crosses, use fewer devices or "
            f"faster links (stagewise doctor --devices {plan.num_devices} measures them)",
        ),
        (
            causes.imbalance * part,
            "Unequal stages leave {share} of the time idle: cut the model into smaller cells, or "
            "put several stages on each device (--schedule interleaved)",
        ),
        (
            again / (plan.num_devices * step_seconds),
            "Recomputation takes {share} of the time: leave it out if memory allows (--recompute "
            "never)",
        ),
        (
            1 - part,
            "{share} of a step is none of the cells' and messages' time: data, other programs on "
            "this host, or instructions that are too small (fewer microbatches)",
        ),
    ]
