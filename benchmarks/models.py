"""Unmodified models of other libraries through the pipeline, beside themselves.

Every model of `benchmarks.unmodified` runs in a process forked for it: it is captured (or cut by
paths), planned for two stages, and compared with the plain model: loss and gradients with two and
four stages, another batch size, another length, evaluation, prediction, recomputation, two
processes, and names in order. `make test-models` runs this in an environment of its own and fails
if a row does; `--write docs/models.md` writes the table there, where rows of models that `--only`
leaves out stay.
"""

import copy
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import stagewise
from benchmarks.unmodified import ENTRIES, Batch, Entry
from stagewise.errors import BatchError
from stagewise.model.captured import captured_of

NUM_SAMPLES, OTHER_NUM_SAMPLES, NUM_MICROBATCHES, MANY_STAGES = 8, 6, 4, 4
# Relative errors by the dtype that the loss is computed in; transformers computes it in float32.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}
SECONDS = 120  # that two processes may take
COLUMNS = (
    *("model", "captured by", "cells", "M", "loss", "gradients", "names", "another batch"),
    *("another length", "evaluate", "predict", "recompute", "two processes", "passes", "CPU s"),
    "note",
)
TEXT = """# Unmodified models

Written by `make test-models` (`python -m benchmarks.models --write docs/models.md`), which makes an
environment of its own with the versions in `constraints-models.txt`. Tiny configurations with
random weights and no dropout, float64 but for what cannot run in it. Every model is captured from
an example of 8 samples and compared with itself, unpipelined: with two and four stages, 4
microbatches (M=1 where mathematics forbids them, for the reason given), other sizes than the
example's, in evaluation, prediction, with all forwards recomputed, and in two processes over gloo.

Numbers are differences: of losses and outputs in absolute terms, of gradients over the largest
gradient, the largest of two and four stages. `names` says whether parameters and state are the
model's, in its order; `refused` that a batch of another length was refused in words, and `-` that
the model has none. CPU seconds are of everything in the row: building, capturing, planning and all
comparisons.
"""


Wanted = tuple[float, dict[str, Tensor | None]]  # the plain model's loss and gradients


class Failed(Exception):
    """A comparison of a row."""


def inputs_of(batch: Batch) -> Batch:
    """Without the target."""
    return {name: value for name, value in batch.items() if name != "target"}


def plain_loss(model: nn.Module, entry: Entry, batch: Batch) -> Tensor:
    """The plain model's loss."""
    target = [batch["target"]] if "target" in batch else []
    return entry.loss(model(**inputs_of(batch)), *target)


def gradients_of(named: Any) -> dict[str, Tensor | None]:
    """Copies of the gradients, by name."""
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in named}


def difference(ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]) -> float:
    """The largest difference of `ours` over the largest gradient; one that lacks counts as zero."""
    scale = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    worst = 0.0
    for name, gradient in ours.items():
        pair = [g for g in (gradient, theirs[name]) if g is not None]
        apart = pair[0] - pair[1] if len(pair) == 2 else sum(pair, torch.zeros(1))
        worst = max(worst, float(apart.abs().max()) / scale)
    return worst


