"""One model's comparisons with itself, unpipelined: a row of the table."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import stagewise
from benchmarks.unmodified.entry import Batch, Entry
from stagewise.errors import BatchError, ModelError
from stagewise.model.captured import captured_of

NUM_SAMPLES, OTHER_NUM_SAMPLES, NUM_MICROBATCHES, MANY_STAGES = 8, 6, 4, 4
# Relative errors by the dtype that the loss is computed in; transformers computes it in float32.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5}
_NORMS = "BatchNorm normalises by microbatch"
_DROPS = {"dropout_prob", "drop_prob"}  # attributes of modules that drop
_SUGGESTED = re.compile(r"stagewise\.plan\(\.\.\., cells=(\[.*?\])\)")
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
        self.plain, self.model = built(entry), built(entry)
        self.model.load_state_dict(self.plain.state_dict())
        self.batch = self.made(NUM_SAMPLES, entry.length)
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.plain.modules())
        self.whole = entry.whole_batch or (_NORMS if norms else "")
        self.count = 1 if self.whole else NUM_MICROBATCHES
        self.paths = entry.cells
        self.cells: dict[str, str] = {}
        self.wanted: tuple[stagewise.Plan, Wanted, tuple[str, ...] | None] | None = None

    def made(self, num_samples: int, length: int | None) -> Batch:
        """A batch."""
        batch = self.entry.batch(num_samples, length)
        return {
            n: t.to(self.entry.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in batch.items()
        }

    def run(self) -> None:
        """Fill the row; raises what a comparison raises."""
        plan = self.planned()
        captured = captured_of(self.model)
        assert captured is not None
        num_cells = len(captured.chain)
        self.cells |= {"cells": str(num_cells), "M": str(self.count)}
        self.cells["note"] = f"M=1: {self.whole}" if self.whole else self.entry.length_fixed
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
        again = self.pipe(dataclasses.replace(plan, recompute="always"))
        loss, gradients = self.step(again, self.batch)
        self.note("recompute", max(abs(loss - wanted[0]), difference(gradients, wanted[1])), 1.0)
        self.in_eval(pipes[-1])  # last: some models are others afterwards
        self.wanted = plan, wanted, self.paths

    def planned(self) -> stagewise.Plan:
        """A plan; where the model cannot be captured, with the `cells=` that the error names."""
        self.cells["captured by"] = "cells=" if self.paths else "torch.export"
        try:
            return self.planned_with()
        except ModelError as error:
            self.paths = suggested(error)
            if not self.paths:
                raise
            self.cells["captured by"] = "cells=, suggested"
            return self.planned_with()

    def planned_with(self) -> stagewise.Plan:
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
            cells=self.paths,
        )

    def pipe(self, plan: stagewise.Plan, transport: str = "local") -> stagewise.Pipeline:
        """A pipeline; outputs that hold a loss are joined by their main tensor."""
        merge = None if "target" in self.batch and self.entry.joined else self.merged
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
            if buffer.shape == buffers[name].shape:  # or else it was made by the first call
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

    def in_a_process(
        self, plan: stagewise.Plan, wanted: Wanted, paths: tuple[str, ...] | None
    ) -> float:
        """One of two: how far this rank's loss and gradients are apart."""
        if paths:
            stagewise.capture_cells(self.model, paths, **inputs_of(self.batch))
        else:
            stagewise.capture(self.model, **inputs_of(self.batch))
        pipe = self.pipe(plan, "distributed")
        loss = float(pipe.step(**self.batch))
        own = gradients_of(pipe.named_parameters())
        return max(abs(loss - wanted[0]), difference(own, wanted[1]) if own else 0.0)

    def note(self, what: str, error: float, scale: float) -> None:
        """Put a difference into the row; raises Failed for one that is no round-off."""
        self.cells[what] = f"{error:.0e}" if error else "0"
        computed = computed_in(self.entry)
        if not error <= ALLOWED[computed] * max(abs(scale), 1.0):
            raise Failed(f"{what} differs by {error:.1e}")


def computed_in(entry: Entry) -> torch.dtype:
    """Transformers computes losses, norms and positions in float32, whatever the model's dtype."""
    return torch.float32 if entry.loss.__name__ == "inside" else entry.dtype


def built(entry: Entry) -> nn.Module:
    """The model, which drops nothing, also where there is no setting for it."""
    torch.manual_seed(0)
    model = entry.build().to(entry.dtype).train()
    for module in model.modules():
        drops = {"p"} if isinstance(module, nn.modules.dropout._DropoutNd) else _DROPS
        vars(module).update(dict.fromkeys(drops & vars(module).keys(), 0.0))
    return model


def suggested(error: ModelError) -> tuple[str, ...]:
    """The `cells=` that an error says will do."""
    found = _SUGGESTED.search(str(error))
    return tuple(re.findall(r"'([^']*)'", found[1])) if found else ()


def _evenly(num_cells: int, num_stages: int) -> dict[str, Any]:
    """A balance without measurements."""
    each, more = divmod(num_cells, num_stages)
    return {"balance": tuple(each + (s < more) for s in range(num_stages)), "cells": ()}
