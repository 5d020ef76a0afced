"""How a worker parts from the others."""

import os
import socket

import pytest
import torch

from stagewise.engine.transport.connect import between_processes
from stagewise.training.workers import worker
from stagewise.training.workers.worker import joined


@pytest.mark.parametrize("leaves", [False, True])
def test_no_thread_of_the_process_group_outlives_it(
    monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    """Seen once, under load: a worker of `plan --replicas` aborted while Python was finalising."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = threads()
    try:
        with joined():
            compute_together()
            assert threads() - before
            if leaves:
                raise SystemExit(0)
    except SystemExit:
        assert leaves
    assert not threads() - before


@pytest.mark.parametrize(("workers", "index", "bound"), [("2", 1, True), ("4", 1, False)])
def test_workers_share_gpus_if_there_are_fewer(
    monkeypatch: pytest.MonkeyPatch, workers: str, index: int, bound: bool
) -> None:
    """Bound to one, they would be connected by NCCL, which refuses two of them on it."""
    gpus, calls = [torch.device("cuda", number) for number in range(2)], list[object]()
    monkeypatch.setenv("LOCAL_RANK", str(int(workers) - 1))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", workers)
    monkeypatch.setattr(worker, "accelerators", lambda: gpus)
    monkeypatch.setattr(torch.accelerator, "set_device_index", calls.append)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda *on, device_id, **joining: calls.append((*on, device_id)),
    )
    monkeypatch.setattr(worker, "store_of_all", lambda timeout: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with joined():
        pass
    assert calls == [index, ("cpu:gloo,cuda:nccl", gpus[index] if bound else None)]


def compute_together() -> None:
    """As replicas do; what they hold is garbage afterwards, in a circle as a Pipeline's is."""
    ranks = between_processes(torch.device("cpu")).ranks
    circle = [ranks.group([0]), ranks]
    circle[0].start_sum(torch.ones(3))()  # type: ignore[union-attr]
    circle.append(circle)  # type: ignore[arg-type]


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))
