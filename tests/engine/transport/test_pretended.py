"""What collectives send, by the ranks that they span; nothing is sent."""

import pytest
import torch
import torch.distributed as dist

from stagewise.engine.transport.pretended import Beside, pretended_mesh
from stagewise.errors import UsageError
from stagewise.profiling.op_counter import OpCounter


def test_collectives_are_rings_among_ranks_that_span_so_many() -> None:
    x, four = torch.ones(8), torch.ones(32)
    with pretended_mesh([Beside("a", 2, 8), Beside("b", 4, 4)]) as mesh:
        assert mesh.mesh.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
        a, b = mesh.get_group("a"), mesh.get_group("b")
        with OpCounter() as counter:
            dist.all_reduce(x, group=a)
            dist.all_gather([*four.chunk(4)], x, group=b)
            dist.reduce_scatter(x, [*four.chunk(4)], group=b)
            dist.all_to_all_single(x.clone(), x, group=b)
            dist.broadcast(x, 0, group=a)
            dist.all_reduce(x, group=mesh.get_group("pp"))  # of one rank
    sent = [(op.messages, op.num_bytes, op.span) for op in counter.ops if op.messages]
    assert sent == [(2, 16, 8), (3, 32, 4), (3, 32, 4), (3, 8, 4), (1, 32, 8)]
    assert not dist.is_initialized()


def test_not_among_real_ranks() -> None:
    one, other = pretended_mesh([]), pretended_mesh([])
    with one, pytest.raises(UsageError, match="without torchrun"):
        other.__enter__()
