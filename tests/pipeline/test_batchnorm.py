"""BatchNorm's running statistics are the minibatch's, however it is cut, scheduled or recomputed.

The layers under test see the plain model's own inputs: each stands first, or behind cells that
treat samples one by one.
"""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import stagewise
from stagewise.errors import CellError, ModelError, PlanError
from stagewise.model.chain import chain_of
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import Call
from tests.pipeline.runs import unexamined
from tests.schedules import RUNNABLE, layout, planned, policies_at

WIDTH, SIZE, NUM_MICROBATCHES = 3, 22, 4  # microbatches of 6, 6, 5, 5
State = dict[str, Tensor]


class Twice(nn.Module):
    """Its layer runs twice per forward, each time on something the plain model has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(2 * x + 1)
        return x + self.norm(x)


class OwnForward(nn.BatchNorm1d):
    """Batch renormalisation of a sort: uses the running mean in training."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        before = self.running_mean.clone()
        return super().forward(input) + 0.1 * before


def _set(module: nn.Module, **values: object) -> nn.Module:
    for name, value in values.items():
        setattr(module, name, value)
    return module


def _after_linear(norm: nn.Module, *shape: int) -> list[nn.Module]:
    first = nn.Linear(WIDTH, WIDTH)
    return [first, norm, Call(lambda x: x.reshape(len(x), -1, WIDTH).mean(1)), nn.Linear(WIDTH, 1)]


def _shared() -> list[nn.Module]:
    """One layer as two cells, with the plain model's input both times."""
    norm = nn.BatchNorm1d(WIDTH)
    both = [Both(norm), Both(norm)]
    return [Call(lambda x: (x, x)), *both, Call(lambda xs: xs[1]), nn.Linear(WIDTH, 1)]


