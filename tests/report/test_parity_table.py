"""A literal drawing of a small report."""

import io

from rich.console import Console

from stagewise.parity import Configuration, ParityReport, ParityRow
from stagewise.report import render_parity


def row(num_stages: int, quantity: str, full: float, **more: object) -> ParityRow:
    configuration = Configuration(
        schedule="1f1b", num_stages=num_stages, num_microbatches=4, recompute="except_last"
    )
    fields = {"microbatched": 0.0, "identical": True, "verdict": "ok", **more}
    return ParityRow(
        configuration=configuration,
        quantity=quantity,
        full_batch=full,
        **fields,  # type: ignore[arg-type]
    )


REPORT = ParityReport(
    rows=(
        row(1, "loss", 0.25, verdict="explained", reason="random numbers (1 Dropout)"),
        row(1, "gradient 0.weight", 3e-12),
        row(2, "loss", 0.25, verdict="explained", reason="random numbers (1 Dropout)"),
        row(
            2,
            "gradient 0.weight",
            float("inf"),
            microbatched=float("inf"),
            identical=False,
            verdict="FAILED",
            reason="other bits",
        ),
    ),
    tolerance=1e-10,
    dtype="float64",
)


def test_tables_and_sentence() -> None:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(render_parity(REPORT))
    assert [line.rstrip() for line in capture.get().splitlines() if line.strip()] == DRAWN


def test_verdicts() -> None:
    assert not REPORT.ok
    assert [r.quantity for r in REPORT.failures] == ["gradient 0.weight"]
    assert REPORT.table()[1] == {
        "quantity": "gradient 0.weight",
        "full_batch": float("inf"),
        "microbatched": float("inf"),
        "identical": False,
        "verdict": "FAILED",
        "reason": "other bits",
        "configuration": "1f1b, 2 stages, 4 microbatches, recompute except_last",
    }


DRAWN = [
    "Relative difference to the plain model (float64, round-off up to 1e-10)",
    "                                                   identical across",
    " quantity            full batch   by microbatch              stages     verdict",
    " ──────────────────────────────────────────────────────────────────────────────",
    " loss                     2e-01               0                 yes   explained",
    " gradient 0.weight          inf             inf                  NO      FAILED",
    "Largest differences to the plain model by microbatch",
    " schedule, stages, microbatches, recompute   loss   gradient     verdict",
    " ───────────────────────────────────────────────────────────────────────",
    " 1f1b, 1, 4, except_last                        0          0   explained",
    " 1f1b, 2, 4, except_last                        0        inf      FAILED",
    "FAILED: gradient 0.weight differs from the plain model in 1 of 2 pipelined runs;",
    "gradient 0.weight (1f1b, 2 stages, 4 microbatches, recompute except_last): other",
    "bits",
]
