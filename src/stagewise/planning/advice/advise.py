"""Is pipeline parallelism the right tool? The verdict of each rule, and the resulting choice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stagewise.costs import load_seconds
from stagewise.planning.advice.advise_facts import Facts
from stagewise.planning.advice.advise_rules import RULES, Verdict, size_of


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The recommended way to train, and every rule's verdict."""

    choice: str
    reason: str
    verdicts: tuple[Verdict, ...]


def advise(facts: Facts) -> Advice:
    """Apply every rule, and choose how to train."""
    verdicts = tuple(rule(facts) for rule in RULES.values())
    chosen = next(choice for choice in CHOICES if choice.holds(facts))
    return Advice(choice=chosen.name, reason=chosen.reason(facts), verdicts=verdicts)


@dataclass(frozen=True)
class _Choice:
    """A way to train, its condition and its reason; the first whose condition holds is taken."""

    name: str
    holds: Callable[[Facts], bool]
    reason: Callable[[Facts], str]


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
    ),
    _Choice("tensor parallelism", lambda facts: bool(facts.too_big), _reason_of("largest_cell")),
    _Choice(
        "one device",
        lambda facts: facts.fitting[False] == 1 and facts.num_devices == 1,
        _reason_of("single_device"),
    ),
    _Choice(
        "data parallelism", lambda facts: facts.fitting[False] == 1, _reason_of("single_device")
    ),
    _Choice(
        "data parallelism with recomputation",
        lambda facts: facts.fitting[True] == 1,
        lambda facts: (
            f"with recomputation the whole model needs "
            f"{size_of(facts.peak_memory(1, recompute=True))} on one device, which has "
            f"{size_of(facts.device_memory_bytes)}"
        ),
    ),
    _Choice(
        "more devices",
        lambda facts: facts.fitting[False] is None and facts.fitting[True] is None,
        _reason_of("recomputation"),
    ),
    _Choice(
        "pipeline with replicas",
        lambda facts: not RULES["replicas"](facts).ok,
        _reason_of("replicas"),
    ),
    _Choice("pipeline with replicas", _one_cell_is_a_bottleneck, _reason_of("balance")),
    _Choice("pipeline", lambda facts: True, _reason_of("recomputation")),
)
