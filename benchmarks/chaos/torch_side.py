"""What a user of torch.distributed.pipelining sees of the same faults, and after how long."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.processes import run
from benchmarks.chaos.strike import CHAOS
from benchmarks.chaos.trial import NUM_STEPS, Place, told

_LIMIT_SECONDS, _NUM_RANKS = 90.0, 2
_ERROR = re.compile(r"\[rank\d+\]: [\w.]*(Error|Exception)\b")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One row of the table."""

    fault: str
    struck: str
    seconds: float | None  # from the fault to the end of the last process; None: it did not end
    named: bool  # whether all words that must name it were in the output
    code: int | None
    said: str


def under_torch(fault: Fault, place: Place) -> Seen:
    """Train on two ranks with the fault."""
    place = replace(place, rank=min(place.rank, _NUM_RANKS - 1))
    with TemporaryDirectory() as directory:
        folder, mark = Path(directory), Path(directory, "mark")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(_NUM_RANKS), "-m", "benchmarks.chaos.torch_loop"]
        environment = {CHAOS: told(fault, place, mark), "CHAOS_STEPS": str(NUM_STEPS)}
        ended = run(command, folder, environment, _LIMIT_SECONDS)
        has_ended = ended.code is not None and mark.exists()
        words = [word.format(rank=place.rank, step=place.step) for word in fault.words]
        return Seen(
            fault=fault.name,
            struck=f"rank {place.rank}, step {place.step}",
            seconds=ended.gone_at - float(mark.read_text()) if has_ended else None,
            named=all(word in ended.text for word in words),
            code=ended.code,
            said=_said(ended.text),
        )


def _said(text: str) -> str:
    """Return the last error of a rank: torchrun's own, which follows, tells exit codes only."""
    lines = [line for line in text.splitlines() if _ERROR.match(line)]
    return lines[-1][:160] if lines else ""
