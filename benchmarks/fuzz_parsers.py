"""What `benchmarks.fuzz` tries: the parsers of what comes from files, with valid examples."""

import ast
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as save_safetensors

from benchmarks.fuzz_words import COMMANDS, TOML, recordings, report, toml, words
from stagewise.checkpoints.sources import open_source
from stagewise.cli.typed import Typed, named_or_read
from stagewise.costs import CellCost, LinkCost
from stagewise.errors import CheckpointError
from stagewise.planning import plan_from_costs
from stagewise.planning.devices import load_devices, with_efficiency
from stagewise.planning.plan import Plan
from stagewise.schedule import named_schedule
from stagewise.training.metrics.progress import LOG_FILE, lines_until
from stagewise.training.recipe import load_recipe
from stagewise.training.run_folder import DESCRIPTION, find_undamaged, folder_of, signed
from stagewise.training.workers.elastic import Interrupted


@dataclass(frozen=True)
class Parser:
    """Valid examples, and what reads an input; a StagewiseError is the right refusal."""

    examples: Callable[[], tuple[bytes, ...]]
    parse: Callable[[bytes, Path], object]


def _plans() -> tuple[bytes, ...]:
    link = LinkCost(latency_seconds=1e-5, seconds_per_byte=1e-9)
    cells = [
        CellCost(
            name=str(index),
            forward_seconds=1.0,
            backward_seconds=2.0,
            parameter_bytes=8,
            activation_bytes=16,
            output_bytes=4,
            gradient_bytes=4,
        )
        for index in range(6)
    ]
    plans = (
        plan_from_costs(cells, num_devices=2, num_microbatches=4, link=link),
        plan_from_costs(cells, num_devices=2, num_microbatches=4, schedule="interleaved"),
        plan_from_costs(cells, num_microbatches=4, schedule=named_schedule("gpipe", 2, 4)),
        Plan(balance=(3, 3), schedule="1f1b", num_microbatches=4, replicas=(1, 2)),
    )
    return tuple(plan.to_json().encode() for plan in plans)


def _plan(text: bytes, folder: Path) -> object:
    plan = Plan.from_json(text.decode("utf-8", errors="replace"))
    return plan.to_json(), plan.timeline.duration_seconds if plan.cells else None


def _schedules() -> tuple[bytes, ...]:
    names = "gpipe", "1f1b", "interleaved", "zb_v"
    return tuple(str(named_schedule(name, 2, 4)).encode() for name in names)


def _schedule(text: bytes, folder: Path) -> object:
    (folder / "own.txt").write_bytes(text)
    return named_or_read(str(folder / "own.txt"))


_DEVICE = b"""
[efficiency]
compute = 0.5
memory = 0.9
[devices.mine]
memory = "16 GB"
memory_bandwidth = "732 GB/s"
devices_per_node = 8
source = "a data sheet"
[devices.mine.flops]
float32 = "9.3 TFLOP/s"
float16 = "18.7 TFLOP/s"
[devices.mine.intra_node]
bandwidth = "20 GB/s"
latency = "9 us"
[devices.mine.inter_node]
bandwidth = "1 GB/s"
latency = "20 us"
"""


def _device(text: bytes, folder: Path) -> object:
    (folder / "devices.toml").write_bytes(text)
    return [device.link(2) for device in load_devices([folder / "devices.toml"]).values()]


_OPTIONS = {
    "schedule": "1f1b",
    "recompute": "never",
    "stages": 2,
    "devices": 2,
    "replicas": "1,1",
    "microbatches": "8",
    "balance": "3,3",
    "efficiency": "compute=0.4,memory=0.8,link=0.9",
}


def _options() -> tuple[bytes, ...]:
    searched = {"schedule": "auto", "devices": 2, "microbatches": "4,8", "memory": "16GB,8GiB"}
    searched |= {"speeds": "1,0.5"}
    return tuple(json.dumps(each).encode() for each in (_OPTIONS, searched))


def _config(text: bytes, folder: Path) -> object:
    try:
        given = json.loads(text)
        words = {
            name: given[name] for name in (_OPTIONS.keys() | {"memory", "speeds"}) & given.keys()
        }
        efficiency = str(words.pop("efficiency", "0.5"))
        typed = {name: str(value) for name, value in words.items() if value is not None}
        numbers = {name: int(typed.pop(name) or 1) for name in ("stages", "devices") & typed.keys()}
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return None  # what typer refuses before
    with_efficiency(load_devices()["h100"], efficiency)
    return Typed(**{"schedule": "1f1b", **typed, **numbers}).request()  # type: ignore[arg-type]


_RECIPE = b"""clip_grad_norm = 1.0
clip_grad_value = 2
accumulate = 2
grad_scaler = {"init_scale": 1024.0}
accumulate_in_float32 = True
find_nonfinite = False
compare_batches = True
batch_dim = 0
loss_reduction = "mean"
meta = False
cells = ["embed", "layers.*"]
"""
_FUNCTIONS = b"\n".join(
    b"def %s: pass" % form for form in (b"model()", b"data(split)", b"loss(o, t)", b"optimizer(p)")
)


