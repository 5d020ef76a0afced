"""What must be done is told, on the host where it must be done; what is well is not."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from stagewise.doctor.diagnose import Diagnosis, LinkFound
from stagewise.doctor.facts import HostFacts
from stagewise.doctor.remedies import ADVICE, MUST, OK, findings

GIB = 1 << 30
WELL = HostFacts(
    host="a",
    device="cuda:0",
    versions={"python": "3.11.7", "torch": "2.13.0", "stagewise": "0.1.0"},
    num_cores=8,
    memory_bytes=64 * GIB,
    free_memory_bytes=60 * GIB,
    shared_memory_bytes=8 * GIB,
    free_shared_memory_bytes=8 * GIB,
    open_files=65536,
    temporary_folder="/tmp",
    free_temporary_bytes=GIB,
    accelerators=["cuda:0 X", "cuda:1 X"],
    without_peer_access=[],
    nccl="2.27.5",
)
OTHER = replace(WELL, host="b", device="cuda:0")


def judged(
    *facts: HostFacts, links: Sequence[LinkFound] = (), leads: Sequence[float] = ()
) -> dict[tuple[str, str], str]:
    """The found and the remedy by check and verdict, without what is well."""
    found = findings(
        Diagnosis(
            facts=facts,
            links=tuple(links),
            clock_leads_seconds=tuple(leads) or (0.0,) * len(facts),
        )
    )
    assert all(bool(each.remedy) or each.verdict == OK for each in found)
    return {
        (each.check, each.verdict): f"{each.found} -> {each.remedy}"
        for each in found
        if each.verdict != OK
    }


def test_nothing_is_to_be_done_where_all_is_well() -> None:
    assert not judged(WELL, OTHER, links=[link(0, 1), link(1, 0)], leads=[0, 0.1])
    assert not judged(replace(WELL, accelerators=[], device="cpu", nccl=None))
    unknown = replace(
        WELL,
        memory_bytes=None,
        free_memory_bytes=None,
        shared_memory_bytes=None,
        free_shared_memory_bytes=None,
        open_files=None,
        free_temporary_bytes=None,
    )
    assert not judged(unknown)


def link(source: int, target: int, slower: float = 1.0) -> LinkFound:
    return LinkFound(
        source=source,
        target=target,
        latency_seconds=1e-5 * slower,
        bytes_per_second=1e9,
    )


@pytest.mark.parametrize(
    ("changed", "check", "verdict", "said"),
    [
        ({"versions": {**WELL.versions, "torch": "2.12.0"}}, "versions", MUST, "ranks 1 (b) -> "),
        ({"versions": {**WELL.versions, "transformers": "5"}}, "versions", MUST, "absent: ranks 0"),
        ({"free_memory_bytes": GIB // 4}, "memory", MUST, "b: 256 MiB of 64 GiB free"),
        ({"free_shared_memory_bytes": 9}, "shared memory", MUST, "b: /dev/shm 9 B of 8 GiB free"),
        ({"shared_memory_bytes": 64 << 20}, "shared memory", ADVICE, "--shm-size=8g"),
        ({"open_files": 256}, "open files", MUST, "b: 256 open files a process, about 272 needed"),
        ({"free_temporary_bytes": 0}, "temporary folder", MUST, "b: /tmp, 0 B free"),
        ({"temporary_folder": "/t" * 60}, "temporary folder", ADVICE, "a shorter path"),
        ({"num_cores": 0}, "cores", ADVICE, "b: 0 for 1 rank(s)"),
        ({"nccl": None}, "NCCL", MUST, "no NCCL on ranks 1"),
        ({"nccl": "2.20.5"}, "NCCL", MUST, "versions 2.20.5, 2.27.5"),
        ({"accelerators": [], "device": "cpu"}, "accelerators", MUST, "have no accelerator"),
        (
            {"without_peer_access": [(0, 1)]},
            "accelerators",
            ADVICE,
            "no peer access from GPU 0",
        ),
    ],
)
def test_what_is_wrong_on_the_second_host(
    changed: dict[str, object], check: str, verdict: str, said: str
) -> None:
    found = judged(WELL, replace(OTHER, **changed))  # type: ignore[arg-type]
    assert list(found) == [(check, verdict)]
    assert said in found[check, verdict]


def test_a_host_with_fewer_gpus_than_ranks() -> None:
    assert "for 3 ranks" in judged(WELL, WELL, WELL)["accelerators", ADVICE]


def test_clocks_and_links_are_judged_between_ranks() -> None:
    found = judged(WELL, OTHER, leads=[0.0, -2.0])
    assert "b is behind a" in found["clocks", MUST]
    links = [link(0, 1), link(1, 0), link(0, 2), link(2, 0, slower=9), link(1, 2), link(2, 1)]
    assert (
        "4 times slower: 2 to 0"
        in judged(*[replace(WELL, accelerators=["X"] * 3)] * 3, links=links)["links", ADVICE]
    )
