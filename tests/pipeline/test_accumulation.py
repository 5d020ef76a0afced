"""accumulate_in_float32: gradients of low-precision parameters are rounded once."""

import gc

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.engine.gradients.float32 import Float32Sums
from stagewise.errors import CellError
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import Call
from tests.pipeline.runs import unexamined
from tests.schedules import RUNNABLE, layout, planned, policy_in_turn

WIDTH, SIZE, NUM_MICROBATCHES = 8, 64, 32
BF16 = torch.bfloat16
State = dict[str, Tensor | None]


def build(dtype: torch.dtype = BF16) -> list[nn.Module]:
    """bfloat16 cells, the third in float32, the second frozen."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        cells: list[nn.Module] = [
            nn.Linear(WIDTH, WIDTH),
            nn.Sequential(nn.LayerNorm(WIDTH).requires_grad_(False)),
            nn.Tanh(),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        ]
        for cell in cells:
            cell.to(dtype)
        if dtype is BF16:
            cells[3:4] = [
                nn.Sequential(Call(Tensor.float), cells[3].float(), Call(Tensor.bfloat16))
            ]  # type: ignore[arg-type]
        return cells


def minibatch(index: int = 0, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    x = 1 + torch.randn(SIZE, WIDTH, generator=generator)
    return x.to(BF16).to(dtype), (x.cos() + 3).to(BF16).to(dtype)


def loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.double(), target.double())


def pipe_of(
    cells: list[nn.Module],
    *balance: int,
    schedule: str = "1f1b",
    recompute: str = "never",
    num_microbatches: int = NUM_MICROBATCHES,
    in_float32: bool = True,
) -> stagewise.Pipeline:
    plan = planned(
        balance,
        schedule,
        num_microbatches=num_microbatches,
        recompute=recompute,
    )
    return stagewise.Pipeline(cells, plan, loss=loss, accumulate_in_float32=in_float32)


def gradients(module: nn.Module) -> State:
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def trained(balance: tuple[int, ...], schedule: str, policies: list[str]) -> list[State]:
    """Gradients of two accumulated steps, per policy."""
    states = []
    for policy in policies:
        pipe = pipe_of(build(), *balance, schedule=schedule, recompute=policy)
        pipe = unexamined(pipe) if states else pipe
        for index in range(2):
            inputs, target = minibatch(index)
            pipe.step(inputs, target=target)
        states.append(gradients(pipe.module))
    return states


CUTS = [(7,), (4, 3), (2, 3, 2), (1, 2, 1, 3)]  # the cell in float32 is three


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_any_cut_policy_and_transport_has_the_same_bits(pools: Pools, schedule: str) -> None:
    (wanted,) = trained((7,), schedule, ["never"])
    for balance in CUTS:
        states = trained(balance, schedule, list(POLICIES))
        if (num_devices := layout(schedule, len(balance))[0]) > 1:
            policy = policy_in_turn(RUNNABLE.index(schedule) + len(balance))
            ranks = pools[num_devices].run(trained, balance, schedule, [policy])
            states.append({k: t for [own] in ranks for k, t in own.items()})
        for state in states:
            assert set(state) == set(wanted)
            for name, gradient in wanted.items():
                got = state[name]
                assert (got is None) == (gradient is None) == name.startswith("1."), name
                if got is not None and gradient is not None:
                    assert got.dtype is gradient.dtype and torch.equal(got, gradient), name


def microbatch_gradients(num_steps: int) -> dict[str, list[Tensor]]:
    """What autograd gives for each microbatch, in their order."""
    parts: dict[str, list[Tensor]] = {}
    model = nn.Sequential(*build())
    for index in range(num_steps):
        inputs, target = minibatch(index)
        pairs = zip(inputs.chunk(NUM_MICROBATCHES), target.chunk(NUM_MICROBATCHES), strict=True)
        for x, y in pairs:
            model.zero_grad()
            value = loss(model(x), y)
            value.backward(torch.full_like(value, 1 / NUM_MICROBATCHES))
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    parts.setdefault(name, []).append(parameter.grad)
    return parts


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_sum_is_rounded_once(num_steps: int) -> None:
    pipe = pipe_of(build(), 2, 5)
    for index in range(num_steps):
        inputs, target = minibatch(index)
        pipe.step(inputs, target=target)
    parts = microbatch_gradients(num_steps)
    compared = 0
    for name, parameter in pipe.named_parameters():
        if parameter.dtype is BF16 and parameter.grad is not None:
            total = torch.zeros(parameter.shape)
            for part in parts[name]:
                total += part
            assert torch.equal(parameter.grad, total.bfloat16()), name
            compared += 1
    assert compared == 4


def test_much_closer_to_the_truth() -> None:
    """Against the same model in float64; and against the microbatches' own sum in float64."""
    plain = nn.Sequential(*build(torch.float64))
    for ours, theirs in zip(plain.parameters(), nn.Sequential(*build()).parameters(), strict=True):
        ours.data.copy_(theirs)
    sums = {n: torch.stack(parts).double().sum(0) for n, parts in microbatch_gradients(8).items()}
    errors: dict[bool, list[float]] = {}
    for in_float32 in (False, True):
        pipe = pipe_of(build(), 2, 5, in_float32=in_float32)
        plain.zero_grad()
        for index in range(8):
            inputs, target = minibatch(index)
            pipe.step(inputs, target=target)
            x, y = minibatch(index, torch.float64)
            loss(plain(x), y).backward()
        low = {n: p.grad for n, p in pipe.named_parameters() if p.dtype is BF16}
        truth = dict(
            zip(sums, (p.grad for p in plain.parameters() if p.grad is not None), strict=True)
        )
        errors[in_float32] = [
            max(
                float((g.double() - wanted[n]).norm() / wanted[n].norm())  # type: ignore[union-attr]
                for n, g in low.items()
                if g is not None
            )
            for wanted in (truth, sums)
        ]
    for without, with_ in zip(errors[False], errors[True], strict=True):
        assert with_ < without / 5, errors


