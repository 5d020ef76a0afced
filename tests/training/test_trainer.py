"""The loop in this process: a pause changes nothing, and what happened is logged."""

import io
import itertools
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from rich.console import Console

from stagewise.errors import CheckpointError, ExactnessWarning, RecipeError
from stagewise.planning import Plan
from stagewise.planning.request import PlanRequest
from stagewise.training import run_folder
from stagewise.training.outcome import RunOutcome
from stagewise.training.prepare import TrainOptions, prepare
from stagewise.training.recipe import load_recipe
from stagewise.training.trainer import run_training
from stagewise.training.workers.stop import StopRequest
from tests.recipes import log_of, write_recipe


class StopAfter(StopRequest):
    """Asks to stop when it has been looked at `number` times."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    @property
    def made(self) -> bool:
        self.left -= 1
        return self.left < 0


def run(
    recipe: Path,
    out: Path,
    *,
    stages: int = 1,
    steps: int | None = 10,
    resume: Path | None = None,
    stop: StopRequest | None = None,
    checkpoint_every: int = 4,
) -> tuple[RunOutcome, str]:
    console = Console(file=io.StringIO(), width=100)
    options = TrainOptions(
        plan=PlanRequest(num_stages=stages, num_microbatches=4),
        run=out,
        num_steps=steps,
        validate_every=5,
        checkpoint_every=checkpoint_every,
        resume=run_folder.find(resume) if resume else None,
    )
    outcome = run_training(
        load_recipe(recipe), options, console=console, stop=stop or StopRequest()
    )
    assert isinstance(console.file, io.StringIO)
    return outcome, console.file.getvalue()


def test_a_recipe_may_weigh_its_targets(tmp_path: Path) -> None:
    losses = []
    for name, body in [("none", "None"), ("same", "len(target)"), ("size", "target.abs().sum()")]:
        weight = "" if name == "none" else f"def weight(target):\n    return {body}"
        recipe = write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = 8\n{weight}"), name=f"{name}.py")
        # Such weights are not those of the loss, a mean over samples.
        wrong = pytest.warns(ExactnessWarning, match=r"are weighted .* by weight\(target\)")
        with wrong if name == "size" else nullcontext():
            run(recipe, tmp_path / name, stages=2)
        losses.append([r["loss"] for r in log_of(tmp_path / name) if "loss" in r])
    by_samples, the_same, by_size = losses
    assert the_same == by_samples
    assert all(a != b for a, b in zip(by_size, by_samples, strict=True))


def test_a_run_and_its_log(tmp_path: Path) -> None:
    generate = "def generate(predict):\n    return str(tuple(predict(torch.ones(3, 8)).shape))"
    recipe = write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = 8\nclip_grad_norm = 1.0\n{generate}"))
    outcome, shown = run(recipe, tmp_path / "run", stages=2)
    assert outcome.sample == "(3, 1)"
    assert outcome.validation_before is not None and outcome.validation_after is not None
    assert outcome.validation_after < outcome.validation_before
    assert outcome.measured is not None and outcome.measured.step_seconds is not None
    assert len(outcome.measured.peak_activation_bytes) == 1  # one process
    assert min(outcome.measured.peak_activation_bytes) > 0
    assert not outcome.stopped
    assert outcome.checkpoint == tmp_path / "run/checkpoints/step-00000010"
    assert "step 10/10  loss" in shown
    assert "stage 1:" in shown and "predicted: step" in shown

    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 5, 10]
    assert all(r["samples_per_second"] > 0 and r["seconds"] > 0 for r in records if "loss" in r)
    assert [r["step"] for r in records if "bubble_fraction" in r] == [10]


BRANCHES = (
    ("    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))", "    return Branching(layers)"),
    (
        "def model():",
        """cells = ["layers.*", "head"]

