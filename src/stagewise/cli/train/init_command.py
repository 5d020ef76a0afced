"""`stagewise init`: write a recipe to start from."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stagewise.cli.config_file import starting_file
from stagewise.cli.train.train_command import train
from stagewise.errors import RecipeError
from stagewise.starters import hugging_face, plain, vision

What = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER|NAME",
        help="A folder with a model of transformers, the name of one of torchvision's models, or "
        "'plain'.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="Where to write the recipe; never over one.")
]


def init(what: What = "plain", out: Out = Path("recipe.py")) -> None:
    """Write a recipe that trains as it is, with data to replace by your own.

    And beside it the TOML file with the options of its runs, each explained.

    Example: stagewise init resnet18 --out flowers.py
    """
    if out.suffix != ".py":
        raise RecipeError(f"a recipe's name must end in .py; --out is {out}")
    beside = out.with_suffix(".toml")
    for path in (out, beside):
        if path.exists():
            raise RecipeError(f"{path} exists; give another name with --out FILE")
    text = _recipe(what).replace("@FILE@", out.as_posix())
    for path, content in ((out, text), (beside, starting_file(train, out))):
        try:
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"{path} cannot be written: {error.strerror or error}") from None
    lines = (
        f"{out} is written; try it: stagewise train {out} --stages 2 --steps 20\n"
        f"{beside} has all options, which train reads too"
    )
    Console().print(lines, highlight=False, soft_wrap=True)


def _recipe(what: str) -> str:
    folder = Path(what)
    if what == "plain":
        return plain.RECIPE
    if folder.is_dir():
        return hugging_face.RECIPE.replace("@AUTO@", _auto_class(folder)).replace(
            "@FOLDER@", folder.resolve().as_posix()
        )
    if find_spec("torchvision") is None:
        raise RecipeError(
            f"{what} is neither a folder nor 'plain', and torchvision, whose models have names, is "
            "not installed; give a folder with a config.json, or pip install torchvision"
        )
    import torchvision  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if what not in (names := torchvision.models.list_models(module=torchvision.models)):
        raise RecipeError(
            f"{what} is neither a folder, nor 'plain', nor a classifier of torchvision, which has "
            f"{', '.join(names[:5])} ...; give one of these"
        )
    return vision.RECIPE.replace("@NAME@", what)


def _auto_class(folder: Path) -> str:
    """Return transformers' class for the folder's model."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{folder} has no config.json that can be read ({error}); give a folder that a model's "
            "save_pretrained wrote"
        ) from None
    if not named or not str(named[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise RecipeError(
            f"{folder} has the architectures {named}; recipes are written for language models that "
            "predict the next token (...ForCausalLM): start from `stagewise init plain` instead"
        )
    return "AutoModelForCausalLM"
