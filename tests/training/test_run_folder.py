"""A run's checkpoints: damage is found, the last good one kept and used, a full disk named."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import CheckpointError
from stagewise.training import checkpoint as checkpoints
from stagewise.training import run_folder
from stagewise.training.run_folder import DESCRIPTION, DIRECTORY, find, find_undamaged, latest


def build() -> tuple[stagewise.Pipeline, torch.optim.Optimizer]:
    torch.manual_seed(0)
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    return pipe, torch.optim.AdamW(pipe.parameters())


def run_of(directory: Path, *steps: int) -> stagewise.Pipeline:
    pipe, optimizer = build()
    for step in steps:
        optimizer.zero_grad()
        pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
        optimizer.step()
        checkpoints.save(directory, pipe, optimizer, step=step, seed=0)
    return pipe


@pytest.mark.parametrize("suffix", [".distcp", ".metadata", DESCRIPTION])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, suffix: str, where: float
) -> None:
    run_of(tmp_path, 1, 2)
    last = tmp_path / DIRECTORY / "step-00000002"
    file = next(path for path in last.iterdir() if path.name.endswith(suffix))
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        find_undamaged(last)
    checkpoint, told = find_undamaged(tmp_path)
    assert checkpoint.step == 1
    assert len(told) == 1 and "step-00000002 is damaged and was renamed" in told[0]
    assert find_undamaged(tmp_path) == (checkpoint, [])
    assert (last.parent / "step-00000002.damaged").is_dir(), "nothing is lost"


@pytest.mark.parametrize("unreadable", ["__0_0.distcp", DESCRIPTION])
def test_what_this_user_may_not_read_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    """It was renamed as damaged, so that its owner did not find it either."""
    run_of(tmp_path, 1, 2)
    open_file = io.open

    def refuse(file: Any, *args: Any, **options: Any) -> Any:
        if Path(file).name == unreadable and "00000002" in str(file):
            raise PermissionError(13, "Permission denied", str(file))
        return open_file(file, *args, **options)

    with (
        monkeypatch.context() as patched,
        pytest.raises(CheckpointError, match=r"Permission|may not"),
    ):
        patched.setattr("io.open", refuse)
        patched.setattr("builtins.open", refuse)
        find_undamaged(tmp_path)
    assert find_undamaged(tmp_path)[0].step == 2


@pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "a\0b", "..", "", "absent"])
def test_a_description_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "step").mkdir()
    fields = {"step": 1, "seed": 0, "parameter_shapes": {}, "files": {name: "0"}}
    (tmp_path / "step" / DESCRIPTION).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="is not a file in its folder"):
        find_undamaged(tmp_path / "step")


@pytest.mark.parametrize("change", [{"seed": "x"}, {"step": 10**30}, {"scaler": [1]}])
def test_a_description_of_other_things(tmp_path: Path, change: dict[str, object]) -> None:
    fields = {"step": 1, "seed": 0, "parameter_shapes": {}, **change}
    (tmp_path / DESCRIPTION).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="cannot be read"):
        find(tmp_path)


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    run_of(tmp_path, 1, 2)
    for _ in range(2):
        last = tmp_path / DIRECTORY / "step-00000002"
        next(last.glob("*.distcp")).write_bytes(b"")
        assert find_undamaged(tmp_path)[0].step == 1
        run_of(tmp_path, 2)
    names = sorted(path.name for path in (tmp_path / DIRECTORY).glob("*.damaged*"))
    assert names == ["step-00000002.damaged", "step-00000002.damaged-1"]


def test_all_damaged(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    next((tmp_path / DIRECTORY / "step-00000001").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"):
        find_undamaged(tmp_path)


def test_the_last_finite_one_is_never_dropped_and_gone_on_from(tmp_path: Path) -> None:
    pipe = run_of(tmp_path, 1, 2)
    with torch.no_grad():
        next(pipe.parameters()).fill_(float("nan"))
    for step in (3, 4, 5):
        checkpoints.save(tmp_path, pipe, None, step=step, seed=0)
    names = sorted(path.name for path in (tmp_path / DIRECTORY).iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000005"]
    newest = latest(tmp_path)
    assert newest is not None and newest.step == 2
    checkpoint, told = find_undamaged(tmp_path)
    assert checkpoint.step == 2 and "step-00000005 has non-finite numbers" in told[0]
    assert find(tmp_path / DIRECTORY / "step-00000005").finite is False


@pytest.mark.parametrize("where", ["statistics", "optimizer"])
def test_numbers_that_are_not_finite_are_looked_for_everywhere(tmp_path: Path, where: str) -> None:
    torch.manual_seed(0)
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].register_buffer("mask", torch.full((2,), float("-inf")))
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(pipe.parameters())
    pipe.step(torch.randn(16, 4), target=torch.zeros(16, 4))
    optimizer.step()
    assert checkpoints.save(tmp_path, pipe, optimizer, step=1, seed=0).finite
    if where == "statistics":
        dict(pipe.named_buffers())["1.running_mean"].fill_(float("nan"))
    else:
        next(iter(optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))
    assert not checkpoints.save(tmp_path, pipe, optimizer, step=2, seed=0).finite


def test_one_from_before_digests_is_read(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    file = tmp_path / DIRECTORY / "step-00000001" / DESCRIPTION
    fields = json.loads(file.read_text())
    for new in ("digest", "files", "finite"):
        del fields[new]
    file.write_text(json.dumps(fields))
    pipe, optimizer = build()
    checkpoint, told = find_undamaged(tmp_path)
    assert (checkpoint.step, told) == (1, [])
    checkpoints.restore(checkpoint, pipe, optimizer)
    assert pipe.step_index == 1


@pytest.mark.parametrize("step", [-1, "5", None, 2.5, True])
def test_a_description_that_makes_no_sense(tmp_path: Path, step: object) -> None:
    fields = {"step": step, "seed": 0, "parameter_shapes": {}}
    (tmp_path / DESCRIPTION).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_folder.find(tmp_path)


def test_a_full_disk_is_named_and_the_last_checkpoint_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = run_of(tmp_path, 1)
    before = {p: p.read_bytes() for p in (tmp_path / DIRECTORY).rglob("*") if p.is_file()}

    def full(*_: object, **__: object) -> None:
        cause = OSError(28, "No space left on device")
        try:
            raise cause
        except OSError as error:
            raise RuntimeError("unexpected pos 704 vs 598") from error

    monkeypatch.setattr(checkpoints, "save_distributed", full)
    with pytest.raises(CheckpointError, match=r"No space left on device \(ENOSPC\)") as caught:
        checkpoints.save(tmp_path, pipe, None, step=2, seed=0)
    assert "step-00000001 is untouched" in str(caught.value)
    assert {p: p.read_bytes() for p in (tmp_path / DIRECTORY).rglob("*") if p.is_file()} == before


def test_a_damaged_one_in_a_folder_that_may_only_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(tmp_path, 1, 2)
    next((tmp_path / DIRECTORY / "step-00000002").glob("*.distcp")).write_bytes(b"")

    def forbidden(*_: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", forbidden)
    checkpoint, told = find_undamaged(tmp_path)
    assert checkpoint.step == 1 and told[0].startswith("step-00000002 is damaged: ")