def step(pipe: stagewise.Pipeline, index: int = 0) -> None:
    inputs, target = minibatch(index)
    pipe.step(inputs, target=target)


def test_grad_is_continued_while_it_is_left_alone() -> None:
    """The tensor in .grad stays the same one, as autograd keeps it."""
    pipe = pipe_of(build(), 2, 5)
    step(pipe)
    before = [p.grad for p in pipe.parameters()]
    step(pipe, 1)
    assert all(p.grad is g for p, g in zip(pipe.parameters(), before, strict=True))


def test_a_cleared_or_changed_grad_is_what_the_sum_starts_from() -> None:
    fresh = pipe_of(build(), 2, 5)
    step(fresh, 1)
    wanted = gradients(fresh.module)
    for set_to_none in (True, False):
        pipe = pipe_of(build(), 2, 5)
        step(pipe)
        pipe.zero_grad(set_to_none)
        step(pipe, 1)
        assert_same(gradients(pipe.module), wanted)
    pipe = pipe_of(build(), 2, 5)
    step(pipe)
    for parameter in pipe.parameters():
        if parameter.grad is not None:
            parameter.grad.data.zero_()  # leaves no mark in the tensor's version
    step(pipe, 1)
    assert_same(gradients(pipe.module), wanted)


def assert_same(got: State, wanted: State) -> None:
    for name, gradient in wanted.items():
        other = got[name]
        assert other is gradient or torch.equal(other, gradient), name  # type: ignore[arg-type]


def test_trials_and_inference_leave_no_trace() -> None:
    states = []
    for disturbed in (False, True):
        pipe = pipe_of(build(), 2, 5)
        step(pipe)
        if disturbed:
            inputs, target = minibatch(7)
            pipe.measure_memory(inputs, target=target)
            pipe.rehearse(inputs, target=target, num_steps=1)
            pipe.evaluate(inputs, target=target)
            pipe.predict(inputs)
        step(pipe, 1)
        states.append(gradients(pipe.module))
    assert_same(*states)


