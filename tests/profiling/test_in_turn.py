"""Cells take turns on a device: measured as they are together, and left as they were.

The CPU stands for the device: what is on it is what was made there and is not the host's copy.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import stagewise
from stagewise.errors import CellError, PlanError
from stagewise.model.chain import chain_of
from stagewise.profiling import example, in_turn, trial_steps
from stagewise.schedule import Instruction
from tests.models import EXAMPLES
from tests.profiling.test_estimate import by_name

CPU = torch.device("cpu")


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether the CPU stands for a device."""
    monkeypatch.setattr(in_turn, "_is_at", lambda tensor, device: False)

    def stands(yes: bool) -> None:
        for module in (trial_steps, example):
            monkeypatch.setattr(module, "takes_turns", lambda device: yes)

    stands(True)
    return stands


def profiled(model: nn.Module, *batch: object, loss: Any, split: bool = True) -> Any:
    torch.manual_seed(0)
    return trial_steps.profile(
        chain_of(model), (*batch, {}), loss=loss, device=CPU, seconds=0.0, split=split
    )


class Passes(nn.Linear):
    """Passes its weight on, to be used by the next cell."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.weight


class Takes(nn.Linear):
    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        x, weight = given
        return super().forward(x @ weight)


@pytest.mark.parametrize("name", [*EXAMPLES, "passed on"])
def test_bytes_and_gradients_are_those_of_all_cells_together(
    name: str, turns: Callable[[bool], None]
) -> None:
    found = []
    for yes in (False, True):
        turns(yes)
        torch.manual_seed(0)
        if name in EXAMPLES:
            one = EXAMPLES[name]
            model, batch, loss = one.model(), (one.inputs(8), one.target(8)), one.loss
        else:
            model, loss = nn.Sequential(Passes(4, 4), Takes(4, 4)), nn.functional.mse_loss
            batch = torch.ones(8, 4), torch.ones(8, 4)
        before = {
            n: (t, t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()
        }
        seen: dict[str, list[Tensor]] = {}
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
                note = seen.setdefault(path, [])
                parameter.register_hook(lambda g, note=note: note.append(g.clone()))
        costs = profiled(model, *batch, loss=loss)
        found.append((by_name(costs), seen))
        for path, tensor in model.state_dict(keep_vars=True).items():
            same, address, value = before[path]
            assert tensor is same and tensor.data_ptr() == address and torch.equal(tensor, value)
            assert tensor.grad is None or torch.equal(tensor.grad, torch.ones_like(tensor))
    (bytes_together, together), (bytes_in_turn, alone) = found
    assert bytes_in_turn == bytes_together
    for path, gradients in together.items():
        assert len(gradients) == len(alone[path])
        assert all(map(torch.equal, gradients, alone[path])), path


class Here(TorchDispatchMode):
    """Knows the storages that operators made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage)
        return result

    def num_bytes(self, elsewhere: set[int]) -> int:
        alive = [
            key for key, ref in self.made.items() if not ref.expired() and key not in elsewhere
        ]
        sizes = [torch.UntypedStorage._new_with_weak_ptr(self.made[key].cdata) for key in alive]
        return sum(storage.nbytes() for storage in sizes if storage is not None)


def test_at_most_one_cell_is_on_the_device(
    turns: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, peaks = Here(), []

    class Counted(in_turn.InTurn):
        def _move_on(self, stages: Any, ran: Instruction, then: Instruction | None) -> None:
            def count() -> None:
                elsewhere = *(kept for _, kept in self._emptied.values()), *homes
                peaks.append(here.num_bytes({t.untyped_storage()._cdata for t in elsewhere}))

            count()
            super()._move_on(stages, ran, then)
            count()

    monkeypatch.setattr(trial_steps, "InTurn", Counted)
    width, samples, num_cells = 64, 64, 12
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(num_cells)))
    batch = torch.ones(samples, width), torch.ones(samples, width)
    homes = [*batch, *(parameter.detach() for parameter in model.parameters())]
    with here:
        profiled(model, *batch, loss=nn.functional.mse_loss)
    cell = 4 * width * width
    assert len(peaks) == 2 * (2 + 3) * num_cells * 4 + 2 * 3 * num_cells
    # Its weight, its gradient's sum, a new gradient, its input, its output, what comes and goes.
    assert max(peaks) <= 8 * cell < num_cells * cell, max(peaks) / cell


def test_a_cell_that_does_not_fit_is_named_and_all_is_put_back(
    turns: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    model = nn.Sequential(nn.Linear(2, 2), Large(2, 2), nn.Linear(2, 2))
    before = [(p, p.data_ptr()) for p in model.parameters()]
    x = torch.ones(4, 2)
    with pytest.raises(PlanError, match=r"cell '1' \(Large, 24 B.*not fit on cpu by itself"):
        profiled(model, x, x, loss=nn.functional.mse_loss)
    assert [(p, p.data_ptr()) for p in model.parameters()] == before
    model[1] = Fails(2, 2)
    with pytest.raises(CellError, match="no"):
        profiled(model, x, x, loss=nn.functional.mse_loss)

    def full(self: in_turn.InTurn, tensor: Tensor) -> None:
        if tensor is model[2].weight:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model[1] = nn.Linear(2, 2)
    monkeypatch.setattr(in_turn.InTurn, "_put", full)
    with pytest.raises(PlanError, match=r"cell '2' \(Linear"):
        stagewise.plan(
            model, x, target=x, loss=nn.functional.mse_loss, num_stages=2, num_microbatches=2
        )
    assert all(p.grad is None for p in model.parameters())