class Row:
    """One model's comparisons, in the order of the table."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        torch.manual_seed(0)
        self.plain = entry.build().to(entry.dtype).train()
        self.model = copy.deepcopy(self.plain)
        self.model.load_state_dict(self.plain.state_dict())
        self.batch = self.made(NUM_SAMPLES, entry.length)
        self.count = 1 if entry.whole_batch else NUM_MICROBATCHES
        self.cells: dict[str, object] = {}
        self.wanted: tuple[stagewise.Plan, Wanted] | None = None

    def made(self, num_samples: int, length: int | None) -> Batch:
        """A batch."""
        batch = self.entry.batch(num_samples, length)
        return {
            n: t.to(self.entry.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in batch.items()
        }

    def run(self) -> dict[str, object]:
        """The row; raises what a comparison raises."""
        entry = self.entry
        plan = self.planned()
        captured = captured_of(self.model)
        assert captured is not None
        num_cells = len(captured.chain)
        self.cells = {
            "captured by": "cells=" if entry.cells else "torch.export",
            "cells": num_cells,
            "M": self.count,
            "note": f"M=1: {entry.whole_batch}" if entry.whole_batch else entry.length_fixed,
        }
        pipes = [self.pipe(plan)]
        if num_cells > plan.num_stages:
            stages = min(MANY_STAGES, num_cells)
            pipes.append(self.pipe(dataclasses.replace(plan, **_evenly(num_cells, stages))))
        wanted = self.plain_step(self.batch)
        steps = [self.step(pipe, self.batch) for pipe in pipes]
        self.note("loss", max(abs(loss - wanted[0]) for loss, _ in steps), wanted[0])
        self.note("gradients", max(difference(found, wanted[1]) for _, found in steps), 1.0)
        self.names(pipes[-1])
        self.other_sizes(pipes[0])
        self.in_eval(pipes[-1])
        again = self.pipe(dataclasses.replace(plan, recompute="always"))
        loss, gradients = self.step(again, self.batch)
        self.note("recompute", max(abs(loss - wanted[0]), difference(gradients, wanted[1])), 1.0)
        self.wanted = plan, wanted
        return self.cells

    def planned(self) -> stagewise.Plan:
        """A plan for two stages, of which it is measured where to cut."""
        return stagewise.plan(
            self.model,
            kwargs=inputs_of(self.batch),
            target=self.batch.get("target"),
            loss=self.entry.loss,
            num_stages=2,
            num_microbatches=self.count,
            schedule="1f1b",
            seconds=0.05,
            cells=self.entry.cells,
        )

    def pipe(self, plan: stagewise.Plan, transport: str = "local") -> stagewise.Pipeline:
        """A pipeline; outputs that hold a loss are joined by their main tensor."""
        merge = None if "target" in self.batch else self.merged
        return stagewise.Pipeline(
            self.model,
            plan,
            loss=self.entry.loss,
            merge=merge,
            transport=transport,  # type: ignore[arg-type]
        )

    def merged(self, outputs: list[Any]) -> Tensor:
        """The microbatches' main tensors as one."""
        return torch.cat([self.entry.main(output) for output in outputs])

    def plain_step(self, batch: Batch) -> Wanted:
        """The plain model's loss and gradients; its buffers stay."""
        buffers = {name: buffer.clone() for name, buffer in self.plain.named_buffers()}
        self.plain.train().zero_grad()
        loss = plain_loss(self.plain, self.entry, batch)
        loss.backward()
        for name, buffer in self.plain.named_buffers():
            buffer.detach().copy_(buffers[name])
        return float(loss.detach()), gradients_of(self.plain.named_parameters())

    def step(self, pipe: stagewise.Pipeline, batch: Batch) -> Wanted:
        """The pipeline's; the model is put back afterwards."""
        pipe.zero_grad()
        loss = float(pipe.step(**batch))
        gradients = gradients_of(pipe.named_parameters())
        self.put_back(pipe)
        return loss, gradients

    def put_back(self, pipe: stagewise.Pipeline) -> None:
        """Running statistics have moved."""
        state = self.plain.state_dict()
        for name, buffer in pipe.module.named_buffers():
            if name in state:
                buffer.detach().copy_(state[name])

    def names(self, pipe: stagewise.Pipeline) -> None:
        """Parameters and state in the model's order."""
        same = [n for n, _ in pipe.named_parameters()] == [
            n for n, _ in self.plain.named_parameters()
        ] and list(pipe.state_dict()) == list(self.plain.state_dict())
        self.cells["names"] = "yes" if same else "no"
        if not same:
            raise Failed("names differ")

    def other_sizes(self, pipe: stagewise.Pipeline) -> None:
        """Another batch, and another length, which may be refused where that is known."""
        entry = self.entry
        batch = self.made(OTHER_NUM_SAMPLES, entry.length)
        wanted = self.plain_step(batch)[0]
        self.note("another batch", abs(self.step(pipe, batch)[0] - wanted), wanted)
        self.cells["another length"] = "-"
        if entry.length is None:
            return
        batch = self.made(NUM_SAMPLES, entry.other_length)
        wanted = self.plain_step(batch)[0]
        try:
            found = self.step(pipe, batch)[0]
        except BatchError:
            if not entry.length_fixed:
                raise
            self.cells["another length"] = "refused"
        else:
            self.note("another length", abs(found - wanted), wanted)

    def in_eval(self, pipe: stagewise.Pipeline) -> None:
        """Evaluation and prediction."""
        self.plain.eval()
        with torch.no_grad():
            wanted = float(plain_loss(self.plain, self.entry, self.batch))
            main = self.entry.main(self.plain(**inputs_of(self.batch)))
        found = float(pipe.evaluate(**self.batch))
        self.note("evaluate", abs(found - wanted), wanted)
        output = pipe.predict(**inputs_of(self.batch))
        ours = output if isinstance(output, Tensor) else self.entry.main(output)
        self.note("predict", float((ours - main).abs().max()), float(main.abs().max()))

    def in_a_process(self, plan: stagewise.Plan, wanted: Wanted) -> float:
        """One of two: how far this rank's loss and gradients are apart."""
        if self.entry.cells:
            stagewise.capture_cells(self.model, self.entry.cells, **inputs_of(self.batch))
        else:
            stagewise.capture(self.model, **inputs_of(self.batch))
        pipe = self.pipe(plan, "distributed")
        loss = float(pipe.step(**self.batch))
        own = gradients_of(pipe.named_parameters())
        return max(abs(loss - wanted[0]), difference(own, wanted[1]) if own else 0.0)

    def note(self, what: str, error: float, scale: float) -> None:
        """Put a difference into the row; raises Failed for one that is no round-off."""
        self.cells[what] = f"{error:.0e}" if error else "0"
        computed = plain_loss_dtype(self.entry)
        if not error <= ALLOWED[computed] * max(abs(scale), 1.0):
            raise Failed(f"{what} differs by {error:.1e}")


