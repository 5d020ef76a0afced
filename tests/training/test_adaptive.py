"""Microbatches that change in a run: what is lost (nothing), and what is told."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stagewise.cli.options import parsed_microbatches
from stagewise.errors import OutOfMemoryError, PlanError
from stagewise.training import checkpoint as checkpoints
from stagewise.training.prepare import PlanOptions, TrainOptions
from stagewise.training.recipe import load_recipe
from stagewise.training.stop import StopRequest
from stagewise.training.trainer import train
from tests.harness import Pools
from tests.recipes import write_recipe

GREEDY = '''WIDTH = 8

class Greedy(nn.Module):
    """Has memory for LARGEST samples only, from the third batch on."""

    def forward(self, x):
        if self.training and len(x) > LARGEST and x[0, 0] >= 2:
            raise torch.OutOfMemoryError("none left, says the test")
        return x
'''


def greedy(directory: Path, largest: int) -> Path:
    """A recipe with a Greedy cell; each batch tells by its first column which one it is."""
    return write_recipe(
        directory,
        ("WIDTH = 8\n", GREEDY.replace("LARGEST", str(largest))),
        ("nn.Sequential(*layers,", "nn.Sequential(Greedy(), *layers,"),
        ("for _ in range(6):", "for index in range(6):"),
        ("yield inputs,", "inputs[:, 0] = index\n            yield inputs,"),
        name=f"greedy_{largest}.py",
    )


def run(recipe: Path, out: Path, *, steps: int = 4, resume: Path | None = None, **plan: Any) -> str:
    options = TrainOptions(
        plan=PlanOptions(**{"num_stages": 2, "num_microbatches": 4, "balance": (4, 7), **plan}),
        run=out,
        num_steps=steps,
        validate_every=5,
        resume=checkpoints.find(resume) if resume else None,
    )
    console = Console(file=io.StringIO(), width=300)
    train(load_recipe(recipe), options, console=console, stop=StopRequest())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def changes(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "change" in record]


def test_out_of_memory_raises_the_number_of_microbatches_and_loses_nothing(tmp_path: Path) -> None:
    ample, scarce = greedy(tmp_path, 100), greedy(tmp_path, 1)
    run(ample, tmp_path / "before", steps=2)
    run(ample, tmp_path / "after", steps=6, resume=tmp_path / "before", num_microbatches=8)
    shown = run(scarce, tmp_path / "run", steps=6, adaptive=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "before") + losses(tmp_path / "after")
    (change,) = changes(tmp_path / "run")
    assert change["step"] == 3 and change["change"].startswith("8 microbatches in place of 4")
    assert "rank 0 ran out of memory" in change["reason"] and "stage 0" in change["reason"]
    assert "step 3: 8 microbatches in place of 4: at most 25% of the batch is in flight" in shown


def test_recomputation_where_more_microbatches_are_no_help(tmp_path: Path) -> None:
    recipe = greedy(tmp_path, 1)
    with pytest.raises(OutOfMemoryError, match="with 8 microbatches and recompute='always'"):
        run(greedy(tmp_path, 0), tmp_path / "hopeless", steps=6, adaptive=True)
    told = [change["change"].split(" ")[0] for change in changes(tmp_path / "hopeless")]
    assert told == ["8", "recomputation:"]
    with pytest.raises(OutOfMemoryError, match="train with more microbatches"):
        run(recipe, tmp_path / "fixed", steps=6)  # not asked to adapt
    assert not changes(tmp_path / "fixed")


def test_two_workers_out_of_memory(tmp_path: Path, pools: Pools) -> None:
    """The first one has no memory; both change, and lose nothing."""
    ample, scarce = greedy(tmp_path, 100), greedy(tmp_path, 1)
    split = partial(run, schedule="gpipe")
    split(ample, tmp_path / "before", steps=2)
    rest = {"resume": tmp_path / "before", "num_microbatches": 8, "recompute": "always"}
    split(ample, tmp_path / "after", steps=4, **rest)
    pools[2].run(partial(split, adaptive=True), scarce, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "before") + losses(tmp_path / "after")
    told = [change["change"].split(" ")[0] for change in changes(tmp_path / "run")]
    assert told == ["recomputation:", "8"], "GPipe's microbatches are all in flight"


def test_options(tmp_path: Path) -> None:
    assert parsed_microbatches("auto", "1f1b") == (None, True)
    assert parsed_microbatches("6", "1f1b") == (6, False)
    assert parsed_microbatches(None, "mine.txt") == (None, False)
    for text, schedule, problem in [
        ("0", "1f1b", "'0' is no number from 1"),
        ("many", "1f1b", "give one, or auto"),
        ("auto", "mine.txt", "mine.txt is a file for one"),
    ]:
        with pytest.raises(PlanError, match=problem):
            parsed_microbatches(text, schedule)
