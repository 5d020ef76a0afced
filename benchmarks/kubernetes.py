"""`examples/cluster/kubernetes.yaml` without a cluster: `make test-kubernetes`.

What can be checked of it on one machine: its objects against Kubernetes' own schemas, strictly, in
every version that PyPI's kubernetes-validate has; its names and numbers against each other; and
its command, in two network namespaces that have what the kubelet gives the pods of an Indexed Job
with a subdomain (hostname, entries of the headless service, environment, a shared volume). There
the losses must be those of one process. With `--kill` a container is killed and started again, as
`restartPolicy: OnFailure` does. What no cluster has seen: scheduling, images, GPUs, real DNS.
Linux and root for the namespaces; elsewhere it says so, and only the file is checked.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer

from benchmarks.two_hosts import RECIPE, losses, two_networks

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "cluster" / "kubernetes.yaml"
SECONDS, NUM_STEPS = 480, 40
_RESTARTS = 4  # of containers that fail after one was killed
Objects = Mapping[str, Any]  # by kind


def objects() -> Objects:
    """Return what the file describes."""
    import yaml

    return {each["kind"]: each for each in yaml.safe_load_all(FILE.read_text())}


def check_schemas(every: Objects) -> str:
    """Validate every object; raises for a field that is unknown or of the wrong type."""
    from kubernetes_validate.utils import all_versions, validate

    versions = all_versions()
    for version in versions:
        for each in every.values():
            validate(each, version, strict=True)
    return f"valid for Kubernetes {versions[0]} to {versions[-1]}"


def mistakes(every: Objects) -> list[str]:
    """Return what does not fit together, as pods would find out."""
    service, job = every["Service"], every["Job"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    name, domain = job["metadata"]["name"], service["metadata"]["name"]
    claims = {mount["name"] for mount in container["volumeMounts"]}
    found = {
        "pods get no names": pod.get("subdomain") == domain
        and service["spec"]["clusterIP"] == "None",
        "the service selects other pods": service["spec"]["selector"] == {"job-name": name},
        "HEAD is not pod 0": env["HEAD"] == f"{name}-0.{domain}",
        "NODES is not their number": {int(env["NODES"] or 0)}
        == {spec["completions"], spec["parallelism"]},
        "PER_NODE is not that of GPUs": int(env["PER_NODE"] or 0)
        == container["resources"]["limits"]["nvidia.com/gpu"],
        "mounts are of other volumes": claims == {volume["name"] for volume in pod["volumes"]},
        "pods would not be indexed": spec["completionMode"] == "Indexed",
        "the script is not there": (ROOT / container["command"][1]).is_file(),
    }
    return [why for why, is_well in found.items() if not is_well]


@contextmanager
def as_pods(every: Objects, networks: Mapping[str, str]) -> Iterator[list[str]]:
    """Let both namespaces know the pods by the names that the headless service gives them."""
    job = every["Job"]
    domain = job["spec"]["template"]["spec"]["subdomain"]
    names = [f"{job['metadata']['name']}-{index}" for index in range(len(networks))]
    lines = ["127.0.0.1 localhost"]
    for name, address in zip(names, networks.values(), strict=True):
        full = f"{name}.{domain}.default.svc.cluster.local"
        lines.append(f"{address} {full} {name}.{domain} {name}")
    with ExitStack() as stack:
        for network in networks:
            folder = Path("/etc/netns", network)
            folder.mkdir(parents=True)
            stack.callback(folder.rmdir)
            (folder / "hosts").write_text("\n".join(lines) + "\n")
            stack.callback((folder / "hosts").unlink)
        yield names


class Pods:
    """The pods of the job, each in a namespace, with `runs` as their shared volume."""

    def __init__(
        self, every: Objects, networks: Mapping[str, str], runs: Path, *, quick: bool
    ) -> None:
        self._networks, self._runs, self._is_quick = networks, runs, quick
        (self._container,) = every["Job"]["spec"]["template"]["spec"]["containers"]

    def start(
        self, index: int, name: str, words: Sequence[str], log: Path
    ) -> subprocess.Popen[Any]:
        """Start the container of a pod, with more `words` for its command."""
        network, address = [*self._networks.items()][index]
        env = {each["name"]: each.get("value", address) for each in self._container["env"]}
        args = self._container["args"]
        if self._is_quick:
            env["PER_NODE"], args = "1", [re.sub(r",dp_shard=\d+", "", word) for word in args]
        volume = self._container["volumeMounts"][0]["mountPath"]
        args = [word.replace(volume, str(self._runs)) for word in args]
        command = [*self._container["command"], *args, *words]
        inside = 'hostname "$0"; exec "$@"'
        with log.open("a") as file:
            return subprocess.Popen(
                [*f"ip netns exec {network} unshare --uts sh -c".split(), inside, name, *command],
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(self._runs),
                    "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
                    "PYTHON": sys.executable,
                    "OMP_NUM_THREADS": "1",
                    "JOB_COMPLETION_INDEX": str(index),
                    "HOSTNAME": name,
                    **env,
                },
                stdout=file,
                stderr=file,
                start_new_session=True,
            )


def end(pod: subprocess.Popen[Any]) -> None:
    """End all processes of a pod at once, as when its container is killed."""
    children = subprocess.run(
        ["pgrep", "-s", str(pod.pid)], capture_output=True, text=True, check=False
    )
    workers = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    own = {int(pid) for pid in children.stdout.split()} | {pod.pid}
    pairs = [tuple(map(int, line.split())) for line in workers.stdout.splitlines()]
    for _ in pairs:
        if not (more := {pid for pid, parent in pairs if parent in own} - own):
            break
        own |= more
    for pid in own:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    pod.wait()


def main(
    quick: bool = typer.Option(False, help="One worker in each pod, in place of the file's four."),
    kills: bool = typer.Option(False, "--kill", help="Kill a container, and start it again."),
) -> None:
    """Check the file, then run it."""
    try:
        every = objects()
        print(f"{FILE.name}: {check_schemas(every)}")
    except ImportError as error:
        print(f"skipped: {error}; pip install kubernetes-validate")
        return
    if found := mistakes(every):
        raise SystemExit("; ".join(found))
    print("names, numbers and volumes fit together")
    with ExitStack() as stack:
        try:
            networks = stack.enter_context(two_networks())
            names = stack.enter_context(as_pods(every, networks))
        except OSError as error:
            print(f"skipped: network namespaces are not permitted here ({error}); run as root")
            return
        runs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _compare(Pods(every, networks, runs, quick=quick), names, runs, quick=quick, kills=kills)


def _compare(pods: Pods, names: Sequence[str], runs: Path, *, quick: bool, kills: bool) -> None:
    recipe = ROOT / "recipe.py"
    if recipe.exists():
        raise SystemExit(f"{recipe} is in the way: the job's command reads a recipe of that name")
    recipe.write_text(RECIPE.replace("range(3)", f"range({NUM_STEPS})"))
    out, one, log = runs / "one", runs / "alone", [runs / f"{name}.txt" for name in names]
    steps = ("--steps", str(NUM_STEPS), "--validate-every", "0", "--checkpoint-every", "5")
    started: list[subprocess.Popen[Any]] = []
    try:
        words = [*steps, "--microbatches", "2"]
        started = [pods.start(i, n, words, log[i]) for i, n in enumerate(names)]
        if kills:
            _until(lambda: _steps(out) >= NUM_STEPS // 4, started, log)
            end(started[1])
            print(f"container of {names[1]} killed after step {_steps(out)}, and started again")
            started[1] = pods.start(1, names[1], words, log[1])
        again = _RESTARTS if kills else 0
        deadline = time.monotonic() + SECONDS
        while any(codes := [pod.poll() for pod in started]) or None in codes:
            for index, name in enumerate(names):
                if codes[index] and again:  # as `restartPolicy: OnFailure` does
                    again -= 1
                    print(f"container of {name} ended with {codes[index]}, and started again")
                    started[index] = pods.start(index, name, words, log[index])
                elif codes[index] or time.monotonic() > deadline:
                    raise SystemExit(f"pods ended with {codes}\n{_said(log)}")
            time.sleep(0.2)
        command = [sys.executable, "-m", "stagewise", "train", str(recipe), "--devices", "1"]
        command += ["--microbatches", "2" if quick else "8", *steps, "--out", str(one)]
        subprocess.run(command, check=True, capture_output=True)
    finally:
        for pod in started:
            end(pod)
        recipe.unlink()
    last = {record["step"]: record["loss"] for record in _records(out)}
    worst = max(abs(last[i + 1] - loss) for i, loss in enumerate(losses(one)))
    print(f"{len(last)} steps in {len(names)} pods: largest difference of losses {worst:.1e}")
    if worst > 1e-12:
        raise SystemExit(1)


def _until(is_done: Any, started: Sequence[subprocess.Popen[Any]], log: Sequence[Path]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_done():
        if time.monotonic() > deadline or any(pod.poll() is not None for pod in started):
            raise SystemExit(f"the pods do not get on\n{_said(log)}")
        time.sleep(0.2)


def _said(log: Sequence[Path]) -> str:
    return "\n".join(f"{path.stem}:\n{path.read_text()[-2500:]}" for path in log if path.exists())


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def _steps(run: Path) -> int:
    return max((record["step"] for record in _records(run)), default=0)


if __name__ == "__main__":
    typer.run(main)
