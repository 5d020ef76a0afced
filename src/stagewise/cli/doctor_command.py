"""`stagewise doctor`: check the machines of a run before it starts."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagewise.cli import options as opt
from stagewise.cli.typed import command_line
from stagewise.cli.workers import end_with, report_errors_once, run_in_workers
from stagewise.training.workers.environment import FAILURE_EXIT_CODE, launched, world_size

if TYPE_CHECKING:
    from stagewise.doctor.diagnose import Diagnosis
    from stagewise.doctor.remedies import Finding

Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of worker processes to start and examine on this machine. [default: those "
        "that torchrun has started; else one for each GPU, or only this process]",
        show_default=False,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print everything that was found as JSON instead of a table.")
]
_STYLES = {"ok": "green", "advice": "yellow", "must be done": "bold red"}


def doctor_command(
    devices: Devices = None, timeout: opt.Timeout = opt.DEFAULT_TIMEOUT, as_json: AsJson = False
) -> None:
    """Check a machine, or a set of hosts, before a run; say what to do.

    Examines whether ranks reach each other, latency and bandwidth of every link in both directions,
    GPUs and the access between them, NCCL, memory, shared memory, limits on open files, clocks, and
    whether versions are equal. The exit code is 1 if something must be done.

    Example: stagewise doctor --devices 4

    Example, on every host: torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d
    --rdzv-endpoint HOST:29500 -m stagewise doctor
    """
    with report_errors_once():
        if devices is None:
            devices = world_size() if launched() else _accelerators()
        words = {"--devices": devices, "--timeout": timeout}
        run_in_workers(
            devices,
            ["doctor", *command_line(words), *(["--json"] if as_json else [])],
            before=lambda: None,
            body=lambda: _run(as_json=as_json),
            timeout=timeout,
        )


def _accelerators() -> int:
    from stagewise.engine.transport.processes import accelerators

    return max(1, len(accelerators()))


def _run(*, as_json: bool) -> None:
    """Examine on every worker; rank 0 prints."""
    from stagewise.doctor.diagnose import diagnose
    from stagewise.doctor.remedies import MUST, findings
    from stagewise.engine.transport.processes import is_first

    diagnosis = diagnose()
    found = findings(diagnosis)
    is_well = all(each.verdict != MUST for each in found)
    if is_first() and as_json:
        told = {
            "ok": is_well,
            "findings": [asdict(each) for each in found],
            **diagnosis.to_dict(),
        }
        print(json.dumps(told, indent=2))
    elif is_first():
        _print(diagnosis, found)
    if not is_well:
        end_with(FAILURE_EXIT_CODE)


def _print(diagnosis: "Diagnosis", found: "list[Finding]") -> None:
    from stagewise.report import format_seconds
    from stagewise.units import size_in_words

    console = Console(soft_wrap=True)
    if diagnosis.links:
        links = Table(title="links, one at a time", title_justify="left")
        for name in ("from rank", "to rank", "latency", "bandwidth"):
            links.add_column(name, justify="right")
        for link in diagnosis.links:
            latency = format_seconds(link.latency_seconds)
            rate = f"{size_in_words(link.bytes_per_second)}/s"
            links.add_row(str(link.source), str(link.target), latency, rate)
        console.print(links)
    table = Table(title="what was found, and what to do", title_justify="left")
    for name in ("check", "found", "verdict", "what to do"):
        table.add_column(name, overflow="fold")
    for each in found:
        verdict = Text(each.verdict, _STYLES[each.verdict])
        table.add_row(each.check, Text(each.found), verdict, Text(each.remedy))
    console.print(table)
