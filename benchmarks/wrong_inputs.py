"""A hundred wrong inputs, as people type them: no traceback of ours, the exit code, the remedy.

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 120
TINY = """
import torch
from torch import nn
def model():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(8, 1))
def data(split):
    return [(torch.ones(8, 8), torch.ones(8, 1)) for _ in range(3)]
def loss(output, target):
    return nn.functional.mse_loss(output, target)
def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)
"""

LOSS = "    return nn.functional"


def changed(*pairs: tuple[str, str], more: str = "") -> str:
    """Return the tiny recipe with each pair replaced, and lines added."""
    text = TINY
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text + more


FILES: dict[str, str | bytes] = {
    "tiny.py": TINY,
    "raises.py": changed(("    return nn.Seq", "    raise ValueError('no')\n    return nn.Seq")),
    "exits.py": changed(("    return nn.Seq", "    raise SystemExit(3)\n    return nn.Seq")),
    "syntax.py": changed(("def model", "deff model")),
    "badimport.py": changed(more="import no_such_module\n"),
    "nomodel.py": changed(("def model", "def _model")),
    "noloss.py": changed(("def loss", "def _loss")),
    "lossvalue.py": changed(more="loss = 3\n"),
    "returns.py": changed(
        ("    return nn.Sequential", "    return 3 and None or 7, nn.Sequential")
    ),
    "empty.py": "",
    "binary.py": b"\x7fELF\x00\x01\x02",
    "typo.py": changed(more="acumulate = 4\n"),
    "typo2.py": changed(more="autocst = torch.bfloat16\n"),
    "accum.py": changed(more="accumulate = 0\n"),
    "autocast.py": changed(more="autocast = 'bf16'\n"),
    "clip.py": changed(more="clip_grad_norm = -1\n"),
    "cellsmeta.py": changed(more="meta = True\ncells = ['0']\n"),
    "dictbatch.py": changed(("[(torch.ones(8, 8), torch.ones(8, 1))", "[{'x': torch.ones(8, 8)}")),
    "triple.py": changed(("torch.ones(8, 1))", "torch.ones(8, 1), 3)")),
    "nodata.py": changed(("    return [(", "    return None\n    return [(")),
    "nobatches.py": changed(("range(3)]\ndef loss", "range(0)]\ndef loss")),
    "intdata.py": changed(("    return [(", "    return 3\n    return [(")),
    "shapes.py": changed(("torch.ones(8, 1))", "torch.ones(3, 1))")),
    "width.py": changed(("torch.ones(8, 8)", "torch.ones(8, 9)")),
    "lossraises.py": changed(
        (
            "    return nn.functional.mse",
            "    raise RuntimeError('bad')\n    return nn.functional.mse",
        )
    ),
    "lossvector.py": changed(
        ("mse_loss(output, target)", "mse_loss(output, target, reduction='none')")
    ),
    "nooptimizer.py": changed(
        ("    return torch.optim.AdamW", "    return 42\n    return torch.optim.AdamW")
    ),
    "lbfgs.py": changed(("AdamW(parameters, lr=1e-2)", "LBFGS(parameters)")),
    "schedulerbad.py": changed(more="def scheduler(optimizer): return 3\n"),
    "plateau.py": changed(
        more="def scheduler(o): return torch.optim.lr_scheduler.ReduceLROnPlateau(o)\n"
    ),
    "onesample.py": changed(
        ("torch.ones(8, 8), torch.ones(8, 1)", "torch.ones(1, 8), torch.ones(1, 1)")
    ),
    "afile": "",
    "nojson.json": "not json",
    "wrong.json": "{}",
    "list.json": "[1, 2]",
    "sched.txt": "0F0 0F0\n",
    "words.txt": "hello world\n",
    "dev.toml": "[devices.x]\nmemory = 3\n",
    "broken.toml": "[[[",
    "recipe.txt": TINY,
    "bad.safetensors": b"\xff" * 40,
    "ünï çødé.py": TINY,
}


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


# Those of the first trial by newcomers, by kind.
FIRST = [
    cli("plan nosuch.py", 2, "no recipe file nosuch.py; give the path"),
    cli("train nosuch.py", 2, "no recipe file"),
    cli("train", 2, "Missing argument"),
    cli("trian tiny.py", 2, "No such command|train"),
    cli("train tiny.py --stagse 2", 2, "--stages"),
    cli("train tiny.py --stages two", 2, "--stages.*whole number|valid integer|two"),
    cli("train tiny.py --stages 0", 2, "--stages.*(>=1|at least 1|greater than or equal to 1)"),
    cli("train tiny.py --stages -1", 2, "--stages.*(>=1|at least 1|greater than or equal to 1)"),
    cli("train tiny.py --stages 2.5", 2, "--stages"),
    cli("train tiny.py --stages 99", 2, "99 stages.*cells"),
    cli("train tiny.py --devices 99", 2, "cells"),
    cli("plan tiny.py --stages 3 --devices 2", 2, "--stages|stages"),
    cli("train tiny.py --stages 1 --microbatches 0", 2, "microbatches"),
    cli("train tiny.py --stages 1 --microbatches many", 2, "--microbatches"),
    cli("plan tiny.py --microbatches 4,x", 2, "--microbatches"),
    cli("train tiny.py --schedule 1F1B", 2, "'1f1b'"),
    cli("train tiny.py --schedule nosuch", 2, "choose one of"),
    cli("train tiny.py --schedule nosuch.txt", 2, "cannot be read"),
    cli("train tiny.py --schedule words.txt", 2, "not an instruction|write the stage"),
    cli("train tiny.py --schedule sched.txt", 2, "0F0"),
    cli("train tiny.py --recompute sometimes", 2, "never.*always|always.*never|choose"),
    cli("train tiny.py --balance 9,9", 2, "balance.*cells"),
    cli("train tiny.py --balance a,b", 2, "--balance.*such as|--balance.*as in"),
    cli("train tiny.py --balance 4,4 --stages 3", 2, "balance.*stages|stages"),
    cli("train tiny.py --replicas 0,1", 2, "--replicas"),
    cli("train tiny.py --replicas x", 2, "--replicas.*such as"),
    cli("plan tiny.py --memory 8G", 2, "8GB.*8GiB|GB"),
    cli("plan tiny.py --memory lots", 2, "such as"),
    cli("plan tiny.py --memory -3GB", 2, "above 0"),
    cli("plan tiny.py --device rtx9000", 2, "h100"),
    cli("plan tiny.py --device-file dev.toml", 2, "--device"),
    cli("plan tiny.py --device x --device-file dev.toml", 2, "add it|no "),
    cli("plan tiny.py --device x --device-file broken.toml", 2, "TOML|toml"),
    cli("plan tiny.py --device x --device-file nosuch.toml", 2, "nosuch.toml"),
    cli("plan tiny.py --device h100 --efficiency 7", 2, "efficiency"),
    cli("plan tiny.py --device h100 --efficiency fast", 2, "efficiency"),
    cli("train tiny.py --plan nojson.json", 2, "not a plan"),
    cli("train tiny.py --plan wrong.json", 2, "not a plan.*stagewise plan --json"),
    cli("train tiny.py --plan list.json", 2, "not a plan"),
    cli("train tiny.py --plan nosuch.json", 2, "cannot be read"),
    cli("train tiny.py --plan nojson.json --stages 2", 2, "--stages"),
    cli("train tiny.py --stages 1 --steps 2 --out afile", 2, "another --out"),
    cli("train tiny.py --stages 1 --steps 2 --out /proc/nope", 2, "another --out"),
    cli("train tiny.py --stages 1 --steps 0", 2, "--steps"),
    cli("train tiny.py --stages 1 --resume nosuch", 2, "nosuch"),
    cli("train tiny.py --stages 1 --init nosuch", 2, "nosuch"),
    cli("train tiny.py --stages 1 --init bad.safetensors", 2, "bad.safetensors"),
    cli("train raises.py --stages 1", 2, r"model\(\) failed in .*raises.py, line 6", True),
    cli("train exits.py --stages 1", 2, r"model\(\).*SystemExit|exits.py", True),
    cli("train syntax.py --stages 1", 2, "syntax.py, line 4"),
    cli("train badimport.py --stages 1", 2, "badimport.py, line 1", True),
    cli("train nomodel.py --stages 1", 2, "no model; add it"),
    cli("train noloss.py --stages 1", 2, "no loss; add it"),
    cli("train lossvalue.py --stages 1", 2, "must be a function"),
    cli("train empty.py --stages 1", 2, "has no model; add it"),
    cli("train typo.py --stages 1", 2, "is it accumulate"),
    cli("train typo2.py --stages 1", 2, "is it autocast"),
    cli("train accum.py --stages 1", 2, "positive integer"),
    cli("train autocast.py --stages 1", 2, "torch.bfloat16"),
    cli("train dictbatch.py --stages 1", 2, "pair"),
]

MORE = [
    cli("train binary.py --stages 1", 2, "binary.py"),
    cli("train recipe.txt --stages 1", 2, r"\.py"),
    cli("train . --stages 1", 2, "no recipe file"),
    cli("train clip.py --stages 1", 2, "positive number"),
    cli("train cellsmeta.py --stages 1", 2, "leave one of them out"),
    cli("train triple.py --stages 1", 2, "pair"),
    cli("train nodata.py --stages 1", 2, "batches"),
    cli("train intdata.py --stages 1", 2, "batches"),
    cli("train nobatches.py --stages 1", 2, "no batch|empty|at least"),
    cli("train returns.py --stages 1", 2, "model"),
    cli("train shapes.py --stages 1 --steps 2", 2, "samples"),
    cli("train width.py --stages 1 --steps 2", 1, "shapes|cell", True),
    cli("train lossraises.py --stages 1 --steps 2", 1, "loss.*bad", True),
    cli("train lossvector.py --stages 1 --microbatches 2", 2, "one number"),
    cli("train nooptimizer.py --stages 1 --steps 2", 2, "torch.optim.Optimizer"),
    cli("train lbfgs.py --stages 1 --steps 2", 2, "closure"),
    cli("train schedulerbad.py --stages 1 --steps 2", 2, "lr_scheduler"),
    cli("train plateau.py --stages 1 --steps 2", 2, "metric"),
    cli("train onesample.py --stages 1 --steps 2 --microbatches 4", 2, "larger batch"),
    cli("simulate --forward one", 2, "--forward 1"),
    cli("simulate --forward 1,2 --stages 3", 2, "one cost"),
    cli("simulate --latency -1", 2, "not negative"),
    cli("simulate --json --text", 2, "choose one"),
    cli("simulate --html nosuchfolder/x.html", 2, "nosuchfolder|plotly"),
    cli("check tiny.py --stages 1 --devices 1", 2, "choose one"),
    cli("check tiny.py --recompute x", 2, "choose from"),
    cli("advise tiny.py --devices 0", 2, "--devices"),
    cli("advise tiny.py --device-memory big", 2, "such as"),
    cli("export nosuch out.safetensors", 2, "nosuch"),
    cli("train tiny.py --mesh pp=two", 2, "mesh"),
    cli("train tiny.py --record -1", 2, "--record"),
    py("stagewise.Plan(balance=[2, 0], num_microbatches=4)", "PlanError"),
    py("stagewise.plan(model, x, num_stages=2, num_microbatches='8')", "is '8'; .*such as"),
    py("stagewise.plan(model, x, num_stages=2, num_microbatches=99)", "99 microbatches"),
    py("stagewise.Pipeline(model, plan, loss=mse, chunks=3)", "num_microbatches"),
    py("stagewise.Pipeline(model, plan, loss=mse).step(x, y)", r"target=\.\.\."),
    py("stagewise.Pipeline(model, plan, loss=mse)(x)", r"pipe\.step"),
    py("stagewise.Pipeline(model, plan).step(x)", "give Pipeline a loss function"),
    py("stagewise.Pipeline(model, 'plan', loss=mse)", "Plan"),
    py("stagewise.simulate('gpipe', 4, 4)", "StageCost"),
]
CASES = [*FIRST, *MORE]
PREPARED = (
    "import torch, stagewise\nfrom torch import nn\n"
    "model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))\n"
    "x, y, mse = torch.ones(8, 8), torch.ones(8, 1), nn.functional.mse_loss\n"
    "plan = stagewise.Plan(balance=(1, 1), schedule='1f1b', num_microbatches=4)\n"
)


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


if __name__ == "__main__":
    main()
