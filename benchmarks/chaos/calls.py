"""One rank makes another call than the rest: all are told, and the repeated step is exact."""

import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.loop import WEIGHTS
from benchmarks.chaos.processes import Ended, run
from benchmarks.chaos.strike import CHAOS
from benchmarks.chaos.trial import (
    LIMIT_SECONDS,
    NUM_STEPS,
    Layout,
    Outcome,
    Place,
    Weights,
    difference,
)

_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def try_call(fault: Fault, layout: Layout, place: Place) -> Outcome:
    """Train with the other call, and compare with the run without it."""
    told = json.dumps({"place": "call", "how": fault.how, "rank": place.rank, "step": place.step})
    expected = _undisturbed(layout)
    with TemporaryDirectory() as directory:
        ended = _train(layout, Path(directory), {CHAOS: told})
        far = difference(_weights(directory), expected) if ended.code == 0 else float("inf")
        every = [f"rank {rank} was told: " for rank in range(layout.num_ranks)]
        named = all(word in ended.text for word in (*every, *fault.words))
        return Outcome(
            fault=fault.name,
            layout=layout.name,
            ranks=layout.num_ranks,
            struck=f"rank {place.rank}, step {place.step}",
            named=named,
            seconds=0.0,
            resumed=ended.code == 0,
            difference=far,
            left_behind=ended.left,
            text="" if named and not far and not ended.left else ended.text,
        )


@cache
def _undisturbed(layout: Layout) -> Weights:
    with TemporaryDirectory() as directory:
        ended = _train(layout, Path(directory), {})
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed loop of {layout.name} failed:\n{ended.text}")
        return _weights(directory)


def _train(layout: Layout, folder: Path, environment: Mapping[str, str]) -> Ended:
    (folder / "plan.json").write_text(layout.plan)
    command = [*_TORCHRUN, str(layout.num_ranks), "-m", "benchmarks.chaos.loop"]
    steps = {"CHAOS_STEPS": str(NUM_STEPS)}
    return run(command, folder, {**steps, **environment}, LIMIT_SECONDS)


def _weights(folder: str) -> Weights:
    shards = map(load_file, Path(folder, WEIGHTS).glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in shard.items()}
