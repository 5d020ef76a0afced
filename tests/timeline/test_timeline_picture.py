"""Literal drawings: as text without colour, so that the picture itself is held."""

import io

import pytest
from rich.console import Console

from stagewise.costs import StageCost
from stagewise.planning import simulate, unit_costs
from stagewise.report import format_seconds, render_timeline
from stagewise.schedule import Schedule, named_schedule, parse_programs, with_recompute
from stagewise.timeline import Timeline


def draw(timeline: Timeline, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_timeline(timeline, width=width))
    return [line.rstrip() for line in capture.get().splitlines()]


def costs(num_stages: int, forward: float = 1, backward: float = 2) -> list[StageCost]:
    one = StageCost(forward_seconds=forward, backward_seconds=backward, recompute_seconds=forward)
    return [one] * num_stages


def test_gpipe_as_in_the_paper() -> None:
    timeline = simulate(named_schedule("gpipe", 3, 3), costs(3))
    assert draw(timeline, 50) == [
        "          0                         15 s",
        "device 0  F0F1F2............B2##B1##B0##",
        "device 1  ..F0F1F2......B2##B1##B0##....",
        "device 2  ....F0F1F2B2##B1##B0##........",
        "F0= forward  B0# backward  ... idle  (0: the micro",
        "",
        "device 0  busy  60.0%, at most 3 in flight",
        "device 1  busy  60.0%, at most 3 in flight",
        "device 2  busy  60.0%, at most 3 in flight",
        "step 15 s, bubble 40.0% of all devices' time",
    ]


def test_recomputation_has_its_own_letter_and_filling() -> None:
    schedule = with_recompute(named_schedule("gpipe", 2, 2), "always")
    timeline = simulate(schedule, unit_costs(2))
    assert draw(timeline, 42)[1:4] == [
        "device 0  F0==F1==R1~~....B1##R0~~B0##",
        "device 1  ....F0==F1==B1##R0~~B0##....",
        "F0= forward  B0# backward  R0~ recompute",
    ]


def test_kinds_that_do_not_occur_are_not_in_the_legend() -> None:
    text = "\n".join(draw(simulate(named_schedule("1f1b", 2, 2), costs(2))))
    assert "recompute" not in text
    assert "weights" not in text


def test_times_that_are_no_multiples_fill_the_width() -> None:
    timeline = simulate(named_schedule("gpipe", 2, 1), costs(2, 1, 1.3))
    lines = draw(timeline, 40)
    assert lines[0].endswith("4.6 s") and len(lines[0]) == 40
    assert lines[1:3] == [
        "device 0  F0=====...............B0######",
        "device 1  .......F0====B0#######........",
    ]


def test_what_is_too_short_for_its_name_keeps_its_letter() -> None:
    timeline = simulate(named_schedule("1f1b", 1, 12), unit_costs(1))
    assert draw(timeline, 34)[1] == "device 0  " + "FB" * 12
    assert draw(timeline, 58)[1].endswith("F9B9F=B#F=B#")


def test_the_drawing_is_as_wide_as_asked() -> None:
    timeline = simulate(named_schedule("gpipe", 4, 64), costs(4))
    for width in (40, 80, 200):
        drawing = draw(timeline, width)[: 1 + 4]
        assert max(map(len, drawing)) <= width
        assert max(map(len, drawing)) > width / 2


def test_stages_are_named_where_a_device_holds_several() -> None:
    schedule = Schedule(
        name="one device",
        programs=parse_programs("0F0 1F0 1B0 0B0"),
        placement=((0,), (0,)),
        num_microbatches=1,
    )
    assert draw(simulate(schedule, unit_costs(2)), 26)[1] == "device 0  0F0=1F0=1B0#0B0#"


@pytest.mark.parametrize("num_devices", [1, 11])
def test_names_are_aligned(num_devices: int) -> None:
    lines = draw(simulate(named_schedule("gpipe", num_devices, 2), costs(num_devices)))
    starts = {line.index("F0") for line in lines[1:2]}
    assert starts == {len(f"device {num_devices - 1}") + 2}


def test_colours_tell_the_kinds_apart() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        timeline = simulate(named_schedule("gpipe", 2, 2), costs(2))
        console.print(render_timeline(timeline, width=80))
    coloured = capture.get()
    assert "\x1b[37;44mF0" in coloured
    assert "\x1b[30;42mB0" in coloured


def test_a_step_of_no_time_and_an_empty_one_can_be_drawn() -> None:
    assert draw(simulate(named_schedule("gpipe", 2, 1), costs(2, 0, 0)))[-1].startswith("step 0 s")
    assert draw(Timeline(1, ()))[-1] == "step 0 s, bubble 0.0% of all devices' time"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (33, "33 s"),
        (1.25, "1.25 s"),
        (213.4, "213 s"),
        (4321, "4321 s"),
        (0.9999, "1 s"),
        (0.0125, "12.5 ms"),
        (0.395, "395 ms"),
        (8e-5, "80 us"),
        (2e-7, "0.2 us"),
        (-0.002, "-2 ms"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
