"""A parity report in the terminal: per quantity, per run, then the verdict in one sentence."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stagewise.parity import ParityReport, ParityRow

_STYLES = {"ok": "green", "explained": "yellow", "FAILED": "bold red"}
_KINDS = ("loss", "outputs", "gradient", "buffer", "parameter")


def render_parity(report: ParityReport) -> RenderableType:
    """Return two tables of relative differences to the plain model, and the summary.

    The first has a row per quantity with its largest differences over all runs, the second a row
    per run with the largest difference of each kind to the plain model by microbatch.
    """
    return Group(_quantities(report), _runs(report), Text(report.summary()))


def _quantities(report: ParityReport) -> Table:
    table = _table(
        f"Relative difference to the plain model ({report.dtype}, round-off up to "
        f"{report.tolerance:g})",
        "quantity",
        "full batch",
        "by microbatch",
        "identical across stages",
        "verdict",
    )
    for row in report.table():
        verdict = str(row["verdict"])
        table.add_row(
            Text(str(row["quantity"]), overflow="fold"),
            _number(row["full_batch"]),
            _number(row["microbatched"]),
            "yes" if row["identical"] else "NO" if verdict == "FAILED" else "except replicas",
            Text(verdict, _STYLES[verdict]),
        )
    return table


def _runs(report: ParityReport) -> Table:
    grouped: dict[object, list[ParityRow]] = {}
    for row in report.rows:
        grouped.setdefault(row.configuration, []).append(row)
    kinds = [kind for kind in _KINDS if any(row.quantity.startswith(kind) for row in report.rows)]
    first = "schedule, stages, microbatches, recompute"
    table = _table("Largest differences to the plain model by microbatch", first, *kinds, "verdict")
    for configuration in report.configurations:
        rows = grouped[configuration]
        worst = report.worst(rows)
        table.add_row(
            Text(
                f"{configuration.schedule}, {configuration.stages}, "
                f"{configuration.num_microbatches}, {configuration.recompute}",
                overflow="fold",
            ),
            *(
                _number(
                    max((r.microbatched for r in rows if r.quantity.startswith(kind)), default=0.0)
                )
                for kind in kinds
            ),
            Text(worst.verdict, _STYLES[worst.verdict]),
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _number(value: object) -> str:
    return f"{value:.0e}" if value else "0"
