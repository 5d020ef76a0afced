"""Figures hold the Timeline's numbers, and plotly accepts them."""

import pytest

from stagewise.costs import StageCost
from stagewise.page.figures import losses_figure, memory_figure, timeline_figure
from stagewise.page.page_contents import Losses, ShownStep
from stagewise.planning.simulate import simulate
from stagewise.schedule import named_schedule

COST = StageCost(
    forward_seconds=1,
    backward_seconds=2,
    recompute_seconds=1,
    input_seconds=1,
    weight_seconds=1,
    input_bytes=1024,
    activation_bytes=3 * 1024,
)


def shown(name: str = "zb_h1") -> ShownStep:
    schedule = named_schedule(name, 2, 3)
    costs = (COST,) * schedule.num_stages
    return ShownStep(name, simulate(schedule, costs), costs)


def test_every_instruction_is_a_bar_and_idle_time_too() -> None:
    step = shown()
    *kinds, idle = timeline_figure(step)["data"]
    bars = {
        (name, int(y.removeprefix("device ")), start, start + length)
        for trace in kinds
        for name, y, start, length in zip(
            trace["text"], trace["y"], trace["base"], trace["x"], strict=True
        )
    }
    assert bars == {
        (str(s.instruction), s.device, s.start_seconds, s.end_seconds) for s in step.timeline.spans
    }
    total = step.timeline.num_devices * step.timeline.duration_seconds
    assert sum(idle["x"]) == total - sum(step.timeline.busy_seconds)
    looks = [(t["marker"]["color"], t["marker"].get("pattern", {}).get("shape")) for t in kinds]
    assert len(set(looks)) == len(kinds) == 3


def test_memory_is_in_the_unit_that_fits() -> None:
    step = shown("gpipe")
    figure = memory_figure(step)
    assert figure["layout"]["yaxis"]["title"]["text"] == "KiB"
    for trace, peak in zip(
        figure["data"], step.timeline.peak_activation_bytes(step.costs), strict=True
    ):
        assert max(trace["y"]) * 1024 == peak
        assert trace["x"][-1] == step.timeline.duration_seconds


def test_a_trial_steps_memory_has_a_time_of_its_own() -> None:
    step = ShownStep("", shown().timeline, measured=(((0.0, 1024), (99.0, 0)), ()))
    layout = memory_figure(step)["layout"]
    assert layout["meta"] == {"own_time": True} and layout["xaxis"]["range"] == [0, 99]
    assert memory_figure(shown())["layout"]["meta"] == {"own_time": False}


def test_plotly_accepts_them() -> None:
    Figure = pytest.importorskip("plotly.graph_objects").Figure  # noqa: N806
    runs = [Losses("a <b>", [(1, 2.0), (2, 1.5)], [(2, 1.6)]), Losses("b", [(1, 2.1)])]
    for figure in (timeline_figure(shown()), memory_figure(shown()), losses_figure(runs)):
        Figure(figure)
    assert losses_figure(runs)["data"][0]["name"] == "a &lt;b&gt;"
