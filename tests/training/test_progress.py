"""What a run shows and logs."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from stagewise.training.progress import LOG_FILE, Shown, StepRecord, ValidationRecord


def record(step: int, **fields: float) -> StepRecord:
    values = {"loss": 2.5, "seconds": 0.5, "rate": 1234.56, "bubble_fraction": None, **fields}
    return StepRecord(step=step, rate_unit="tokens", **values)  # type: ignore[arg-type]


def shown(run: Path, *, terminal: bool, first_step: int = 0) -> tuple[Shown, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    reporter = Shown(console=console, run=run, first_step=first_step, num_steps=20, line_every=10)
    return reporter, file


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    reporter, file = shown(tmp_path, terminal=False)
    reporter.step(record(9))
    reporter.step(record(10, bubble_fraction=0.25))
    reporter.validation(ValidationRecord(step=10, validation_loss=2.0, metrics={"accuracy": 0.5}))
    reporter.step(record(20))
    reporter.close()
    assert file.getvalue().splitlines() == [
        "step 10/20  loss 2.5000  1,235 tokens/s  bubble 25%  5 s left",
        "step 10: validation loss 2.0000  accuracy 0.5000",
        "step 20/20  loss 2.5000  1,235 tokens/s  bubble 25%  0 s left",
    ]


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    reporter, file = shown(tmp_path, terminal=True)
    reporter.step(record(9, bubble_fraction=0.25))
    reporter.say("[not markup]")
    reporter.close()
    assert "9/20" in file.getvalue()
    assert "loss 2.5000  1,235 tokens/s  bubble 25%" in file.getvalue()
    assert "[not markup]" in file.getvalue()


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_null(tmp_path: Path, loss: float) -> None:
    reporter, _ = shown(tmp_path, terminal=False)
    reporter.step(record(1, loss=loss))
    reporter.close()
    fields = json.loads((tmp_path / LOG_FILE).read_text())
    assert fields == {"step": 1, "loss": None, "seconds": 0.5, "tokens_per_second": 1234.6}


def test_a_resumed_runs_log_goes_on_from_its_step(tmp_path: Path) -> None:
    reporter, _ = shown(tmp_path, terminal=False)
    for step in range(1, 6):
        reporter.step(record(step))
        if step == 3:
            reporter.validation(ValidationRecord(step=3, validation_loss=2.0, metrics={}))
    reporter.close()
    with (tmp_path / LOG_FILE).open("a") as log:
        log.write('{"step": 6, "lo')
    resumed, _ = shown(tmp_path, terminal=False, first_step=3)
    resumed.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert steps == [1, 2, 3]
