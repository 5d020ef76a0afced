"""evaluate and predict: the plain model in eval mode, at any batch size, without a trace."""

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError
from tests.harness import Pools
from tests.models import EXAMPLES, Call, batch, build
from tests.pipeline.runs import Run, even, num_cells, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:cell .* changes count:UserWarning")

SIZES = (1, 2, 3, 10)  # fewer than the 4 microbatches, and more
PREDICTABLE = sorted(set(EXAMPLES) - {"loss_inside", "odd"})  # `odd` sums over the microbatch


def infer(run: Run) -> dict[int, tuple[Tensor, object]]:
    """(loss, output) per batch size; asserts that the calls leave no trace."""
    pipe = pipeline(run)
    inputs, target = batch(run.example, 10, run.dtype)
    pipe.step(inputs, target=target)
    pipe.module.train()
    next(pipe.module.children()).eval()  # a mixed mode must come back, too
    modes = [module.training for module in pipe.module.modules()]
    gradients = [p.grad for p in pipe.parameters()]
    values = [None if g is None else g.clone() for g in gradients]
    buffers = {n: b.clone() for n, b in pipe.named_buffers()}
    torch.manual_seed(5)
    state, step_index = torch.get_rng_state(), pipe.step_index
    results = {}
    for size in SIZES:
        inputs, target = batch(run.example, size, run.dtype)
        results[size] = pipe.evaluate(inputs, target=target), pipe.predict(inputs)
    assert [module.training for module in pipe.module.modules()] == modes
    for parameter, gradient, value in zip(pipe.parameters(), gradients, values, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    assert all(torch.equal(b, buffers[n]) for n, b in pipe.named_buffers())
    assert torch.equal(torch.get_rng_state(), state) and pipe.step_index == step_index
    return results


def plain(run: Run) -> dict[int, tuple[Tensor, Tensor]]:
    model = build(run.example, run.dtype)
    inputs, target = batch(run.example, 10, run.dtype)
    plan = stagewise.Plan(balance=(num_cells(run.example),), schedule="gpipe", num_microbatches=4)
    loss = EXAMPLES[run.example].loss
    assert loss is not None
    stagewise.Pipeline(model, plan, loss=loss).step(inputs, target=target)  # moves statistics
    model.eval()
    results = {}
    for size in SIZES:
        inputs, target = batch(run.example, size, run.dtype)
        with torch.no_grad():
            output = model(inputs)
        results[size] = loss(output, target), output
    return results


@pytest.mark.parametrize("example", [e for e in PREDICTABLE if e not in ("noise", "buffers")])
def test_equals_the_plain_model_in_eval_mode(pools: Pools, example: str) -> None:
    run = Run(example=example, balance=even(num_cells(example), 3), dtype=torch.float64)
    wanted = plain(run)
    for results in [infer(run), *pools[3].run(infer, run)]:
        assert isinstance(results, dict)
        for size, (loss, output) in results.items():
            torch.testing.assert_close(loss, wanted[size][0], rtol=1e-12, atol=0)
            torch.testing.assert_close(output, wanted[size][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("example", ["noise", "buffers"])
def test_any_cut_and_transport_infers_the_same(pools: Pools, example: str) -> None:
    """Also for cells that draw or count in eval mode."""
    wanted = infer(Run(example=example, balance=(num_cells(example),)))
    run = Run(example=example, balance=even(num_cells(example), 2))
    for results in [infer(run), *pools[2].run(infer, run)]:
        for size, (loss, output) in results.items():
            assert torch.equal(loss, wanted[size][0])
            assert torch.equal(output, wanted[size][1])


def structured(transport: str) -> object:
    cells = [
        nn.Linear(3, 3).double().requires_grad_(False),
        Call(lambda x: {"x": (x, x > 0), "n": None, "bf16": x.bfloat16(), "none": x[:, :0]}),  # type: ignore[index,operator]
    ]
    for parameter in cells[0].parameters():
        nn.init.constant_(parameter, 0.5)
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4)
    pipe = stagewise.Pipeline(cells, plan, loss=None, transport=transport)  # type: ignore[arg-type]
    return pipe.predict(torch.arange(30.0, dtype=torch.double).view(10, 3) - 15)


def test_predict_returns_any_pytree_on_every_rank(pools: Pools) -> None:
    wanted = structured("local")
    assert isinstance(wanted, dict)
    assert wanted["n"] is None and wanted["none"].shape == (10, 0)
    assert wanted["x"][1].dtype is torch.bool and wanted["bf16"].dtype is torch.bfloat16
    for result in pools[2].run(structured, "distributed"):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def predict_numbers(balance: tuple[int, ...]) -> str:
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=4)
    cells = [nn.Linear(3, 3), Call(lambda x: x.mean().reshape(1))]  # type: ignore[attr-defined]
    pipe = stagewise.Pipeline(cells, plan)
    try:
        pipe.predict(torch.ones(10, 3))
    except BatchError as error:
        pipe.evaluate(torch.ones(10, 3))  # the pipeline is not broken by it
        return str(error)
    return ""


def test_outputs_that_are_no_samples_are_refused_on_every_rank(pools: Pools) -> None:
    """Found a bug: only the last rank raised, and the others waited for it."""
    for text in [predict_numbers((2,)), *pools[2].run(predict_numbers, (1, 1))]:
        assert "dimension 0 must hold the microbatch's samples ([3, 3, 2, 2])" in text


def test_evaluate_with_a_count_as_loss() -> None:
    """The mean over samples of a count, weighed by the sizes of ragged microbatches."""
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4)

    def accuracy(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().mean()

    pipe = stagewise.Pipeline([nn.Linear(3, 5), nn.Identity()], plan, loss=accuracy)
    inputs, target = torch.randn(10, 3), torch.randint(5, (10,))
    wanted = accuracy(torch.as_tensor(pipe.predict(inputs)), target)
    torch.testing.assert_close(pipe.evaluate(inputs, target=target), wanted)
