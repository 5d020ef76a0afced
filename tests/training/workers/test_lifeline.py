"""A worker whose launcher is killed ends by itself, whatever it is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The launcher stands between pytest and the worker, and is killed.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
WORKER = """
import ctypes, os, pathlib, time
from stagewise.engine.watch.now import NOW
from stagewise.training.workers import lifeline
lifeline.PATIENCE_SECONDS = 0.2
{settings}
life = lifeline.Lifeline(os.getppid(), pathlib.Path({folder!r}))
print(os.getpid(), flush=True)
{body}
"""
COMPUTES = """
for NOW.count in range(10):
    time.sleep(0.1)  # an instruction that makes progress, for longer than the patience
while not life.is_cut:
    pass
time.sleep(0.4)  # the checkpoint takes longer too
print('saved', flush=True)
life.tidy()
"""


@pytest.mark.parametrize(
    ("settings", "body", "said"),
    [
        ("", "time.sleep(100)", ""),
        ("lifeline.DEATH_SIGNAL = 1", "ctypes.PyDLL(None).sleep(100)", ""),  # holds Python's lock
        ("", COMPUTES, "saved\n"),
    ],
    ids=["hangs", "hangs in C", "ends between two steps"],
)
def test_no_worker_outlives_its_launcher(
    tmp_path: Path, settings: str, body: str, said: str
) -> None:
    folder = tmp_path / "launcher's"
    folder.mkdir()
    worker = WORKER.format(settings=settings, folder=str(folder), body=body)
    command = [sys.executable, "-c", LAUNCHER, worker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        number = int(launcher.stdout.readline())
        launcher.kill()
        try:
            assert launcher.communicate(timeout=20)[0] == said  # ends when the worker has ended
        finally:
            if Path(f"/proc/{number}").exists():
                os.kill(number, signal.SIGKILL)
    assert folder.exists() == ("PyDLL" in body)  # what one worker cannot remove, another does
