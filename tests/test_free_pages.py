"""Pages go back in every step where that is cheap, and hardly ever where it is not."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import stagewise
from stagewise.engine.looks import mixing
from stagewise.free_pages import (
    HEAP,
    RARELY,
    SHARE,
    FreePages,
    fault_seconds_per_byte,
    trim_of_glibc,
)


class Doubled(nn.Module):
    """No layer that is known to treat samples alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def ticking(*seconds: float) -> Callable[[], float]:
    """A clock that shows a time 0 and one of `seconds` later, and again with the next."""
    times: Iterator[float] = (time for second in seconds for time in (0.0, second))
    return lambda: next(times)


def test_cheap_trims_are_in_every_step_and_others_in_hardly_any() -> None:
    given_back: list[int] = []
    costs = [0.9 * SHARE] * 3 + [3.3 * SHARE] + [0.9 * SHARE] * 4
    pages = FreePages(lambda: given_back.append(step), ticking(*costs), resident=lambda: 0)
    for step in range(40):  # noqa: B007  (what `given_back` notes)
        pages.after_step(1.0)
    rest = 33
    assert RARELY == SHARE / 10 and given_back == [0, 1, 2, 3, *range(4 + rest, 40)]


def test_what_is_trimmed_within_a_step_counts_with_it() -> None:
    given_back: list[int] = []
    pages = FreePages(lambda: given_back.append(1), ticking(*[0.6 * SHARE] * 8), resident=lambda: 0)
    for _ in range(2):
        pages.within_step()
        pages.after_step(1.0)
    assert len(given_back) == 2, "both together take more than their share of the first step"


def test_what_faulting_in_again_takes_counts_too() -> None:
    given_back: list[int] = []
    sizes = iter([3 << 30, 1 << 30] * 3)
    pages = FreePages(lambda: given_back.append(1), clock=lambda: 0.0, resident=lambda: next(sizes))
    pages.within_step()
    assert pages._spent_seconds == (2 << 30) * fault_seconds_per_byte()
    assert 1e-12 < fault_seconds_per_byte() < 1e-6
    pages.after_step(1.0)
    pages.after_step(1.0)
    assert given_back == [1, 1], "gigabytes take longer than a hundredth of these steps"


def test_a_c_library_without_it() -> None:
    pages = FreePages(None)
    pages.give_back()
    pages.after_step(1.0)
    assert pages._spent_seconds == 0


@pytest.mark.parametrize(("recompute", "calls"), [("never", 0), ("always", 3)])
def test_only_steps_that_recompute_give_back(
    recompute: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each stage's first backward, and at the end."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=2, recompute=recompute)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    given_back: list[int] = []
    monkeypatch.setattr(HEAP, "trim", lambda: given_back.append(1))
    monkeypatch.setattr(HEAP, "_clock", ticking(0.0, 0.0, 1000.0))
    monkeypatch.setattr(HEAP, "_resting", 0)
    for _ in range(2):  # the second has no time for it
        pipe.step(torch.ones(4, 2), target=torch.ones(4, 2))
    assert len(given_back) == calls


def test_the_c_library_is_asked_where_it_can() -> None:
    trim = trim_of_glibc()
    assert trim is None or trim() in (0, 1)


def test_planning_gives_back_what_its_trial_steps_took(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[None] = []
    monkeypatch.setattr(HEAP, "trim", lambda: trims.append(None))
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(4, 2)
    loss = nn.functional.mse_loss
    for count in (2, [2, 4]):  # measured, and searched for
        stagewise.plan(
            model,
            x,
            target=x,
            loss=loss,
            num_devices=2,
            num_microbatches=count,
            schedule="gpipe",
            seconds=0.01,
        )
    assert len(trims) == 2


def test_a_look_gives_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory would come on top of the holes between the gradients."""
    given_back: list[int] = []
    monkeypatch.setattr(mixing, "trim_of_glibc", lambda: lambda: given_back.append(1))
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), Doubled())
    plan = stagewise.Plan(balance=(2, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    pipe.step(torch.ones(4, 2), target=torch.ones(4, 2))
    first_call = len(given_back)
    pipe.step(torch.ones(4, 2), target=torch.ones(4, 2))  # not looked at
    assert first_call == len(given_back) == 1
