"""What NCCL does with point-to-point messages: as a model of its streams, and as groups on CPUs."""

import queue
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from stagewise.engine.transport.mailbox import POSTED_AHEAD
from stagewise.engine.transport.transport import Links
from stagewise.schedule import LoweredProgram, Message, links
from stagewise.schedule.posting import PostFrom


@dataclass(eq=False)
class Op:
    """A kernel on a rank's stream: it starts when those before it have ended."""

    rank: int
    place: int  # in the order in which the rank's host issues kernels
    after: list["Op"] = field(default_factory=list)
    mate: "Op | None" = None  # the other end: a send and its receive end together


class Host:
    """One rank's program as its host issues it: the mailbox's order, without its values."""

    def __init__(self, rank: int, rule: PostFrom | None) -> None:
        self.rank, self._rule = rank, rule
        self.ops: list[Op] = []
        self.ends: list[int] = []  # by instruction: the kernels issued before it
        self.sends: dict[Message, Op] = {}
        self.receives: dict[Message, Op] = {}
        self._last: dict[object, Op] = {}  # by stream
        self._awaited: list[Op] = []  # by the computing stream, from its next kernel on

    def run(self, program: LoweredProgram, orders: Links) -> None:
        self._expected = {s: deque(ms) for (s, d), ms in orders.items() if d == self.rank}
        self._posted = {source: deque[Message]() for source in self._expected}
        arrived: set[Message] = set()
        for place, step in enumerate(program):
            for source in self._expected:
                self._post_ahead(source, place)
            self.ends.append(len(self.ops))
            for message in step.receives:
                source = message.source
                while source != self.rank and message not in arrived:
                    if not self._posted[source]:
                        self._post(source)
                        self._post_ahead(source, place)
                    taken = self._posted[source].popleft()
                    self._awaited.append(self.receives[taken])
                    arrived.add(taken)
            self._issue("compute", self._awaited)
            self._awaited = []
            for message in step.sends:
                if message.destination != self.rank:
                    self.sends[message] = self._communicate(message)

    def _post_ahead(self, source: int, num_ran: int) -> None:
        expected = self._expected[source]
        while expected and (
            len(self._posted[source]) < POSTED_AHEAD
            or (self._rule is not None and expected[0].distance > 1)
        ):
            if self._rule is not None and self._rule[expected[0]] > num_ran:
                return
            self._post(source)

    def _post(self, source: int) -> None:
        message = self._expected[source].popleft()
        self.receives[message] = self._communicate(message)
        self._posted[source].append(message)

    def _communicate(self, message: Message) -> Op:
        # NCCL's stream waits for what the computing one was given so far.
        before = [self._last["compute"]] if "compute" in self._last else []
        return self._issue((message.source, message.destination), [*before, *self._awaited])

    def _issue(self, stream: object, after: Sequence[Op]) -> Op:
        own = [self._last[stream]] if stream in self._last else []
        op = self._last[stream] = Op(self.rank, len(self.ops), [*own, *after])
        self.ops.append(op)
        return op


def hosts_of(programs: Sequence[LoweredProgram], rule: PostFrom | None) -> list[Host]:
    """All ranks' kernels of one step."""
    orders, hosts = links(tuple(programs)), [Host(rank, rule) for rank in range(len(programs))]
    for host, program in zip(hosts, programs, strict=True):
        host.run(program, orders)
    sends = {m: op for host in hosts for m, op in host.sends.items()}
    receives = {m: op for host in hosts for m, op in host.receives.items()}
    assert sends.keys() == receives.keys()
    for message, send in sends.items():
        send.mate, receives[message].mate = receives[message], send
    return hosts


def needs_of(hosts: Sequence[Host]) -> dict[Op, list[int]] | None:
    """How many kernels each rank must have issued for a kernel to end; None if some never do."""
    needs: dict[Op, list[int]] = {}
    started: dict[Op, list[int]] = {}
    missing = {op: len(op.after) for host in hosts for op in host.ops}
    users: dict[Op, list[Op]] = defaultdict(list)
    for op in missing:
        for before in op.after:
            users[before].append(op)
    ready = [op for op, number in missing.items() if not number]
    while ready:
        op = ready.pop()
        seen = [0] * len(hosts)
        for before in op.after:
            seen = list(map(max, seen, needs[before]))
        seen[op.rank] = max(seen[op.rank], op.place + 1)
        started[op] = seen
        if op.mate is not None and op.mate not in started:
            continue
        ended = [op] if op.mate is None else [op, op.mate]
        whole = seen if op.mate is None else list(map(max, seen, started[op.mate]))
        for one in ended:
            needs[one] = whole
            for user in users[one]:
                missing[user] -= 1
                if not missing[user]:
                    ready.append(user)
    return needs if len(needs) == len(missing) else None


def blocking_waits(hosts: Sequence[Host], needs: dict[Op, list[int]]) -> Iterator[tuple[int, int]]:
    """(rank, instruction) before which a wait for the whole device would never end."""
    for host in hosts:
        needed = 0  # kernels of this rank, for all of those issued so far to end
        issued = 0
        for instruction, end in enumerate(host.ends):
            for op in host.ops[issued:end]:
                needed = max(needed, needs[op][host.rank])
            issued = end
            if needed > end:
                yield host.rank, instruction


class InOrder:
    """A group that runs its operations one at a time, in order; a send ends with its receive."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._tasks = group, queue.SimpleQueue[tuple[Callable[[], None], _Done]]()
        threading.Thread(target=self._work, daemon=True).start()

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> "_Done":
        return self._add(lambda: self._both(tensors, rank, tag, sends=True))

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> "_Done":
        return self._add(lambda: self._both(tensors, rank, tag, sends=False))

    def _both(self, tensors: list[torch.Tensor], rank: int, tag: int, *, sends: bool) -> None:
        there, back = (self._group.send, self._group.recv)[:: 1 if sends else -1]
        there(tensors, rank, tag).wait()
        back([torch.zeros(1, dtype=torch.uint8)], rank, tag + 1).wait()

    def _add(self, task: Callable[[], None]) -> "_Done":
        done = _Done()
        self._tasks.put((task, done))
        return done

    def _work(self) -> None:
        while True:
            task, done = self._tasks.get()
            task()
            done.event.set()


class _Done:
    def __init__(self) -> None:
        self.event = threading.Event()

    def wait(self) -> None:
        self.event.wait()

    def is_completed(self) -> bool:
        return self.event.is_set()
