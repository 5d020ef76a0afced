"""A rank's device is that which its process group exchanges tensors of, whatever its maker."""

from types import SimpleNamespace

import pytest
import torch

from stagewise.engine.transport import processes


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
    machine.setenv("LOCAL_RANK", "7")  # two ranks share each
    assert own_device(machine, group_with(both)) == torch.device("xpu", 3)
    torch.accelerator.set_device_index(0)
    machine.setattr(torch.accelerator, "device_count", lambda: 1)  # each process sees its own
    assert own_device(machine, group_with(both)) == torch.device("xpu", 0)
