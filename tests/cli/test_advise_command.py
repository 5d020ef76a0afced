"""In this process: what is estimated needs no workers, and starting Python takes seconds."""

import json
from pathlib import Path

import pytest
import typer.main

from stagewise.cli.main import command_app
from stagewise.errors import UsageError
from tests.recipes import write_recipe

Capture = pytest.CaptureFixture[str]

EXPERTS = """    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    layers = [Experts(), nn.BatchNorm1d(WIDTH)]
"""


def output_of(capture: Capture, name: str, *arguments: str | Path) -> str:
    command = typer.main.get_command(command_app(name))
    command.main([*map(str, arguments)], standalone_mode=False)
    return capture.readouterr().out


def advice(capture: Capture, recipe: Path, *arguments: str) -> dict[str, object]:
    return json.loads(output_of(capture, "advise", recipe, *arguments, "--json"))  # type: ignore[no-any-return]


def verdicts(found: dict[str, object]) -> dict[str, dict[str, object]]:
    return {verdict["rule"]: verdict for verdict in found["verdicts"]}  # type: ignore[attr-defined]


def test_a_small_model_needs_no_pipeline(tmp_path: Path, capsys: Capture) -> None:
    found = advice(capsys, write_recipe(tmp_path), "--device", "h100", "--devices", "8")
    assert found["choice"] == "one device"
    assert "too small for several; on pp=2,dp_replicate=2,dp_shard=2" in str(found["reason"])
    assert found["options"] == ["--devices", "1"]
    by_rule = verdicts(found)
    assert by_rule["four microbatches per stage"]["numbers"]["batch_size"] == 8  # type: ignore[index]
    assert not by_rule["communication is cheap"]["ok"]


def test_little_memory_makes_a_pipeline_or_tensor_parallelism(
    tmp_path: Path, capsys: Capture
) -> None:
    recipe = write_recipe(tmp_path)
    # A cell: 288 bytes of parameters, with gradients and AdamW's two moments 1152.
    pipeline = advice(
        capsys, recipe, "--device-memory", "0.003MB", "--devices", "4", "--device", "cpu"
    )
    assert pipeline["choice"] == "pipeline of sharded stages"
    plan = ("--device", "cpu", "--devices", "4", "--mesh", "auto", "--memory", "0.003MB")
    searched = json.loads(output_of(capsys, "plan", recipe, *plan, "--json"))
    assert pipeline["options"][:2] == ["--mesh", searched["mesh"]]  # type: ignore[index]
    assert pipeline["options"][4:6] == ["--microbatches", str(searched["num_microbatches"])]  # type: ignore[index]
    too_big = advice(
        capsys, recipe, "--device-memory", "0.001MB", "--devices", "4", "--device", "cpu"
    )
    assert too_big["choice"] == "tensor parallelism"
    numbers = verdicts(too_big)["every cell fits a device"]["numbers"]
    assert 1152 < numbers["needed_bytes"] < 1152 + 4 * 8 * 10  # type: ignore[index]


def test_experts_and_batchnorm_are_seen(tmp_path: Path, capsys: Capture) -> None:
    block = "nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2))"
    layers = f"    layers = [{block} for _ in range(3)]\n"
    recipe = write_recipe(tmp_path, (layers, EXPERTS))
    found = advice(
        capsys, recipe, "--device-memory", "0.002MB", "--device", "cpu", "--microbatches", "2"
    )
    assert found["choice"] == "expert parallelism"
    by_rule = verdicts(found)
    assert by_rule["every cell fits a device"]["numbers"]["num_experts"] == 4  # type: ignore[index]
    assert not by_rule["BatchNorm sees enough samples"]["ok"]


def test_without_a_device_costs_are_measured_here(tmp_path: Path, capsys: Capture) -> None:
    out = output_of(capsys, "advise", write_recipe(tmp_path))
    assert "costs measured here" in out
    assert "data parallelism: the whole model needs" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--device", "abacus"), "no device 'abacus'; known devices are"),
        (("--efficiency", "0.4"), "--efficiency needs --device"),
        (("--device-memory", "16"), "--device-memory is '16'"),
        (("--device", "h100", "--device-file", "absent.toml"), "absent.toml cannot be read"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: Capture, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        output_of(capsys, "advise", write_recipe(tmp_path), *arguments)
    assert message in str(caught.value)


HUGE = """
import torch
from torch import nn

def model():
    return nn.Sequential(*(nn.Linear(65536, 65536) for _ in range(40)))  # 172 billion parameters

def data(split):
    return [(torch.empty(0).expand(0), None)] if split != "train" else [
        (torch.ones(1).expand(256, 65536), torch.ones(1).expand(256, 65536))
    ]

def loss(output, target):
    return nn.functional.mse_loss(output, target)

def optimizer(parameters):
    return torch.optim.AdamW(parameters)
"""


def test_a_plan_for_devices_that_one_does_not_have(tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "huge.py"
    recipe.write_text(HUGE)
    own = tmp_path / "mine.toml"
    own.write_text(
        '[devices.mine]\nmemory = "800 GB"\nmemory_bandwidth = "3 TB/s"\n'
        'flops = { float32 = "100 TFLOP/s" }\ndevices_per_node = 8\n'
        'intra_node = { bandwidth = "400 GB/s", latency = "10 us" }\n'
        'inter_node = { bandwidth = "50 GB/s", latency = "10 us" }\n'
    )
    predicted = {}
    for efficiency in ("1", "0.5"):
        out = output_of(
            *(capsys, "plan", recipe, "--device", "mine", "--device-file", own),
            *("--devices", "20", "--microbatches", "8", "--efficiency", efficiency, "--json"),
        )
        found = json.loads(out)
        assert found["balance"] == [2] * 20
        assert found["predicted"]["parameter_bytes"] == [2 * 4 * 65536 * 65537] * 20
        predicted[efficiency] = found["predicted"]["step_seconds"]
    # A microbatch of 32 samples reads a weight longer than it multiplies, at either efficiency.
    product = 2 * 32 * 65536**2
    assert product / 50e12 < 4 * 65536**2 / (0.9 * 3e12)
    assert predicted["1"] == predicted["0.5"]


@pytest.mark.parametrize(
    ("width", "memory", "words"),
    [
        (4096, None, "train RECIPE --mesh pp=4,dp_shard=2 "),
        (512, "1 MB", "train RECIPE --devices 8 --pipeline"),
    ],
)
def test_advice_ends_in_a_command(
    tmp_path: Path, capsys: Capture, width: int, memory: str | None, words: str
) -> None:
    recipe = write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = {width}"))
    given = [] if memory is None else ["--device-memory", memory]
    arguments = ("advise", recipe, "--device", "h100", "--devices", "8", *given)
    said = output_of(capsys, *arguments).splitlines()  # type: ignore[arg-type]
    assert said[-1].startswith("next: stagewise " + words.replace("RECIPE", str(recipe)))
    assert said[-2].startswith("to compare: FSDP (ZeRO-3) over 8 devices")
    assert said[0].split(":")[0] in ("pipeline of sharded stages", "tensor parallelism")
