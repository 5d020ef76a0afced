"""`stagewise train` for real: worker processes, Ctrl-C, resuming, and wrong use told once."""

import os
import signal
import socket
from pathlib import Path

import pytest

from stagewise.recording import read_run
from tests.recipes import Command, RunHere, log_of, run_command, write_recipe

pytestmark = pytest.mark.timeout(300)
SMALL = ("--microbatches", "4", "--validate-every", "0")


def losses(run: Path) -> list[dict[str, float]]:
    return [record for record in log_of(run) if "loss" in record]


def test_two_workers_train_and_what_they_leave(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    code, out, err = run_command("train", recipe, "--steps", "10", *SMALL, cwd=tmp_path)
    waits = [line for line in err.splitlines() if " waits at localhost:" not in line]
    assert (code, waits) == (0, [])  # a slow machine is told that a rank is slow to start
    for expected in ("stage 1:", "step 10/10  loss", "step time", "peak activations, device 1"):
        assert expected in out
    assert out.count("validation loss") == 3  # before, after, and in the summary
    assert "--steps 20 --validate-every 0 --resume runs/tiny" in out
    run = tmp_path / "runs/tiny"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010"]
    assert "where the time went: stagewise report runs/tiny" in out
    recording = read_run(run).recording
    assert recording is not None and [step.step for step in recording.steps] == [8, 9, 10]
    assert recording.environment["command"].startswith("stagewise train ")
    assert len(recording.clocks) == 2 and all(memory.live for memory in recording.memory)

    # One process gives the same losses, bit for bit; its run gets a directory of its own.
    code, _, err = run_here("train", recipe, "--stages", "1", "--steps", "10", *SMALL)
    assert (code, err) == (0, "")
    assert losses(tmp_path / "runs/tiny-2") == losses(run)


def test_a_schedule_of_ones_own_trains_alike(tmp_path: Path, run_here: RunHere) -> None:
    """Four stages on two workers, from a file; and in one process, by name, as 1f1b."""
    recipe = write_recipe(tmp_path)
    arguments = ("--schedule", "interleaved", "--devices", "2", "--microbatches", "4")
    code, text, _ = run_here("simulate", *arguments, "--text")
    (tmp_path / "mine.txt").write_text(text)
    own = ("--schedule", "mine.txt", "--steps", "3", "--validate-every", "0")
    code, out, err = run_here("train", recipe, *own)
    assert (code, err) == (0, "")
    assert "stage 3:" in out and "peak activations, device 1" in out
    assert "--schedule mine.txt --steps 6 --validate-every 0 --resume runs/tiny" in out
    one = ("--devices", "1", "--steps", "3", *SMALL)
    assert run_here("train", recipe, *one)[0] == 0
    assert losses(tmp_path / "runs/tiny-2") == losses(tmp_path / "runs/tiny")


def test_replicas_train_alike(tmp_path: Path, run_here: RunHere) -> None:
    """Two microbatches on two devices: a sum of two has one order, so the very same losses."""
    recipe = write_recipe(tmp_path)
    more = ("--microbatches", "2", "--steps", "3", "--validate-every", "0")
    code, out, err = run_here("train", recipe, "--replicas", "2", *more)
    assert (code, err) == (0, "")
    assert "stage 0: 10 cells" in out and "peak activations, device 1" in out
    assert "--replicas 2 --microbatches 2 --steps 6 --validate-every 0 --resume runs/tiny" in out
    one = ("train", recipe, "--devices", "1", *more)
    assert run_here(*one)[0] == 0
    assert losses(tmp_path / "runs/tiny-2") == losses(tmp_path / "runs/tiny")


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path)
    with Command("train", recipe, "--steps", "1000000", *SMALL, cwd=tmp_path) as command:
        command.read_until("step 10/")
        command.interrupt()
        code, out, err = command.finish()
    assert code == 130, err
    assert err == "\nstopping after this step; repeat to stop at once\n"
    assert "stopped after step" in out
    run = tmp_path / "runs/tiny"
    (last,) = sorted((run / "checkpoints").iterdir())[-1:]
    stopped_at = int(last.name.removeprefix("step-"))
    assert [record["step"] for record in losses(run)] == list(range(1, stopped_at + 1))

    steps = str(stopped_at + 5)
    code, _, err = run_here("train", recipe, "--steps", steps, *SMALL, "--resume", "runs/tiny")
    assert (code, err) == (0, "")
    whole = ("train", recipe, "--stages", "1", "--steps", steps, "--out", "whole", *SMALL)
    assert run_here(*whole)[0] == 0
    assert losses(tmp_path / "whole") == losses(run)


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    sleep = "import time\n            print('asleep', flush=True)\n            time.sleep(1000)"
    recipe = write_recipe(
        tmp_path, ("sum(dim=1, keepdim=True)\n", f"sum(1, True)\n            {sleep}\n")
    )
    with Command("train", recipe, "--steps", "1000", *SMALL, cwd=tmp_path, forked=True) as command:
        command.read_until("asleep")
        command.interrupt()
        assert command.process.stderr is not None
        while "repeat to stop at once" not in command.process.stderr.readline():
            pass
        command.interrupt()
        code, _, err = command.finish()
    assert code == 130
    assert "Traceback" not in err


