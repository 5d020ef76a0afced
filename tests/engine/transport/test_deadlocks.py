"""On GPUs: no schedule deadlocks over one group a link, whatever waits for the device."""

import itertools
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stagewise
from stagewise.batch.values import take_apart
from stagewise.engine.step.programs import Programs
from stagewise.engine.transport import connect
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.wires.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Arrival, Link, Wires, flat
from stagewise.schedule import (
    SCHEDULES,
    LoweredProgram,
    links,
    lower,
    named_schedule,
    on_replicas,
    walk,
)
from stagewise.schedule.posting import post_from
from tests.engine.transport.nccl import InOrder, blocking_waits, hosts_of, needs_of
from tests.engine.transport.wires import fresh_connections
from tests.harness import Pools

CPU = torch.device("cpu")


def cases(name: str) -> list[tuple[LoweredProgram, ...]]:
    """Programs of a schedule's row, also with long skips."""
    found = []
    for devices, microbatches in itertools.product(range(2, 9), (1, 3, 8, 16)):
        schedule = named_schedule(name, devices, microbatches)
        found.append(lower(schedule))
        last = schedule.num_stages - 1
        if last > 1 and microbatches in (1, 8):
            found.append(lower(schedule, [(0, last), (last // 2 - 1, last)][: 1 + (last > 3)]))
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_blocks_for_ever(name: str) -> None:
    for programs in cases(name):
        hosts = hosts_of(programs, post_from(programs))
        needs = needs_of(hosts)
        assert needs is not None
        assert not [*blocking_waits(hosts, needs)]


@pytest.mark.parametrize("replicas", [(1, 3, 2), (2, 2), (3, 1), (1, 2, 1, 2)])
def test_nothing_blocks_for_ever_with_replicas(replicas: tuple[int, ...]) -> None:
    last = len(replicas) - 1
    for name, num_microbatches in itertools.product(("gpipe", "1f1b", "zb_h1"), (1, 4, 7, 12)):
        schedule = on_replicas(named_schedule(name, len(replicas), num_microbatches), replicas)
        programs = lower(schedule, [(0, last)] if last > 1 else [])
        hosts = hosts_of(programs, post_from(programs))
        needs = needs_of(hosts)
        assert needs is not None
        assert not [*blocking_waits(hosts, needs)]


def test_the_model_finds_what_the_rule_prevents() -> None:
    programs = lower(named_schedule("1f1b", 4, 8))
    hosts = hosts_of(programs, None)
    needs = needs_of(hosts)
    assert needs is not None
    assert len([*blocking_waits(hosts, needs)]) > 10


# The model issues what the mailbox does.


class Recorder:
    """A wire within this process that notes what is started on it."""

    def __init__(self, rank: int, num_ranks: int, lines: dict[Link, deque[Tensor]]) -> None:
        self.rank, self.num_ranks, self.lines = rank, num_ranks, lines
        self.reached = [other for other in range(num_ranks) if other != rank]
        self.started: list[tuple[str, int]] = []

    def start_send(self, tensors: Sequence[Tensor], rank: int) -> None:
        self.started.append(("send", rank))
        self.lines[self.rank, rank].extend(tensors)

    def start_receive(self, tensors: Sequence[Tensor], rank: int) -> Arrival:
        self.started.append(("receive", rank))
        return partial(self._fill, tensors, rank)

    def _fill(self, tensors: Sequence[Tensor], rank: int) -> None:
        for tensor in tensors:
            flat(tensor).copy_(flat(self.lines[rank, self.rank].popleft()))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_v", "dualpipe_v"])
def test_the_mailbox_issues_what_the_model_says(name: str) -> None:
    programs = lower(named_schedule(name, 3, 5), [(0, 2)])
    rule, num_ranks = post_from(programs), len(programs)
    data, control = defaultdict[Link, deque[Tensor]](deque), defaultdict[Link, deque[Tensor]](deque)
    wires = [Recorder(rank, num_ranks, data) for rank in range(num_ranks)]
    mails = [Mailbox(Wires(wire, Recorder(wire.rank, num_ranks, control)), CPU) for wire in wires]
    for mail in mails:
        mail._posted_bytes = 0  # as on a GPU
    for _ in range(2):  # the first call learns the messages' forms
        for wire in wires:
            wire.started.clear()
        for mail in mails:
            mail.begin(1, links(programs), rule)
        for device, step in walk(programs):
            for message in step.receives:
                mails[device].receive(message)
            for message in step.sends:
                mails[device].send(message, take_apart(torch.ones(2)))
            mails[device].look_ahead()
    for wire, host in zip(wires, hosts_of(programs, rule), strict=True):
        kinds = {op: ("send", m.destination) for m, op in host.sends.items()}
        kinds |= {op: ("receive", m.source) for m, op in host.receives.items()}
        assert wire.started == [kinds[op] for op in host.ops if op in kinds]


# The engine over groups that behave as NCCL's.


class InOrderLinks(LinkGroups):
    def prepare(self, links: object) -> None:
        super().prepare(links)  # type: ignore[arg-type]
        for link, group in self._links.items():
            if group is not None and not isinstance(group, InOrder):
                self._links[link] = InOrder(group)  # type: ignore[assignment]

    def close(self) -> None:
        self._links.clear()


def as_on_gpus(
    seats: object,
    device: torch.device,
    group: dist.ProcessGroup,
    host: dist.ProcessGroup,
    peers: Peers,
) -> Wires:
    data = InOrderLinks(peers, group, CPU)
    return Wires(data, GroupWire(peers, host), prepare=data.prepare)


def steps(name: str, num_devices: int, transport: str) -> list[Tensor]:
    per_device = SCHEDULES[name].stages_per_device
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(num_devices * per_device)])
    plan = stagewise.Plan(
        balance=(1,) * len(model),
        schedule=name,
        num_microbatches=8,
        stages_per_device=per_device,
    )
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, transport=transport)
    if transport != "local":
        pipe._runner.mail._posted_bytes = 0  # type: ignore[attr-defined]
    batch = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    found = [pipe.step(batch, target=batch) for _ in range(3)]
    return [*found, *(p.grad for _, p in sorted(pipe.named_parameters()) if p.grad is not None)]


def in_order(names: Sequence[str]) -> list[bool]:
    """Whether each schedule gives the bits of one process."""
    same = []

    def made(*given: Any) -> Programs:
        return Programs(*given[:4], torch.device("meta"))

    for name in names:
        with (
            fresh_connections(),
            mock.patch.object(connect, "wires_between", as_on_gpus),
            mock.patch("stagewise.engine.step.step.Programs", made),
        ):
            between = steps(name, dist.get_world_size(), "distributed")
        alone = steps(name, dist.get_world_size(), "local")
        losses = all(map(torch.equal, between[:3], alone[:3]))
        grads = [any(torch.equal(g, other) for other in alone[3:]) for g in between[3:]]
        same.append(losses and len(grads) > 0 and all(grads))
    return same


def test_schedules_end_over_groups_that_run_in_order(pools: Pools) -> None:
    names = ["1f1b", "interleaved", "zb_v", "dualpipe_v"]
    assert pools[4].run(in_order, names) == [[True] * len(names)] * 4
