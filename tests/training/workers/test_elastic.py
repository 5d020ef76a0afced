"""What a restarted run had done is read from its log."""

import json
import os
from pathlib import Path

from stagewise.training.workers.elastic import Interrupted


def test_the_last_step_is_read_from_the_log(tmp_path: Path) -> None:
    assert Interrupted.of(tmp_path / "log.jsonl", 1).last_step == 0
    lines = [json.dumps({"step": 7, "loss": 1.0}), '{"step": "8"', '{"step": null}', "[9]", "\x00"]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    os.utime(tmp_path / "log.jsonl", (5.0, 5.0))
    assert Interrupted.of(tmp_path / "log.jsonl", 1) == Interrupted(
        last_step=7, when=5.0, restart=1
    )
