"""GPipe's models on the meta device, estimated for its devices: shared by table1 and table2."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from stagewise.models import amoebanet_d, transformer_l
from stagewise.planning.roofline import CellWork
from stagewise.profiling.estimate import cell_work

IMAGE, CLASSES = 224, 1000  # GPipe, section 3: ImageNet at 224 x 224
TOKENS, VOCABULARY = 1024, 32_000  # the same: sentences of 1,024 tokens
BYTES_PER_PARAMETER = 12  # in float32: itself, its gradient, RMSProp's mean of squares


@dataclass(frozen=True)
class Estimated:
    """A model's cells for one microbatch, and the bytes of that microbatch of its inputs."""

    cells: tuple[CellWork, ...]
    input_bytes: int

    @property
    def num_parameters(self) -> int:
        return sum(cell.parameter_bytes for cell in self.cells) // 4


@cache
def amoebanet(num_layers: int, num_filters: int, samples: int) -> Estimated:
    """AmoebaNet-D (L, D) on microbatches of so many images, in float32."""
    with torch.device("meta"):
        model = amoebanet_d(num_layers, num_filters, num_classes=CLASSES)
        images = torch.empty(samples, 3, IMAGE, IMAGE)
        labels = torch.empty(samples, dtype=torch.long)
    work = cell_work(model, images, target=labels, loss=cross_entropy, num_microbatches=1)
    return Estimated(work, images.nbytes)


def transformer(num_layers: int, samples: int) -> Estimated:
    """Transformer-L on microbatches of so many sentences, in float32.

    Its layers are alike, so that of a short stack stands for all.
    """
    short = _short_transformer(samples)
    first, layer, last = short.cells[0], short.cells[1], short.cells[-1]
    layers = (replace(layer, name=str(1 + index)) for index in range(num_layers))
    return replace(short, cells=(first, *layers, last))


@cache
def _short_transformer(samples: int) -> Estimated:
    with torch.device("meta"):
        model = transformer_l(3)
        tokens = torch.empty(samples, TOKENS, dtype=torch.long)
    work = cell_work(model, tokens, target=tokens, loss=token_loss, num_microbatches=1)
    return Estimated(work, tokens.nbytes)


def token_loss(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token."""
    return cross_entropy(scores.flatten(0, 1), target.flatten())


def stage_memory(model: Estimated, num_microbatches: int) -> np.ndarray:
    """Bytes of the stage of cells [start, end), as [start, end], with GPipe's recomputation.

    A stage keeps the inputs of all microbatches, and what one microbatch saves while it is
    recomputed (arXiv:1811.06965, section 2.3); and BYTES_PER_PARAMETER.
    """
    cells = model.cells
    states = _sums([BYTES_PER_PARAMETER / 4 * cell.parameter_bytes for cell in cells])
    saved = _sums([cell.activation_bytes for cell in cells])
    unsaved = _sums([cell.unsaved_output_bytes for cell in cells])
    inputs = np.array([model.input_bytes, *(cell.output_bytes for cell in cells)], dtype=float)
    start, end = np.indices((len(cells) + 1, len(cells) + 1))
    last = np.maximum(end - 1, 0)
    made = saved[end] - saved[start] - (unsaved[last] - unsaved[np.minimum(start, last)])
    released = np.array([cell.released_output_bytes for cell in cells])[last]
    return np.where(
        end > start,
        states[end]
        - states[start]
        + made
        - np.minimum(made, released)
        + num_microbatches * inputs[start],
        np.inf,
    )


def fewest_stages(memory: np.ndarray, room: float) -> tuple[int, ...]:
    """The cut into the fewest stages of at most `room` bytes each; empty if a cell is too big.

    Exact: the fewest for every prefix, from the fewest for all shorter ones.
    """
    num_cells = len(memory) - 1
    fewest = np.full(num_cells + 1, np.inf)
    fewest[0] = 0
    begins = np.zeros(num_cells + 1, dtype=int)
    for end in range(1, num_cells + 1):
        counts = np.where(memory[:end, end] <= room, fewest[:end] + 1, np.inf)
        begins[end] = int(counts.argmin())
        fewest[end] = counts[begins[end]]
    if not np.isfinite(fewest[num_cells]):
        return ()
    balance, end = [], num_cells
    while end:
        balance.append(end - int(begins[end]))
        end = int(begins[end])
    return tuple(reversed(balance))


def least_room(memory: np.ndarray, num_stages: int) -> tuple[float, tuple[int, ...]]:
    """The least memory of the fullest device over all cuts into `num_stages`, and that cut."""
    num_cells = len(memory) - 1
    sizes = np.unique(memory[np.isfinite(memory)])
    low, high = 0, len(sizes) - 1
    while low < high:  # the answer is some stage's memory
        middle = (low + high) // 2
        balance = fewest_stages(memory, float(sizes[middle]))
        if balance and len(balance) <= num_stages:
            high = middle
        else:
            low = middle + 1
    balance = list(fewest_stages(memory, float(sizes[high])))
    while len(balance) < min(num_stages, num_cells):  # a further cut frees memory, or costs none
        widest = max(range(len(balance)), key=balance.__getitem__)
        balance[widest : widest + 1] = [balance[widest] - 1, 1]
    return float(sizes[high]), tuple(balance)


def _sums(values: Sequence[float]) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])
