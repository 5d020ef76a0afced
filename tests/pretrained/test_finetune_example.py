"""examples/finetune_llama.py: equal losses on any devices, and what plain libraries load."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from examples import finetune_llama
from tests.harness import Pools

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(600),
]

UNEQUAL = {"schedule": "1f1b", "num_devices": 2, "memory_bytes": (12e6, 18e6)}


def trained(base: str, out: str, plan: dict[str, object] | None) -> list[float]:
    return finetune_llama.finetune(Path(base), Path(out), 3, plan)


def test_losses_are_equal_on_any_devices(
    pools: Pools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    finetune_llama.write_base(base, torch.float64)
    assert len([*base.glob("model-*.safetensors")]) > 2
    alone = trained(str(base), str(tmp_path / "one"), None)
    capsys.readouterr()
    ways = {
        "two": trained(str(base), str(tmp_path / "two"), {"num_devices": 2}),
        "four": trained(str(base), str(tmp_path / "four"), {"num_devices": 4}),
        "caps": trained(str(base), str(tmp_path / "caps"), UNEQUAL),
    }
    assert "stage 0: 4 cells" in capsys.readouterr().out  # in place of 6
    for rank, losses in enumerate(
        pools[2].run(trained, str(base), str(tmp_path / "ranks"), UNEQUAL)
    ):
        ways[f"rank {rank}"] = losses
    for name, losses in ways.items():
        torch.testing.assert_close(
            torch.tensor(losses), torch.tensor(alone), rtol=1e-12, atol=0, msg=name
        )