class Both(nn.Module):
    """(x, y) -> (x + 1, y + norm(x)): x stays free of statistics."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, xs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return xs[0] + 1, xs[1] + self.norm(xs[0])


BN = nn.BatchNorm1d
MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "1d": lambda: _after_linear(BN(WIDTH)),
    "not affine": lambda: _after_linear(BN(WIDTH, affine=False)),
    "cumulative": lambda: _after_linear(BN(WIDTH, momentum=None)),
    "momentum 0.3": lambda: _after_linear(BN(WIDTH, momentum=0.3)),
    "untracked": lambda: _after_linear(BN(WIDTH, track_running_stats=False)),
    "no counter": lambda: _after_linear(_set(BN(WIDTH), num_batches_tracked=None)),
    "eval mode": lambda: _after_linear(BN(WIDTH).eval()),
    "frozen": lambda: _after_linear(BN(WIDTH).requires_grad_(False)),
    "sequences": lambda: [
        Call(lambda x: torch.stack([x, x.sin(), x.cos()], -1)),
        *_after_linear(BN(WIDTH)),
    ],
    "2d": lambda: [
        Call(lambda x: torch.stack([x, x.sin(), x.cos()], -1)[..., None].expand(-1, -1, -1, 3)),
        *_after_linear(nn.BatchNorm2d(WIDTH)),
    ],
    "3d": lambda: [
        Call(lambda x: torch.stack([x, x.sin()], -1)[:, :, :, None, None].expand(-1, -1, 2, 2, 3)),
        *_after_linear(nn.BatchNorm3d(WIDTH)),
    ],
    "twice in a cell": lambda: [Twice(), nn.Linear(WIDTH, 1)],
    "twice in a stage": _shared,
}


def build(name: str, dtype: torch.dtype) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        modules = MODELS[name]()
        nn.Sequential(*modules).to(dtype)
        return modules


def minibatch(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = 3 + 2 * torch.randn(SIZE, WIDTH, dtype=torch.double, generator=generator)
    x[:7] -= 4  # microbatches differ
    return x.to(dtype), x.sum(1, keepdim=True).to(dtype)


def state_of(module: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()} | {
        f"{n}.grad": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None
    }


def even(num_cells: int, num_stages: int) -> tuple[int, ...]:
    if num_stages == 2:
        return (num_cells - 1, 1)
    return (num_cells,) if num_stages == 1 else (1, *even(num_cells - 1, num_stages - 1))


def pipe_of(modules: list[nn.Module], num_stages: int, **changes: object) -> stagewise.Pipeline:
    arguments = {"schedule": "1f1b", "num_microbatches": NUM_MICROBATCHES, **changes}
    num_cells = len(chain_of(modules))
    plan = planned(even(num_cells, num_stages), **arguments)  # type: ignore[arg-type]
    return stagewise.Pipeline(modules, plan, loss=nn.functional.mse_loss)


def trained(
    name: str, num_stages: int, schedule: str, policies: list[str], dtype: torch.dtype
) -> list[State]:
    """State and summed gradients after two steps, for each policy."""
    states = []
    for policy in policies:
        pipe = pipe_of(build(name, dtype), num_stages, schedule=schedule, recompute=policy)
        pipe = unexamined(pipe) if states else pipe
        for index in range(2):
            inputs, target = minibatch(index, dtype)
            pipe.step(inputs, target=target)
        states.append(state_of(pipe.module))
    return states


def trained_plain(name: str, dtype: torch.dtype) -> State:
    model = nn.Sequential(*build(name, dtype))
    for index in range(2):
        inputs, target = minibatch(index, dtype)
        nn.functional.mse_loss(model(inputs), target).backward()
    return {n: b.clone() for n, b in model.named_buffers()}


@pytest.mark.parametrize("name", MODELS)
def test_one_update_from_the_whole_minibatch(name: str) -> None:
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        wanted = trained_plain(name, dtype)
        for state in trained(name, 2, "1f1b", list(POLICIES), dtype):
            for key, buffer in wanted.items():
                assert state[key].dtype is buffer.dtype
                torch.testing.assert_close(state[key], buffer, rtol=error, atol=0)


@pytest.mark.parametrize("schedule", RUNNABLE)
@pytest.mark.parametrize("name", MODELS)
def test_any_cut_policy_and_transport_has_the_same_bits(
    pools: Pools, name: str, schedule: str
) -> None:
    (wanted,) = trained(name, 1, schedule, ["never"], torch.float32)
    for num_stages in range(1, min(len(MODELS[name]()), 4) + 1):
        here, between = policies_at(name, schedule, num_stages)
        if name == "twice in a stage":
            if num_stages > 2:
                continue
        elif (num_devices := layout(schedule, num_stages)[0]) > 1 and between:
            arguments = (name, num_stages, schedule, between, torch.float32)
            ranks = pools[num_devices].run(trained, *arguments)
            for states in zip(*ranks, strict=True):
                assert_same({k: t for state in states for k, t in state.items()}, wanted)
        for state in trained(name, num_stages, schedule, here, torch.float32):
            assert_same(state, wanted)


def assert_same(got: State, wanted: State) -> None:
    assert set(got) == set(wanted)
    wrong = [key for key in wanted if not torch.equal(got[key], wanted[key])]
    assert not wrong


def test_one_layer_in_two_stages_of_one_process() -> None:
    """Updates come in the chain's order, as in the plain model."""
    wanted = trained_plain("twice in a stage", torch.float64)
    for schedule in RUNNABLE:
        for state in trained("twice in a stage", 4, schedule, list(POLICIES), torch.float64):
            for key, buffer in wanted.items():
                torch.testing.assert_close(state[key], buffer, rtol=1e-12, atol=0)


def test_low_precision_statistics_are_rounded_once() -> None:
    layer = nn.BatchNorm1d(WIDTH, momentum=1.0).bfloat16()
    pipe = pipe_of([layer, nn.Linear(WIDTH, 1).bfloat16()], 1)
    inputs, target = minibatch(0, torch.bfloat16)
    pipe.step(inputs + 100, target=target)
    variance, mean = torch.var_mean((inputs + 100).double(), 0)
    assert layer.running_mean is not None and torch.equal(layer.running_mean, mean.bfloat16())
    assert layer.running_var is not None and torch.equal(layer.running_var, variance.bfloat16())


def test_under_autocast() -> None:
    layer = nn.BatchNorm1d(WIDTH, momentum=1.0)
    inputs, target = minibatch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        pipe_of([layer, nn.Linear(WIDTH, 1)], 2).step(inputs, target=target)
    assert layer.running_mean is not None
    torch.testing.assert_close(layer.running_mean, inputs.mean(0), rtol=1e-6, atol=0)


def test_checkpointing_inside_a_cell_counts_once() -> None:
    layer = nn.BatchNorm1d(WIDTH)
    again = nn.Linear(WIDTH, 1)

    def function(x: Tensor) -> Tensor:
        run = nn.Sequential(layer, again)
        return torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)  # type: ignore[no-any-return]

    cell = _set(Call(function), layer=layer, again=again)  # type: ignore[arg-type]
    inputs, target = minibatch(0, torch.float32)
    pipe_of([cell], 1).step(inputs, target=target)
    plain = nn.BatchNorm1d(WIDTH)
    plain(inputs)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-6, atol=0)