def _recipe(text: bytes, folder: Path) -> object:
    """Only values change: a recipe is the user's program, and runs as it is."""
    values = []
    for line in text.decode("utf-8", errors="replace").splitlines():
        name, _, value = line.partition(" = ")
        try:
            values.append(f"{name.strip()} = {ast.literal_eval(value)!r}")
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            values.append(f"{name.strip()} = {value!r}")
    known = [v for v in values if v.partition(" = ")[0].encode() in _RECIPE and v[:1].isalpha()]
    (folder / "own.py").write_bytes(_FUNCTIONS + b"\n" + "\n".join(known).encode(errors="replace"))
    return load_recipe(folder / "own.py")


@cache
def _written() -> dict[str, bytes]:
    """Return the files of a small torch.distributed.checkpoint."""
    tensors = {"model": {"weight": torch.ones(3, 4), "bias": torch.zeros(4)}, "step": 3}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _description() -> dict[str, object]:
    return {
        "step": 5,
        "seed": 0,
        "parameter_shapes": {"weight": [3, 4], "bias": [4]},
        "scaler": {"scale": 1024.0, "_growth_tracker": 3},
        "finite": True,
        "validation_loss": 0.5,
        "files": {},
    }


def _descriptions() -> tuple[bytes, ...]:
    return tuple(json.dumps(fields).encode() for fields in (_description(), signed(_description())))


def _described(text: bytes, folder: Path) -> object:
    path = folder_of(folder / "run", 5)
    path.mkdir(parents=True, exist_ok=True)
    (path / DESCRIPTION).write_bytes(text)
    for other in path.parent.iterdir():
        if other != path:
            (other / DESCRIPTION).unlink(missing_ok=True)
            other.rmdir()
    return find_undamaged(folder / "run")


def _index(text: bytes, folder: Path) -> object:
    return _opened(folder, {**_written(), ".metadata": text})


def _shard(text: bytes, folder: Path) -> object:
    (name,) = (name for name in _written() if name != ".metadata")
    return _opened(folder, {**_written(), name: text})


def _opened(folder: Path, files: dict[str, bytes]) -> object:
    path = folder / "state"
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    source = open_source(path, ("weight", "bias"))
    forms = source.forms(source.names)
    small = {n: form for n, form in forms.items() if form.dtype is not None and form.shape == (4,)}
    targets = {name: torch.empty(form.shape, dtype=form.dtype) for name, form in small.items()}
    source.read(targets)
    return targets


def _weight_maps() -> tuple[bytes, ...]:
    return (
        json.dumps(
            {"metadata": {"total_size": 16}, "weight_map": {"bias": "a.safetensors"}}
        ).encode(),
    )


@cache
def _tensors() -> bytes:
    return save_safetensors({"bias": torch.zeros(4), "weight": torch.ones(3, 4)})


def _weight_map(text: bytes, folder: Path) -> object:
    return _opened_tensors(folder, text, _tensors())


def _safetensors(text: bytes, folder: Path) -> object:
    return _opened_tensors(folder, _weight_maps()[0], text)


def _opened_tensors(folder: Path, index: bytes, tensors: bytes) -> object:
    path = folder / "tensors"
    path.mkdir(exist_ok=True)
    (path / "model.safetensors.index.json").write_bytes(index)
    (path / "a.safetensors").write_bytes(tensors)
    source = open_source(path, ("bias",))
    if "bias" not in source.names:
        raise CheckpointError("no bias")
    if source.forms(("bias",))["bias"].shape == (4,):
        source.read({"bias": torch.empty(4)})
    return source


def _logs() -> tuple[bytes, ...]:
    lines = [
        {"step": 1, "loss": 0.5, "seconds": 0.01, "samples_per_second": 10.0},
        {"step": 1, "validation_loss": 0.5, "metrics": {}},
        {"step": 2, "change": "8 microbatches", "reason": "faster", "predicted_gain": 0.1},
    ]
    return ("".join(json.dumps(line) + "\n" for line in lines).encode(),)


def _log(text: bytes, folder: Path) -> object:
    (folder / LOG_FILE).write_bytes(text)
    return lines_until(folder / LOG_FILE, 2), Interrupted.of(folder / LOG_FILE, 1)


PARSERS: dict[str, Parser] = {
    "plan": Parser(_plans, _plan),
    "schedule": Parser(_schedules, _schedule),
    "devices": Parser(lambda: (_DEVICE,), _device),
    "options": Parser(_options, _config),
    "recipe values": Parser(lambda: (_RECIPE,), _recipe),
    "checkpoint": Parser(_descriptions, _described),
    "metadata": Parser(lambda: (_written()[".metadata"],), _index),
    "shard": Parser(
        lambda: tuple(content for name, content in _written().items() if name != ".metadata"),
        _shard,
    ),
    "weight map": Parser(_weight_maps, _weight_map),
    "safetensors": Parser(lambda: (_tensors(),), _safetensors),
    "log": Parser(_logs, _log),
    "TOML beside a recipe": Parser(lambda: TOML, toml),
    "command line": Parser(lambda: COMMANDS, words),
    "recording": Parser(recordings, report),
}
