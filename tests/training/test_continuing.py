"""A run that goes on says what the interruption has cost."""

import json
import os
from pathlib import Path

from stagewise.training.continuing import Interrupted, Recovering
from stagewise.training.progress import ChangeRecord, Silent, StepRecord


class Kept(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: object) -> None:
        self.said.append(str(text))

    def change(self, record: ChangeRecord) -> None:
        self.said.append(f"{record.change}: {record.reason}")


def step(number: int) -> StepRecord:
    return StepRecord(step=number, loss=1.0, seconds=2.0, rate=1.0, rate_unit="samples")


def test_the_last_step_is_read_from_the_log(tmp_path: Path) -> None:
    assert Interrupted.of(tmp_path, 1).last_step == 0
    lines = [json.dumps({"step": 7, "loss": 1.0}), '{"step": "8"', '{"step": null}', "[9]", "\x00"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    os.utime(tmp_path / "log.jsonl", (5.0, 5.0))
    assert Interrupted.of(tmp_path, 1) == Interrupted(last_step=7, when=5.0, restart=1)


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
    assert "workers came or left; the last step was 7" in kept.said[0]
    assert kept.said[1].endswith("with 0 steps repeated in 0.0 s")
