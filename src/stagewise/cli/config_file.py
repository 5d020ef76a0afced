"""A command's options from a TOML file, which the command line overrides.

Problem: what a run was started with should lie beside its recipe, not in a shell's history; but a
second list of options would soon differ from the command line's. Idea: the file's keys are the
command's own options. Their values take the place of the options' defaults, after the same checks.
"""

import difflib
import inspect
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from typer.models import OptionInfo

from stagewise.cli.plain_command import PlainCommand
from stagewise.errors import UsageError

_PLANNING = (
    *("stages", "devices", "replicas", "microbatches", "schedule", "recompute", "balance"),
    *("memory", "speeds"),
)
_MESH = ("mesh", "pipeline", "shard", "tensor")
# What the command line gives -> what it contradicts in the file, which then does not count.
_SETS_ASIDE: Mapping[str, tuple[str, ...]] = {
    "plan": _PLANNING,
    **dict.fromkeys(_PLANNING, ("plan",)),
    "replicas": ("stages", "devices", "balance", "plan", *_MESH),
    "stages": ("replicas", "balance", "plan", "mesh", "pipeline"),
    "devices": ("replicas", "plan"),
    "mesh": ("pipeline", "shard", "tensor", "stages", "devices", "replicas", "balance"),
    **dict.fromkeys(("pipeline", "shard", "tensor"), ("mesh",)),
    "resume": ("init", "out", "seed"),
    "init": ("resume",),
}
_ASKS_NO_OTHER = "resume", "auto"  # goes on with the very run that the file has
_NOT_KEYS = ("config", "no_config")


@dataclass(frozen=True)
class _Option:
    """An option as the command's function declares it."""

    kind: object
    told: OptionInfo
    default: object

    @property
    def needed(self) -> str:
        """What its value must be, in words."""
        if bool in (self.kind, *getattr(self.kind, "__args__", ())):
            return "true or false"
        if self.told.parser is None and int in (self.kind, *getattr(self.kind, "__args__", ())):
            least, most = self.told.min, self.told.max
            above = "" if least is None else f" of at least {least}"
            return f"an integer{above}" + ("" if most is None else f" and at most {most}")
        number = "a number or " if _takes_numbers(self.metavar) else ""
        return f"{number}a string" + (", or a list" if "..." in self.metavar else "")

    @property
    def metavar(self) -> str:
        return self.told.metavar or "FOLDER"

    @property
    def example(self) -> str:
        """A value for it, in TOML."""
        if self.default not in (None, ""):
            return _toml(self.default)
        such = re.search(r"such as ((?:[^\s;).,]|[.,](?=[^\s;).,]))+)", self.told.help or "")
        if self.needed.startswith("an integer"):
            return such[1] if such else "2"
        return _toml(such[1] if such else self.metavar)

    def taken(self, value: object) -> object:
        """Return the value as the command line would give it; None if it is of a wrong type."""
        if self.needed == "true or false":
            return value if isinstance(value, bool) else None
        if self.needed.startswith("an integer"):
            if not isinstance(value, int) or isinstance(value, bool):
                return None
            least, most = self.told.min, self.told.max
            fits = (least is None or value >= least) and (most is None or value <= most)
            return value if fits else None
        return _as_text(value, self.metavar)


def _options_of(function: Callable[..., object]) -> dict[str, _Option]:
    """Return the options that a file may hold, by parameter."""
    hints = get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind, told = hints[name].__origin__, hints[name].__metadata__[0]
        if isinstance(told, OptionInfo) and name not in _NOT_KEYS:
            found[name] = _Option(kind, told, parameter.default)
    return found


class Configured(PlainCommand):
    """A command on a RECIPE, with the options `--config` and `--no-config`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, with the file's values as the options' defaults."""
        given = self.make_parser(ctx).parse_args(args=list(args))[0]
        path = _path_of(given)
        if path is not None:
            assert self.callback is not None
            values = _read(path, _options_of(inspect.unwrap(self.callback)))
            asked = {key for key in given if (key, given[key]) != _ASKS_NO_OTHER}
            aside = {name for key in asked for name in _SETS_ASIDE.get(key, ())}
            kept = {name: value for name, value in values.items() if name not in aside}
            ctx.default_map = {**kept, "config": str(path)}
        return list(super().parse_args(ctx, args))