def plain_loss_dtype(entry: Entry) -> torch.dtype:
    """Transformers computes losses, norms and positions in float32, whatever the model's dtype."""
    return torch.float32 if entry.loss.__name__ == "inside" else entry.dtype


def _evenly(num_cells: int, num_stages: int) -> dict[str, Any]:
    """A balance without measurements."""
    each, more = divmod(num_cells, num_stages)
    return {"balance": tuple(each + (s < more) for s in range(num_stages)), "cells": ()}


def row_of(entry: Entry) -> dict[str, object]:
    """The table's row for one model.

    It is made in a process of its own; after it, the two that share the model are forked from this
    one, which has run no backward (autograd's threads outlive no fork). They find the capture on
    disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        here = Path(folder)
        _wait(_forked(_local, entry, here / "row"))
        row, wanted = _read(here / "row") or ({"passes": "no: it died"}, None)
        if wanted is not None:
            ranks = [_forked(_rank, entry, here / f"rank{r}", here, r, wanted) for r in range(2)]
            seconds = [_wait(child) for child in ranks]
            found = [_read(here / f"rank{rank}") or "it died" for rank in range(2)]
            failures = [each for each in found if isinstance(each, str)]
            worst = max((each for each in found if not isinstance(each, str)), default=0.0)
            row["two processes"] = f"{worst:.0e}" if worst else "0"
            row["CPU s"] += sum(seconds)
            if failures or not worst <= ALLOWED[plain_loss_dtype(entry)]:
                row["passes"] = f"no: two processes: {(failures or [worst])[0]}"
    seconds_text = {"CPU s": f"{row['CPU s']:.1f}"} if "CPU s" in row else {}
    return {"model": entry.name, **row, **seconds_text}


def _forked(run: Callable[..., object], entry: Entry, path: Path, *arguments: object) -> int:
    """A process that puts what `run` gives into a file; its number."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result: object
    try:
        result = run(entry, *arguments)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    torch.save(result, path)
    os._exit(0)


def _wait(child: int) -> float:
    """Until it ended; the CPU seconds that it took."""
    usage = os.wait4(child, 0)[2]
    return usage.ru_utime + usage.ru_stime


def _read(path: Path) -> Any:
    return torch.load(path, weights_only=False) if path.exists() else None


def _local(entry: Entry) -> tuple[dict[str, object], object]:
    """The comparisons in one process; and what those in two need."""
    cells: dict[str, object] = {}
    wanted = None
    try:
        row = Row(entry)
        cells = row.cells
        row.run()
        cells, wanted, passes = row.cells, row.wanted, "yes"
    except Exception as error:
        passes = f"no: {type(error).__name__}: {error}"
        if not isinstance(error, (Failed, stagewise.StagewiseError)):
            traceback.print_exc()
    times = os.times()
    return {**cells, "passes": passes, "CPU s": times.user + times.system}, wanted


def _rank(entry: Entry, folder: Path, rank: int, wanted: tuple[stagewise.Plan, Wanted]) -> float:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    return Row(entry).in_a_process(*wanted)


def load_libraries() -> None:
    """Once, before processes are forked."""
    for name in ("transformers", "torchvision", "timm", "diffusers", "peft"):
        __import__(name)


def markdown(rows: list[dict[str, object]]) -> str:
    """The page."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(str(row.get(column, "")) for column in COLUMNS) for row in rows]
    passed = sum(row.get("passes") == "yes" for row in rows)
    table = "\n".join(f"| {line} |" for line in lines)
    machine = f"torch {torch.__version__.split('+')[0]}, {platform.machine()}"
    return f"{TEXT}\n{passed} of {len(rows)} models pass ({machine}).\n\n{table}\n"


def rows_in(path: Path) -> dict[str, dict[str, object]]:
    """The rows of a page, by model."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {
        row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells if len(row) == len(COLUMNS)
    }


def main(
    as_json: Annotated[bool, typer.Option("--json")] = False,
    only: str = "",
    write: Path | None = None,
) -> None:
    """Print a line for each model; exit status 1 if one does not pass.

    --only takes parts of models' names, with commas between; --write puts the table into a page.
    """
    load_libraries()
    kept = rows_in(write) if write else {}
    wanted = [part.strip().lower() for part in only.split(",")]
    failed = False
    for entry in ENTRIES:
        if not any(part in entry.name.lower() for part in wanted):
            continue
        start = time.perf_counter()
        row = row_of(entry)
        kept[entry.name] = {k: str(v).replace("|", "/").replace("\n", " ") for k, v in row.items()}
        failed |= row["passes"] != "yes"
        if as_json:
            print(json.dumps(row), flush=True)
        seconds = time.perf_counter() - start
        print(f"{entry.name}: {row['passes']} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        if write:
            names = [e.name for e in ENTRIES]
            write.write_text(markdown([kept[name] for name in names if name in kept]))
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
