"""Meshes of a recipe with axes of its own: priced by what `parallelize` does, and searched."""

import json
from pathlib import Path

import pytest
import typer.main

from stagewise.cli.main import command_app
from stagewise.errors import StagewiseError
from stagewise.mesh import MeshShape
from stagewise.planning.devices import DeviceSpec, device_named, load_devices
from stagewise.planning.meshes.mesh_cost import EXCHANGE, INSIDE, MeshCost
from stagewise.planning.request import PlanRequest
from stagewise.training.pricing.mesh_plans import priced_mesh
from stagewise.training.recipe import Recipe, load_recipe
from tests.recipes import write_recipe

Capture = pytest.CaptureFixture[str]

OWN = """
import torch
from torch import nn
from benchmarks.mesh import inner, subjects

MODEL, SAMPLES = "decoder", 16

def model():
    return subjects.MODELS[MODEL]()

def data(split):
    batch = torch.zeros(SAMPLES, subjects.LENGTH, dtype=torch.long)
    return [(batch, batch)]

def loss(output, target):
    return nn.functional.cross_entropy(output, target)

def optimizer(parameters):
    return torch.optim.AdamW(parameters)

def parallelize(module, mesh, index):
    names = mesh.mesh_dim_names
    if "tp" in names:
        inner.split(module, mesh, index)
    if "heads" in names or "ring" in names:
        inner.in_sequence(module, mesh, index)
    if "ep" in names:
        inner.shared_experts(module, mesh, index)
    if "dp_shard" in names:
        inner.sharded(module, mesh, index)

data_axes = {"heads": 1, "ring": 1, "ep": 0}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


H100 = device_named("h100", load_devices())


def priced(recipe: Recipe, mesh: str, device: DeviceSpec = H100) -> MeshCost:
    request = PlanRequest(num_devices=1, num_microbatches=2)
    return priced_mesh(recipe, request, device, MeshShape.of(mesh)).chosen


def test_tensor_parallelism_divides_matrices_and_exchanges_inside_cells(own: Path) -> None:
    recipe = load_recipe(own)
    whole, split = priced(recipe, "pp=1"), priced(recipe, "pp=1,tp=2")
    assert 0.5 < split.parameter_bytes[0] / whole.parameter_bytes[0] < 0.6
    assert whole.parts[INSIDE] == 0 < split.parts[INSIDE] and split.parts[EXCHANGE] == 0
    # Of each block and microbatch an all-reduce after attention and one after the wide layer; in
    # the backward one before each of query, key, value and the wide layer. Each is a ring of two.
    messages = split.plan.num_microbatches * 6 * (2 + 4) * 2
    assert split.parts[INSIDE] == pytest.approx(messages * H100.link(2).transfer_seconds(2048))
    assert sum(split.parts.values()) == pytest.approx(split.step_seconds)


def test_links_between_hosts_are_dearer(own: Path) -> None:
    recipe = load_recipe(own)
    within, beyond = (
        priced(recipe, mesh) for mesh in ("pp=1,dp_replicate=8,tp=2", "pp=1,tp=2,dp_replicate=8")
    )
    assert beyond.parts[INSIDE] > within.parts[INSIDE] > 0


def test_sequences_and_experts_are_parts_of_the_batch(own: Path) -> None:
    recipe = load_recipe(own)
    whole, part = priced(recipe, "pp=1"), priced(recipe, "pp=1,heads=2")
    assert part.parameter_bytes == whole.parameter_bytes
    assert part.parts[INSIDE] > 0 and part.parts[EXCHANGE] > 0  # gradients are summed over it
    assert part.plan.peak_activation_bytes[0] < 0.75 * whole.plan.peak_activation_bytes[0]
    own.write_text(OWN.replace('"decoder"', '"moe"'))
    recipe = load_recipe(own)
    whole, part = priced(recipe, "pp=1,dp_replicate=2"), priced(recipe, "pp=1,ep=2")
    assert part.parameter_bytes[0] < whole.parameter_bytes[0]
    assert part.parts[EXCHANGE] < whole.parts[EXCHANGE]  # each has experts of its own
    assert part.parts[INSIDE] > whole.parts[INSIDE] == 0


@pytest.mark.parametrize(
    ("model", "mesh", "told"),
    [
        ("decoder", "pp=1,tp=3", "ranks along 'tp' cannot share its dimension"),
        ("decoder", "pp=1,heads=8", "cannot be divided by heads over 8 ranks"),
        ("decoder", "pp=1,ring=3", "cannot be divided into 3 equal parts along dimension 1"),
        ("moe", "pp=1,ep=3", "experts cannot be divided over 3 ranks"),
    ],
)
def test_what_does_not_divide_is_refused(own: Path, model: str, mesh: str, told: str) -> None:
    own.write_text(OWN.replace('"decoder"', f'"{model}"'))
    with pytest.raises(StagewiseError, match=told):
        priced(load_recipe(own), mesh)


def output_of(capture: Capture, name: str, *arguments: str | Path) -> dict[str, object]:
    command = typer.main.get_command(command_app(name))
    command.main([*map(str, arguments), "--json"], standalone_mode=False)
    found: dict[str, object] = json.loads(capture.readouterr().out)
    return found


LINKS = {"fast": ("400 GB/s", "50 GB/s"), "slow": ("1 GB/s", "0.01 GB/s")}
DEVICES = """[devices.cpu]
memory = "{memory}"
memory_bandwidth = "3 TB/s"
flops = {{ float32 = "1 TFLOP/s" }}
devices_per_node = 4
intra_node = {{ bandwidth = "{within}", latency = "1 us" }}
inter_node = {{ bandwidth = "{between}", latency = "10 us" }}
"""


@pytest.mark.parametrize(
    ("width", "devices", "memory", "link"),
    [
        (8, 2, "80 GB", "fast"),
        (512, 4, "80 GB", "slow"),
        (512, 8, "80 GB", "fast"),
        (512, 4, "9 MB", "slow"),
        (512, 8, "12 MB", "fast"),
        (512, 6, "5.5 MB", "slow"),
    ],
)
def test_advice_is_what_the_search_finds(
    tmp_path: Path, capsys: Capture, width: int, devices: int, memory: str, link: str
) -> None:
    """Whether or not the model fits one device, unless that is faster: then it is advised."""
    within, between = LINKS[link]
    (file := tmp_path / "mine.toml").write_text(
        DEVICES.format(memory=memory, within=within, between=between)
    )
    on = ("--device", "cpu", "--device-file", file, "--devices", str(devices))
    recipe = write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = {width}"))
    advice = output_of(capsys, "advise", recipe, *on)
    planned = output_of(capsys, "plan", recipe, *on, "--mesh", "auto")
    mesh = [
        *("--mesh", planned["mesh"], "--schedule", planned["schedule"]),
        *("--microbatches", str(planned["num_microbatches"])),
        *(["--recompute", planned["recompute"]] if planned["recompute"] != "never" else []),
    ]
    assert advice["options"] == (["--devices", "1"] if width == 8 else mesh)
    assert f"on {planned['mesh']} a step takes" in str(advice["reason"])
    assert str(planned["why"]) in str(advice["reason"])


def test_a_search_is_over_the_axes_that_the_recipe_uses(own: Path, capsys: Capture) -> None:
    own.write_text(OWN.replace("data_axes = {", "axes = {"))
    arguments = ("--device", "h100", "--devices", "2", "--mesh", "auto", "--microbatches", "2")
    found = output_of(capsys, "plan", own, *arguments)
    others = [other["mesh"] for other in found["others"]]  # type: ignore[attr-defined]
    every = {"pp=2", "pp=1,dp_replicate=2", "pp=1,dp_shard=2", "pp=1,tp=2"}
    assert {found["mesh"], *others} == every
