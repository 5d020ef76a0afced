"""One fault: the run that it strikes, the run that goes on from there, and what they left."""

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.forked import forked
from benchmarks.chaos.processes import Ended, run
from benchmarks.chaos.strike import CHAOS
from stagewise import Plan
from stagewise.checkpoints.exporting import export_model
from stagewise.training.run_folder import find_undamaged

RECIPE = Path(__file__).parent / "recipe.py"
NUM_STEPS, CHECKPOINT_EVERY, NUM_MICROBATCHES = 8, 2, 4
LIMIT_SECONDS = 150.0
WHOLE = "step-*[0-9]"  # the folders of checkpoints that were written to their end
WATCHDOG_SECONDS, PATIENT_SECONDS = 10, 60  # for faults that only the watchdog tells; for others
ROUNDING = 1e-12  # of parameters, where other ranks have added up gradients
Weights = Mapping[str, torch.Tensor]
# Runs `stagewise WORDS` on so many ranks, in a folder, with more environment variables.
Start = Callable[[list[str], int, Path, Mapping[str, str]], Ended]


def by_command(
    words: list[str], num_ranks: int, folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Start the command line as a user does; it starts the workers."""
    command = [sys.executable, "-m", "stagewise", *words]
    return run(command, folder, environment, LIMIT_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the model is spread over ranks."""

    name: str
    balance: tuple[int, ...]
    replicas: tuple[int, ...] = ()
    num_shards: int = 1  # of every stage, over ranks side by side

    @property
    def num_ranks(self) -> int:
        return sum(self.replicas or (1,) * len(self.balance)) * self.num_shards

    def goes_on_without(self, rank: int) -> bool:
        """Whether the stage of `rank` has other replicas."""
        stages = [number for number in self.replicas for _ in range(number)]
        return bool(stages) and stages[rank] > 1

    @property
    def plan(self) -> str:
        return Plan(
            balance=self.balance,
            replicas=self.replicas,
            schedule="1f1b",
            num_microbatches=NUM_MICROBATCHES,
        ).to_json()


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(name="2 stages", balance=(2, 2)),
        Layout(name="4 stages", balance=(1, 1, 1, 1)),
        Layout(name="replicas 1,2", balance=(1, 3), replicas=(1, 2)),
        Layout(name="replicas 2,2", balance=(2, 2), replicas=(2, 2)),
        Layout(name="2 stages, each in 2 shards", balance=(2, 2), num_shards=2),
    )
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and when a fault strikes."""

    rank: int
    step: int
    passed: int  # at which pass in that step
    after: float  # seconds, of faults that strike a little later

    @staticmethod
    def drawn(fault: Fault, layout: Layout, draw: random.Random) -> "Place":
        """Draw a place of `fault`."""
        once = fault.place in ("data", "optimizer", "scheduler")
        ranks, last = layout.num_ranks, NUM_STEPS - 2 * (fault.how == "kill_soon")
        return Place(
            rank=ranks - 1 if fault.last_rank_only else draw.randrange(ranks),
            step=draw.randrange(3, last),
            passed=1 if once else draw.randrange(1, NUM_MICROBATCHES // 2 + 1),
            after=draw.uniform(0, 0.05),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One row of the table."""

    fault: str
    layout: str
    ranks: int
    struck: str
    named: bool
    seconds: float  # from the fault to the end of the last process
    resumed: bool
    difference: float  # largest, of any parameter, to the undisturbed run's
    left_behind: int  # processes and temporary files
    went_on: bool = False  # without the lost rank, in the same run
    text: str = ""  # the output, where something is not as it must be


def undisturbed(layout: Layout, start: Start = forked) -> Weights:
    """Return the parameters at the end of a run without faults."""
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        ended = train(start, layout, folder, {})
        if ended.code != 0:
            raise RuntimeError(f"the undisturbed run of {layout.name} failed:\n{ended.text}")
        return weights(folder)