class Stubborn(nn.Sequential):
    """Stays in training mode, whatever is asked."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1

    def train(self, mode: bool = True) -> "Stubborn":
        return super().train(True)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("born", None)
        self.register_buffer("spread", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.born = torch.ones(2)
        return x


@pytest.mark.filterwarnings("ignore:cell '1' changes parametrizations")  # as it does by its nature
@pytest.mark.parametrize("warm", [False, True])
def test_calls_that_do_not_train_leave_buffers_alone(warm: bool) -> None:
    """Also those of layers that ignore eval mode."""
    torch.default_generator.manual_seed(0)
    cells = [Stubborn(BN(WIDTH)), spectral_norm(nn.Linear(WIDTH, WIDTH)), Counts(), BN(WIDTH)]
    pipe = pipe_of([*cells, nn.Linear(WIDTH, 1)], 3, recompute="always")
    inputs, target = minibatch(0, torch.float32)
    if warm:
        pipe.step(inputs, target=target)
    before = {n: (b, b.clone()) for n, b in pipe.named_buffers()}
    for _ in range(2):
        pipe.evaluate(inputs, target=target)
        pipe.predict(inputs)
        if warm:  # a buffer born in a trial would stay
            pipe.measure_memory(inputs, target=target)
            pipe.rehearse(inputs, target=target, num_steps=1)
    after = dict(pipe.named_buffers())
    assert set(after) == set(before)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value), name


class Bomb(nn.Module):
    armed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.armed:
            raise RuntimeError("boom")
        return x * 1


class BombLate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        raise RuntimeError("boom")


class Late(Bomb):
    def forward(self, x: Tensor) -> Tensor:
        return BombLate.apply(x) if self.armed else x * 1  # type: ignore[no-any-return]


def fail(bomb: Bomb, steps: int, num_stages: int) -> str:
    """Train `steps` steps, fail in the next; returns what changed in the buffers by that."""
    cells = [Bomb(), BN(WIDTH), spectral_norm(nn.Linear(WIDTH, WIDTH)), Counts(), bomb]
    pipe = pipe_of([*cells, nn.Linear(WIDTH, 1)], num_stages, schedule="gpipe")
    for index in range(steps):
        inputs, target = minibatch(index, torch.float32)
        pipe.step(inputs, target=target)
    before = {n: (b, b.clone()) for n, b in pipe.named_buffers()}
    bomb.armed = True
    inputs, target = minibatch(9, torch.float32)
    try:
        pipe.step(inputs, target=target)
    except (RuntimeError, stagewise.StagewiseError):
        after = dict(pipe.named_buffers())
        same = [after[n] is b and torch.equal(b, value) for n, (b, value) in before.items()]
        return "" if all(same) and set(after) == set(before) else f"changed: {same}"
    return "did not fail"


def fail_on_rank(bomb: Bomb, steps: int) -> None:
    """As a script does: the error ends the process, by which its peer notices."""
    raise RuntimeError(f"changed: {fail(bomb, steps, 2)!r}")


@pytest.mark.filterwarnings("ignore:cell .* changes .*_u, .*_v in forward")  # spectral norm
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("bomb", [Bomb, Late])
def test_a_failed_step_leaves_buffers_as_they_were(
    pools: Pools, bomb: type[Bomb], steps: int
) -> None:
    assert [fail(bomb(), steps, num_stages) for num_stages in (1, 2)] == ["", ""]
    results = pools[2].outcomes(fail_on_rank, bomb(), steps)
    assert [result.error for result in results] == ["RuntimeError: changed: ''"] * 2


def test_a_subclass_with_its_own_forward_changes_once_per_microbatch_and_says_so() -> None:
    states = []
    for policy in POLICIES:
        torch.default_generator.manual_seed(0)
        pipe = pipe_of([nn.Linear(WIDTH, WIDTH), OwnForward(WIDTH), BN(WIDTH)], 2, recompute=policy)
        inputs, target = minibatch(0, torch.float32)
        with pytest.warns(UserWarning, match=r"layers 1 override forward.*once per mic"):
            pipe.step(inputs, target=target.expand(-1, WIDTH))
        states.append(state_of(pipe.module))
    for state in states:
        assert_same(state, states[0])
    assert states[0]["1.num_batches_tracked"] == NUM_MICROBATCHES
    assert states[0]["2.num_batches_tracked"] == 1


def test_each_kind_of_warning_comes_once() -> None:
    pipe = pipe_of([OwnForward(WIDTH), nn.Linear(WIDTH, 1)], 2, num_microbatches=2)
    for size, texts in ((16, ["override forward"]), (8, ["smallest has 4"]), (8, [])):
        got = warned(pipe, size)
        assert len(got) == len(texts) and all(t in g for t, g in zip(texts, got, strict=True))


def test_a_compiled_cell() -> None:
    """Its graph is made anew where a layer's forward is another."""
    wanted, got = BN(WIDTH), BN(WIDTH)
    inputs, target = minibatch(0, torch.float32)
    for layer, wrap in ((wanted, lambda m: m), (got, torch.compile)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cell = wrap(nn.Sequential(layer), **({"backend": "eager"} if layer is got else {}))  # type: ignore[operator]
            torch.default_generator.manual_seed(0)
            pipe = pipe_of([cell, nn.Linear(WIDTH, 1)], 2, recompute="always")
            for _ in range(3):
                pipe.step(inputs, target=target)
    assert_same(state_of(got), state_of(wanted))


def warned(pipe: stagewise.Pipeline, size: int) -> list[str]:
    inputs, target = torch.randn(size, WIDTH), torch.randn(size, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe.step(inputs, target=target)
    return [str(warning.message) for warning in caught]


def named_model() -> list[nn.Module]:
    frozen = BN(WIDTH).eval()
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), BN(WIDTH, track_running_stats=False))
    return [BN(WIDTH), nn.Sequential(frozen, inner), Twice(), nn.Linear(WIDTH, 1)]


