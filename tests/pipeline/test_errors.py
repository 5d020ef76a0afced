"""Wrong use gets an error in words, on every rank, before anything moves; nothing hangs."""

import re
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import (
    BatchError,
    CellError,
    ModelError,
    PlanError,
    ScheduleError,
    StagewiseError,
    UsageError,
)
from tests.harness import Pools, Raised
from tests.models import Call

pytestmark = pytest.mark.filterwarnings("ignore:cell .* changes calls:UserWarning")

MSE = nn.functional.mse_loss
SOON_SECONDS = 20  # on a busy machine; a time-out of gloo's would be 30 minutes


def plan_of(
    *balance: int, num_microbatches: int = 4, recompute: str = "never", schedule: str = "1f1b"
) -> stagewise.Plan:
    return stagewise.Plan(
        balance=balance, schedule=schedule, num_microbatches=num_microbatches, recompute=recompute
    )


def linears(number: int) -> list[nn.Module]:
    return [nn.Linear(3, 3) for _ in range(number)]


def local(cells: list[nn.Module], *balance: int) -> stagewise.Pipeline:
    return stagewise.Pipeline(cells, plan_of(*balance), loss=MSE, transport="local")


def test_models_and_plans_that_do_not_fit() -> None:
    for build, error, text in [
        (lambda: local(linears(2), 1, 1, 1), PlanError, "places 3 cells but the model has 2"),
        (lambda: local(linears(3), 1, 1), PlanError, "places 2 cells but the model has 3"),
        (lambda: stagewise.Pipeline(nn.Linear(1, 1), plan_of(1)), ModelError, "is not a sequence"),
        (lambda: plan_of(1, schedule="zigzag"), ScheduleError, "no schedule 'zigzag'"),
        (lambda: plan_of(1, recompute="maybe"), ScheduleError, "no recompute policy 'maybe'"),
        (
            lambda: stagewise.Pipeline(linears(1), plan_of(1), transport="pigeon"),  # type: ignore[arg-type]
            PlanError,
            "transport is 'pigeon'; choose",
        ),
        (
            lambda: stagewise.Pipeline(linears(1), plan_of(1), transport="distributed"),
            PlanError,
            "start the script with torchrun",
        ),
        (
            lambda: stagewise.Pipeline(linears(2), plan_of(1, 1), devices=["cpu"]),
            PlanError,
            "got 1 devices for a plan of 2",
        ),
        (
            lambda: stagewise.Pipeline(linears(1), plan_of(1), loss=nn.PReLU()),
            ModelError,
            "the loss has parameters",
        ),
    ]:
        with pytest.raises(error, match=re.escape(text).replace("\\ ", " ")):
            build()


def test_gradients_scaled_by_frequency_need_the_whole_minibatch() -> None:
    tokens = torch.tensor([1, 1, 2, 1, 0, 2])
    model, plain = (nn.Sequential(nn.Embedding(3, 1, scale_grad_by_freq=True)) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    one = stagewise.Plan(balance=(1,), schedule="gpipe", num_microbatches=1)
    pipe = stagewise.Pipeline(model, one, loss=MSE, transport="local")
    pipe.step(tokens, target=torch.ones(6, 1))
    MSE(plain(tokens), torch.ones(6, 1)).backward()
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)  # type: ignore[arg-type]
    two = replace(one, num_microbatches=2)
    for refused in (lambda: pipe.use(two), lambda: stagewise.Pipeline(plain, two, loss=MSE)):
        with pytest.raises(ModelError, match=r"0 has scale_grad_by_freq.* of the 2 microbatches"):
            refused()
    assert pipe.num_microbatches == 1


def test_a_loss_module_without_parameters_is_fine() -> None:
    pipe = stagewise.Pipeline(linears(2), plan_of(1, 1), loss=nn.MSELoss())
    pipe.step(torch.ones(8, 3), target=torch.ones(8, 3))


