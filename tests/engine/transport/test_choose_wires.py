"""Which wires connect ranks: a GPU for each and its backend, else the hosts' memory."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import stagewise
from stagewise.engine.transport import choose_wires, connect
from stagewise.engine.transport.choose_wires import Seat, why_staged
from stagewise.engine.transport.connect import between_processes
from stagewise.engine.transport.wires import staged
from stagewise.engine.transport.wires.staged import Staged
from stagewise.errors import PlanError
from tests.engine.transport.wires import fresh_connections
from tests.harness import Pools

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HERE = Seat("here", "cuda", "a", True)


@pytest.mark.parametrize(
    ("seats", "why"),
    [
        ([Seat("here", "cpu", "cpu", True)] * 2, None),
        ([HERE, HERE._replace(device="b")], None),
        ([HERE, HERE._replace(host="there")], None),
        ([HERE, HERE._replace(device="b"), HERE], "ranks 0 and 2 share cuda device a of here"),
        ([HERE._replace(sends=False), HERE._replace(device="b", sends=False)], "no backend"),
        ([Seat("here", "mps", "mps", False)] * 2, "no backend, such as NCCL, that sends from mps"),
        ([HERE, Seat("here", "cpu", "cpu", True)], "devices of several kinds: cpu, cuda"),
        ([HERE, Seat("here", "xpu", "xpu:0", True)], "devices of several kinds: cuda, xpu"),
    ],
)
def test_why_tensors_go_through_the_hosts_memory(seats: list[Seat], why: str | None) -> None:
    said = why_staged(seats)
    assert said is None if why is None else said is not None and why in said


def group_with(**backends: str) -> SimpleNamespace:
    return SimpleNamespace(
        _device_types=[torch.device(kind) for kind in backends],
        _get_backend=lambda device: SimpleNamespace(name=lambda: backends[device.type]),
    )


def test_a_seat_is_known_by_its_devices_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    both: dist.ProcessGroup = group_with(cpu="gloo", cuda="nccl")  # type: ignore[assignment]
    gloo: dist.ProcessGroup = group_with(cpu="gloo", cuda="gloo")  # type: ignore[assignment]
    module = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert Seat.of(GPU, both)[1:] == ("cuda", "GPU-1", True)
    assert Seat.of(GPU, gloo)[1:] == ("cuda", "GPU-1", False)
    assert Seat.of(CPU, both)[1:] == ("cpu", "cpu", True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert Seat.of(torch.device("mps"), gloo)[1:] == ("mps", "mps", False)


def moved() -> tuple[list[str], list[list[int]], bool]:
    """Connect on CPUs, then with rank 1 on a GPU: what is said, what is exchanged, and how."""
    rank = dist.get_rank()
    with (
        fresh_connections(),
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        patch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
        patch.setattr(staged, "has_streams", lambda device: False)
        for own in (CPU, CPU if rank == 0 else GPU):
            transport = between_processes(own)
            rows = transport.ranks.exchange([rank], "test")
        wire = transport.mail._wires.data  # type: ignore[attr-defined]
        connect.disconnect()
    return [str(each.message) for each in caught], rows, isinstance(wire, Staged)


def test_ranks_on_other_devices_than_before_are_connected_anew(pools: Pools) -> None:
    """Also those that stay where they were; one rank of them says why they are slower."""
    (said, *first), (nothing, *second) = pools[2].run(moved)
    assert len(said) == 1 and not nothing
    assert said[0].startswith("all messages between ranks go through the hosts' memory, since")
    assert "cpu, cuda" in said[0]
    assert first == [[[0], [1]], False] and second == [[[0], [1]], True]


def planned() -> list[str]:
    """Where the wires of a plan's measurements and trial steps, and of its pipeline, lead."""
    with fresh_connections(), pytest.MonkeyPatch.context() as patch:
        real, asked = Seat.of, []

        def of(device: torch.device, group: dist.ProcessGroup) -> Seat:
            asked.append(str(device))
            return real(device, group)

        patch.setattr(Seat, "of", of)
        model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(4, 2)
        stagewise.plan(
            model,
            x,
            target=x,
            loss=nn.functional.mse_loss,
            num_stages=2,
            num_microbatches=2,
            seconds=0,
            device="cpu:0",
        )
        connect.disconnect()
    return asked


def test_a_plan_tries_messages_where_its_cells_are_measured(pools: Pools) -> None:
    for asked in pools[2].run(planned):
        assert len(asked) >= 2 and asked[-2:] == ["cpu:0", "cpu:0"]


@pytest.mark.parametrize("name", ["CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS"])
def test_streams_that_wait_for_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "8")
    choose_wires._check_streams(torch.device("cuda"))
    monkeypatch.setenv(name, "1")
    choose_wires._check_streams(CPU)
    with pytest.raises(PlanError, match=f"{name}=1 .* unset it"):
        choose_wires._check_streams(torch.device("cuda"))