def test_a_warning_names_layers_with_few_samples_once() -> None:
    pipe = pipe_of(named_model(), 2, num_microbatches=2)
    assert warned(pipe, 16) == []
    (text,) = warned(pipe, 15)
    assert "layers 0, 1.1.1, 2.norm normalise by microbatch, and the smallest has 7" in text
    for remedy in ("fewer microbatches", "larger batch", "GroupNorm", ".eval()"):
        assert remedy in text
    assert warned(pipe, 15) == []
    assert warned(pipe_of(named_model(), 1, num_microbatches=1), 4) == []


def test_no_warning_without_batch_statistics() -> None:
    pipe = pipe_of([nn.Linear(WIDTH, WIDTH), BN(WIDTH).eval(), nn.Linear(WIDTH, 1)], 2)
    assert warned(pipe, 8) == []


def warned_on_rank() -> list[str]:
    return warned(pipe_of(named_model(), 2, num_microbatches=2), 15)


def test_each_rank_names_its_own_layers(pools: Pools) -> None:
    (first,), last = pools[2].run(warned_on_rank)
    assert "layers 0, 1.1.1, 2.norm normalise" in first and last == []


def test_the_warning_comes_before_the_failure_of_one_sample() -> None:
    pipe = pipe_of([BN(WIDTH), nn.Linear(WIDTH, 1)], 2)
    with (
        pytest.warns(UserWarning, match="smallest has 1 samples"),
        pytest.raises(CellError, match="more than 1 value per channel"),
    ):
        pipe.step(torch.randn(4, WIDTH), target=torch.randn(4, 1))


def test_planning_does_not_warn() -> None:
    inputs, target = minibatch(0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stagewise.plan(
            named_model(), inputs, target=target, loss=nn.functional.mse_loss,
            num_stages=2, num_microbatches=4, seconds=0.0,
        )  # fmt: skip


def test_sync_batchnorm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.SyncBatchNorm(WIDTH)))
    with pytest.raises(ModelError, match=r"1\.0 is a SyncBatchNorm.*use BatchNorm"):
        pipe_of(list(model), 2)


def split_layer() -> str:
    norm = BN(WIDTH, affine=False)
    try:
        pipe_of([Both(norm), Both(norm)], 2)
    except PlanError as error:
        return str(error)
    return ""


def test_one_layer_on_two_ranks_is_refused(pools: Pools) -> None:
    for text in pools[2].run(split_layer):
        assert "0.norm and 1.norm, on different ranks, share one BatchNorm" in text
    assert split_layer() == ""


def test_the_model_can_be_copied_after_a_step() -> None:
    pipe = pipe_of([BN(WIDTH), nn.Linear(WIDTH, 1)], 2)
    inputs, target = minibatch(0, torch.float32)
    pipe.step(inputs, target=target)
    again = copy.deepcopy(pipe.module)
    again.get_submodule("0")(inputs)
    assert again.state_dict()["0.num_batches_tracked"] == 2
    assert pipe.state_dict()["0.num_batches_tracked"] == 1
