"""`stagewise plan` where something is "auto": options, progress, and the answer in one screen."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stagewise.cli import options as opt
from stagewise.errors import PlanError, UsageError
from stagewise.planning.devices import DeviceSpec, parse_bytes
from stagewise.planning.search.cuts import SEGMENTS
from stagewise.schedule import POLICIES, SCHEDULES

if TYPE_CHECKING:
    from stagewise.planning import SearchResult
    from stagewise.training.plans import SearchOptions
    from stagewise.training.recipe import Recipe

AUTO = "auto"

Microbatches = Annotated[
    str | None,
    typer.Option(
        metavar="N|N,N,...|auto",
        help="Into how many microbatches each minibatch is split: a number, several to choose "
        "from, or auto. More keep the devices busier, but each must still be worth computing. "
        f"[default: {opt.DEFAULT_MICROBATCHES}, or those of the schedule's file]",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What each device has, such as 8GB: the fastest plan that fits is searched for. "
        "Counted are parameters, gradients, the optimizer's state and activations.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The options of which each may be "auto", or asks for a search by itself."""

    schedule: str
    recompute: str
    replicas: str | None
    microbatches: str | None
    memory: str | None

    @property
    def searched(self) -> bool:
        """Whether they ask for a search."""
        return (
            AUTO in (self.schedule, self.recompute, self.replicas, self.microbatches)
            or self.recompute == SEGMENTS
            or self.memory is not None
            or "," in (self.microbatches or "")
        )

    def options(
        self, *, devices: int | None, stages: int | None, balance: str | None
    ) -> "SearchOptions":
        """What to search over; raises UsageError where nothing would be left to choose."""
        fixed = {
            "--stages": stages is not None,
            "--balance": balance is not None,
            "--replicas": self.replicas not in (None, AUTO),
        }
        if given := [name for name, is_given in fixed.items() if is_given]:
            raise UsageError(
                f"the search chooses the cut itself, but {', '.join(given)} was given; leave it "
                "out and say --devices, or leave out auto and --memory"
            )
        for what, got, known in (
            ("schedule that the search knows", self.schedule, {AUTO, *SCHEDULES}),
            ("recompute policy", self.recompute, {AUTO, SEGMENTS, *POLICIES}),
        ):
            if got not in known:
                raise PlanError(
                    f"there is no {what} called {got!r}; choose one of {', '.join(sorted(known))}"
                )
        from stagewise.training.plans import SearchOptions

        return SearchOptions(
            num_devices=opt.DEFAULT_DEVICES if devices is None else devices,
            num_microbatches=(
                "auto"
                if self.microbatches == AUTO
                else parsed_microbatches(self.microbatches) or opt.DEFAULT_MICROBATCHES
            ),
            schedules=None if self.schedule == AUTO else [self.schedule],
            recompute=self.recompute,
            replicas=self.replicas == AUTO,
            memory_bytes=None if self.memory is None else parse_bytes(self.memory, "--memory"),
        )

    def arguments(self) -> list[str]:
        """The part of the command line that gives these wishes again."""
        given = {
            "--schedule": self.schedule,
            "--recompute": self.recompute,
            "--replicas": self.replicas,
            "--microbatches": self.microbatches,
            "--memory": self.memory,
        }
        return [word for name, text in given.items() if text is not None for word in (name, text)]


def parsed_microbatches(text: str | None) -> int | tuple[int, ...] | None:
    """ "8" or "4,8"; raises PlanError for anything else."""
    if text is None:
        return None
    words = text.split(",")
    numbers = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(numbers) != len(words) or 0 in numbers:
        raise PlanError(
            f"--microbatches {text!r} is no number from 1; write one, such as 8, several, such as "
            "4,8,16, or auto"
        )
    return numbers if len(numbers) > 1 else numbers[0]


def run_search(
    recipe: "Recipe", options: "SearchOptions", spec: DeviceSpec | None, *, as_json: bool
) -> None:
    """What every worker does; rank 0 prints."""
    import torch.distributed as dist

    from stagewise.training.plans import estimated_search, measured_search

    speaks = not (dist.is_initialized() and dist.get_rank() != 0)
    with progress_bar(speaks) as progress:
        if spec is not None:
            result = estimated_search(recipe, options, spec, progress)
        else:
            result = measured_search(recipe, options, progress)
    if speaks:
        show(result, as_json=as_json)


@contextmanager
def progress_bar(visible: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(
        *columns, console=console, transient=True, disable=not (visible and console.is_terminal)
    ) as bar:
        task = bar.add_task("searching", total=None)

        def advance(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield advance


def show(result: "SearchResult", *, as_json: bool) -> None:
    """Print what was found, as a screen or as JSON that is the plan too."""
    from stagewise.report.search import as_record, explanation

    if as_json:
        plan = json.loads(result.plan.to_json())
        print(json.dumps({**plan, "search": as_record(result)}, indent=2))
        return
    console = Console()
    for part in explanation(result):
        console.print(part, markup=False, highlight=False, soft_wrap=True)
