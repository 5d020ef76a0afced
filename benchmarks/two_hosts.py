"""Two hosts on one machine, as network namespaces: `make test-hosts`.

Each has an address of its own; they share the disk only, as hosts with a shared file system do.
Both run `examples/cluster/torchrun.sh`; the losses must be those of one process.
Linux and root only: elsewhere it says so, and nothing is run.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "cluster" / "torchrun.sh"
STEPS = ("--steps", "3", "--validate-every", "0")
CASES = {  # the mesh, and the microbatches that give the same losses in one process
    "a stage on each host": (("--devices", "2", "--microbatches", "4"), 1, "4"),
    "stages across hosts": (("--mesh", "dp_shard=2,pp=2", "--microbatches", "2"), 2, "4"),
    "shards across hosts": (("--mesh", "pp=2,dp_shard=2", "--microbatches", "2"), 2, "4"),
}
RECIPE = """
import torch
from torch import nn

def model():
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]).double()

def data(split):
    torch.manual_seed(0)
    return [(torch.randn(8, 8).double(), torch.randn(8, 8).double()) for _ in range(3)]

def loss(output, target):
    return nn.functional.mse_loss(output, target)

def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)
"""


@contextmanager
def two_networks() -> Iterator[dict[str, str]]:
    """Namespaces with their addresses, on a cable; raises OSError where that is not permitted."""
    names = [f"sw{os.getpid()}{side}" for side in "ab"]
    addresses = [f"10.231.{os.getpid() % 250}.{side}" for side in (1, 2)]
    with ExitStack() as stack:
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        ends = [f"{name}0"[-14:] for name in names]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, addresses, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                _ip("-n", name, "link", "set", device, "up")
        yield dict(zip(names, addresses, strict=True))


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def losses(run: Path) -> list[float]:
    """Return those of a run's log."""
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def on_both(networks: dict[str, str], per_node: int, words: Sequence[str], folder: Path) -> None:
    """Run the script in both namespaces; raise RuntimeError with what they say if one fails."""
    head = next(iter(networks.values()))
    started = []
    for name, address in networks.items():
        environment = {
            **os.environ,
            "HEAD": head,
            "NODES": "2",
            "PER_NODE": str(per_node),
            "LOCAL_ADDR": address,
            "PYTHON": sys.executable,
            "GLOO_SOCKET_IFNAME": f"{name}0"[-14:],
            "OMP_NUM_THREADS": "1",
        }
        command = ["ip", "netns", "exec", name, "bash", str(SCRIPT), *words]
        log = (folder / f"{name}.txt").open("w+")
        started.append(
            (name, log, subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        )
    try:
        codes = [process.wait(120) for _, _, process in started]
    finally:
        for _, log, process in started:
            process.terminate()
            log.close()
    if any(codes):
        said = "\n".join(f"{n}:\n{(folder / f'{n}.txt').read_text()[-2000:]}" for n in networks)
        raise RuntimeError(f"{words} ended with {codes}\n{said}")


def main() -> None:
    """Run every case, and print its largest difference."""
    with ExitStack() as stack:
        try:
            networks = stack.enter_context(two_networks())
        except OSError as error:
            print(f"skipped: network namespaces are not permitted here ({error}); run as root")
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        recipe = folder / "recipe.py"
        recipe.write_text(RECIPE)
        for number, (name, (words, per_node, alone)) in enumerate(CASES.items()):
            run, one = folder / f"run{number}", folder / f"one{number}"
            on_both(
                networks,
                per_node,
                ["train", str(recipe), *words, *STEPS, "--out", str(run)],
                folder,
            )
            command = [sys.executable, "-m", "stagewise", "train", str(recipe), "--devices", "1"]
            command += ["--microbatches", alone, *STEPS, "--out", str(one)]
            subprocess.run(command, check=True, capture_output=True)
            worst = max(abs(a - b) for a, b in zip(losses(run), losses(one), strict=True))
            print(f"{name}: {' '.join(words)}: largest difference of losses {worst:.1e}")
            if worst > 1e-12:
                raise SystemExit(1)


if __name__ == "__main__":
    main()
