"""One process per device: messages over torch.distributed (gloo on CPU, NCCL on GPU).

`Wire` carries bytes, `Mailbox` knows which message comes next and in what form, and in
`Rendezvous` ranks agree; here they are one `Transport`, with what several ranks share of one value.
"""

import sys
import weakref
from collections.abc import Sequence
from multiprocessing.util import Finalize

import torch
import torch.distributed as dist

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.transport.group import DistributedGroup
from stagewise.engine.transport.local_classes import LocalClasses
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.message_form import Header, layout_of
from stagewise.engine.transport.rendezvous import Rendezvous
from stagewise.engine.transport.transport import T
from stagewise.engine.transport.wire import Wire
from stagewise.errors import CellError


class DistributedTransport:
    """Rank r of `group` runs device r of the schedule."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        self._wire = Wire(device, group)
        self.rank, self.num_ranks = self._wire.rank, self._wire.num_ranks
        self._device = device
        self._rendezvous = Rendezvous(self._wire)
        self._is_lost = False
        # Runs at the end of a process of multiprocessing's too, which knows no atexit.
        Finalize(None, _leave, args=(weakref.ref(self),), exitpriority=0)
        self._classes = LocalClasses()
        self._mailbox = Mailbox(self._wire, device)
        self.begin, self.look_ahead = self._mailbox.begin, self._mailbox.look_ahead
        self.receive, self.send = self._mailbox.receive, self._mailbox.send
        self.send_lost, self.waiting = self._mailbox.send_lost, self._mailbox.waiting

    def finish(self) -> None:
        self._wire.finish()

    def fail(self, cause: str) -> None:
        self._is_lost = True
        self._wire.failures.write(cause)

    def exchange(self, row: Sequence[int], what: str) -> list[list[int]]:
        return self._rendezvous.exchange(row, what)

    def gather(self, value: T, what: str) -> list[T]:
        return self._rendezvous.gather(value, what)

    def broadcast(self, value: T, source: int, ranks: Sequence[int] | None = None) -> T:
        tensors, structure = take_apart(value)
        own = Header(structure, tuple(map(layout_of, tensors, tensors)))
        header = self._header_of(own, source)
        wanted = range(self.num_ranks) if ranks is None else ranks
        present = [source, *(rank for rank in wanted if rank != source)]
        if self.rank not in present:
            nothing: T = put_together([None] * len(header.layouts), header.structure)  # type: ignore
            return nothing
        if self.rank != source:
            tensors = [torch.empty(at.shape, dtype=at.dtype) for at in header.layouts]
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors]
        with self._wire.everyone:
            for tensor in tensors:
                if tensor.numel():
                    self._spread(tensor, source, present)
        received: T = put_together(  # type: ignore[assignment]
            [tensor.to(self._device) for tensor in tensors], header.structure
        )
        return received

    def give(self, rank: int, tensors: Sequence[torch.Tensor | None]) -> None:
        present = torch.tensor([tensor is not None for tensor in tensors])
        self._wire.start_sending(present, rank, control=True)
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                self._wire.start_sending(tensor.detach(), rank)

    def take(self, rank: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        present = torch.empty(len(like), dtype=torch.bool)
        self._wire.wait([self._wire.start_receiving(present, rank, control=True)], rank)
        taken = [
            torch.empty_like(tensor, requires_grad=False) if is_there else None
            for tensor, is_there in zip(like, present.tolist(), strict=True)
        ]
        works = [
            self._wire.start_receiving(tensor, rank)
            for tensor in taken
            if tensor is not None and tensor.numel()
        ]
        self._wire.wait(works, rank)
        return taken

    def group(self, ranks: Sequence[int]) -> DistributedGroup | None:
        assert self._wire.group is not None
        everyone = dist.get_process_group_ranks(self._wire.group)
        made = dist.new_group([everyone[rank] for rank in ranks])
        if self.rank not in ranks:
            return None
        return DistributedGroup(made, self._device, self._wire.everyone)

    def _header_of(self, own: Header, source: int) -> Header:
        """The form of what rank `source` has; CellError on every rank if it cannot be said."""
        payload, problem = b"", None
        if self.rank == source:
            try:
                payload = self._classes.pickled(own)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
        payload, problem = self._rendezvous.gather((payload, problem), "outputs")[source]
        if problem is not None:
            raise CellError(
                f"what the model returns cannot go to other ranks: {problem}; return tensors, "
                "numbers and text in tuples, dicts or dataclasses"
            )
        header = self._classes.unpickled(payload)
        assert isinstance(header, Header)
        return header

    def _spread(self, tensor: torch.Tensor, source: int, present: Sequence[int]) -> None:
        """Fill `tensor` on the ranks `present` with that of `source`."""
        if len(present) == self.num_ranks:
            dist.broadcast(tensor, group=self._wire.control, group_src=source)
        elif self.rank == source:
            for rank in present[1:]:
                dist.send(tensor, group=self._wire.control, group_dst=rank)
        else:
            dist.recv(tensor, group=self._wire.control, group_src=source)

    def leave(self, why: str) -> None:
        """Tell who waits for this rank that its program ends here."""
        if not self._is_lost:  # else the others are in the middle of a call, and were told
            self._rendezvous.leave(why)


def _leave(reference: "weakref.ref[DistributedTransport]") -> None:
    transport, error = reference(), getattr(sys, "last_value", None)
    if transport is not None and dist.is_initialized():
        transport.leave("" if error is None else f" ({type(error).__name__}: {error})")
