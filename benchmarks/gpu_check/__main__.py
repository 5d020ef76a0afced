"""`python -m benchmarks.gpu_check`: what stagewise does on this machine's GPUs.

    PYTHONPATH=src:. python3 -m benchmarks.gpu_check                    # at most eight minutes
    PYTHONPATH=src:. python3 -m benchmarks.gpu_check --only exact,host
    PYTHONPATH=src:. python3 -m benchmarks.gpu_check --dry              # on a CPU: does it run?

Needs torch, numpy and safetensors. Prints a JSON line per result, also to $OUT/gpu.jsonl if OUT is
set, and a table at the end. Ends with 1 if something that must hold does not, with 2 without a GPU.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu_check.supervise import Check, Row, Say, run, run_all, table

BUDGET_SECONDS = 440.0
ENVIRONMENT = {
    "STAGEWISE_CAPTURE_CACHE": "off",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for deterministic algorithms
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # else asking for GPUs bars forked processes from them
}
CHECKS: dict[str, tuple[str, float]] = {  # most valuable first: module, seconds that it may take
    "env": ("environment", 30),
    "exact": ("exact", 70),
    "waits": ("streams", 40),
    "queues": ("streams", 60),
    "syncs": ("costs", 30),
    "host": ("costs", 45),
    "timing": ("planned", 30),
    "memory": ("planned", 40),
    "two": ("processes", 150),
    "staged": ("staged", 60),
    "model": ("whole_model", 40),
    "scaler": ("training", 20),
    "captured": ("training", 50),
    "graphs": ("compiled", 20),
    "compiled": ("compiled", 80),
}
Function = Callable[..., None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks asked for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--only", default=",".join(CHECKS), help="names, separated by commas")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with small sizes")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"no check is named {', '.join(unknown)}; choose from {', '.join(CHECKS)}")
    os.environ.update(ENVIRONMENT)
    warnings.simplefilter("ignore")
    importlib.import_module("torch._dynamo")  # two checks need it, and it takes a second
    checks = [_check(name, options.dry) for name in CHECKS if name in names]
    _choose_start_method()
    ended = run_all(checks, BUDGET_SECONDS, emit)
    print(f"\n{table(ended)}", flush=True)
    if all(each.outcome == "skipped, needs a GPU" for each in ended):
        print("no GPU here; --dry runs the same code on a CPU")
        return 2
    return 0 if all(each.passed for each in ended) else 1


def emit(row: Row) -> None:
    """Print a row as JSON, and append it to $OUT/gpu.jsonl."""
    line = json.dumps({key: _short(value) for key, value in row.items()}, default=str)
    print(line, flush=True)
    if folder := os.environ.get("OUT"):
        with Path(folder, "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def _choose_start_method() -> None:
    """Fork the processes of checks, unless one that is forked cannot use the GPU."""
    multiprocessing.set_start_method("fork", force=True)
    tried = run(Check("fork", _touch, 60.0), 60.0, lambda row: None)
    if not tried.passed:
        print(f"no forked processes: {tried.outcome}", flush=True)
        multiprocessing.set_start_method("spawn", force=True)


def _touch(say: Say) -> None:
    import torch

    if torch.accelerator.is_available():
        torch.zeros(1, device=torch.accelerator.current_accelerator()).add_(1).item()


def _check(name: str, dry: bool) -> Check:
    module, seconds = CHECKS[name]
    function: Function = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)
    return Check(name, partial(function, dry), seconds)


def _short(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return value


if __name__ == "__main__":
    sys.exit(main())