def _path_of(given: Mapping[str, object]) -> Path | None:
    """Return the file that is asked for, or else the recipe's if there is one."""
    config, recipe = given.get("config"), given.get("recipe")
    if given.get("no_config"):
        if isinstance(config, str):
            raise UsageError(f"--config {config} reads a file, --no-config none; leave one out")
        return None
    if isinstance(config, str):
        return Path(config)
    if not isinstance(recipe, str) or not recipe.endswith(".py"):
        return None
    beside = Path(recipe).with_suffix(".toml")
    return beside if os.path.isfile(beside) else None  # False for what can be no file's name


def _read(path: Path, options: Mapping[str, _Option]) -> dict[str, object]:
    """Return the file's values by parameter; raise UsageError that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the options in {path} cannot be read: {reason}") from None
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError, too many digits, too deep
        raise UsageError(
            f"{path} is not TOML: {error}; write a line such as: microbatches = 8"
        ) from None
    values = {}
    for key, value in table.items():
        where = f"{path}, line {_line_of(text, key)}"
        name = key.replace("-", "_")
        if name not in options:
            raise UsageError(f"{where}: {_unknown(key, value, options)}")
        if name in values:
            raise UsageError(f"{where}: {key} is given twice, with - and with _; leave one out")
        values[name] = _checked(where, key, value, options[name])
    return values


def _line_of(text: str, key: str) -> int:
    start = re.compile(rf"""\s*(\[+\s*)?["']?{re.escape(key)}["']?\s*[=.\]]""")
    lines = text.splitlines()
    return next((n for n, line in enumerate(lines, 1) if start.match(line)), 1)


def _unknown(key: str, value: object, options: Mapping[str, _Option]) -> str:
    if isinstance(value, dict):
        return f"[{key}] is a table, but options stand at the top of the file, without one"
    named = [name.replace("_", "-") for name in options]
    near = difflib.get_close_matches(key.replace("_", "-"), named, n=1)
    remedy = f"is it {near[0]}?" if near else f"there are {', '.join(named)}"
    return f"{key} is no option of stagewise train; {remedy} (--no-config reads no file)"


def _checked(where: str, key: str, value: object, option: _Option) -> object:
    if (found := option.taken(value)) is None:
        raise UsageError(
            f"{where}: {key} is {_toml(value)}, but must be {option.needed}; write "
            f"{key} = {option.example}"
        )
    return found


def _as_text(value: object, metavar: str) -> str | None:
    """Return the words of the command line: `[4, 6]` as 4,6 and `{pp = 2}` as pp=2."""
    if isinstance(value, str):
        return value
    if _takes_numbers(metavar) and type(value) is int:
        return str(value)
    if "..." in metavar:
        if isinstance(value, dict) and "=" in metavar:
            value = [f"{k}={v}" for k, v in value.items()]
        items = (int, str) if _takes_numbers(metavar) else (int, float, str)
        if isinstance(value, list) and all(type(each) in items for each in value):
            return ",".join(map(str, value))
    return None


def _takes_numbers(metavar: str) -> bool:
    return re.match(r"N\b", metavar) is not None


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def starting_file(function: Callable[..., object], recipe: Path) -> str:
    """Return a file of all options, each explained; those without a default are commented out."""
    about = (
        f"How stagewise train {recipe.as_posix()} runs: read by itself because of its name. "
        "Options on the command line override it, --no-config leaves it unread, --config FILE "
        "reads another. Paths are relative to the current directory, as on the command line."
    )
    lines = _comment(about)
    for name, option in _options_of(function).items():
        off = "# " if option.default in (None, "") else ""
        lines += ["", *_comment(" ".join((option.told.help or "").replace("`", "").split()))]
        lines.append(f"{off}{name.replace('_', '-')} = {option.example}")
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 94, initial_indent="# ", subsequent_indent="# ")
