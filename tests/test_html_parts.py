"""What notebooks show: pictures and tables, escaped."""

import re
from dataclasses import replace
from xml.etree import ElementTree

from stagewise.costs import CellCost
from stagewise.html_parts import LOOKS, Bar, bars_of
from stagewise.parity import Configuration, ParityReport, ParityRow
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.schedule import SCHEDULES, Kind, named_schedule

EVIL = "<script>alert(1)</script>"
CELLS = [CellCost(name=EVIL, forward_seconds=1, backward_seconds=2) for _ in range(8)]


def parsed(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{html}</div>")


def labels(html: str) -> list[str]:
    return [hover.text.split(":")[0] for hover in parsed(html).iter("title") if hover.text]


def test_every_schedule_shows_every_instruction() -> None:
    for name in SCHEDULES:
        schedule = named_schedule(name, 2, 4)
        assert sorted(labels(schedule._repr_html_())) == sorted(
            str(instruction) for _, instruction in schedule.instructions()
        )
    assert LOOKS.keys() == {*Kind}


def test_a_plan_shows_its_words_and_its_step() -> None:
    plan = plan_from_costs(CELLS, num_devices=2, num_microbatches=3)
    html = plan._repr_html_()
    assert sorted(labels(html)) == sorted(str(s.instruction) for s in plan.timeline.spans)
    assert parsed(html).findtext("pre") == str(plan) and EVIL not in html
    assert labels(plan.timeline._repr_html_()) == labels(html)
    assert "step 48 s, bubble 25.0%" in html
    unmeasured = replace(plan, cells=())
    assert sorted(labels(unmeasured._repr_html_())) == sorted(labels(html))


def test_bars_are_as_long_as_their_times() -> None:
    svg = parsed(bars_of("", [[Bar(0, 1, "F", "a", ""), Bar(1, 4, "B", "b", "")]])).find("svg")
    assert svg is not None
    idle, first, second = (float(rect.attrib["width"]) for rect in svg.iter("rect"))
    assert second == 3 * first and idle == first + second


def test_what_is_too_large_is_said() -> None:
    html = named_schedule("gpipe", 60, 60)._repr_html_()
    assert "7,200 instructions: too many to draw here" in html and len(html) < 1000


def test_reprs_are_short() -> None:
    schedule = named_schedule("1f1b", 2, 40)
    assert repr(schedule) == "<Schedule 1f1b: 2 stages on 2 devices, 40 microbatches>"
    configuration = Configuration(
        schedule="1f1b", num_stages=2, num_microbatches=4, recompute="never"
    )
    row = ParityRow(
        configuration=configuration,
        quantity=f"gradient {EVIL}",
        full_batch=1.25e-16,
        microbatched=0.0,
        identical=True,
        verdict="ok",
    )
    report = ParityReport(rows=(row,), tolerance=1e-12, dtype="float64")
    assert repr(report).startswith("<ParityReport ok: 1 pipelined run equal")
    cells = [cell.text for cell in parsed(report._repr_html_()).iter("td")]
    assert cells == ["1e-16", "0.0", "yes", "ok"]
    assert EVIL not in report._repr_html_() and "gradient &lt;script" in report._repr_html_()


def test_plans_of_unmeasured_models_show_their_schedule() -> None:
    plan = Plan(balance=(1, 1), num_microbatches=2)
    assert re.findall(r"<title>(\w+)", plan._repr_html_())[:2] == ["0F0", "0F1"]