def test_a_killed_worker_is_told_and_ends_the_run(tmp_path: Path, run_here: RunHere) -> None:
    kill = "__import__('os').environ.get('RANK') == '1' and __import__('os').kill("
    kill += "__import__('os').getpid(), 9)"
    recipe = write_recipe(
        tmp_path, ("inputs = torch.randn", f"{kill}\n            inputs = torch.randn")
    )
    code, _, err = run_here("train", recipe, "--steps", "5", *SMALL)
    assert code == 1
    assert "rank 1" in err and "SIGKILL" in err


def test_a_workers_failure_is_told_once_with_its_traceback(
    tmp_path: Path, run_here: RunHere
) -> None:
    fail = "import os\n    if os.environ.get('RANK') == '1':\n        raise KeyError('oh')"
    recipe = write_recipe(
        tmp_path, ("def loss(output, target):", f"def loss(output, target):\n    {fail}")
    )
    code, _, err = run_here("train", recipe, "--steps", "5", *SMALL)
    assert code == 1
    assert err.startswith("error: the worker of rank 1 failed: CellError: ")
    assert err.count("Traceback (most recent call last)") == 1
    assert err.endswith("KeyError: 'oh'\n")


def test_a_failure_outside_the_pipeline_names_rank_and_step(
    tmp_path: Path, run_here: RunHere
) -> None:
    fail = "if index == 2 and __import__('os').environ.get('RANK') == '1':\n"
    fail += "                raise KeyError('oh')\n            inputs = torch.randn"
    recipe = write_recipe(
        tmp_path, ("for _ in range(6)", "for index in range(6)"), ("inputs = torch.randn", fail)
    )
    code, _, err = run_here("train", recipe, "--steps", "5", *SMALL)
    assert code == 2
    place = f"line 20 (rank 1 on {socket.gethostname()}, stage 1, step 3): KeyError: 'oh'\n"
    assert place in err and err.startswith("error: data('train') failed in ")
    assert err.count("Traceback (most recent call last)") == 1
    assert err.endswith("KeyError: 'oh'\n")


