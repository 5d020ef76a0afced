"""Generated chains through the parity checker: any cells, random ones too, against plain torch.

Where `test_random_chains.py` compares a pipeline with another cut of it, this compares it with
the plain model in float64, by microbatch and on the full batch. A new kind of piece
joins by a row in that file's EXACT or INEXACT, or here, where a plain run needs it.
"""

from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import stagewise
from stagewise.model.chain import chain_of
from stagewise.schedule import POLICIES, SCHEDULES
from stagewise.testing import check_parity
from tests.pipeline.test_random_chains import (
    ALL,
    EXACT,
    FIRST,
    INEXACT,
    WIDTH,
    Channels,
    Pop,
    Stash,
    rows,
)
from tests.schedules import stages_on
from tests.soak import examples, part_of

# What spectral norm and a counter do; `test_random_chains.py` says so too.
pytestmark = pytest.mark.filterwarnings("ignore:.* changes (count|param):UserWarning")

PIECES: dict[str, Callable[[], list[nn.Module]]] = {
    **EXACT,
    **INEXACT,
    "frozen batch norm": lambda: [Channels(nn.BatchNorm1d(WIDTH)).eval()],
    "batch norm, cumulative": lambda: [Channels(nn.BatchNorm1d(WIDTH, momentum=None))],
    "batch norm, no memory": lambda: [
        Channels(nn.BatchNorm1d(WIDTH, affine=False, track_running_stats=False))
    ],
    "skips around batch norm": lambda: [
        stagewise.SkipScope(Stash(), Channels(nn.BatchNorm1d(WIDTH)), nn.Dropout(0.2), Pop())
    ],
    "alpha dropout": lambda: [nn.AlphaDropout(0.2)],
    "recurrent": lambda: [nn.GRU(WIDTH, WIDTH, batch_first=True), First()],
}


# Beside these, subtracting a mean over dimension 0 may change nothing.
HIDING = {"view", "pooled", *(name for name in PIECES if "norm" in name)}


class First(nn.Module):
    def forward(self, values: tuple[Tensor, ...]) -> Tensor:
        return values[0]


class ByMicrobatch(nn.Module):
    """What no one must write: it centres by the samples it sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0, keepdim=True)


def model_of(names: list[str]) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        cells = [cell for name in names for cell in (ALL | PIECES)[name]()]
    return nn.Sequential(*cells)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[str], dict[str, object]]:
    """A chain's pieces, and the arguments of its check."""
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    each = stages_on(schedule, 1)
    first = draw(st.lists(st.sampled_from(sorted(FIRST)), max_size=1))
    names = first + draw(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=6))
    num_cells = len(chain_of(model_of(names)))
    hypothesis.assume(num_cells >= each)
    num_microbatches = draw(st.integers(1, 5))
    size = draw(st.integers(2 * num_microbatches, 12))
    return names, {
        "inputs": rows(size, draw(st.integers(0, 99)), torch.float32),
        "target": rows(size, 1, torch.float32),
        "loss": draw(st.sampled_from([nn.functional.mse_loss, nn.functional.smooth_l1_loss])),
        "num_stages": [each, each * draw(st.integers(1, min(num_cells // each, 5)))],
        "num_microbatches": num_microbatches,
        "schedules": [schedule],
        "recompute": ["never", draw(st.sampled_from(sorted(POLICIES)))],
        "dtype": torch.float64,
    }


@pytest.mark.parametrize("part", range(5))
def test_any_chain_has_the_plain_models_gradients(part: int) -> None:
    @part_of(part)
    @hypothesis.settings(
        max_examples=examples(35), suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    @hypothesis.given(cases())
    def check(case: tuple[list[str], dict[str, object]]) -> None:
        names, arguments = case
        report = check_parity(model_of(names), **arguments)  # type: ignore[arg-type]
        report.raise_for_failure()
        assert report.tolerance == 1e-10
        assert all(row.identical and row.microbatched <= 1e-10 for row in report.rows)
        if set(names) <= EXACT.keys() | FIRST.keys():
            assert all(row.full_batch <= 1e-10 for row in report.rows)

    check()


@hypothesis.settings(max_examples=examples(25))
@hypothesis.given(cases(), st.data())
def test_the_checker_is_not_fooled(
    case: tuple[list[str], dict[str, object]], data: st.DataObject
) -> None:
    """Wherever the cell that sees its microbatch stands, and whatever else may explain it."""
    names, arguments = case
    hypothesis.assume(arguments["num_microbatches"] != 1 and not HIDING & set(names))
    cells = list(model_of([*names, "linear"]))
    place = data.draw(st.integers(0, len(cells) - 1))
    cells.insert(place, Wherever())
    report = check_parity(nn.Sequential(*cells), **arguments)  # type: ignore[arg-type]
    hypothesis.assume(any(row.full_batch > 1e-6 for row in report.rows if row.quantity == "loss"))
    assert not report.ok
    assert f"cell {place} Wherever" in report.summary()


class Wherever(nn.Module):
    """`ByMicrobatch` on the first floating-point tensor of any value."""

    def forward(self, value: object) -> object:
        from stagewise.batch.values import put_together, take_apart

        tensors, structure = take_apart(value)
        tensors[0] = ByMicrobatch()(tensors[0])
        return put_together(tensors, structure)
