"""A rank's device is that which its process group exchanges tensors of, whatever its maker."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from stagewise.engine.transport import connect, processes
from stagewise.engine.transport.peers import Peers
from stagewise.errors import PlanError
from tests.harness import Pools


def group_with(backends: dict[str, str], bound: torch.device | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        _device_types=[torch.device(kind) for kind in backends],
        _get_backend=lambda device: SimpleNamespace(name=lambda: backends[device.type]),
        bound_device_id=bound,
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One with four GPUs of the kind `xpu`, the first of which is current."""
    index = [0]
    for name, value in {
        "current_accelerator": lambda check_available: torch.device("xpu"),
        "current_device_index": lambda: index[0],
        "set_device_index": lambda new: index.__setitem__(0, new),
        "device_count": lambda: 4,
    }.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    monkeypatch.setattr(processes, "are_ready", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


def own_device(machine: pytest.MonkeyPatch, group: SimpleNamespace) -> torch.device:
    machine.setattr(processes, "dist", SimpleNamespace(group=SimpleNamespace(WORLD=group)))
    return processes.own_device()


@pytest.mark.parametrize(
    ("backends", "wanted"),
    [
        ({"xpu": "xccl"}, "xpu:0"),  # as of init_process_group() without a backend
        ({"cpu": "gloo", "xpu": "xccl"}, "xpu:0"),
        ({"cpu": "gloo", "xpu": "gloo"}, "cpu"),  # gloo registers for every kind
        ({"cpu": "gloo", "cuda": "nccl"}, "cpu"),  # of another maker
        ({"cpu": "mpi"}, "cpu"),
    ],
)
def test_it_is_the_accelerator_that_the_group_has_a_backend_for(
    machine: pytest.MonkeyPatch, backends: dict[str, str], wanted: str
) -> None:
    assert own_device(machine, group_with(backends)) == torch.device(wanted)


def test_which_of_several_accelerators(machine: pytest.MonkeyPatch) -> None:
    both = {"cpu": "gloo", "xpu": "xccl"}
    machine.setenv("LOCAL_RANK", "2")
    bound = group_with(both, torch.device("xpu", 3))
    assert own_device(machine, bound) == torch.device("xpu", 3)
    assert own_device(machine, group_with(both)) == torch.device("xpu", 2)
    assert torch.accelerator.current_device_index() == 2
    torch.accelerator.set_device_index(1)  # the user's choice
    assert own_device(machine, group_with(both)) == torch.device("xpu", 1)
    torch.accelerator.set_device_index(0)
    machine.setenv("LOCAL_RANK", "7")  # each process sees its own devices only
    assert own_device(machine, group_with(both)) == torch.device("xpu", 0)


def on_one_device(uuids: list[str]) -> str:
    """What a rank says of the devices of all."""
    properties = SimpleNamespace(uuid=uuids[dist.get_rank()])
    module = SimpleNamespace(get_device_properties=lambda device: properties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_device_module", lambda device: module)
        group = dist.group.WORLD
        assert group is not None
        try:
            connect._check_own(
                torch.device("cuda", 0),
                lambda value: connect._gathered(group, Peers(dist.get_rank()), value),
            )
        except PlanError as error:
            return str(error)
    return ""


def test_two_ranks_on_one_device_are_refused_on_both(pools: Pools) -> None:
    assert pools[2].run(on_one_device, ["a", "b"]) == ["", ""]
    for said in pools[2].run(on_one_device, ["a", "a"]):
        assert "ranks 0 and 1 are both on CUDA a" in said
        assert "set_device_index" in said
