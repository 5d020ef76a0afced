"""The rules of `stagewise advise`: a table of pure functions of the facts.

They check GPipe's assumptions (arXiv:1811.06965): every cell fits one device, cells have similar
costs, there are at least four microbatches per stage (of at least eight samples if the model has
BatchNorm), and communication takes far less time than computation.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stagewise.costs import FREE_LINK, LinkCost, StageCost, load_seconds, stage_costs
from stagewise.planning.advice.advise_facts import Facts

MICROBATCHES_PER_STAGE = 4  # bubble (K-1)/(M+K-1) below 1/5 from here on; GPipe, section 2.3
SAMPLES_FOR_BATCHNORM = 8
TRANSFER_SHARE = 0.1  # of a stage's compute
BALANCED = 0.9  # mean stage load over the largest

Numbers = Mapping[str, float | int | str]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One rule's result: whether it is met, what to do, the reason and its numbers."""

    rule: str
    ok: bool
    advice: str
    reason: str
    numbers: Numbers


def _single_device(facts: Facts) -> Verdict:
    needed = facts.peak_memory(1, recompute=False)
    fits = needed <= facts.device_memory_bytes
    return Verdict(
        rule="fits one device",
        ok=fits,
        advice="use data parallelism" if fits else "cut the model",
        reason=f"the whole model needs {size_of(needed)} on one device, which has "
        f"{size_of(facts.device_memory_bytes)}",
        numbers={"needed_bytes": round(needed), "device_memory_bytes": facts.device_memory_bytes},
    )


def _largest_cell(facts: Facts) -> Verdict:
    alone = stage_costs(facts.cells, [1] * len(facts.cells))
    needs = [facts.memory(stage, 1, recompute=True) for stage in alone]
    worst = max(range(len(needs)), key=needs.__getitem__)
    parts = math.ceil(needs[worst] / facts.device_memory_bytes)
    experts = (facts.num_experts or {}).get(worst, 0)
    way = f"expert parallelism over its {experts} experts" if experts else "tensor parallelism"
    return Verdict(
        rule="every cell fits a device",
        ok=not facts.too_big,
        advice=f"split cell {facts.cells[worst].name} in {parts} by {way}, or make the "
        "microbatches smaller"
        if facts.too_big
        else "nothing",
        reason=f"the largest cell, {facts.cells[worst].name}, needs {size_of(needs[worst])} of "
        f"{size_of(facts.device_memory_bytes)}",
        numbers={
            "cell": facts.cells[worst].name,
            "needed_bytes": round(needs[worst]),
            "device_memory_bytes": facts.device_memory_bytes,
            "num_too_big": len(facts.too_big),
            "num_parts": parts,
            "num_experts": experts,
        },
    )


def _recomputation(facts: Facts) -> Verdict:
    depth = facts.depths[-1]
    plain, recomputed = (facts.peak_memory(depth, recompute=again) for again in (False, True))
    room = facts.device_memory_bytes
    forward = sum(cell.forward_seconds for cell in facts.cells)
    whole = forward + sum(cell.backward_seconds for cell in facts.cells)
    extra = forward / whole if whole else 0.0
    if plain <= room:
        advice = "nothing"
    elif recomputed <= room:
        advice = "recompute activations"
    else:
        advice = "use more devices or smaller microbatches: recomputation is not enough"
    return Verdict(
        rule="fits without recomputation",
        ok=plain <= room,
        advice=advice,
        reason=f"in {depth} stages the fullest device needs {size_of(plain)}, or "
        f"{size_of(recomputed)} with recomputation, which takes {extra:.0%} more time; it has "
        f"{size_of(room)}",
        numbers={
            "num_stages": depth,
            "plain_bytes": round(plain),
            "recomputed_bytes": round(recomputed),
            "device_memory_bytes": room,
            "extra_time": extra,
        },
    )


def _balance(facts: Facts) -> Verdict:
    depth = facts.num_stages
    loads = [stage.forward_seconds + stage.backward_seconds for stage in facts.stages(depth)]
    mean, largest = sum(loads) / depth, max(loads)
    heaviest = max(facts.cells, key=load_seconds)
    share = mean / largest if largest else 1.0
    most = load_seconds(heaviest) / mean if mean else 0
    replicas = math.ceil(load_seconds(heaviest) / mean) if mean else 1
    if share >= BALANCED:
        advice = "nothing"
    elif load_seconds(heaviest) > mean:
        advice = (
            f"share cell {heaviest.name}'s stage between {replicas} replicas, or split the cell"
        )
    else:
        advice = "use fewer stages, or several on each device, or split the model into more cells"
    return Verdict(
        rule="cells have similar costs",
        ok=share >= BALANCED,
        advice=advice,
        reason=f"in {depth} stages the mean load is {share:.0%} of the largest; the heaviest "
        f"cell, {heaviest.name}, takes {most:.2f} of a mean stage",
        numbers={
            "num_stages": depth,
            "balance": share,
            "cell": heaviest.name,
            "heaviest_over_mean": load_seconds(heaviest) / mean if mean else 0.0,
        },
    )


