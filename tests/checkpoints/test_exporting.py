"""A run's model as safetensors: the plain model's state_dict, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import stagewise
from stagewise.checkpoints import saving
from stagewise.checkpoints.exporting import export_model
from stagewise.errors import CheckpointError, UsageError
from stagewise.planning import Plan
from stagewise.training import checkpoint as checkpoints


class WithExtra(nn.Linear):
    """Its state has an entry that is no tensor."""

    def get_extra_state(self) -> dict[str, object]:
        return {"calls": 3, "table": torch.ones(2)}

    def set_extra_state(self, state: object) -> None:
        pass


def model() -> nn.Sequential:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    half = nn.Linear(4, 4).to(torch.bfloat16).requires_grad_(False)
    return nn.Sequential(first, nn.BatchNorm1d(4), WithExtra(4, 4), last, nn.Sequential(), half)


def saved(run: Path) -> tuple[nn.Sequential, Path]:
    plain = model()
    plan = Plan(balance=(2, 3), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(nn.Sequential(*[*plain][:5]), plan, loss=nn.functional.mse_loss)
    optimizer = torch.optim.AdamW(pipe.parameters())
    return plain, checkpoints.save(run, pipe, optimizer, step=1, seed=0).path


def equal(one: dict[str, object], other: dict[str, object]) -> bool:
    tensors = [n for n, value in one.items() if isinstance(value, torch.Tensor)]
    assert {*tensors} == {*other}
    return all(torch.equal(one[n], other[n]) for n in tensors)  # type: ignore[arg-type]


def test_one_file_and_one_folder(tmp_path: Path) -> None:
    plain, checkpoint = saved(tmp_path)
    expected = nn.Sequential(*[*plain][:5]).state_dict()
    left_out = export_model(checkpoint, tmp_path / "new/all.safetensors")
    assert left_out == ["2._extra_state"]
    assert equal(expected, load_file(tmp_path / "new/all.safetensors"))
    (tmp_path / "empty").mkdir()
    export_model(checkpoint, tmp_path / "empty")
    assert [f.name for f in (tmp_path / "empty").iterdir()] == ["model.safetensors"]
    assert equal(expected, load_file(tmp_path / "empty/model.safetensors"))


def test_shards_are_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 100)
    plain, checkpoint = saved(tmp_path)
    export_model(checkpoint, tmp_path / "out", beside=[checkpoint / "stagewise.json"])
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = {file for file in index["weight_map"].values()}
    assert len(files) > 2 and (tmp_path / "out/stagewise.json").is_file()
    read: dict[str, object] = {}
    for file in files:
        read |= load_file(tmp_path / "out" / file)
    assert equal(nn.Sequential(*[*plain][:5]).state_dict(), read)


def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, checkpoint = saved(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stagewise.checkpoints.exporting.save_file", full)
    for name in ("out", "out.safetensors"):
        with pytest.raises(CheckpointError, match="No space left on device"):
            export_model(checkpoint, tmp_path / name)
    assert {f.name for f in tmp_path.iterdir()} == {"checkpoints"}
    (tmp_path / "taken").write_text("")
    with pytest.raises(UsageError, match="taken exists already; remove it, or give another OUT"):
        export_model(checkpoint, tmp_path / "taken")
