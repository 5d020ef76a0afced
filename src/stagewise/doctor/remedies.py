"""Judge what was found: a table of checks, each a function from what all ranks found to findings.

A finding that must be acted on would make a run fail, hang or differ; advice is about speed.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from stagewise.doctor.diagnose import Diagnosis, LinkFound
from stagewise.doctor.facts import path_length
from stagewise.report import format_seconds
from stagewise.units import size_in_words

OK, ADVICE, MUST = "ok", "advice", "must be done"

MOST_CLOCK_SECONDS = 1.0
LEAST_MEMORY_BYTES = 512 << 20  # a rank: torch and stagewise alone take a third of it
LEAST_SHARED_BYTES, GOOD_SHARED_BYTES = 16 << 20, 1 << 30  # Docker gives 64 MiB
LEAST_FREE_DISK_BYTES = 64 << 20
FILES, FILES_PER_RANK = 256, 8  # Python, torch and data; gloo's and our sockets to each rank
MOST_SOCKET_PATH = 107  # characters, by the kernel's `sockaddr_un`
SLOWER = 4.0  # times slower than the median link of its kind


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found, its verdict (OK, ADVICE or MUST), and what to do."""

    check: str
    found: str
    verdict: str = OK
    remedy: str = ""


def findings(diagnosis: Diagnosis) -> list[Finding]:
    """Return the findings of all checks, in the order of CHECKS."""
    return [
        Finding(check=name, found=found, verdict=verdict, remedy=remedy)
        for name, check in CHECKS.items()
        for found, verdict, remedy in check(diagnosis)
    ]


_Judged = Iterator[tuple[str, str, str]]  # found, verdict, remedy


def _versions(diagnosis: Diagnosis) -> _Judged:
    first = diagnosis.facts[0].versions
    names = dict.fromkeys(name for facts in diagnosis.facts for name in facts.versions)
    for name in names:
        by_version: dict[str, list[str]] = defaultdict(list)
        for rank, facts in enumerate(diagnosis.facts):
            by_version[facts.versions.get(name, "absent")].append(f"{rank} ({facts.host})")
        if len(by_version) == 1:
            yield f"{name} {first[name]}", OK, ""
            continue
        told = "; ".join(f"{v}: ranks {_few(ranks)}" for v, ranks in by_version.items())
        yield f"{name} {told}", MUST, f"install the same {name} on every host"


def _reached(diagnosis: Diagnosis) -> _Judged:
    hosts = _by_host(diagnosis)
    if len(diagnosis.facts) == 1:
        yield "one rank", OK, "start more with --devices, or with torchrun on every host"
        return
    yield f"{len(diagnosis.facts)} ranks on {len(hosts)} host(s) reach each other", OK, ""


def _links(diagnosis: Diagnosis) -> _Judged:
    hosts = [facts.host for facts in diagnosis.facts]
    kinds: dict[bool, list[LinkFound]] = defaultdict(list)
    for link in diagnosis.links:
        kinds[hosts[link.source] == hosts[link.target]].append(link)
    for is_local, links in kinds.items():
        latency = statistics.median(link.latency_seconds for link in links)
        rate = statistics.median(link.bytes_per_second for link in links)
        where = "within a host" if is_local else "between hosts"
        words = f"{where}: {format_seconds(latency)}, {size_in_words(rate)}/s (median)"
        slow = [
            f"{link.source} to {link.target}"
            for link in links
            if link.latency_seconds > SLOWER * latency or link.bytes_per_second * SLOWER < rate
        ]
        if not slow:
            yield words, OK, ""
            continue
        remedy = "look what else uses these links or hosts, and repeat"
        if not is_local:
            remedy += "; else check their network cards, cables and NCCL_SOCKET_IFNAME"
        yield f"{words}; {SLOWER:g} times slower: {_few(slow)}", ADVICE, remedy


def _clocks(diagnosis: Diagnosis) -> _Judged:
    leads = diagnosis.clock_leads_seconds
    worst = max(range(len(leads)), key=lambda rank: abs(leads[rank]))
    words = f"at most {format_seconds(abs(leads[worst]))} apart"
    if abs(leads[worst]) <= MOST_CLOCK_SECONDS:
        yield words, OK, ""
        return
    host = diagnosis.facts[worst].host
    ahead = "ahead of" if leads[worst] > 0 else "behind"
    remedy = f"synchronise the clock of {host} (chrony, systemd-timesyncd): logs cannot be compared"
    yield f"{words}: {host} is {ahead} {diagnosis.facts[0].host}", MUST, remedy


def _accelerators(diagnosis: Diagnosis) -> _Judged:
    for host, ranks in _by_host(diagnosis).items():
        facts = diagnosis.facts[ranks[0]]
        if not facts.accelerators:
            yield f"{host}: none; the CPU computes", OK, ""
            continue
        words = f"{host}: {_few(facts.accelerators)}"
        if len(facts.accelerators) < len(ranks):
            remedy = f"start {len(facts.accelerators)} ranks there: others share, and wait"
            yield f"{words}, for {len(ranks)} ranks", ADVICE, remedy
        else:
            yield words, OK, ""
        if pairs := facts.without_peer_access:
            told = _few([f"{one} to {other}" for one, other in pairs])
            remedy = "place neighbouring stages on GPUs that reach each other (nvidia-smi topo -m)"
            yield f"{host}: no peer access from GPU {told}", ADVICE, remedy
    kinds = {not facts.accelerators for facts in diagnosis.facts}
    if len(kinds) > 1:
        yield (
            "some hosts have no accelerator",
            MUST,
            "start ranks on the others only, or install the driver: torch.accelerator finds none",
        )


