"""Start workers by forking a process that has imported everything, as torchrun would start them.

There is no launcher. What it does is part of trials whose first run is started `by_command`.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from benchmarks.chaos.processes import Ended

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch", "torch._dynamo", "torch.distributed", "stagewise.training.trainer"]
PRELOADED += ["stagewise.cli.main", "torch.distributed.launcher.api"]
_LIMIT_SECONDS, _GRACE_SECONDS = 120.0, 30.0


def forked(words: list[str], num_ranks: int, folder: Path, environment: Mapping[str, str]) -> Ended:
    """Run `stagewise WORDS` as torchrun does; whoever outlives a failed rank is ended."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    common = {**environment, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    outputs = [folder / f"output-{rank}" for rank in range(num_ranks)]
    processes = [
        CONTEXT.Process(target=_stagewise, args=(words, rank, folder, common, outputs[rank]))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline, left = time.monotonic() + _LIMIT_SECONDS, 0
    running = {process.sentinel: process for process in processes}
    while running and (ended := wait(running, max(0.0, deadline - time.monotonic()))):
        for sentinel in ended:
            if running.pop(sentinel).exitcode:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    gone_at, left = time.time(), len(running)
    for process in processes:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    code = None if left else next((code for code in codes if code), 0)
    # torchrun's summary shows the sentence in the error file.
    files = [file for output in outputs for file in (output, _error_file(output)) if file.exists()]
    text = "\n".join(file.read_text(errors="replace") for file in files)
    for file in files:
        file.unlink()
    return Ended(code, "\n".join([text, *map(_in_words, range(num_ranks), codes)]), gone_at, left)


def _error_file(output: Path) -> Path:
    return output.with_suffix(".error")


def _in_words(rank: int, code: int | None) -> str:
    return f"rank {rank}: {signal.Signals(-code).name}" if code is not None and code < 0 else ""


def _stagewise(
    words: list[str], rank: int, folder: Path, environment: Mapping[str, str], output: Path
) -> None:
    """What a worker of torchrun runs."""
    to = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(to, 1)
    os.dup2(to, 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(_error_file(output))
    os.chdir(folder)
    sys.argv = ["stagewise", *words]
    multiprocessing.process._children.clear()  # type: ignore[attr-defined]
    from stagewise.cli.main import main

    main()
