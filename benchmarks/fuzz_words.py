"""What `benchmarks.fuzz` tries besides: command lines, TOML beside a recipe, and recordings."""

import contextlib
import io
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import typer

from stagewise.cli.config_file import _options_of, _read
from stagewise.cli.main import command_app
from stagewise.cli.train.train_command import train
from stagewise.cli.train.train_options import AskedMesh
from stagewise.cli.train.wanted import wanted_of
from stagewise.cli.typed import Typed
from stagewise.costs import CellCost, LinkCost
from stagewise.errors import UsageError
from stagewise.planning import plan_from_costs, simulate
from stagewise.recording import (
    Clock,
    Phase,
    Recorder,
    Recording,
    StageMemory,
    read_run,
    recording_to_json,
    step_of,
)
from stagewise.report.chrome_trace import chrome_trace
from stagewise.report.run_report import RunReport

TOML = (
    b"""stages = 2
microbatches = 8
schedule = "1f1b"
recompute = "never"
balance = [3, 3]
steps = 10
seed = 0
out = "runs/mine"
log = "tensorboard"
validate-every = 100
dashboard = false
""",
    b"""devices = 4
pipeline = 2
shard = 2
microbatches = "auto"
memory = ["16GB", "8GiB"]
""",
    b"""devices = "cuda:0,cuda:1"
speeds = [1, 0.5]
mesh = {pp = 2, dp_shard = 2}
replicas = [1, 2]
""",
)
COMMANDS = (
    b"train own.py --stages 2 --microbatches 8 --speeds 1,0.5 --memory 16GB,8GiB --steps 3",
    b"train own.py --devices cuda:0,cpu --schedule interleaved --recompute except_last",
    b"train own.py --mesh pp=2,dp_shard=2,tp=2 --microbatches 4 --timeout 60 --keep 2",
    b"train own.py --devices 8 --pipeline 2 --shard 2 --tensor 2 --restarts 1 --replace-lost 1",
    b"plan own.py --devices 4 --schedule auto --microbatches 4,8 --memory 8e9 --speeds measured",
    b"generate runs/mine 'To be' --max-new-tokens 40 --temperature 0.7 --top-k 5 --top-p 0.9",
    b"generate runs/mine Once --sample --seed 3 --devices 2",
    b"simulate --schedule zb_v --devices 4 --microbatches 8",
)
_PLANNING = frozenset(Typed.__dataclass_fields__)
_MESH = ("mesh", "pipeline", "shard", "tensor")


def toml(text: bytes, folder: Path) -> object:
    """Read the options that `stagewise train` takes from a file, and make a request of them."""
    (folder / "own.toml").write_bytes(text)
    return _wanted(_read(folder / "own.toml", _options_of(train)))


def words(text: bytes, folder: Path) -> object:
    """Parse a command line, and make a request of it."""
    try:
        name, *arguments = shlex.split(text.decode(errors="replace"))
    except ValueError:
        return None  # what no shell would pass on
    if name not in ("train", "plan", "generate", "simulate"):
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            given = _command(name).make_context(name, arguments).params
    except (*typer.BadParameter.__mro__[:3], typer.Exit) as error:  # typer's own click
        raise UsageError(str(error)) from error
    return _wanted(given) if name in ("train", "plan") else given


@cache
def _command(name: str) -> Any:
    return typer.main.get_command(command_app(name))


def _wanted(given: dict[str, object]) -> object:
    """What `train` does with its options before it starts anything."""
    planning = {k: v for k, v in given.items() if k in _PLANNING and v is not None}
    mesh = {name: given.get(name) for name in _MESH}
    typed, asked = Typed(**planning), AskedMesh(**mesh)  # type: ignore[arg-type]
    return wanted_of(typed, None, asked)


@cache
def recordings() -> tuple[bytes, ...]:
    """Return predicted ones."""
    cells = [
        CellCost(name=name, forward_seconds=1, backward_seconds=2, output_bytes=3, gradient_bytes=3)
        for name in "abcd"
    ]
    plan = plan_from_costs(cells, num_devices=2, num_microbatches=3)
    recorder = Recorder()
    link = LinkCost(latency_seconds=1, overhead_seconds=1)
    simulate(plan.built_schedule, plan.engine_costs, link, recorder)
    recorder.ran.append((0, Phase.DATA, -2, 0, (1.5, 0.5)))
    memory = {"parameter_bytes": 1, "gradient_bytes": 2, "optimizer_bytes": 3}
    made = Recording(
        num_devices=2,
        clocks=(Clock(rank=0, host="here", device="cpu", offset_ns=-3, error_ns=4),),
        plans=(json.loads(plan.to_json()),),
        steps=(step_of([recorder], [0.0], step=7, num_devices=2, origin=-2),),
        memory=(StageMemory(stage=0, device=0, **memory, live=((0, 5), (9, 6), (12, 0))),),
        environment={"torch": "2"},
    )
    return (recording_to_json(made).encode(),)


def report(text: bytes, folder: Path) -> object:
    """Read a recording, and show all that there is to show of it."""
    (folder / "recording.json").write_bytes(text)
    run = read_run(folder / "recording.json")
    assert run.recording is not None
    shown = RunReport(run)
    return [*shown.shown(80)], shown.record(), chrome_trace(run.recording)