class Branching(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if x.sum() > 0 else x - layer(x)
        return self.head(x)

def model():""",
    ),
)


@pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")  # by such a decision
def test_cells_of_a_recipe_may_decide_by_the_data(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, *BRANCHES)
    run(recipe, tmp_path / "one", steps=4)
    run(recipe, tmp_path / "two", steps=4, stages=2)
    saved = Plan(balance=(1, 3), schedule="gpipe", num_microbatches=4)
    options = TrainOptions(plan=saved, run=tmp_path, num_steps=1)
    pipe = prepare(load_recipe(recipe), options).trained.pipe
    assert [r for r in log_of(tmp_path / "one") if "loss" in r] == [
        r for r in log_of(tmp_path / "two") if "loss" in r
    ]
    assert [*pipe.state_dict()][-1] == "head.bias" and pipe.plan == saved


TIED = ("    return nn.Seq", "    layers[2][0].weight = layers[0][0].weight\n    return nn.Seq")


@pytest.mark.parametrize("changes", [(), (TIED,)], ids=["", "tied"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_pause_changes_nothing(
    tmp_path: Path, stages: int, changes: tuple[tuple[str, str], ...]
) -> None:
    recipe = write_recipe(tmp_path, *changes)
    run(recipe, tmp_path / "whole")
    stopped, _ = run(recipe, tmp_path / "parts", stages=2, stop=StopAfter(7))
    assert stopped.stopped and stopped.last_step == 7
    assert stopped.sample is None and stopped.measured is None
    assert stopped.checkpoint == tmp_path / "parts/checkpoints/step-00000007"
    run(recipe, tmp_path / "parts", stages=stages, resume=tmp_path / "parts")
    whole, parts = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    assert [r for r in whole if "loss" in r] == [r for r in parts if "loss" in r]
    assert whole[-1] == parts[-1]


META = ("WIDTH = 8", "WIDTH = 8\nmeta = True")


def test_a_model_on_the_meta_device_trains_alike_at_any_number_of_stages(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, META, TIED)
    outcome, shown = run(recipe, tmp_path / "whole")
    assert outcome.last_step == 10 and outcome.measured is not None
    assert "predicted: nothing, because a model on the meta device cannot be measured" in shown
    run(recipe, tmp_path / "parts", stages=2, stop=StopAfter(7))
    run(recipe, tmp_path / "parts", stages=3, resume=tmp_path / "parts")
    whole, parts = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    assert [r for r in whole if "loss" in r] == [r for r in parts if "loss" in r]
    assert whole[-1] == parts[-1]


def test_a_recipes_init_fills_its_model(tmp_path: Path) -> None:
    init = "def init(module):\n    getattr(module, 'weight', torch.ones(1)).data.zero_()"
    recipe = write_recipe(tmp_path, ("WIDTH = 8", f"WIDTH = 8\nmeta = True\n{init}"))
    options = TrainOptions(plan=PlanRequest(num_stages=2, num_microbatches=2), run=tmp_path / "run")
    pipe = prepare(load_recipe(recipe), options).trained.pipe
    state = pipe.state_dict()
    assert not any(state[n].any() for n in state if n.endswith("weight"))
    assert state["3.bias"].any()


def test_what_cannot_be_estimated_is_cut_by_size(tmp_path: Path) -> None:
    """A loss that needs values; 72 parameters three times, and 9."""
    recipe = write_recipe(
        tmp_path,
        META,
        ("return nn.functional", "assert target.max() > -1e9\n    return nn.functional"),
    )
    options = TrainOptions(plan=PlanRequest(num_stages=3, num_microbatches=2), run=tmp_path / "run")
    plan = prepare(load_recipe(recipe), options).trained.pipe.plan
    starts = [0, *itertools.accumulate(plan.balance)]
    sizes = [
        sum((72, 0, 0)[i % 3] if i < 9 else 9 for i in range(*pair))
        for pair in itertools.pairwise(starts)
    ]
    assert max(sizes) == 81 and not plan.cells


def test_a_model_that_cannot_be_built_on_the_meta_device(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        META,
        ("    return nn.Seq", "    layers[0][0].weight.max().item()\n    return nn.Seq"),
    )
    with pytest.raises(
        RecipeError, match=r"model\(\) under torch.device\('meta'\), as meta = True"
    ):
        run(recipe, tmp_path / "run")


def test_a_crash_is_made_up_for_from_the_last_checkpoint(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run(recipe, tmp_path / "whole", steps=9, checkpoint_every=0)
    run(recipe, tmp_path / "parts", steps=8)
    run(recipe, tmp_path / "parts", steps=9, resume=tmp_path / "parts/checkpoints/step-00000004")
    whole, parts = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    assert [r for r in whole if "loss" in r] == [r for r in parts if "loss" in r]


def test_stopped_before_the_first_step(tmp_path: Path) -> None:
    outcome, _ = run(write_recipe(tmp_path), tmp_path / "run", stop=StopAfter(0))
    assert outcome.stopped and outcome.checkpoint is None


def test_metrics_are_averaged_over_samples(tmp_path: Path) -> None:
    metrics = "def metrics(output, target):\n    return {'samples': len(output)}"
    batches = "[(torch.ones(n, WIDTH), torch.ones(n, 1)) for n in (1, 3)]"
    recipe = write_recipe(
        tmp_path,
        ("WIDTH = 8", f"WIDTH = 8\n{metrics}"),
        ("[(torch.ones(5, WIDTH), torch.ones(5, 1))]", batches),
    )
    run(recipe, tmp_path / "run", steps=1)
    assert log_of(tmp_path / "run")[0]["metrics"] == {"samples": (1 * 1 + 3 * 3) / 4}


def test_one_pass_by_default(tmp_path: Path) -> None:
    outcome, _ = run(write_recipe(tmp_path), tmp_path / "run", steps=None)
    assert outcome.last_step == 6


def test_data_of_unknown_length_needs_steps(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ("Shuffled() if", "iter(Shuffled()) if"))
    with pytest.raises(RecipeError, match="give --steps"):
        run(recipe, tmp_path / "run", steps=None)


def test_nothing_left_to_do(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run(recipe, tmp_path / "run", steps=4)
    with pytest.raises(CheckpointError, match=r"already has 4 of 4 steps.*larger --steps"):
        run(recipe, tmp_path / "run", steps=4, resume=tmp_path / "run")


def test_a_stage_without_parameters(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path))
    options = TrainOptions(
        plan=PlanRequest(num_stages=2, num_microbatches=2, balance=(1, 9)),
        run=tmp_path / "run",
        num_steps=2,
    )
    console = Console(file=io.StringIO())
    outcome = run_training(recipe, options, console=console, stop=StopRequest())
    assert outcome.last_step == 2