def test_a_failed_step_leaves_grad_as_it_was() -> None:
    armed = False

    def bomb(x: Tensor) -> Tensor:
        if armed:
            raise RuntimeError("boom")
        return x * 1

    cells = build()
    pipe = pipe_of([Call(bomb), *cells], 3, 5, schedule="gpipe")  # type: ignore[arg-type]
    step(pipe)
    low = [p for p in pipe.parameters() if p.dtype is BF16]
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in low]
    armed = True
    with pytest.raises(CellError, match="boom"):
        step(pipe, 1)
    for parameter, (gradient, value) in zip(low, before, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)  # type: ignore[arg-type]
    # The hooks are gone: a plain backward is a plain one.
    armed = False
    pipe.zero_grad()
    x, y = minibatch()
    loss(nn.Sequential(*cells)(x), y).backward()
    assert low[0].grad is not None


def test_the_sums_live_as_long_as_grad() -> None:
    pipe = pipe_of(build(), 2, 5)
    step(pipe)
    (float32,) = (p for p in pipe._runner._policies._policies if isinstance(p, Float32Sums))
    sums = float32._sums
    gc.collect()
    assert len(sums) == 4
    pipe.zero_grad()
    gc.collect()
    assert len(sums) == 0


def test_float16_and_clipping() -> None:
    torch.default_generator.manual_seed(0)
    cells: list[nn.Module] = [nn.Linear(WIDTH, WIDTH).half(), nn.Linear(WIDTH, WIDTH).half()]
    pipe = pipe_of(cells, 1, 1, num_microbatches=4)
    inputs, target = minibatch(0, torch.float16)
    pipe.step(inputs, target=target)
    pipe.clip_grad_norm_(1e-2)
    clipped = gradients(pipe.module)
    pipe.step(inputs, target=target)
    for name, parameter in pipe.named_parameters():
        before = clipped[name]
        assert parameter.grad is not None and before is not None
        assert parameter.grad.dtype is torch.float16 and not torch.equal(parameter.grad, before)


def test_sparse_gradients() -> None:
    wanted = []
    for in_float32 in (True, False):
        torch.default_generator.manual_seed(0)
        table = nn.Embedding(6, WIDTH, sparse=True).bfloat16()
        cells = [table, nn.Linear(WIDTH, WIDTH).bfloat16()]
        pipe = pipe_of(cells, 1, 1, num_microbatches=2, in_float32=in_float32)
        for _ in range(2):
            pipe.step(torch.arange(4), target=torch.ones(4, WIDTH, dtype=BF16))
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        wanted.append(table.weight.grad.to_dense())
    assert torch.equal(*wanted)  # nothing adds up within a step, and doubling is exact


def build_tied() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        cells = [nn.Linear(WIDTH, WIDTH).to(BF16) for _ in range(4)]
    cells[3].weight = cells[1].weight = cells[0].weight
    return list(cells)


def trained_tied(balance: tuple[int, ...], in_float32: bool) -> State:
    pipe = pipe_of(build_tied(), *balance, in_float32=in_float32)
    for index in range(2):
        inputs, target = minibatch(index)
        pipe.step(inputs, target=target)
    return {n: None if p.grad is None else p.grad.clone() for n, p in pipe.named_parameters()}


def test_a_tied_parameter_is_summed_in_float32_too(pools: Pools) -> None:
    wanted = trained_tied((4,), in_float32=True)
    for balance in [(1, 3), (2, 2), (1, 1, 2), (1, 1, 1, 1)]:
        assert_same(trained_tied(balance, in_float32=True), wanted)
        for rank in pools[len(balance)].run(trained_tied, balance, True):
            for name, gradient in rank.items():
                assert torch.equal(gradient, wanted[name]), name
    exact = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for index in range(2):
        for x, y in zip(*(torch.chunk(t, NUM_MICROBATCHES) for t in minibatch(index)), strict=True):
            cells = build_tied()
            for cell in (cells[1], cells[3]):  # untied, so that each user's gradient is apart
                cell.weight = nn.Parameter(cell.weight.detach().clone())
            (loss(nn.Sequential(*cells)(x), y) / NUM_MICROBATCHES).backward()
            exact += sum(cells[user].weight.grad.double() for user in (0, 1, 3))  # type: ignore[union-attr, operator]
    got = wanted["0.weight"]
    assert got is not None and torch.equal(got, exact.to(BF16))
    coarse = trained_tied((4,), in_float32=False)["0.weight"]
    assert coarse is not None and not torch.equal(coarse, got)
