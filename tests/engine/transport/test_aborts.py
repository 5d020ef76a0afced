"""What is in flight on devices ends when a call fails for good: a kernel would wait on for ever."""

import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stagewise
from stagewise.engine.transport import connect
from stagewise.engine.transport.wires.group_wire import GroupWire, LinkGroups
from stagewise.engine.transport.wires.peers import Peers
from stagewise.engine.transport.wires.wire import Wires
from stagewise.errors import PeerError
from tests.engine.transport.wires import fresh_connections
from tests.harness import Pool

log: list[str] = []


class Recorded:
    """A link's group, as NCCL's, which can be aborted; then its connections close."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group: dist.ProcessGroup | None = group
        self.send, self.recv = group.send, group.recv

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            _group_start=lambda: log.append("start"), _group_end=lambda: log.append("end")
        )

    def abort(self) -> None:
        log.append("abort")
        dist.destroy_process_group(self._group)
        del self._group, self.send, self.recv


class RecordedLinks(LinkGroups):
    def prepare(self, links: object) -> None:
        super().prepare(links)  # type: ignore[arg-type]
        for link, group in self._links.items():
            if group is not None and not isinstance(group, Recorded):
                self._links[link] = Recorded(group)  # type: ignore[assignment]

    def close(self) -> None:
        self._links.clear()


def as_on_gpus(
    seats: object,
    device: torch.device,
    group: dist.ProcessGroup,
    host: dist.ProcessGroup,
    peers: Peers,
) -> Wires:
    data = RecordedLinks(peers, group, torch.device("cpu"))
    return Wires(data, GroupWire(peers, host), prepare=data.prepare, abort=data.abort)


class Fails(nn.Module):
    raises: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.raises is not None:
            raise self.raises
        return x + 1


def failing() -> tuple[list[str], str, float]:
    """What an error of a cell aborts, and then an interrupt of rank 1's program; seconds."""
    log.clear()
    last = Fails()
    cells = [nn.Linear(4, 4), last]
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4)
    batch = torch.ones(8, 4)
    with fresh_connections(), mock.patch.object(connect, "wires_between", as_on_gpus):
        pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss, transport="distributed")
        pipe.step(batch, target=batch)
        last.raises = ValueError("a cell's")
        with pytest.raises(stagewise.StagewiseError, match="a cell's"):
            pipe.step(batch, target=batch)
        last.raises = None
        pipe.step(batch, target=batch)  # usable, so nothing was aborted
        log.append("steps on")
        last.raises = KeyboardInterrupt()  # ends one rank without a word to the others
        start = time.monotonic()
        with pytest.raises((KeyboardInterrupt, PeerError)) as raised:
            pipe.step(batch, target=batch)
        return [*log], str(raised.value), time.monotonic() - start


def test_a_call_that_fails_for_good_aborts_the_links_of_every_rank() -> None:
    pool = Pool(2)  # of its own: what has failed stays written down
    try:
        (first, error, took), (second, _, _) = pool.run(failing)
    finally:
        pool.kill()
    # Both directions' links, at once: aborts of NCCL communicators may wait for each other.
    assert first == second == ["steps on", "start", "abort", "abort", "end"]
    assert "KeyboardInterrupt" in error
    assert took < 10
