"""The files that the wrong inputs name: recipes with one thing wrong each, and others."""

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
        "scheduler_metric = 'accuracy'\n"
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
    "bare/note.txt": "x",
    "brokenhf/config.json": "{",
    "emptyhf/config.json": "{}",
    "badrun/recording.json": "{",
    "oldrun/recording.json": '{"format": "stagewise recording", "version": 2}',
    "logrun/log.jsonl": '{"step": 1, "loss": 0.5}\n',
    "other.json": '{"a": 1}',
    "misspelt.toml": "stagse = 2\n",
    "wrongtype.toml": 'stages = "two"\n',
    "table.toml": "[train]\nstages = 2\n",
    "negative.toml": "steps = -3\n",
    "par3.py": changed(more="parallelize = 3\n"),
    "parargs.py": changed(more="def parallelize(module): pass\n"),
}
