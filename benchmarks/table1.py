"""GPipe's table 1, planned: the largest models that fit its devices, without building any.

AmoebaNet-D on 8 GB devices and Transformer-L on 16 GB devices (Huang et al., arXiv:1811.06965,
table 1), on the meta device. Naive-1 is one device that keeps every activation of the batch;
pipeline-K is K devices with recomputation, cut to minimise the largest memory of a device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import typer

from benchmarks.estimates import (
    BYTES_PER_PARAMETER,
    Estimated,
    amoebanet,
    fewest_stages,
    least_room,
    stage_memory,
    transformer,
)
from benchmarks.workers import Row, print_rows

GIB = 2**30
FILTERS_STEP = 16  # all of the paper's D are multiples of 16


@dataclass(frozen=True)
class Column:
    """A column of the paper's table: how it ran, the largest size there, and its figures."""

    name: str
    num_devices: int
    size: tuple[int, ...]  # (L, D) or (L,)
    parameters: float
    parameter_gb: float | None = None
    activation_gb: float | None = None
    torchgpipe: float | None = None  # its parameters, in millions

    @property
    def is_naive(self) -> bool:
        return self.name.startswith("naive")


AMOEBANET = (
    Column("naive-1", 1, (18, 208), 82e6, 1.05, 6.26, 81.5),
    Column("pipeline-1", 1, (18, 416), 318e6, 3.8, 3.46, 319.0),
    Column("pipeline-2", 2, (18, 544), 542e6, 6.45, 8.11, 542.7),
    Column("pipeline-4", 4, (36, 544), 1.05e9, 12.53, 15.21, 1060.0),
    Column("pipeline-8", 8, (72, 512), 1.8e9, 24.62, 26.24, 1840.0),
)
TRANSFORMER = (
    Column("naive-1", 1, (3,), 282.2e6),
    Column("pipeline-1", 1, (13,), 785.8e6),
    Column("pipeline-8", 8, (103,), 5.3e9),
    Column("pipeline-32", 32, (415,), 21.0e9),
    Column("pipeline-128", 128, (1663,), 83.9e9),
)


@dataclass(frozen=True)
class Family:
    """A model that grows: in one dimension here, the others as in the paper's column."""

    name: str
    room: int  # bytes of a device
    batch_size: int
    columns: tuple[Column, ...]
    build: Callable[..., Estimated]  # (*size, samples in a microbatch)
    step: int  # of the dimension that grows, the last

    def samples(self, column: Column) -> int:
        """In a microbatch: all in naive-1, else one, which needs the least memory."""
        return self.batch_size if column.is_naive else 1


FAMILIES = (
    Family("AmoebaNet-D", 8 * GIB, 128, AMOEBANET, amoebanet, FILTERS_STEP),
    Family("Transformer-L", 16 * GIB, 32, TRANSFORMER, transformer, 1),
)
NOTES = (
    "batches: 128 images of 224 x 224, 32 sentences of 1,024 tokens (GPipe, section 3); 12 bytes a "
    "parameter: itself, gradient, RMSProp.",
    "Assumed, since the paper does not say: float32 throughout; microbatches of one sample (M = "
    "128, 32), as torchgpipe's reproduction; cells as in stagewise.models; only the last of (L, D) "
    "grows.",
    "Counted are parameters, their states, and activations between forward and backward; not "
    "kernels' workspaces, gradients on their way, the allocator's losses.",
    "paper_M, gpipe_M, ours_M: millions of parameters of that size in the paper, torchgpipe, here. "
    "paper_par, paper_act: its GB of parameters and peak activations; par_GiB, act_GiB: ours for "
    "the same model, all devices together, max_GiB: the fullest device, on the best cut.",
    "largest, largest_M: what fits by our estimate; ratio: over the paper's. Where it differs:",
)
REASONS = {
    (True, "AmoebaNet-D"): "autograd keeps the input of every convolution, norm and ReLU of 128 "
    "images in float32; the paper's figure is what {alike} images need here. Its batch on one "
    "device was smaller, or XLA kept less (torchgpipe reports no naive-1 activations)",
    (True, "Transformer-L"): "of the activations 7.8 GiB are scores and their softmax, 32,768 "
    "tokens by 32,000 words in float32; the paper does not say how it kept them",
    (False, "AmoebaNet-D"): "microbatches of one image keep least; the paper does not give its M, "
    "and with larger ones activations grow. Nor do we count workspaces",
    (False, "Transformer-L"): "a cut by memory fills every device alike; microbatches of one "
    "sentence, with attention that keeps no scores; these would be 128 MiB a layer, and as much "
    "again for each further tensor of their size (32 heads, 1,024 x 1,024, float32)",
}


