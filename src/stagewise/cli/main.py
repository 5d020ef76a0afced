"""The command `stagewise`: a table of commands, each imported when it is called.

So `stagewise simulate` and `--help` answer at once, without importing torch.
"""

import functools
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import stagewise
from stagewise.cli.config_file import Configured
from stagewise.cli.plain_command import PlainCommand
from stagewise.errors import CellError, ExactnessWarning, RecipeError, StagewiseError, UsageError


@dataclass(frozen=True, kw_only=True)
class Command:
    """The location of a command's typer-annotated function, and its line in the command list."""

    module: str
    function: str
    help: str
    configured: bool = False  # reads its options from a TOML file too


COMMANDS = {
    "init": Command(
        module="stagewise.cli.train.init_command",
        function="init",
        help="Write a recipe to start from, which trains as it is.",
    ),
    "train": Command(
        module="stagewise.cli.train.train_command",
        function="train",
        help="Train the model of a recipe through a pipeline.",
        configured=True,
    ),
    "report": Command(
        module="stagewise.cli.shown.report_command",
        function="report_command",
        help="Show where the time and the memory of a run went, and what would help.",
    ),
    "export": Command(
        module="stagewise.cli.export_command",
        function="export",
        help="Write the model of a run's checkpoint as safetensors.",
    ),
    "generate": Command(
        module="stagewise.cli.generate_command",
        function="generate_command",
        help="Continue prompts with the model of a run, if it is one of transformers.",
    ),
    "plan": Command(
        module="stagewise.cli.plan_command",
        function="plan_command",
        help="Measure a recipe's model; show how it would be cut and how fast it would run.",
    ),
    "advise": Command(
        module="stagewise.cli.advise_command",
        function="advise_command",
        help="Recommend a pipeline or another way to train a recipe's model.",
    ),
    "check": Command(
        module="stagewise.cli.check_command",
        function="check_command",
        help="Run a recipe's model plain and pipelined, and check that both train alike.",
    ),
    "doctor": Command(
        module="stagewise.cli.doctor_command",
        function="doctor_command",
        help="Check a machine, or a set of hosts, before a run; say what to do.",
    ),
    "schedules": Command(
        module="stagewise.cli.shown.schedules_command",
        function="schedules_command",
        help="Draw all schedules beside each other, for some devices and microbatches.",
    ),
    "simulate": Command(
        module="stagewise.cli.simulate_command",
        function="simulate_command",
        help="Draw the timeline of a schedule from costs alone, without model or device.",
    ),
}


def command_app(name: str) -> typer.Typer:
    """Return the command called `name` as a separate application; imports its module."""
    command = COMMANDS[name]
    function: Callable[..., None] = getattr(import_module(command.module), command.function)
    single = _application()
    single.command(cls=Configured if command.configured else PlainCommand)(function)
    return single


def _application() -> typer.Typer:
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )


def _build() -> typer.Typer:
    """Return all commands; each forwards its arguments, including `--help`, to its application."""
    built = _application()
    built.callback(invoke_without_command=True)(_root)
    for name, command in COMMANDS.items():
        forwards = built.command(
            name,
            help=command.help,
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )
        forwards(_forward)
    return built


def _forward(context: typer.Context) -> None:
    command_app(context.info_name or "")(args=context.args, prog_name=context.command_path)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Pipeline-parallel training for PyTorch, with the plain model's gradients.

    `stagewise COMMAND --help` explains a command.
    """
    if version:
        typer.echo(f"stagewise {stagewise.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = _build()


def main() -> None:
    """Run the command line; an error becomes one message and exit code 1, or 2 for wrong use."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show, warnings.showwarning)
            app(prog_name="stagewise")
    except StagewiseError as error:
        _say("error: ", "bold red", f"{error}{_trace(error)}")
        sys.exit(2 if isinstance(error, UsageError) else 1)


def _show(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any
) -> None:
    if issubclass(category, ExactnessWarning):  # its place is a line of typer
        _say("warning: ", "bold yellow", message)
    else:
        otherwise(message, category, *place)


def _trace(error: StagewiseError) -> str:
    """Return the traceback of what the user's code raised, without our and torch's own lines."""
    is_users = isinstance(error, CellError | RecipeError)
    if error.__cause__ is None or isinstance(error.__cause__, SyntaxError) or not is_users:
        return ""
    told = traceback.TracebackException.from_exception(error.__cause__)
    named = (sys.modules[name].__file__ for name in ("stagewise", "torch") if name in sys.modules)
    libraries = tuple(str(Path(file).parent) for file in named if file is not None)
    for one in _chain(told):
        users = [frame for frame in one.stack if not frame.filename.startswith(libraries)]
        one.stack = traceback.StackSummary.from_list(users or one.stack[-1:])
    return "\n\n" + "".join(told.format()).rstrip()


def _chain(told: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """Yield an exception and those that led to it."""
    one: traceback.TracebackException | None = told
    while one is not None:
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _say(kind: str, style: str, message: object) -> None:
    Console(stderr=True, soft_wrap=True).print(Text.assemble((kind, style), str(message)))
