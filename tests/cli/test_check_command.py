"""`stagewise check` runs a recipe's model plain and pipelined, and its exit code is the verdict."""

from pathlib import Path

import pytest

from stagewise.schedule import POLICIES, SCHEDULES
from tests.recipes import RunHere, run_command, write_recipe


def test_the_tiny_recipe_agrees(tmp_path: Path, run_here: RunHere) -> None:
    code, out, err = run_here("check", write_recipe(tmp_path), "--double")
    assert (code, err) == (0, "")
    for expected in ("gradient 3.weight", "parameter 0.0.bias", "1f1b, 4, 4, except_last"):
        assert expected in out
    *_, verdict = out.strip().splitlines()
    num_runs = len(SCHEDULES) * len((1, 2, 4)) * len(POLICIES)
    assert verdict.startswith(
        f"ok: {num_runs} pipelined runs equal the plain model run by microbatch"
    )
    assert "explained by random numbers (0.2 Dropout, 1.2 Dropout, 2.2 Dropout)" in verdict
    assert not list(tmp_path.glob("runs*")), "a check leaves nothing behind"


def test_a_loss_that_is_a_sum_fails(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(
        tmp_path, ("mse_loss(output, target)", "mse_loss(output, target, reduction='sum')")
    )
    code, out, err = run_here(
        *("check", recipe, "--stages", "2,3", "--schedule", "gpipe", "--recompute", "never")
    )
    assert (code, err) == (1, "")
    assert "FAILED: loss, gradient 0.0.weight" in out
    assert "it must be a mean over samples" in out


COUNTS = """class Counts(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * min(1, self.calls)

def model():"""


def test_what_a_cell_carries_over_is_a_warning(tmp_path: Path) -> None:
    changes = ("def model():", COUNTS), ("nn.Linear(WIDTH, 1)", "Counts(WIDTH, 1)")
    arguments = ("--stages", "2", "--schedule", "gpipe", "--recompute", "never")
    recipe = write_recipe(tmp_path, *changes)
    code, out, err = run_command("check", recipe, *arguments, cwd=tmp_path, forked=True)
    assert code == 0 and "ok: 1 pipelined run" in out
    assert err.startswith("warning: cell '3' changes calls in every") and err.count("\n") == 1


def test_a_schedule_of_ones_own(tmp_path: Path, run_here: RunHere) -> None:
    (tmp_path / "mine.txt").write_text("0F0 0F1 2F0 2B0 2F1 0B0 2B1 0B1\n1F0 1F1 1B0 1B1\n")
    arguments = ("--schedule", "mine.txt", "--recompute", "never", "--double")
    code, out, err = run_here("check", write_recipe(tmp_path), *arguments)
    assert (code, err) == (0, "")
    assert "mine.txt, 3, 2, never" in out and "ok: 1 pipelined run " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stages", "1,two"), "--stages '1,two' is not a list of positive"),
        (("--stages", "11"), "use at most 10 stages"),
        (("--microbatches", "0"), "--microbatches '0' is not a list of positive integers"),
        (("--microbatches", "9"), "8 samples cannot fill 9 microbatches"),
        (("--schedule", "zigzag"), "there is no schedule 'zigzag'; choose one of 1f1b, breadth"),
        (("--stages", "2", "--devices", "2"), "--stages and --devices were both given"),
        (("--recompute", "often"), "no recompute policy 'often'"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, run_here: RunHere, arguments: tuple[str, str], message: str
) -> None:
    code, out, err = run_here("check", write_recipe(tmp_path), *arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_an_error_in_the_model_names_the_recipes_line(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path, ("nn.Linear(WIDTH, 1)", "nn.Linear(3, 1)"))
    code, _, err = run_here("check", recipe)
    assert code == 2
    assert "a training step failed in" in err and "mat1 and mat2" in err


BRANCHING = """class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh() if x.mean() < 1e6 else -layer(x)
        return self.head(x)

cells = ["layers.*", "head"]
clip_grad_value, clip_grad_norm, accumulate, autocast = 0.01, 0.5, 2, torch.bfloat16

def model():
    return Net()

def unused():"""


def test_a_recipe_that_names_its_cells(tmp_path: Path, run_here: RunHere) -> None:
    recipe = write_recipe(tmp_path, ("def model():", BRANCHING))
    arguments = ("--stages", "1,2", "--schedule", "gpipe,1f1b", "--recompute", "never", "--double")
    code, out, err = run_here("check", recipe, *arguments)
    assert (code, err) == (0, "")
    assert "gradient head.bias" in out
    assert "ok: 4 pipelined runs equal the plain model within round-off" in out
    assert "Checked without the recipe's autocast, accumulate:" in out
