"""The screen after a search: the decision, why it takes as long, and what else there was."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from stagewise.costs import CellCost
from stagewise.planning import SearchResult, search
from stagewise.planning.search.finalists import Tried
from stagewise.report.search_table import as_record, explanation

CELL = CellCost(
    name="cell",
    forward_seconds=1,
    backward_seconds=2,
    parameter_bytes=10,
    activation_bytes=1000,
    output_bytes=100,
    gradient_bytes=100,
)


def found(**options: object) -> SearchResult:
    return search(
        lambda count: [CELL] * 8,
        2,
        num_microbatches=[4, 8],
        schedules=["1f1b", "gpipe"],
        synthesis=False,
        **options,  # type: ignore[arg-type]
    )


def text(result: SearchResult) -> str:
    shown = StringIO()
    console = Console(width=120, file=shown)
    for part in explanation(result):
        console.print(part)
    return shown.getvalue()


def test_the_decision_stands_first() -> None:
    result = found()
    lines = text(result).splitlines()
    assert lines[0] == "fastest plan: 1f1b, 4 microbatches"
    # 12 seconds a microbatch on each of 2 devices, 5 rounds of which 4 are full.
    assert lines[1].startswith(
        "step 60 s predicted, 25.0% above the lower bound of any plan, 48 s;"
    )
    assert lines[2] == ("bubble 20.0%: fill and drain 20.0%, imbalance 0.0%, communication 0.0%")
    assert lines[3] == "cells per stage: 4, 4"


def test_memory_stands_against_the_cap() -> None:
    result = found(memory_bytes=7_000.0)
    shown = text(result)
    share = max(result.chosen.device_bytes) / 7_000
    assert f"{share:.0%}" in shown and "of the cap" in shown
    assert "gpipe, 4 microbatches: device " in shown and "KiB of 6.84 KiB" in shown


def test_segments_are_counted() -> None:
    result = found(memory_bytes=7_000.0)
    assert result.plan.segments
    again = sum(n for parts in result.plan.segments for n, recomputed in parts if recomputed)
    assert f"recomputed: {again} of 8 cells, in segments" in text(result)


def test_the_record_has_all_as_json() -> None:
    result = found(memory_bytes=7_000.0)
    record = json.loads(json.dumps(as_record(result)))
    assert record["step_seconds"] == result.chosen.seconds
    assert sum(record["bubble"].values()) == pytest.approx(result.plan.timeline.bubble_fraction)
    assert len(record["rejected"]) == len(result.rejected) > 0
    assert record["work"]["simulations"] == result.work.simulations


def test_what_was_tried_stands_beside_what_was_predicted() -> None:
    tried = Tried(
        what="1f1b, 4 microbatches",
        predicted_seconds=60,
        measured_seconds=66,
        corrected_seconds=65,
        num_steps=3,
    )
    result = replace(found(), tried=(tried,), machine="2 x cpu")
    assert "Tried, on 2 x cpu" in text(result)
    row = next(line for line in text(result).splitlines() if "60 s" in line and "66 s" in line)
    assert "1f1b, 4 microbatches" in row and "3" in row and "65 s" in row
    assert as_record(result)["tried"] == [vars(tried)]
    assert (result.plan.measured_seconds, result.plan.machine) == (66, "2 x cpu")


def test_one_device_and_data_parallelism_stand_beside_it() -> None:
    uncapped, capped = text(found()), text(found(memory_bytes=7_000.0))
    assert "instead, one device: step 96 s; needs 8.12 KiB a device\n" in uncapped
    assert "instead, data parallelism on 2 devices: step 48 s, without the sum of" in uncapped
    assert "which does not fit" in capped and "which" not in uncapped.partition("instead,")[2]
