"""A command whose help and complaints are in its user's words.

typer shows types as Python names them (`--json <bool>`, `--steps <int range> [x>=1]`), and says
what is wrong with a value in the words of the library that checks it ("Input should be a valid
integer, unable to parse string as an integer"). Here a switch takes no value, other options say
what they take by their `metavar`, and numbers are asked for as people write them.
"""

import re
from typing import Any

import typer
import typer.core

_FEW = 8  # options, of which all are named to who gives an unknown one
_IN_WORDS = (
    (r"Input should be a valid integer.*", "this is not a whole number, such as 4"),
    (r"Input should be a valid number.*", "this is not a number, such as 0.5"),
    (r"Input should be greater than or equal to (\S+)", r"it must be at least \1"),
    (r"Input should be less than or equal to (\S+)", r"it must be at most \1"),
)


def _nothing(*_: object, **__: object) -> None:
    """What stands in the column of types beside an argument's name, and in that of ranges."""


class PlainCommand(typer.core.TyperCommand):
    """See above."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if isinstance(param, typer.core.TyperOption) and param.is_flag:
                param.metavar = ""
            elif isinstance(param, typer.core.TyperArgument):
                param.display_type_rich = _nothing  # type: ignore[method-assign]
            param._get_number_range_help_str = _nothing  # type: ignore[attr-defined]
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            for theirs, ours in _IN_WORDS:
                error.message = re.sub(theirs, ours, error.message)
            raise
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # which typer does not export
                self._name_all_options(error)
            raise

    def _name_all_options(self, error: Any) -> None:
        names = [name for param in self.params for name in param.opts if name.startswith("--")]
        if not error.possibilities and len(names) <= _FEW:
            error.possibilities = names
