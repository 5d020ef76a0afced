"""A Slurm cluster of two nodes on one machine: `make test-slurm`.

A node is a network namespace with an address and a hostname of its own, in which a real slurmd
runs; slurmctld runs on the first. `sbatch examples/cluster/slurm.sbatch` must train as one process
does, end with a checkpoint when Slurm says that the time will be up, and go on from there when it
is submitted again. Nodes have two GPUs in Slurm's books, which are null devices: all run on CPUs.
Linux and root, with Debian's slurm-wlm and munge; elsewhere it says so, and nothing is run.
"""

import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.two_hosts import RECIPE, losses, two_networks

ROOT = Path(__file__).parents[1]
MESH = ("--mesh", "pp=2,dp_shard=2", "--microbatches", "2", "--validate-every", "0")
ALONE = ("--devices", "1", "--microbatches", "4", "--validate-every", "0")
SECONDS = 180  # that anything may take
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
CONFIGURATION = """
ClusterName=stagewise
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""


Run = Callable[..., str]  # runs a command on the first node, and returns what it says


@contextmanager
def cluster(networks: dict[str, str]) -> Iterator[Run]:
    """Start Slurm's daemons on every node, which has its network."""
    first = next(iter(networks))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)  # munge refuses a folder that others may write to
        _configure(folder, networks, stack)
        key = folder / "munge" / "key"
        key.parent.mkdir(mode=0o700)
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
        }

        def start(name: str, command: str) -> None:
            log = stack.enter_context((folder / f"{command.split()[0]}.{name}").open("w"))
            line = [*_on(name), "unshare", "--uts", "sh", "-c", f"hostname {name}; exec {command}"]
            daemon = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
            stack.callback(_end, daemon)

        def run(*command: str, check: bool = True) -> str:
            done = subprocess.run(
                [*_on(first), *command],
                env=environment,
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
            if check and done.returncode:
                raise RuntimeError(f"{' '.join(command)}: {done.returncode}: {done.stderr}")
            return done.stdout

        files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={key.parent / name}" for option, name in files.items()]
        start(first, f"munged --foreground --force --socket={folder}/socket {' '.join(options)}")
        wait_until((folder / "socket").exists, "munged does not listen")
        start(first, "slurmctld -D")
        for name in networks:
            start(name, "slurmd -D")
        states = ("sinfo", "-h", "-N", "-o", "%t")
        wait_until(lambda: run(*states, check=False).split() == ["idle"] * 2, "a node is not idle")
        yield run


def _configure(folder: Path, networks: dict[str, str], stack: ExitStack) -> None:
    nodes = [f"NodeName={name} NodeAddr={at} CPUs=2 Gres=gpu:2" for name, at in networks.items()]
    text = CONFIGURATION.format(first=next(iter(networks)), folder=folder, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    for number in range(2):
        os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    hosts = "".join(f"{address} {name}\n" for name, address in networks.items())
    for name in networks:  # `ip netns exec` lays such files over /etc
        own = Path("/etc/netns") / name
        own.mkdir(parents=True)
        stack.callback(shutil.rmtree, own)
        (own / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")


def _on(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Wait; RuntimeError with `what` if that takes too long."""
    end = time.monotonic() + SECONDS
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(f"after {SECONDS} seconds, {what}")
        time.sleep(0.2)


def submitted(run: Run, folder: Path, *words: str) -> str:
    """Submit `stagewise train recipe.py --resume auto` with these words; return its number."""
    options = ("--parsable", "--gpus-per-node=2", "--cpus-per-task=1", "--time=10")
    output = f"--output={folder}/job-%j.txt"
    script = "examples/cluster/slurm.sbatch"
    train = "train", str(folder / "recipe.py"), "--resume", "auto"
    return run("sbatch", *options, output, script, *train, *words)[:-1]


def ended(run: Run, folder: Path, job: str, state: str = "COMPLETED") -> None:
    """Wait for a job's end; RuntimeError with what it said if that is in another state."""
    wait_until(lambda: not run("squeue", "-h", "-j", job, check=False), f"job {job} goes on")
    told = run("scontrol", "show", "job", "-o", job)
    if f"JobState={state}" not in told:
        said = (folder / f"job-{job}.txt").read_text()[-3000:]
        raise RuntimeError(f"job {job} ended otherwise than {state}: {told}\n{said}")


def main() -> None:
    """Train, stop and go on; print the largest differences to one process."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    with ExitStack() as stack:
        try:
            networks = stack.enter_context(two_networks())
        except OSError as error:
            print(f"skipped: network namespaces are not permitted here ({error}); run as root")
            return
        if missing:
            print(f"skipped: no {', '.join(missing)}; apt-get install slurm-wlm munge")
            return
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "recipe.py").write_text(RECIPE)
        run = stack.enter_context(cluster(networks))
        short, long = ("--steps", "3"), ("--steps", "2000")
        ended(run, folder, submitted(run, folder, *MESH, *short, "--out", f"{folder}/short"))
        job = submitted(run, folder, *MESH, *long, "--out", f"{folder}/long")
        log = folder / "long" / "log.jsonl"
        wait_until(lambda: log.exists() and len(losses(log.parent)) > 20, "no step was logged")
        run("scancel", "--signal=TERM", job)
        ended(run, folder, job, "FAILED")  # torchrun's code after a signal is 1
        done = len(losses(log.parent))
        further = ("--steps", str(done + 5), "--out", f"{folder}/long")
        ended(run, folder, submitted(run, folder, *MESH, *further))
        worst = {"two nodes": _difference(folder, "short", 3)}
        worst[f"ended after step {done}, and went on"] = _difference(folder, "long", done + 5)
        for name, difference in worst.items():
            print(f"{name}: {' '.join(MESH)}: largest difference of losses {difference:.1e}")
        if max(worst.values()) > 1e-12 or done >= 2000:
            raise SystemExit(1)


def _difference(folder: Path, name: str, steps: int) -> float:
    """Train in one process; return the largest difference of its losses to those of a run."""
    alone = folder / f"{name}-alone"
    command = [sys.executable, "-m", "stagewise", "train", str(folder / "recipe.py"), *ALONE]
    command += ["--steps", str(steps), "--out", str(alone)]
    subprocess.run(command, check=True, capture_output=True)
    pairs = zip(losses(folder / name), losses(alone), strict=True)
    return max(abs(one - other) for one, other in pairs)


if __name__ == "__main__":
    main()