def _nccl(diagnosis: Diagnosis) -> _Judged:
    gpus = {
        rank: facts.nccl
        for rank, facts in enumerate(diagnosis.facts)
        if facts.device.startswith("cuda")
    }
    if not gpus:
        return
    if None in gpus.values():
        ranks = _few([str(rank) for rank, found in gpus.items() if found is None])
        yield f"no NCCL on ranks {ranks}", MUST, "install a torch that is built with NCCL"
    elif len({*gpus.values()}) > 1:
        yield f"versions {_few(sorted(map(str, {*gpus.values()})))}", MUST, "install the same torch"
    else:
        yield str(next(iter(gpus.values()))), OK, ""


def _memory(diagnosis: Diagnosis) -> _Judged:
    for host, ranks in _by_host(diagnosis).items():
        facts = diagnosis.facts[ranks[0]]
        if facts.memory_bytes is None or facts.free_memory_bytes is None:
            continue
        free, each = facts.free_memory_bytes, facts.free_memory_bytes // len(ranks)
        words = f"{host}: {size_in_words(free)} of {size_in_words(facts.memory_bytes)} free"
        enough = each >= LEAST_MEMORY_BYTES
        remedy = f"for {len(ranks)} rank(s): end other programs, or start fewer ranks there"
        yield words, OK if enough else MUST, "" if enough else remedy


def _shared_memory(diagnosis: Diagnosis) -> _Judged:
    for host, ranks in _by_host(diagnosis).items():
        facts = diagnosis.facts[ranks[0]]
        if facts.shared_memory_bytes is None or facts.free_shared_memory_bytes is None:
            continue
        size, free = facts.shared_memory_bytes, facts.free_shared_memory_bytes
        words = f"{host}: /dev/shm {size_in_words(free)} of {size_in_words(size)} free"
        if free < LEAST_SHARED_BYTES:
            yield words, MUST, "remove what is left in /dev/shm, or enlarge it"
        elif size < GOOD_SHARED_BYTES:
            remedy = "data loaders' workers and NCCL need more: docker run --shm-size=8g"
            yield words, ADVICE, remedy
        else:
            yield words, OK, ""


def _files(diagnosis: Diagnosis) -> _Judged:
    needed = FILES + FILES_PER_RANK * len(diagnosis.facts)
    for host, ranks in _by_host(diagnosis).items():
        limit = diagnosis.facts[ranks[0]].open_files
        if limit is not None:
            enough = limit >= needed
            words = f"{host}: {limit} open files a process, about {needed} needed"
            yield words, OK if enough else MUST, "" if enough else f"ulimit -n {4 * needed}"


def _temporary(diagnosis: Diagnosis) -> _Judged:
    for host, ranks in _by_host(diagnosis).items():
        facts = diagnosis.facts[ranks[0]]
        folder, free = facts.temporary_folder, facts.free_temporary_bytes
        words = f"{host}: {folder}"
        if free is not None and free < LEAST_FREE_DISK_BYTES:
            words += f", {size_in_words(free)} free"
            yield words, MUST, "free some space there, or set TMPDIR to another folder"
        elif path_length(folder) > MOST_SOCKET_PATH:
            remedy = "set TMPDIR to a shorter path: Unix sockets do not fit, so TCP is used"
            yield words, ADVICE, remedy
        else:
            yield words, OK, ""


def _cores(diagnosis: Diagnosis) -> _Judged:
    for host, ranks in _by_host(diagnosis).items():
        facts = diagnosis.facts[ranks[0]]
        words = f"{host}: {facts.num_cores} for {len(ranks)} rank(s)"
        enough = facts.num_cores >= len(ranks)
        remedy = "start fewer ranks there: they would take turns"
        yield words, OK if enough else ADVICE, "" if enough else remedy


CHECKS: Mapping[str, Callable[[Diagnosis], _Judged]] = {
    "versions": _versions,
    "ranks": _reached,
    "links": _links,
    "clocks": _clocks,
    "accelerators": _accelerators,
    "NCCL": _nccl,
    "cores": _cores,
    "memory": _memory,
    "shared memory": _shared_memory,
    "open files": _files,
    "temporary folder": _temporary,
}


def _by_host(diagnosis: Diagnosis) -> dict[str, list[int]]:
    """Return the ranks of every host."""
    found: dict[str, list[int]] = defaultdict(list)
    for rank, facts in enumerate(diagnosis.facts):
        found[facts.host].append(rank)
    return found


def _few(words: list[str]) -> str:
    shown = [f"{word} ({n} times)" if n > 1 else word for word, n in Counter(words).items()]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
