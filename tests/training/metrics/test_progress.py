"""What a run shows and logs."""

import io
import json
import math
import time
from pathlib import Path

import pytest
from rich.console import Console

from stagewise.recording import LOG_FILE
from stagewise.training.metrics.progress import (
    ChangeRecord,
    Shown,
    Silent,
    StepRecord,
    ValidationRecord,
)
from stagewise.training.metrics.recovering import Recovering
from stagewise.training.workers.elastic import Interrupted


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
    reporter.step(record(10, bubble_fraction=0.25, slowest=(1, 1.26)))
    reporter.validation(ValidationRecord(step=10, validation_loss=2.0, metrics={"accuracy": 0.5}))
    reporter.step(record(20))
    reporter.close()
    assert file.getvalue().splitlines() == [
        "step 10/20  loss 2.5000  1,235 tokens/s  bubble 25%  slowest stage 1 (1.3x)  5 s left",
        "step 10: validation loss 2.0000  accuracy 0.5000",
        "step 20/20  loss 2.5000  1,235 tokens/s  bubble 25%  slowest stage 1 (1.3x)  0 s left",
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
    assert -1e-3 <= time.time() - fields.pop("time") < 100  # it is rounded
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


class Kept(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: object) -> None:
        self.said.append(str(text))

    def change(self, record: ChangeRecord) -> None:
        self.said.append(f"{record.change}: {record.reason}")


def step(number: int) -> StepRecord:
    return StepRecord(step=number, loss=1.0, seconds=2.0, rate=1.0, rate_unit="samples")


def test_lost_time_and_repeated_steps_are_told_once_all_is_regained() -> None:
    kept = Kept()
    lost = Interrupted(last_step=7, when=0.0, restart=1)
    reporter = Recovering(kept, lost, first_step=5, num_workers=3)
    for number in (6, 7, 8):
        reporter.step(step(number))
    assert len(kept.said) == 2
    assert kept.said[0].startswith("going on with 3 worker(s) after step 5: restart 1, after a")
    assert kept.said[1].endswith(" s, with 2 steps repeated in 4.0 s")


def test_without_a_failure_nothing_is_repeated() -> None:
    kept = Kept()
    lost = Interrupted(last_step=7, when=0.0, restart=0)
    reporter = Recovering(kept, lost, first_step=7, num_workers=4)
    reporter.step(step(8))
    assert "the workers were started again; the last step was 7" in kept.said[0]
    assert kept.said[1].endswith("with 0 steps repeated in 0.0 s")
