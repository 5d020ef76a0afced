"""Unmodified models of other libraries through the pipeline, beside themselves.

Every model of `benchmarks.unmodified` runs in a process forked for it: it is captured (or cut by
paths), planned for two stages, and compared with the plain model: loss and gradients with two and
four stages, another batch size, another length, evaluation, prediction, recomputation, two
processes, and names in order. `make test-models` runs this in an environment of its own and fails
if a row does; `--write docs/models.md` writes the table there, where rows of models that `--only`
leaves out stay.
"""

import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.unmodified import ENTRIES
from benchmarks.unmodified.processes import row_of

LIBRARIES = ("torch", "torchvision", "transformers", "timm", "diffusers", "peft")
COLUMNS = (
    *("model", "result", "captured by", "cells", "M", "loss", "gradients", "names"),
    *("another batch", "another length", "evaluate", "predict", "recompute", "two processes"),
    *("CPU s", "note"),
)
TEXT = """# Unmodified models

Written by `make test-models` (`python -m benchmarks.models --write docs/models.md`), which makes an
environment of its own with the versions in `constraints-models.txt`. Tiny configurations with
random weights and no dropout, float64 but for what cannot run in it. Every model is captured from
an example of 8 samples and compared with itself, unpipelined: with two and four stages, 4
microbatches (M=1 where mathematics forbids them, for the reason given), other sizes than the
example's, in evaluation, prediction, with all forwards recomputed, and in two processes over gloo
(`-`: not this model; what takes long to capture runs there one in six).

`result`: *fine* if every comparison holds; *refused*, an error of stagewise's, in words; *raw*, any
other error; *wrong*, a number that is no round-off. `captured by`: torch.export, or `cells=`, the
modules being named in the table's row; *suggested* where torch.export cannot trace the model, the
error said which `cells=` work, and these were taken as they stand.

Numbers are differences: of losses and outputs in absolute terms, of gradients over the largest
gradient, the largest of two and four stages. `names` says whether parameters and state are the
model's, in its order; `refused` that a batch of another length was refused in words, and `-` that
the model has none. CPU seconds are of everything in the row: building, capturing, planning and all
comparisons.
"""
RESULTS = ("fine", "refused", "raw", "wrong")


def load_libraries() -> None:
    """Once, before processes are forked."""
    for name in LIBRARIES:
        __import__(name)


def machine() -> str:
    """Of the run: its commit, versions and processor."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    versions = [f"{name} {sys.modules[name].__version__.split('+')[0]}" for name in LIBRARIES]
    python = f"Python {platform.python_version()}, {platform.machine()}"
    return f"commit {commit or 'unknown'}; {', '.join(versions)}; {python}"


def summary(rows: list[dict[str, str]]) -> str:
    """How many models ended how."""
    counts = Counter(row["result"] for row in rows)
    how = Counter(row.get("captured by", "") for row in rows if row["result"] == "fine")
    ways = ", ".join(f"{count} by {way}" for way, count in how.most_common())
    ended = ", ".join(f"{counts[result]} {result}" for result in RESULTS[1:])
    return f"{len(rows)} models: {counts['fine']} fine ({ways}), {ended}."


def markdown(rows: list[dict[str, str]], where: str) -> str:
    """The page."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(row.get(column, "") for column in COLUMNS) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{TEXT}\n**{summary(rows)}** Run at {where}.\n\n{table}\n"


def run_in(path: Path) -> str:
    """Where the run of a page was made."""
    found = re.search(r" Run at (.*)\.$", path.read_text(), re.MULTILINE)
    return found[1] if found else "an unknown commit"


def rows_in(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a page, by model."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {
        row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells if len(row) == len(COLUMNS)
    }


def main(
    as_json: Annotated[bool, typer.Option("--json")] = False,
    only: str = "",
    write: Path | None = None,
) -> None:
    """Print a line for each model; exit status 1 if one is not fine.

    --only takes parts of models' names, with semicolons between; --write puts the table into a
    page.
    """
    load_libraries()
    where = machine()
    kept = rows_in(write) if write and only else {}
    if write and kept:
        where = f"{run_in(write)}. Later, at {where.split(';')[0]}, rows that this names: {only}"
    wanted = [part.strip().lower() for part in only.split(";")]
    done = []
    for entry in ENTRIES:
        if not any(part in entry.name.lower() for part in wanted):
            continue
        start = time.perf_counter()
        row = row_of(entry)
        kept[entry.name] = {k: v.replace("|", "/").replace("\n", " ") for k, v in row.items()}
        done.append(kept[entry.name])
        if as_json:
            print(json.dumps(row), flush=True)
        seconds = time.perf_counter() - start
        said = "" if row["result"] == "fine" else f": {row.get('note', '')}"
        print(f"{entry.name}: {row['result']}{said} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        if write:
            rows = [kept[entry.name] for entry in ENTRIES if entry.name in kept]
            write.write_text(markdown(rows, where))
    print(summary(done), file=sys.stderr)
    if any(row["result"] != "fine" for row in done):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
