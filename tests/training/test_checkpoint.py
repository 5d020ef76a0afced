"""A checkpoint fits any number of stages, no other model, and is whole or is none."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import CheckpointError
from stagewise.training import checkpoint as checkpoints
from stagewise.training import run_folder


def build(balance: tuple[int, ...], width: int = 4) -> tuple[stagewise.Pipeline, torch.optim.Adam]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 1)
    )
    plan = stagewise.Plan(balance=balance, schedule="gpipe", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    return pipe, torch.optim.Adam(pipe.parameters(), lr=0.1)


def steps(pipe: stagewise.Pipeline, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        pipe.step(inputs, target=inputs.sum(1, keepdim=True))
        optimizer.step()


@pytest.mark.parametrize("balance", [(4,), (1, 3), (1, 1, 1, 1)])
def test_another_number_of_stages_goes_on_bit_for_bit(
    tmp_path: Path, balance: tuple[int, ...]
) -> None:
    pipe, optimizer = build((2, 2))
    steps(pipe, optimizer, range(3))
    saved = checkpoints.save(tmp_path, pipe, optimizer, step=3, seed=7)
    steps(pipe, optimizer, range(3, 6))

    other, other_optimizer = build(balance)
    found = run_folder.find(tmp_path)
    assert (found, found.step, found.seed) == (saved, 3, 7)
    checkpoints.restore(found, other, other_optimizer)
    assert other.step_index == 3
    steps(other, other_optimizer, range(3, 6))
    expected, state = pipe.state_dict(), other.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(expected[name], state[name]) for name in expected)


def test_another_model_is_refused_with_the_first_differences(tmp_path: Path) -> None:
    pipe, optimizer = build((2, 2))
    checkpoints.save(tmp_path, pipe, optimizer, step=1, seed=0)
    other, other_optimizer = build((2, 2), width=5)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(run_folder.find(tmp_path), other, other_optimizer)
    assert "from another model" in str(caught.value)
    assert "0.weight: (4, 4) in the checkpoint, (5, 4) here" in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    pipe, optimizer = build((4,))
    steps(pipe, optimizer, range(1))
    checkpoints.save(tmp_path, pipe, optimizer, step=1, seed=0)
    other, _ = build((4,))
    adagrad = torch.optim.Adagrad(other.parameters())
    with pytest.raises(CheckpointError, match="another optimizer"):
        checkpoints.restore(run_folder.find(tmp_path), other, adagrad)


@pytest.mark.parametrize(
    ("values", "may_be_infinite", "sound"),
    [
        (torch.full((9,), 6e4, dtype=torch.float16), False, True),  # the sum overflows
        (torch.tensor([1e38, 3e38, 1.0]), False, True),
        (torch.tensor([0.0, math.inf]), False, False),
        (torch.tensor([math.inf, -math.inf]), True, True),  # the sum is NaN
        (torch.tensor([0.0, math.nan]), True, False),
        (torch.tensor([1 + 1j, complex(0, math.inf)]), False, False),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), False, True),
        (torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn), False, False),
        (torch.empty(0), False, True),
        (torch.tensor([2**63 - 1, 1]), False, True),
    ],
)
def test_what_is_not_finite_is_found(
    tmp_path: Path, values: torch.Tensor, may_be_infinite: bool, sound: bool
) -> None:
    pipe, _ = build((2, 2))
    pipe.module.register_buffer("more", values)
    if not may_be_infinite:  # a buffer may be, statistics of the optimizer not
        optimizer = torch.optim.SGD(pipe.parameters(), momentum=0.9)
        optimizer.state[next(iter(pipe.parameters()))] = {"momentum_buffer": values}
        del pipe.module.more
    else:
        optimizer = None
    assert checkpoints.save(tmp_path, pipe, optimizer, step=1, seed=0).finite == sound


def test_half_written_is_not_found_and_the_last_two_are_kept(tmp_path: Path) -> None:
    pipe, optimizer = build((4,))
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, pipe, optimizer, step=step, seed=0)
    directory = tmp_path / run_folder.DIRECTORY
    (directory / "step-00000004.tmp").mkdir()
    (directory / "step-00000004.tmp" / run_folder.DESCRIPTION).write_text("{}")
    assert run_folder.find(tmp_path).step == 3
    assert run_folder.find(directory / "step-00000002").step == 2
    assert not (directory / "step-00000001").exists()
    checkpoints.save(tmp_path, pipe, optimizer, step=4, seed=0)
    assert run_folder.find(tmp_path).step == 4


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist; give the directory"):
        run_folder.find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        run_folder.find(tmp_path)


def test_broken_description(tmp_path: Path) -> None:
    (tmp_path / run_folder.DESCRIPTION).write_text('{"step": 3}')
    with pytest.raises(CheckpointError, match="cannot be read: KeyError: 'seed'"):
        run_folder.find(tmp_path)