X = torch.ones(8, 3)
BATCHES: dict[str, tuple[object, object, str]] = {
    "leaves disagree": (
        {"a": X, "b": [X[:7]]},
        X,
        r"inputs\['a'\] has 8 samples but inputs\['b'\]\[0\] has 7",
    ),
    "sizes disagree": (X, X[:6], "inputs has 8 samples but target has 6"),
    "no samples": (X[:0], X[:0], "inputs has no samples"),
    "no samples anywhere": (stagewise.Replicated(X), torch.tensor(1.0), "nothing .* has samples"),
    "Microbatches disagree": (
        {"a": stagewise.Microbatches([X[:2]] * 4), "b": stagewise.Microbatches([X, X[:0]])},
        X,
        r"inputs\['b'\]\[1\] has no samples",
    ),
    "other Microbatches": (
        stagewise.Microbatches([X[:2]] * 4),
        stagewise.Microbatches([X[:1], X[:3], X[:2], X[:2]]),
        r"inputs has microbatches of \[2, 2, 2, 2\] samples but target of \[1, 3, 2, 2\]",
    ),
    "other number of Microbatches": (
        stagewise.Microbatches([X[:2], X[:2], *[X[:1]] * 4]),
        X,
        "Microbatches of 6 parts, but the plan has 4",
    ),
    "Microbatches without samples": (
        stagewise.Microbatches([X, None]),
        X,
        "Microbatches of 2 parts, of which 1 hold no samples",
    ),
    "no tensor": ("text", X, "inputs holds no tensor"),
    "no inputs": (None, X, "this rank needs inputs but got none"),
    "no target": (X, None, "this rank needs target but got none"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_cannot_be_split(name: str) -> None:
    inputs, target, text = BATCHES[name]
    pipe = local(linears(2), 1, 1)
    with pytest.raises(BatchError, match=text):
        pipe.step(inputs, target=target)
    pipe.step(X, target=X)  # nothing is broken by it
    assert pipe.step_index == 1


def refusals(names: list[str]) -> dict[str, str]:
    """Every rank gives the bad batch; then a good one must work."""
    pipe = stagewise.Pipeline(linears(3), plan_of(1, 1, 1), loss=MSE)
    texts = {}
    for name in names:
        inputs, target, _ = BATCHES[name]
        try:
            pipe.step(inputs, target=target)
        except BatchError as error:
            texts[name] = str(error)
    pipe.step(X, target=X)
    return texts


def test_every_rank_refuses(pools: Pools) -> None:
    results = pools[3].run(refusals, list(BATCHES))
    for texts in results:
        assert set(texts) == set(BATCHES)
    for name, (_, _, text) in BATCHES.items():
        assert any(re.search(text, texts[name]) for texts in results), name


def disagreements() -> dict[str, str]:
    """Ranks do different things; each case must raise on this rank."""
    rank = torch.distributed.get_rank()
    pipe = stagewise.Pipeline(linears(3), plan_of(1, 1, 1), loss=MSE)
    first = rank == 0

    def different_call() -> object:
        return pipe.predict(X) if first else pipe.step(X, target=X)

    def different_step() -> object:
        pipe.step_index += first
        try:
            return pipe.step(X, target=X)
        finally:
            pipe.step_index -= first

    def on_one(batch: Tensor) -> Callable[[], object]:
        return lambda: pipe.step(batch if first else X, target=X)

    cases: dict[str, Callable[[], object]] = {
        "call": different_call,
        "step": different_step,
        "shape": on_one(torch.ones(8, 4)),
        "dtype": on_one(X.double()),
        "size": lambda: pipe.step(X[:7] if first else None, target=None if first else X),
        "one refuses": on_one(X[:2]),
    }
    texts = {}
    for name, case in cases.items():
        try:
            case()
        except UsageError as error:
            texts[name] = str(error)
    pipe.step(X, target=X)
    return texts


def test_ranks_that_disagree_all_raise(pools: Pools) -> None:
    for rank, texts in enumerate(pools[3].run(disagreements, seconds=SOON_SECONDS)):
        assert "ranks make different calls: rank 0: predict, rank 1: step" in texts["call"]
        assert "ranks are at different steps: rank 0: 1, rank 1: 0" in texts["step"]
        assert "inputs of different shapes" in texts["shape"]
        assert "inputs of different shapes" in texts["dtype"]
        assert "batches of [7, 8] samples" in texts["size"]
        wanted = "cannot fill 4 microbatches" if rank == 0 else "rank 0 refused the batch: "
        assert wanted in texts["one refuses"] or "2 samples" in texts["one refuses"]


def test_pipelines_that_cannot_be_built_on_these_ranks(pools: Pools) -> None:
    for texts in pools[3].run(builds, seconds=SOON_SECONDS):
        assert "the plan needs 2 ranks, one per device, but 3 are running" in texts["world"]
        assert "0 and 2, on different ranks, share one BatchNorm" in texts["shared"]
        assert "ranks [1] have different plans than rank 0" in texts["plans"]
        assert "ranks [2] have different models than rank 0" in texts["models"]


def builds() -> dict[str, str]:
    rank = torch.distributed.get_rank()
    shared = nn.BatchNorm1d(3)
    cases: dict[str, Callable[[], object]] = {
        "world": lambda: stagewise.Pipeline(linears(2), plan_of(1, 1)),
        "shared": lambda: stagewise.Pipeline([shared, nn.Tanh(), shared], plan_of(1, 1, 1)),
        "plans": lambda: stagewise.Pipeline(
            linears(3), plan_of(1, 1, 1, num_microbatches=4 + (rank == 1))
        ),
        "models": lambda: stagewise.Pipeline(
            [nn.Linear(3, 3 + (rank == 2)), *linears(2)], plan_of(1, 1, 1)
        ),
    }
    texts = {}
    for name, case in cases.items():
        try:
            case()
        except PlanError as error:
            texts[name] = str(error)
    return texts


class Fails(nn.Module):
    def __init__(self, when: int, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.when, self.error, self.calls = when, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.when:
            raise self.error("no more")
        return x


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor, scale: object = None) -> Tensor:
        return self.linear(x) @ table


@pytest.mark.parametrize("place", [0, 2])
def test_an_argument_that_was_cut_is_named_where_its_cell_fails(place: int) -> None:
    """Only shapes said so: (2x4 and 2x4)."""
    cells: list[nn.Module] = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    cells[place] = Tabled()
    plan = stagewise.Plan(balance=(2, 1), schedule="gpipe", num_microbatches=2)
    pipe = stagewise.Pipeline(cells, plan, loss=MSE)
    x, table = torch.ones(4, 4), torch.ones(4, 4)
    hint = r"cannot be multiplied.*\n\(arguments that were cut .*size: table; .*Replicated"
    with pytest.raises(CellError, match=hint):
        pipe.step(x, table=table, scale=1.0, target=x)
    if place == 0:
        with pytest.raises(CellError, match=hint):
            pipe.step(x, table, target=x)
    with pytest.raises(CellError) as caught:
        pipe.step(x, table=stagewise.Replicated(torch.ones(3, 4)), target=x)
    assert "Replicated" not in str(caught.value)
    assert pipe.step(x, table=stagewise.Replicated(table), target=x).isfinite()


def test_a_cells_error_names_its_place_and_leaves_the_pipeline_usable() -> None:
    pipe = local([nn.Linear(3, 3), nn.Tanh(), Fails(3)], 1, 2)
    state = torch.get_rng_state()
    with pytest.raises(CellError) as caught:
        pipe.step(X, target=X)
    text = str(caught.value)
    assert "cell '2' (Fails) failed on microbatch 2: RuntimeError: no more" in text
    assert "(instruction 1F2 on stage 1, device cpu, step 0" in text  # and a rank, once connected
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in pipe.parameters())
    pipe.step(X, target=X)
    assert pipe.step_index == 1


def test_an_interrupt_passes_through_and_frees_everything() -> None:
    pipe = local([nn.Linear(3, 3), Fails(3, KeyboardInterrupt)], 1, 1)
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        pipe.step(X, target=X)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(StagewiseError, match="an earlier call failed"):
        pipe.evaluate(X, target=X)


def test_losses_that_are_no_number() -> None:
    def losses_per_sample(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean(1)

    pipe = stagewise.Pipeline(linears(1), plan_of(1), loss=losses_per_sample)
    with pytest.raises(BatchError, match=r"must be one number.*shape \(2,\).*return a mean"):
        pipe.step(X, target=X)
    pipe = stagewise.Pipeline(linears(1), plan_of(1), loss=lambda output, target: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(BatchError, match=r"must be one number.*it is 1\.0"):
        pipe.step(X, target=X)
    pipe = stagewise.Pipeline(linears(1), plan_of(1))
    with pytest.raises(BatchError, match="give Pipeline a loss function"):
        pipe.step(X)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_losses_without_a_gradient_are_refused_in_training(dtype: torch.dtype) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean().to(dtype)

    pipe = stagewise.Pipeline(linears(1), plan_of(1), loss=loss)
    with pytest.raises(BatchError, match=f"must be a real number .* its dtype is {dtype}"):
        pipe.step(X, target=X)
    pipe.evaluate(X, target=X)


def failing_step(failing_rank: int) -> None:
    cells = [
        nn.Sequential(nn.Linear(3, 3), Fails(2) if rank == failing_rank else nn.Identity())
        for rank in range(3)
    ]
    pipe = stagewise.Pipeline(cells, plan_of(2, 2, 2), loss=MSE)
    pipe.step(X, target=X)


@pytest.mark.parametrize("failing_rank", [0, 1, 2])
def test_a_failing_rank_stops_the_others_with_its_cause(pools: Pools, failing_rank: int) -> None:
    outcomes = pools[3].outcomes(failing_step, failing_rank, seconds=SOON_SECONDS)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, Raised), f"rank {rank} did not notice"
        if rank == failing_rank:
            assert outcome.error.startswith("CellError: cell")
        else:
            assert outcome.error.startswith("PeerError"), outcome.text
            assert "(Fails) failed on microbatch 1: RuntimeError: no more" in outcome.error
        assert f"step 0, rank {failing_rank} on {socket.gethostname()})" in outcome.error


def changing_shapes() -> str:
    def change(x: Tensor) -> Tensor:
        return x[:, : 2 + int(x[0, 0] > 0)]  # its shape depends on the data

    def pad(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 3 - x.shape[1]))

    cells = [Call(change), Call(pad)]  # type: ignore[arg-type]
    pipe = stagewise.Pipeline(cells, plan_of(1, 1), loss=MSE)
    pipe.step(X, target=X)
    pipe.step(-X, target=X)
    return "no error"


def test_shapes_that_depend_on_data_arrive(pools: Pools) -> None:
    assert pools[2].run(changing_shapes, seconds=SOON_SECONDS) == ["no error"] * 2


def passing_nothing(recompute: str) -> list[Tensor]:
    torch.manual_seed(0)
    pipe = stagewise.Pipeline(linears(4), plan_of(1, 1, 1, 1, recompute=recompute), loss=MSE)
    inputs, target = torch.randn(10, 3), torch.randn(10, 3)
    own = (inputs if pipe.rank == 0 else None), (target if pipe.rank == 3 else None)
    together = [pipe.step(inputs, target=target), pipe.evaluate(inputs, target=target)]
    pipe.step_index = 0
    alone = [pipe.step(own[0], target=own[1]), pipe.evaluate(own[0], target=own[1])]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    output = pipe.predict(own[0])
    assert isinstance(output, Tensor) and output.shape == (10, 3)
    return [*together, output]


def test_ranks_pass_only_what_they_need(pools: Pools) -> None:
    first, *others = pools[4].run(passing_nothing, "always")
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
