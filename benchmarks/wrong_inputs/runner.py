"""Wrong inputs, as people type them: no traceback of ours, the exit code, the remedy.

    python -m benchmarks.wrong_inputs [--json] [--only NUMBER,NUMBER]

Each runs in a process of its own, forked from one that has imported torch. `ok` asks for the exit
code and for words that name the remedy; a traceback is allowed only for what the user's own code
raised, and shows that code's lines alone. The exit code is 1 if any input fails.
"""

import argparse
import json
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.wrong_inputs.case import PREPARED, Case
from benchmarks.wrong_inputs.files import FILES
from benchmarks.wrong_inputs.first_hundred import FIRST, MORE
from benchmarks.wrong_inputs.newer import NEWER

SECONDS = 120
CASES = [*FIRST, *MORE, *NEWER]


def run(case: Case, folder: Path) -> tuple[int, str]:
    """Return the exit code and all output of a forked process; 124 if it ran too long."""
    told = folder / "told"
    sys.stdout.flush()
    if not (child := os.fork()):
        code = 70
        try:
            os.chdir(folder)
            file = os.open(told, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            signal.alarm(SECONDS)
            code = _act(case)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return (124 if code < 0 else code), told.read_text(errors="replace")


def _act(case: Case) -> int:
    import traceback

    try:
        if case.words:
            from stagewise.cli.main import main

            sys.argv = ["stagewise", *case.words]
            main()
        else:
            space: dict[str, object] = {}
            exec(PREPARED, space)
            exec(case.name, space)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:
        if not case.words and (
            type(error).__module__.startswith("stagewise") or isinstance(error, TypeError)
        ):
            print(f"{type(error).__name__}: {error}")
            return 0
        traceback.print_exc()
        return 1
    return 0


def judged(case: Case, code: int, said: str) -> str:
    """Return "ok", or what is wrong."""
    flat = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())
    if "Traceback" in said and not case.users:
        return "traceback"
    package = str(Path(sys.modules["stagewise"].__file__ or "").parent)
    if case.users and "Traceback" in said and package in said.partition("Traceback")[2]:
        return "our lines in the traceback"
    if code != case.exits:
        return f"exit code {code}, not {case.exits}"
    return "ok" if re.search(case.says, flat) else f"does not say {case.says}"


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    import torch  # the children have it
    import torch.distributed

    import stagewise.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in FILES.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        for number, case in enumerate(CASES, 1):
            if given.only and str(number) not in given.only.split(","):
                continue
            code, said = run(case, folder)
            verdict = judged(case, code, said)
            wrong += verdict != "ok"
            first = next((line for line in said.splitlines() if "rror" in line), said.strip()[:80])
            if given.json:
                print(json.dumps([number, case.name, code, verdict, first]), flush=True)
            else:
                print(
                    f"{number:3} {case.name[:60]:60} {code:3} {verdict:30} {first[:90]}", flush=True
                )
    if not given.json:
        print(f"{len(CASES) if not given.only else '-'} inputs, {wrong} not answered well")
    sys.exit(bool(wrong))
