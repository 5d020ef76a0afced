"""The result of a parity check, the pipelined model against the plain one, as plain data.

Rows are made by `stagewise.checker` and printed by `stagewise.report`. A difference is the
largest absolute one, relative to the largest absolute value of the plain model's tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from stagewise.errors import ParityError
from stagewise.html_parts import table_of

Verdict = Literal["ok", "explained", "FAILED"]

_SHOWN_FAILURES = 5
_SHOWN = {  # columns in a notebook
    "quantity": "quantity",
    "full_batch": "to the full batch",
    "microbatched": "by microbatch",
    "identical": "identical across stages",
    "verdict": "verdict",
}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """How the pipelined model was run."""

    schedule: str
    num_stages: int
    num_microbatches: int
    recompute: str
    replicas: tuple[int, ...] = ()  # devices per stage, where some have several

    @property
    def stages(self) -> str:
        """The number of stages, and of devices if some stages have several."""
        return f"{self.num_stages}{self._on}"

    @property
    def _on(self) -> str:
        return f" on {'+'.join(map(str, self.replicas))} devices" if self.replicas else ""

    def __str__(self) -> str:
        return (
            f"{self.schedule}, {self.num_stages} stage{'s' * (self.num_stages > 1)}{self._on}, "
            f"{self.num_microbatches} microbatch{'es' * (self.num_microbatches > 1)}, "
            f"recompute {self.recompute}"
        )


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One quantity of one run: "loss", "gradient 0.weight", "buffer 1.running_mean", ...

    `full_batch` is the relative difference to the plain model on the whole minibatch,
    `microbatched` to the plain model run one microbatch at a time with the pipeline's random
    numbers; infinite if one side lacks the tensor or has non-finite values. `identical`: bit for
    bit equal to this schedule's first run (first number of stages and policy); gradients may differ
    where replicas sum them in another order.
    """

    configuration: Configuration
    quantity: str
    full_batch: float
    microbatched: float
    identical: bool
    verdict: Verdict
    reason: str = ""  # of a verdict that is not "ok"

    @property
    def severity(self) -> tuple[int, bool, float, float]:
        """Sort key: larger is worse."""
        rank = ("ok", "explained", "FAILED").index(self.verdict)
        return rank, not self.identical, self.microbatched, self.full_batch


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Every quantity of every run; differences up to `tolerance` count as round-off."""

    rows: tuple[ParityRow, ...]
    tolerance: float
    dtype: str

    @property
    def ok(self) -> bool:
        """Whether every difference is round-off, or explained by mathematics."""
        return not self.failures

    @property
    def failures(self) -> tuple[ParityRow, ...]:
        """The rows with verdict FAILED."""
        return tuple(row for row in self.rows if row.verdict == "FAILED")

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """The configurations that were run, in order."""
        return tuple(dict.fromkeys(row.configuration for row in self.rows))

    def worst(self, rows: Sequence[ParityRow]) -> ParityRow:
        """Return the most severe of `rows`."""
        return max(rows, key=lambda row: row.severity)

    def table(self) -> list[dict[str, object]]:
        """Return one dictionary per quantity: largest differences and worst verdict of all runs."""
        grouped: dict[str, list[ParityRow]] = {}
        for row in self.rows:
            grouped.setdefault(row.quantity, []).append(row)
        return [
            {
                "quantity": quantity,
                "full_batch": max(row.full_batch for row in rows),
                "microbatched": max(row.microbatched for row in rows),
                "identical": all(row.identical for row in rows),
                "verdict": self.worst(rows).verdict,
                "reason": self.worst(rows).reason,
                "configuration": str(self.worst(rows).configuration),
            }
            for quantity, rows in grouped.items()
        ]

    def summary(self) -> str:
        """Return the verdict in one sentence."""
        num_runs = len(self.configurations)
        runs = f"{num_runs} pipelined run{'s' * (num_runs != 1)}"
        if not self.ok:
            culprits = list(dict.fromkeys(row.quantity for row in self.failures))
            shown = ", ".join(culprits[:_SHOWN_FAILURES])
            if (more := len(culprits) - _SHOWN_FAILURES) > 0:
                shown += f" and {more} more"
            verb = "differs" if len(culprits) == 1 else "differ"
            num_wrong = len({row.configuration for row in self.failures})
            first = self.failures[0]
            return (
                f"FAILED: {shown} {verb} from the plain model in {num_wrong} of {runs}; "
                f"{first.quantity} ({first.configuration}): {first.reason}"
            )
        explained = [row for row in self.rows if row.verdict == "explained"]
        reasons = list(dict.fromkeys(row.reason for row in explained))
        within = f"within round-off ({self.tolerance:g} in {self.dtype})"
        alike = "identical at every cut"
        if not all(row.identical for row in self.rows):
            alike += ", except for the order in which replicas sum gradients"
        if not explained:
            return f"ok: {runs} equal the plain model {within}, {alike}"
        return (
            f"ok: {runs} equal the plain model run by microbatch {within}, {alike}; the full batch "
            f"differs, which is explained by {'; '.join(reasons)}"
        )

    def __repr__(self) -> str:
        return f"<ParityReport {self.summary()}>"

    def _repr_html_(self) -> str:
        rows = [[_in_words(row[name]) for name in _SHOWN] for row in self.table()]
        return f"<div><b>{escape(self.summary())}</b></div>{table_of('', [*_SHOWN.values()], rows)}"

    def raise_for_failure(self) -> None:
        """Raise ParityError with the summary unless `ok`."""
        if not self.ok:
            raise ParityError(self.summary())


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0e}" if isinstance(value, float) and value else str(value)