def try_fault(
    fault: Fault, layout: Layout, place: Place, expected: Weights, start: Start = by_command
) -> Outcome:
    """Train with the fault, then go on from the last checkpoint if it has ended the run.

    What goes on has no other launcher than `forked`: that is faster, and bits must be the same.
    """
    goes_on = start is not forked and fault.kills and layout.goes_on_without(place.rank)
    ends = fault.ends and not goes_on
    with TemporaryDirectory() as directory:
        folder, mark = Path(directory), Path(directory, "mark")
        seconds = WATCHDOG_SECONDS if fault.hangs else PATIENT_SECONDS
        struck = train(start, layout, folder, {CHAOS: told(fault, place, mark)}, seconds)
        left = struck.left + files_left(folder)
        words = [word.format(rank=place.rank, step=place.step) for word in fault.words]
        words += [f"going on without rank {place.rank}"] if goes_on else []
        named = mark.exists() and all(word in struck.text for word in words)
        named &= struck.code is not None and (struck.code == 0) is not ends
        if not ends:
            going_on = struck
        elif (folder / f"run/checkpoints/step-{NUM_STEPS:08d}").exists():
            going_on = replace(struck, code=0)  # its last steps were faster than its end
        else:
            going_on = train(forked, layout, folder, {}, resume=True)
        far = difference(weights(folder), expected) if going_on.code == 0 else float("inf")
        left += (going_on.left + files_left(folder)) if ends else 0
        is_well = named and going_on.code == 0 and far <= ROUNDING * goes_on and not left
        return Outcome(
            fault=fault.name,
            layout=layout.name,
            ranks=layout.num_ranks,
            struck=f"rank {place.rank}, step {place.step}",
            named=named,
            seconds=_seconds(struck, mark, ends=ends, goes_on=goes_on),
            resumed=going_on.code == 0,
            difference=far,
            left_behind=left,
            went_on=goes_on,
            text="" if is_well else "\n".join(account(folder, struck, going_on)),
        )


def _seconds(struck: Ended, mark: Path, *, ends: bool, goes_on: bool) -> float:
    """Return how long it took until all processes had ended, or until the others went on."""
    if goes_on:
        told = re.search(r"([\d.]+) s passed without progress", struck.text)
        return float(told[1]) if told else float("nan")
    return struck.gone_at - float(mark.read_text()) if mark.exists() and ends else 0.0


def account(folder: Path, struck: Ended, going_on: Ended) -> Iterator[str]:
    """Yield what is needed to find out why something is not as it must be."""
    yield f"{struck.text}\n--- exit code {struck.code}; resumed: {going_on.code} ---"
    yield going_on.text
    yield f"--- left: {[str(path.relative_to(folder)) for path in (folder / 'tmp').rglob('*')]}"


def told(fault: Fault, place: Place, mark: Path) -> str:
    """Return what `strike` must know."""
    told = {
        "place": fault.place,
        "how": fault.how,
        "rank": place.rank,
        "step": place.step,
        "pass": place.passed,
        "after": place.after,
        "mark": str(mark),
    }
    return json.dumps(told)


def train(
    start: Start,
    layout: Layout,
    folder: Path,
    environment: Mapping[str, str],
    seconds: int = PATIENT_SECONDS,
    *,
    resume: bool = False,
    num_steps: int = NUM_STEPS,
) -> Ended:
    """Train to the end, or go on; from the start if there is no checkpoint yet."""
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(layout.plan)
    words = ["train", str(RECIPE), "--plan", str(plan), "--steps", str(num_steps)]
    words += ["--validate-every", "0", "--timeout", str(seconds)]
    words += ["--checkpoint-every", str(CHECKPOINT_EVERY), "--record", "0"]
    words += ["--shard", str(layout.num_shards)] if layout.num_shards > 1 else []
    if resume and not list((folder / "run/checkpoints").glob(WHOLE)):  # struck before the first
        shutil.rmtree(folder / "run", ignore_errors=True)
        resume = False
    words += ["--resume", "run"] if resume else ["--out", "run"]
    return start(words, layout.num_ranks, folder, {"TMPDIR": str(temporary), **environment})


def files_left(folder: Path) -> int:
    """Count temporary files, but for the empty cache of torch's compiler."""
    return sum(not path.name.startswith("torchinductor_") for path in (folder / "tmp").iterdir())


def weights(folder: Path) -> Weights:
    """Return the parameters after the last step."""
    checkpoint, _ = find_undamaged(folder / "run")
    if checkpoint.step != NUM_STEPS:
        raise RuntimeError(f"the last checkpoint is that of step {checkpoint.step}")
    out = folder / "weights.safetensors"
    export_model(checkpoint.path, out)
    return load_file(out)


def difference(found: Weights, expected: Weights) -> float:
    """Return the largest of any parameter."""
    if found.keys() != expected.keys():
        return float("inf")
    return max(float((found[name] - one).abs().max()) for name, one in expected.items())
