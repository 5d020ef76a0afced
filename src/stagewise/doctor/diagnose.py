"""Gather the facts of all ranks, and measure between them; every rank calls this at the same time.

Links are measured one pair at a time, as in planning, while no other rank sends. So the time grows
with the number of pairs, and of many ranks only neighbours are measured, whose links a pipeline
uses, and rank 0 with all, who agree through it.
"""

import time
from dataclasses import asdict, dataclass

from stagewise.doctor.facts import HostFacts, facts_here
from stagewise.engine.transport.connect import trial_wire, values_of_all
from stagewise.engine.transport.processes import num_processes, own_device
from stagewise.profiling.links import LARGE_BYTES, SMALL_BYTES, round_trip_seconds

MOST_RANKS = 16  # of which all pairs are measured
_CLOCK_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class LinkFound:
    """Messages from rank `source` to rank `target`; a transfer's size over its time."""

    source: int
    target: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What all ranks found: facts by rank, links, and each clock's lead over rank 0's."""

    facts: tuple[HostFacts, ...]
    links: tuple[LinkFound, ...] = ()
    clock_leads_seconds: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON's types."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Examine this process, or all of torch.distributed; collective."""
    if num_processes() == 1:
        return Diagnosis(facts=(facts_here(),), clock_leads_seconds=(0.0,))
    facts = tuple(values_of_all(facts_here(), "doctor: facts"))
    return Diagnosis(facts=facts, clock_leads_seconds=_clock_leads(), links=_links(len(facts)))


def _clock_leads() -> tuple[float, ...]:
    """Return each rank's clock minus rank 0's, as seen just after all have met."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        values_of_all(None, "doctor: clocks")
        times = values_of_all(time.time(), "doctor: times")
        rounds.append([each - times[0] for each in times])
    return tuple(min(leads, key=abs) for leads in zip(*rounds, strict=True))


def _links(num_ranks: int) -> tuple[LinkFound, ...]:
    wire = trial_wire(own_device())
    found = []
    for one in range(num_ranks):
        for other in range(one + 1, num_ranks):
            if num_ranks > MOST_RANKS and other != one + 1 and one != 0:
                continue
            for source, target in ((one, other), (other, one)):
                values_of_all(None, "doctor: links")  # nobody else sends now
                pair = source, target
                there_and_back = round_trip_seconds(wire, own_device(), pair, SMALL_BYTES)
                with_load = round_trip_seconds(wire, own_device(), pair, LARGE_BYTES)
                if wire.rank == source:
                    seconds = max(with_load - there_and_back / 2, 1e-9)
                    found.append(
                        LinkFound(
                            source=source,
                            target=target,
                            latency_seconds=there_and_back / 2,
                            bytes_per_second=LARGE_BYTES / seconds,
                        )
                    )
    every = values_of_all(found, "doctor: what was measured")
    return tuple(sorted((x for own in every for x in own), key=lambda x: (x.source, x.target)))