def _microbatch_count(facts: Facts) -> Verdict:
    depth, count = facts.num_stages, facts.num_microbatches
    wanted = MICROBATCHES_PER_STAGE * depth
    bubble = (depth - 1) / (count + depth - 1)
    if count >= wanted:
        advice = "nothing"
    elif facts.batch_size >= wanted:
        advice = f"use {wanted} microbatches"
    else:
        advice = f"use a larger batch, of at least {wanted} samples, or fewer stages"
    return Verdict(
        rule="four microbatches per stage",
        ok=count >= wanted,
        advice=advice,
        reason=f"{count} microbatches on {depth} stages leave each device idle for {bubble:.0%} of "
        f"a step; {wanted} would leave {(depth - 1) / (wanted + depth - 1):.0%}",
        numbers={
            "num_stages": depth,
            "num_microbatches": count,
            "wanted_microbatches": wanted,
            "batch_size": facts.batch_size,
            "bubble_fraction": bubble,
        },
    )


def _batchnorm(facts: Facts) -> Verdict:
    samples = facts.microbatch_size
    ok = not facts.has_batchnorm or samples >= SAMPLES_FOR_BATCHNORM
    wanted = SAMPLES_FOR_BATCHNORM * facts.num_microbatches
    return Verdict(
        rule="BatchNorm sees enough samples",
        ok=ok,
        advice="nothing"
        if ok
        else f"use a larger batch, of at least {wanted} samples, or fewer microbatches, or "
        "GroupNorm",
        reason=f"microbatches have {samples} samples"
        if facts.has_batchnorm
        else "the model has no BatchNorm that normalises each microbatch",
        numbers={
            "has_batchnorm": int(facts.has_batchnorm),
            "microbatch_size": samples,
            "wanted_microbatch_size": SAMPLES_FOR_BATCHNORM,
        },
    )


def _transfer(facts: Facts) -> Verdict:
    depth = facts.num_stages
    stages = facts.stages(depth)
    shares = [_share(facts.link, before, after) for before, after in itertools.pairwise(stages)]
    worst = max(shares, default=0.0)
    known = facts.link != FREE_LINK
    many = len(shares) > 1
    where = f"at the worst of {len(shares)} boundaries" if many else "between the two stages"
    return Verdict(
        rule="communication is cheap",
        ok=worst <= TRANSFER_SHARE,
        advice="nothing"
        if worst <= TRANSFER_SHARE
        else "use fewer stages or a faster link, or cut where less data crosses",
        reason=f"{where}, communication takes {worst:.1%} of the adjacent stages' compute time"
        if known
        else "the link is unknown; name a device to include communication",
        numbers={"num_stages": depth, "transfer_share": worst, "limit": TRANSFER_SHARE},
    )


def _share(link: LinkCost, before: StageCost, after: StageCost) -> float:
    """Return the transfer time across a boundary over the compute time of its stages."""
    there = link.transfer_seconds(before.output_bytes)
    back = link.transfer_seconds(before.gradient_bytes) if before.gradient_bytes else 0.0
    computed = min(
        max(stage.forward_seconds for stage in (before, after)),
        max(stage.backward_seconds for stage in (before, after)),
    )
    return max(there, back) / computed if computed else 0.0


def _replicas(facts: Facts) -> Verdict:
    depth = facts.fitting[False] or facts.fitting[True]
    replicas = facts.num_devices // depth if depth else 1
    useful = depth is not None and depth > 1 and replicas > 1
    return Verdict(
        rule="all devices are needed for memory",
        ok=not useful,
        advice=f"use {depth} stages with {replicas} replicas each" if useful else "nothing",
        reason=f"the fewest stages that fit are {depth}"
        + ("" if facts.fitting[False] else ", with recomputation")
        if depth
        else f"the model does not fit on {facts.num_devices} devices",
        numbers={"num_stages": depth or 0, "replicas": replicas, "num_devices": facts.num_devices},
    )


RULES: dict[str, Callable[[Facts], Verdict]] = {
    "single_device": _single_device,
    "largest_cell": _largest_cell,
    "recomputation": _recomputation,
    "replicas": _replicas,
    "balance": _balance,
    "microbatch_count": _microbatch_count,
    "batchnorm": _batchnorm,
    "transfer": _transfer,
}


def size_of(num_bytes: float) -> str:
    """Return a number of bytes as text, such as `1.5 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
