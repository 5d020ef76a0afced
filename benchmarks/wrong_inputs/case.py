"""A wrong input, and what is asked of the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

PREPARED = (
    "import torch, stagewise\nfrom torch import nn\n"
    "model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))\n"
    "x, y, mse = torch.ones(8, 8), torch.ones(8, 1), nn.functional.mse_loss\n"
    "plan = stagewise.Plan(balance=(1, 1), schedule='1f1b', num_microbatches=4)\n"
)


@dataclass(frozen=True)
class Case:
    """A command line or, if `code` is given, Python; what it must end with and say."""

    name: str
    words: Sequence[str]
    exits: int
    says: str
    users: bool = False  # its own code fails: its lines may follow


def cli(line: str, exits: int, says: str, users: bool = False) -> Case:
    """Return the case of a command line."""
    return Case(line, line.split(), exits, says, users)


def py(code: str, says: str) -> Case:
    """Return the case of a line of Python, after `PREPARED`."""
    return Case(code, [], 0, says)
