"""The engine through the hosts' memory, with a CPU that stands for a device and copies late."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import stagewise
from stagewise.engine.transport import choose_wires, connect
from stagewise.engine.transport.ranks import Ranks
from stagewise.engine.transport.wires.group import Group
from stagewise.engine.transport.wires.staged import staged
from stagewise.engine.transport.wires.wire import Wires
from stagewise.schedule import SCHEDULES
from tests.engine.transport.late_device import LateStream, late
from tests.engine.transport.wires import fresh_connections
from tests.harness import Pools
from tests.pipeline.test_failures import no_room


@contextmanager
def late_on(ranks: Collection[int]) -> Iterator[None]:
    """As if these ranks were on devices of their own kind, without a backend."""

    def made(wires: Wires, device: torch.device) -> Wires:
        return late(wires) if dist.get_rank() in ranks else staged(wires, device)

    with (
        fresh_connections(),
        mock.patch.object(choose_wires, "why_staged", lambda seats: "this is a test"),
        mock.patch.object(choose_wires, "staged", made),
        mock.patch.object(choose_wires, "warn_user"),
    ):
        yield
        connect.disconnect()


def steps(name: str, num_devices: int, transport: str) -> list[Tensor]:
    """Losses and gradients of two steps, the second of which knows the messages' forms."""
    per_device = SCHEDULES[name].stages_per_device
    torch.manual_seed(0)
    cells = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2)) for _ in range(2 * num_devices)]
    plan = stagewise.Plan(
        balance=(4 // per_device,) * (num_devices * per_device),
        schedule=name,
        num_microbatches=8,
        stages_per_device=per_device,
    )
    model = nn.Sequential(*cells)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, transport=transport)
    if transport != "local":
        pipe._runner.mail._posted_bytes = 0  # type: ignore[attr-defined]
    batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    found = [pipe.step(batch, target=batch) for _ in range(2)]
    return [*found, *(p.grad for _, p in sorted(pipe.named_parameters()) if p.grad is not None)]


def same_bits(names: Sequence[str], ranks: Collection[int]) -> list[bool]:
    """Whether each schedule gives the bits of one process."""
    same = []
    with late_on(ranks):
        for name in names:
            between = steps(name, dist.get_world_size(), "distributed")
            alone = steps(name, dist.get_world_size(), "local")
            losses = all(map(torch.equal, between[:2], alone[:2]))
            grads = [any(torch.equal(g, other) for other in alone[2:]) for g in between[2:]]
            same.append(losses and len(grads) > 0 and all(grads))
    return same


@pytest.mark.parametrize(("size", "ranks"), [(2, {0, 1}), (2, {1}), (4, {0, 1, 2, 3})])
def test_the_bits_are_those_of_one_process(pools: Pools, size: int, ranks: set[int]) -> None:
    names = ["1f1b", "interleaved", "zb_v"]
    assert pools[size].run(same_bits, names, ranks) == [[True] * len(names)] * size


def counted(name: str) -> tuple[int, int]:
    """Copies between this rank's device and its host in a step, and tensors sent and received."""
    copies = []
    started = LateStream.add

    def add(self: LateStream, task: object) -> None:
        if "copy_" in task.__code__.co_names:  # type: ignore[attr-defined]
            copies.append(task)
        started(self, task)  # type: ignore[arg-type]

    with late_on({0, 1}):
        plan = stagewise.Plan(balance=(1, 1), schedule=name, num_microbatches=4)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
        for _ in range(2):
            pipe.step(torch.ones(8, 2), target=torch.ones(8, 2))
        wires = pipe._runner.mail._wires.data  # type: ignore[attr-defined]
        moved = 0

        def moving(start):  # type: ignore[no-untyped-def]
            def started_now(tensors: Sequence[Tensor], rank: int) -> object:
                nonlocal moved
                moved += len(tensors)
                return start(tensors, rank)

            return started_now

        with (
            mock.patch.object(LateStream, "add", add),
            mock.patch.object(wires, "start_send", moving(wires.start_send)),
            mock.patch.object(wires, "start_receive", moving(wires.start_receive)),
        ):
            pipe.step(torch.ones(8, 2), target=torch.ones(8, 2))
    return len(copies), moved


def test_every_tensor_is_copied_once_on_either_side(pools: Pools) -> None:
    """No thread but those of the wire waits for a copy: `LateEvent` refuses."""
    for copies, moved in pools[2].run(counted, "1f1b"):
        assert copies == moved >= 8


def without_room() -> list[tuple[list[tuple[str, str]], bool]]:
    with late_on({0, 1}):  # and rank 2 without a device
        return no_room()


def test_a_message_without_room_fails_on_all_ranks(pools: Pools) -> None:
    for rows in zip(*pools[3].run(without_room), strict=True):
        for ((kind, text),), next_is_right in rows:
            assert next_is_right and kind == "OutOfMemoryError" and "rank 1 ran out" in text


def replicated(transport: str) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6))
    plan = stagewise.Plan(balance=(3, 1), schedule="1f1b", num_microbatches=8, replicas=(2, 1))
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, transport=transport)  # type: ignore[arg-type]
    batch = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        loss = pipe.step(batch, target=batch)
    return loss.item(), {n: p.grad for n, p in pipe.named_parameters() if p.grad is not None}


def replicas_agree() -> bool:
    """Their gradients are one process's but for the order of two sums."""
    with late_on({0, 1}):
        loss, gradients = replicated("distributed")
    alone, whole = replicated("local")
    return abs(loss - alone) < 1e-6 and all(
        torch.allclose(gradient, whole[name], rtol=1e-6, atol=1e-7)
        for name, gradient in gradients.items()
    )


def test_replicated_stages_train_beside_a_rank_without_a_device(pools: Pools) -> None:
    assert pools[3].run(replicas_agree) == [True] * 3


def sums() -> list[object]:
    with late_on({0}):  # on the other rank the device is the host's
        ranks = connect.between_processes(torch.device("cpu")).ranks
        group = ranks.group([0, 1])
    assert isinstance(ranks, Ranks) and isinstance(group, Group)
    rank = dist.get_rank()
    with mock.patch.object(Tensor, "to", lambda tensor, where: tensor.clone()):  # as from a device
        total, initial = torch.tensor([1.5, 2.0]) * (rank + 1), torch.tensor([rank + 5.0])
        group.start_sum(total)()
        group.copy_from_first(initial)
        gathered = group.gather(torch.arange(float(rank + 1)))
    backend = dist.get_backend(group._group)
    return [backend, total.tolist(), initial.tolist(), [each.tolist() for each in gathered]]


def test_replicas_sum_through_the_hosts_memory(pools: Pools) -> None:
    wanted = ["gloo", [4.5, 6.0], [5.0], [[0.0], [0.0, 1.0]]]
    assert pools[2].run(sums) == [wanted] * 2