def main(
    quick: bool = typer.Option(False, help="Only the paper's sizes, without the search."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Plan the paper's table 1 on meta models."""
    rows = [
        row_of(family, column, search=not quick) for family in FAMILIES for column in family.columns
    ]
    print_rows("GPipe's table 1, planned", rows, as_json=json, notes=() if json else _notes(rows))


def row_of(family: Family, column: Column, *, search: bool) -> Row:
    """The paper's figures for one column beside ours."""
    model = family.build(*column.size, family.samples(column))
    fullest, activations = needed(family, column, model)
    states = BYTES_PER_PARAMETER * model.num_parameters
    largest = largest_size(family, column) if search else None
    biggest = None if not largest else family.build(*largest, family.samples(column))
    return {
        "model": family.name,
        "column": column.name,
        "size": _words(column.size),
        "paper_M": column.parameters / 1e6,
        "gpipe_M": column.torchgpipe,
        "ours_M": model.num_parameters / 1e6,
        "paper_par": column.parameter_gb,
        "par_GiB": states / GIB,
        "paper_act": column.activation_gb,
        "act_GiB": activations / GIB,
        "max_GiB": fullest / GIB,
        "largest": None if largest is None else _words(largest) if largest else "none",
        "largest_M": None if biggest is None else biggest.num_parameters / 1e6,
        "ratio": None if biggest is None else biggest.num_parameters / column.parameters,
    }


def needed(family: Family, column: Column, model: Estimated) -> tuple[float, float]:
    """Bytes on the fullest device, and of activations on all devices together."""
    if column.is_naive:
        saved = sum(cell.activation_bytes for cell in model.cells)
        unsaved = sum(cell.unsaved_output_bytes for cell in model.cells[:-1])
        activations = model.input_bytes + saved - unsaved
        return BYTES_PER_PARAMETER * model.num_parameters + activations, activations
    memory = stage_memory(model, family.batch_size)
    fullest, balance = least_room(memory, column.num_devices)
    ends = [sum(balance[: index + 1]) for index in range(len(balance))]
    whole = sum(memory[end - size, end] for size, end in zip(balance, ends, strict=True))
    return fullest, float(whole) - BYTES_PER_PARAMETER * model.num_parameters


def largest_size(family: Family, column: Column) -> tuple[int, ...]:
    """The paper's size with its last dimension as large as fits; empty if nothing does."""

    def fits(number: int) -> bool:
        model = family.build(*column.size[:-1], number, family.samples(column))
        if column.is_naive:
            return needed(family, column, model)[0] <= family.room
        balance = fewest_stages(stage_memory(model, family.batch_size), family.room)
        return 0 < len(balance) <= column.num_devices

    low, high = 0, column.size[-1] // family.step  # in steps; low fits, high does not
    while high and fits(high * family.step):
        low, high = high, high + max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * family.step) else (low, middle)
    return (*column.size[:-1], low * family.step) if low else ()


def _notes(rows: list[Row]) -> tuple[str, ...]:
    """The assumptions, and a reason for every column that comes out differently."""
    reasons = [
        f"- {row['model']} {row['column']}, {_size_of(row)} the paper's: {_reason(row)}"
        for row in rows
        if row["largest"] is not None and row["largest"] != row["size"]
    ]
    return (*NOTES, *reasons)


def _reason(row: Row) -> str:
    """Why ours is larger or smaller; `alike` images need what the paper reports."""
    text = REASONS[str(row["column"]).startswith("naive"), str(row["model"])]
    kept, ours = row["paper_act"], row["act_GiB"]
    alike = FAMILIES[0].batch_size * kept * 1e9 / (ours * GIB) if kept and ours else 0.0
    return text.format(alike=round(alike))


def _size_of(row: Row) -> str:
    ratio = row["ratio"]
    return "nothing fits of" if ratio is None else f"{ratio:.2f} x"


def _words(size: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, size))})" if len(size) > 1 else str(size[0])


if __name__ == "__main__":
    typer.run(main)