def test_sigterm_to_a_worker_stops_all_with_a_checkpoint(tmp_path: Path) -> None:
    tell = "import os\n    open(f\"pid-{os.environ['RANK']}\", 'w').write(str(os.getpid()))"
    recipe = write_recipe(tmp_path, ("def model():", f"def model():\n    {tell}"))
    with Command(
        "train", recipe, "--steps", "1000000", *SMALL, cwd=tmp_path, forked=True
    ) as command:
        command.read_until("step 10/")
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGTERM)
        code, out, err = command.finish()
    assert (code, err) == (130, "")
    assert "continue with: stagewise train" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "zigzag"], "there is no schedule 'zigzag'; choose one of"),
        (["--recompute", "rarely"], "there is no recompute policy 'rarely'; choose one of"),
        (["--stages", "11"], "use at most 10 stages"),
        (["--balance", "4,7"], "places 11 cells but the model has 10"),
        (["--balance", "4,5,1"], "has 3 stages but num_stages is 2"),
        (["--balance", "half"], "such as --balance 4,6"),
        (["--resume", "nowhere"], "nowhere does not exist"),
        (["--microbatches", "9"], "8 samples cannot fill 9 microbatches"),
    ],
)
def test_wrong_use_is_told_once(
    tmp_path: Path, run_here: RunHere, arguments: list[str], message: str
) -> None:
    recipe = write_recipe(tmp_path)
    code, _, err = run_here("train", recipe, "--steps", "5", *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count(message) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_recipe_without_loss(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path, ("def loss(", "def lossy("))
    code, _, err = run_here("train", recipe)
    assert code == 2
    assert "has no loss; add it, for example:\n\ndef loss(output, target):" in err


def test_resume_of_another_model_and_of_a_taken_directory(
    tmp_path: Path, run_here: RunHere
) -> None:
    recipe = write_recipe(tmp_path)
    one = ("--stages", "1", "--steps", "2", "--out", "run")
    assert run_here("train", recipe, *one)[0] == 0
    code, _, err = run_here("train", recipe, *one)
    assert code == 2
    assert "run already has the checkpoints of a run of 2 steps; resume it" in err
    wider = write_recipe(tmp_path, ("WIDTH = 8", "WIDTH = 9"), name="wider.py")
    code, _, err = run_here("train", wider, "--resume", "run", "--steps", "4")
    assert code == 2
    assert "from another model" in err
    assert "0.0.weight: (8, 8) in the checkpoint, (9, 9) here" in err
    code, _, err = run_here("train", recipe, "--resume", "run", "--seed", "5")
    assert code == 2
    assert "leave --seed out" in err


def test_the_same_command_goes_on_where_a_cluster_starts_it_again(
    tmp_path: Path, run_here: RunHere
) -> None:
    """As of a container that was killed before its first checkpoint, later, and after the last."""
    recipe, once = write_recipe(tmp_path), ("--devices", "1", *SMALL, "--resume", "auto")
    (tmp_path / "tiny.toml").write_text('out = "run"\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    for steps in ("3", "5", "5"):
        code, out, err = run_here("train", recipe, *once, "--steps", steps)
        assert (code, err) == (0, ""), err
    assert "going on with 1 worker(s) after step 5, because" in out
    assert [record["step"] for record in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_torchrun_starts_the_workers_again_when_one_has_died(
    tmp_path: Path, run_here: RunHere
) -> None:
    """The run goes on from its newest checkpoint, in its own folder, with the same losses."""
    once = "import os\n    if os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':\n"
    once += "        if os.path.exists('runs/tiny/checkpoints/step-00000002/stagewise.json'):\n"
    once += "            os.kill(os.getpid(), 9)"
    change = ("def loss(output, target):", f"def loss(output, target):\n    {once}")
    recipe, more = write_recipe(tmp_path, change), ("--steps", "5", "--checkpoint-every", "1")
    torchrun = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "stagewise")
    arguments = (*torchrun, "train", recipe, *more, *SMALL)
    with Command(*arguments, cwd=tmp_path, module="torch.distributed.run", forked=True) as command:
        code, out, err = command.finish()
    assert code == 0, err
    assert out.count("continue with") == 1
    assert out.count("going on with 2 worker(s) after step ") == 1
    assert out.count("the interruption took ") == 1 and "steps repeated" in out
    assert run_here("train", recipe, "--stages", "1", *more, *SMALL)[0] == 0
    assert losses(tmp_path / "runs/tiny") == losses(tmp_path / "runs/tiny-2")


def test_torchrun_starts_as_many_workers_as_asked_for(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    torchrun = ("--standalone", "--nproc-per-node", "2", "-m", "stagewise")
    arguments = (*torchrun, "train", recipe, "--steps", "3", *SMALL, "--stages", "3")
    with Command(*arguments, cwd=tmp_path, module="torch.distributed.run", forked=True) as command:
        code, _, err = command.finish()
    assert code != 0
    assert (
        err.count("torchrun has started 2 workers, but the schedule needs one for each of 3") == 1
    )
