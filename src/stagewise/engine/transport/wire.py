"""Bytes from rank to rank: small ones near, the rest over torch.distributed.

Each pair's messages travel in the sender's program order, so they need no tags. The two directions
between a pair use different process groups, since NCCL runs one communicator's operations in order
and would block on crossed sends; what the host itself reads (`control`) goes over gloo.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from stagewise.engine.transport.failure import FailureBoard
from stagewise.engine.transport.message_form import flat
from stagewise.engine.transport.outbox import Outbox
from stagewise.engine.transport.peers import Peer
from stagewise.engine.transport.unix_sockets import Neighbour, Work, meet

_TAG = 0
PLAIN, CHANGED = b"\0", b"\1"  # marks of messages: whether what is expected comes
_NOTHING = torch.empty(0, dtype=torch.uint8)


class Wire:
    """This rank's connections to the others of `group`."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self.group = group if group is not None else dist.group.WORLD
        assert self.group is not None
        self.rank = dist.get_rank(self.group)
        self.num_ranks = dist.get_world_size(self.group)
        self.failures = FailureBoard(dist.distributed_c10d._get_default_store(), self.rank)
        self.everyone = Peer(self.failures, self.rank)
        self._peers = [Peer(self.failures, self.rank, other) for other in range(self.num_ranks)]
        ranks = dist.get_process_group_ranks(self.group)
        self._near: dict[int, Neighbour] = {}  # ranks of this host; small messages go this way
        if device.type == "cpu":
            self.control = self._down = self._up = self.group
            timeout = self.group._get_backend(device).options._timeout
            self._near = meet(self.rank, self._gather, timeout)
        else:
            self.control = dist.new_group(ranks, backend="gloo")
            self._down, self._up = dist.new_group(ranks), dist.new_group(ranks)
        self._outbox = Outbox()

    def start_sending(self, tensor: torch.Tensor, rank: int, *, control: bool = False) -> None:
        """Start to send a dense tensor; it stays alive until it has left."""
        with self._peers[rank]:
            self.post(tensor, rank, control=control)

    def start_receiving(self, tensor: torch.Tensor, rank: int, *, control: bool = False) -> Work:
        """What fills a dense tensor with what `rank` sends next; `wait` for all in order."""
        with self._peers[rank]:
            if (near := self._near.get(rank)) is not None and tensor.nbytes <= near.limit:
                return near.receive(tensor)
            group = self._group(rank, self.rank, control)
            return group.recv([flat(tensor)], rank, _TAG)

    def post(self, tensor: torch.Tensor, rank: int, *, control: bool = False) -> None:
        """As `start_sending`, but a rank that has gone is the caller's OSError or RuntimeError."""
        if (near := self._near.get(rank)) is not None and tensor.nbytes <= near.limit:
            near.send(tensor)
        else:
            data = flat(tensor)
            work = self._group(self.rank, rank, control).send([data], rank, _TAG)
            self._outbox.add(work, data)

    def has_marks(self, rank: int) -> bool:
        """Whether messages to or from `rank` carry a mark."""
        return rank in self._near

    def start_sending_message(
        self, tensors: Sequence[torch.Tensor], rank: int, mark: bytes = PLAIN
    ) -> None:
        """Start to send dense tensors, `mark` before them where there are marks."""
        with self._peers[rank]:
            if (near := self._near.get(rank)) is not None:
                is_small = bool(tensors) and tensors[0].nbytes <= near.limit
                near.send(tensors[0] if is_small else _NOTHING, mark)
                tensors = tensors[is_small:]
            for tensor in tensors:
                self.post(tensor, rank)

    def start_receiving_message(
        self, tensors: Sequence[torch.Tensor], rank: int
    ) -> tuple[list[Work], bytearray]:
        """What fills dense tensors, and the mark that comes with them."""
        mark, works = bytearray(PLAIN), []
        if (near := self._near.get(rank)) is not None:
            is_small = bool(tensors) and tensors[0].nbytes <= near.limit
            works.append(near.receive(tensors[0] if is_small else _NOTHING, mark))
            tensors = tensors[is_small:]
        works += [self.start_receiving(tensor, rank) for tensor in tensors]
        return works, mark

    def send_near(self, tensor: torch.Tensor, rank: int) -> None:
        """Send a dense tensor of any size before whatever is sent next, where there are marks."""
        with self._peers[rank]:
            self._near[rank].send(tensor)

    def receive_near(self, tensor: torch.Tensor, rank: int) -> None:
        """Wait for what `send_near` sends."""
        self.wait([self._near[rank].receive(tensor)], rank)

    def wait(self, works: Iterable[Work], rank: int) -> None:
        """Until all that `rank` sends has arrived, in order; raises PeerError if it never will."""
        with self._peers[rank]:
            for work in works:
                work.wait()

    def finish(self) -> None:
        """Wait until everything sent has left."""
        with self.everyone:
            self._outbox.finish()
            for neighbour in self._near.values():
                neighbour.finish()

    def _group(self, source: int, destination: int, control: bool) -> dist.ProcessGroup:
        if control:
            return self.control
        return self._down if source < destination else self._up

    def _gather(self, value: object) -> list[object]:
        """Every rank's value, before there is a quicker way."""
        values = [value] * self.num_ranks
        with self.everyone:
            dist.all_gather_object(values, value, group=self.group)
        return values
