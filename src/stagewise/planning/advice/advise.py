"""Is pipeline parallelism the right tool? The verdict of each rule, and the resulting choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stagewise.costs import load_seconds, state_bytes
from stagewise.planning.advice.advise_facts import Facts
from stagewise.planning.advice.advise_rules import (
    MICROBATCHES_PER_STAGE,
    RULES,
    Verdict,
    size_of,
)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recommended way to train, the options that do it, and every rule's verdict.

    `options` are words for `stagewise train RECIPE` or, where it is said, another `command`.
    `besides` names what is worth comparing that is no pipeline.
    """

    choice: str
    reason: str
    verdicts: tuple[Verdict, ...]
    command: str = "train"
    options: tuple[str, ...] = ()
    besides: str = ""


def advise(facts: Facts) -> Advice:
    """Apply every rule, and choose how to train."""
    verdicts = tuple(rule(facts) for rule in RULES.values())
    chosen = next(choice for choice in CHOICES if choice.holds(facts))
    command, *options = chosen.words(facts)
    return Advice(
        choice=chosen.name,
        reason=chosen.reason(facts),
        verdicts=verdicts,
        command=command,
        options=tuple(options),
        besides=_besides(facts),
    )


@dataclass(frozen=True)
class _Choice:
    """A way to train, its condition and its reason; the first whose condition holds is taken."""

    name: str
    holds: Callable[[Facts], bool]
    reason: Callable[[Facts], str]
    words: Callable[[Facts], list[str]]


ALONE = ("--devices", "1")  # the options of training on one device


def _alone(facts: Facts) -> list[str]:
    return ["train", *ALONE]


def _parallel(facts: Facts) -> list[str]:
    return ["train", "--replicas", str(facts.num_devices)]


def _in_stages(facts: Facts) -> list[str]:
    """Return the words of a pipeline, on all devices, of the depth that the rules judge."""
    depth, count = facts.num_stages, facts.num_microbatches
    each = facts.num_devices // depth
    cut = ["--replicas", ",".join([str(each)] * depth)] if each > 1 else ["--stages", str(depth)]
    wanted = max(count, min(MICROBATCHES_PER_STAGE * depth, facts.batch_size))
    again = [] if facts.fitting[False] else ["--recompute", "always"]
    return ["train", *cut, "--microbatches", str(wanted), *again]


def _around_a_heavy_cell(facts: Facts) -> list[str]:
    number = str(facts.num_devices)
    return ["plan", "--devices", number, "--replicas", "auto", "--microbatches", "auto"]


def _in_tensors(facts: Facts) -> list[str]:
    """Return the words of a mesh whose tensor axis is wide enough for the largest cell."""
    parts = int(RULES["largest_cell"](facts).numbers["num_parts"])
    width = next((n for n in range(parts, facts.num_devices) if facts.num_devices % n == 0), parts)
    devices = max(facts.num_devices, width)
    depth = str(max(1, devices // width))
    return ["train", "--devices", str(devices), "--pipeline", depth, "--tensor", str(width)]


def _on_more_devices(facts: Facts) -> list[str]:
    """Return the words of this question for the next number of devices that is enough."""
    number = facts.num_devices
    while number < len(facts.cells):
        number = min(2 * number, len(facts.cells))
        if any(replace(facts, num_devices=number).fitting.values()):
            break
    return ["advise", "--devices", str(max(number, facts.num_devices + 1))]


def _besides(facts: Facts) -> str:
    """Return what sharded data parallelism would keep on each device."""
    if facts.num_devices == 1:
        return ""
    state = sum(state_bytes(cell, facts.state_factor) for cell in facts.cells)
    kept = sum(cell.activation_bytes for cell in facts.cells)
    number = facts.num_devices
    return (
        f"FSDP (ZeRO-3) over {number} devices would keep {size_of(state / number)} of parameters, "
        f"gradients and optimizer state on each, and {size_of(kept)} of activations for a "
        f"microbatch; stagewise train --devices {number} --pipeline 1 --shard {number}"
    )


def _one_cell_is_a_bottleneck(facts: Facts) -> bool:
    """Whether no cut is balanced because one cell takes longer than a mean stage."""
    mean = sum(map(load_seconds, facts.cells)) / facts.num_stages
    return not RULES["balance"](facts).ok and max(map(load_seconds, facts.cells)) > mean


def _reason_of(rule: str) -> Callable[[Facts], str]:
    return lambda facts: RULES[rule](facts).reason


CHOICES: Sequence[_Choice] = (
    _Choice(
        "expert parallelism",
        lambda facts: len(facts.too_big) > 0 and {*facts.too_big} <= {*(facts.num_experts or ())},
        _reason_of("largest_cell"),
        _in_tensors,
    ),
    _Choice(
        "tensor parallelism",
        lambda facts: bool(facts.too_big),
        _reason_of("largest_cell"),
        _in_tensors,
    ),
    _Choice(
        "one device",
        lambda facts: facts.fitting[False] == 1 and facts.num_devices == 1,
        _reason_of("single_device"),
        _alone,
    ),
    _Choice(
        "data parallelism",
        lambda facts: facts.fitting[False] == 1,
        _reason_of("single_device"),
        _parallel,
    ),
    _Choice(
        "data parallelism with recomputation",
        lambda facts: facts.fitting[True] == 1,
        lambda facts: (
            f"with recomputation the whole model needs "
            f"{size_of(facts.peak_memory(1, recompute=True))} on one device, which has "
            f"{size_of(facts.device_memory_bytes)}"
        ),
        lambda facts: [*_parallel(facts), "--recompute", "always"],
    ),
    _Choice(
        "more devices",
        lambda facts: facts.fitting[False] is None and facts.fitting[True] is None,
        _reason_of("recomputation"),
        _on_more_devices,
    ),
    _Choice(
        "pipeline with replicas",
        lambda facts: not RULES["replicas"](facts).ok,
        _reason_of("replicas"),
        _in_stages,
    ),
    _Choice(
        "pipeline with replicas",
        _one_cell_is_a_bottleneck,
        _reason_of("balance"),
        _around_a_heavy_cell,
    ),
    _Choice("pipeline", lambda facts: True, _reason_of("recomputation"), _in_stages),
)
