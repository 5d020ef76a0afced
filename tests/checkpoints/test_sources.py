from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stagewise.checkpoints import sources
from stagewise.free_pages import drop_pages


class Whole:
    """A file's handle; notes whose tensors are asked for whole."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values, self.asked = values, list[str]()

    def get_tensor(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.values[name]


def test_large_tensors_are_copied_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", 100)
    values = {
        "rows": torch.randn(23, 7),
        "wide": torch.randn(3, 50),  # a row is more than a part
        "line": torch.randn(301),
        "small": torch.randn(5, 5),
        "number": torch.tensor(2.5),
        "none": torch.randn(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(values, path)
    whole = Whole(values)
    for name, value in values.items():
        for target in (torch.zeros_like(value), torch.zeros_like(value, dtype=torch.float64)):
            sources._copy(path, whole, name, target)
            assert torch.equal(target, value.to(target.dtype)), name
    assert {*whole.asked} == {"small", "number", "none"}


def test_a_mapped_tensor_is_the_file_s_after_its_pages_are_let_go(tmp_path: Path) -> None:
    value, path = torch.randn(300, 1000), tmp_path / "model.safetensors"
    save_file({"a": torch.randn(3), "value": value}, path)
    mapped = sources.open_source(path, ["value"]).mapped("value")
    assert mapped is not None and torch.equal(mapped, value)
    drop_pages(mapped[100:200])
    drop_pages(mapped)
    assert torch.equal(mapped, value)
    assert sources.open_source({"value": value}, ["value"]).mapped("value") is None
