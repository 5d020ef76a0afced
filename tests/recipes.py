"""A tiny recipe, its variations, and the command line in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.forked import Forked

TINY = """
import torch
from torch import nn

WIDTH = 8

def model():
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2)) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))

class Shuffled:
    '''Draws from torch's default generator, as a shuffling DataLoader does.'''

    def __len__(self):
        return 6

    def __iter__(self):
        for _ in range(6):
            inputs = torch.randn(8, WIDTH)
            yield inputs, inputs.sum(dim=1, keepdim=True)

def data(split):
    return Shuffled() if split == "train" else [(torch.ones(5, WIDTH), torch.ones(5, 1))]

def loss(output, target):
    return nn.functional.mse_loss(output, target)

def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)
"""

RunHere = Callable[..., tuple[int, str, str]]  # the fixture of `tests/cli/conftest.py`

SECONDS = 250  # the hard limit of every process here; beside many others, starting takes half of it


def write_recipe(directory: Path, *changes: tuple[str, str], name: str = "tiny.py") -> Path:
    """The tiny recipe with each (old, new) replaced."""
    text = TINY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = directory / name
    path.write_text(text)
    return path


def log_of(run: Path) -> list[dict[str, float]]:
    """The log's records, without times."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "time", "bubble_fraction", "slowest_stage", "times_the_others")
    return [
        {k: v for k, v in record.items() if k not in timed and not k.endswith("_per_second")}
        for record in records
    ]


class Command:
    """`python -m stagewise ARGUMENTS` in a session of its own, killed whole when it takes long.

    `forked` is for what does not depend on how Python itself starts.
    """

    def __init__(
        self, *arguments: str | Path, cwd: Path, module: str = "stagewise", forked: bool = False
    ) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "STAGEWISE_STOP_FILE"):
            environment.pop(name, None)
        words = ["-m", module, *map(str, arguments)]
        self.process: subprocess.Popen[str] | Forked
        if forked:
            self.process = Forked(words, environment, cwd)
            return
        self.process = subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode is not None
        return self.process.returncode, out, err

    def read_until(self, text: str) -> str:
        """Wait for a line of stdout with `text` in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return line
        _, _, err = self.finish()
        raise AssertionError(f"the process ended without saying {text!r}:\n{err}")

    def interrupt(self) -> None:
        """What Ctrl-C does: SIGINT to the foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End the command and its workers at once, if it still runs."""
        if self.process.poll() is None:
            pid = self.process.pid
            workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for number in (pid, *map(int, workers)):
                os.kill(number, signal.SIGKILL)
            self.process.communicate()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def run_command(*arguments: str | Path, cwd: Path, forked: bool = False) -> tuple[int, str, str]:
    """Run `stagewise ARGUMENTS` to its end."""
    with Command(*arguments, cwd=cwd, forked=forked) as command:
        return command.finish()
