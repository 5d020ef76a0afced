"""Torch's code and ours is not the user's; the model zoo and everything else is."""

from pathlib import Path

import pytest
import torch

import stagewise
from stagewise.model.forward.users_code import is_users

PACKAGE = Path(stagewise.__file__).parent


@pytest.mark.parametrize(
    ("file", "theirs"),
    [
        (__file__, True),
        (str(PACKAGE / "models" / "resnet.py"), True),
        (str(PACKAGE / "pipeline" / "pipeline.py"), False),
        (str(PACKAGE / "__init__.py"), False),
        (torch.__file__, False),
        ("<eval_with_key>", False),
    ],
)
def test_whose_code_it_is(file: str, theirs: bool) -> None:
    assert is_users(file) is theirs
