"""Outputs on request, of any form and batch size; never kept unasked."""

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stagewise
from stagewise.batch.markers import Microbatches
from stagewise.batch.values import take_apart, with_paths
from stagewise.errors import BatchError
from stagewise.schedule import POLICIES
from tests.harness import Pools
from tests.models import Call

SIZES = (1, 3, 4, 7, 10)  # fewer than the 4 microbatches, as many, and more


@dataclass
class Output:
    scores: Tensor
    extra: dict[str, object]


def form(x: Tensor) -> Output:
    extra = {"order": x.argsort(-1), "none": None, "flag": True, "pair": (x > 0, [x, 2, "text"])}
    return Output(x, extra)


def loss_of(output: Output, target: Tensor) -> Tensor:
    assert output.extra["none"] is None and output.extra["flag"] is True
    return nn.functional.mse_loss(output.scores, target)


def pipe_of(num_stages: int, recompute: str = "never") -> stagewise.Pipeline:
    torch.manual_seed(0)
    cells = [nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3), Call(form)]  # type: ignore[arg-type]
    balance = {1: (4,), 2: (2, 2), 3: (1, 1, 2)}[num_stages]
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=4, recompute=recompute)
    return stagewise.Pipeline([c.double() for c in cells], plan, loss=loss_of)


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, y = (torch.randn(size, 3, generator=generator, dtype=torch.double) for _ in range(2))
    return x, y


def everything(num_stages: int) -> list[object]:
    """Inference before, between and after training steps, and what the steps put out."""
    pipe = pipe_of(num_stages)
    results: list[object] = []

    def infer() -> None:
        for size in SIZES:
            x, y = batch(size)
            predicted = pipe.predict(x)
            loss, evaluated = pipe.evaluate(x, target=y, return_outputs=True)
            same(evaluated, predicted)
            results.extend([predicted, loss])

    infer()
    for size in (10, 4, 9):
        x, y = batch(size)
        loss, trained = pipe.step(x, target=y, return_outputs=True)
        assert isinstance(trained, Output) and not trained.scores.requires_grad
        results.extend([loss, trained])
        with torch.no_grad():
            for parameter in filter(
                torch.numel, pipe.parameters()
            ):  # a stage without has an empty one
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        infer()
    return results


def same(ours: object, theirs: object) -> None:
    a, first = take_apart(ours)
    b, second = take_apart(theirs)
    assert first == second and all(map(torch.equal, a, b))


def test_any_form_and_size_before_between_and_after_steps(pools: Pools) -> None:
    wanted = everything(1)
    same(everything(3), wanted)
    for num_ranks in (2, 3):
        for results in pools[num_ranks].run(everything, num_ranks):
            same(results, wanted)


@pytest.mark.parametrize("recompute", POLICIES)
def test_outputs_are_those_of_training(recompute: str) -> None:
    """With dropout's masks, in order; inference in between changes nothing about training."""
    x, y = batch(10)
    quiet, asked = pipe_of(2), pipe_of(3, recompute)
    for _ in range(2):
        asked.evaluate(x, target=y, return_outputs=True)
        asked.predict(x[:3])
        loss, output = asked.step(x, target=y, return_outputs=True)
        assert torch.equal(quiet.step(x, target=y), loss)
        assert isinstance(output, Output)
        torch.testing.assert_close(loss_of(output, y), loss)
        unmasked = asked.predict(x)
        assert isinstance(unmasked, Output) and not torch.equal(unmasked.scores, output.scores)
    for a, b in zip(quiet.parameters(), asked.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_outputs_equal_the_plain_models() -> None:
    pipe = pipe_of(2)
    cells = [module for module in pipe.module.children()]
    for size in SIZES:
        x, _ = batch(size)
        wanted = form(cells[2](cells[0](x)))
        output = pipe.predict(x)
        assert isinstance(output, Output)
        torch.testing.assert_close(output.scores, wanted.scores, rtol=1e-12, atol=0)
        assert output.extra["order"].shape == (size, 3)  # type: ignore[attr-defined]
        assert output.extra["none"] is None and output.extra["flag"] is True
        assert output.extra["pair"][1][1:] == [2, "text"]  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.* changes (made|alive):UserWarning")
def test_outputs_are_not_kept_unasked() -> None:
    """In evaluation one microbatch's output lives at a time, and none after any call."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(x: Tensor) -> Tensor:
        y = x * 1
        made.append(weakref.ref(y.untyped_storage()))  # type: ignore[arg-type]
        return y

    def loss(output: Tensor, target: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        return nn.functional.mse_loss(output, target)

    plan = stagewise.Plan(balance=(1, 1), schedule="gpipe", num_microbatches=4)
    pipe = stagewise.Pipeline([nn.Linear(3, 3), Call(note)], plan, loss=loss, transport="local")  # type: ignore[arg-type]
    x = torch.randn(8, 3)
    step = partial(pipe.step, x, target=x)
    evaluate = partial(pipe.evaluate, x, target=x)
    calls: list[Callable[[], object]] = [
        step,
        partial(step, return_outputs=True),
        step,
        partial(evaluate, return_outputs=True),
        partial(pipe.predict, x),
        evaluate,
        evaluate,
    ]
    gc.disable()  # nothing may need it
    try:
        for index, call in enumerate(calls):
            made.clear()
            alive.clear()
            result = call()
            assert len(made) == 4 and not any(ref() for ref in made), index
            assert result is not None
    finally:
        gc.enable()
    assert alive == [1, 1, 1, 1]


def constants(different: bool) -> str:
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=4)
    cells = [nn.Linear(3, 3), Call(lambda x: {"y": x, "n": x.shape[0] if different else 2})]  # type: ignore[attr-defined]
    pipe = stagewise.Pipeline(cells, plan, loss=lambda o, _: o["y"].mean())
    x = torch.ones(10 if different else 8, 3)
    try:
        output = pipe.predict(x)
    except BatchError as error:
        pipe.step(x, target=x)  # the pipeline is not broken by it
        return str(error)
    assert isinstance(output, dict) and output["n"] == 2
    return "no error"


@pytest.mark.parametrize("different", [False, True])
def test_constants_in_outputs_must_agree(pools: Pools, different: bool) -> None:
    for text in (
        [constants(different), *pools[2].run(constants, different)]
        if different
        else [constants(different)]
    ):
        wanted = r"output['n'] is not a tensor and differs between microbatches: [3, 3, 2, 2]"
        assert (wanted in text) == different


def test_outputs_nested_differently_are_refused() -> None:
    plan = stagewise.Plan(balance=(1,), schedule="1f1b", num_microbatches=4)
    pipe = stagewise.Pipeline([Call(lambda x: [x] * int(x[0, 0]))], plan)  # type: ignore[index]
    with pytest.raises(BatchError, match="nested differently"):
        pipe.predict(torch.arange(1.0, 9.0).view(8, 1))


def test_outputs_of_ready_microbatches_come_as_they_are() -> None:
    """Of other lengths, and in evaluation any number of them."""
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline([nn.Linear(3, 3), nn.Tanh()], plan, loss=nn.functional.mse_loss)
    parts = [torch.randn(2, 5, 3), torch.randn(1, 7, 3), torch.randn(3, 2, 3)]
    output = pipe.predict(Microbatches(parts))
    assert isinstance(output, Microbatches)
    for ours, part in zip(output.parts, parts, strict=True):
        assert isinstance(ours, Tensor)
        torch.testing.assert_close(ours, pipe.predict(part), rtol=1e-6, atol=1e-7)
    loss = pipe.evaluate(Microbatches(parts), target=Microbatches(parts))
    each = [pipe.evaluate(part, target=part) * len(part) / 6 for part in parts]
    torch.testing.assert_close(loss, torch.stack(each).sum())


def test_outputs_that_nobody_can_be_given() -> None:
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline([nn.Linear(3, 3), Call(lambda x: x.mean())], plan)  # type: ignore[attr-defined]
    x = torch.ones(4, 3)
    with pytest.raises(BatchError, match="the model's output is its loss"):
        pipe.step(x, return_outputs=True)
    assert all(p.grad is None for p in pipe.parameters()), "refused before it ran"
    with pytest.raises(BatchError, match=r"ranks is 'last'; give a list"):
        pipe.predict(x, ranks="last")  # type: ignore[arg-type]
    with pytest.raises(BatchError, match=r"on ranks \[-1, 1\], but there are 1"):
        pipe.predict(x, ranks=[1, 0, -1])
    assert pipe.step(x, ranks=[5]).shape == (), "ranks count only where outputs are asked for"


class Sample(OrderedDict[str, Tensor]):
    """An output as diffusers has them: registered without names for its parts."""

    @property
    def sample(self) -> Tensor:
        return self["sample"]


pytree.register_pytree_node(
    Sample,
    lambda node: (list(node.values()), list(node)),
    lambda parts, names: Sample(zip(names, parts, strict=True)),
)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Sample:
        for layer in self.layers:
            x = layer(x).tanh()
        return Sample(sample=x)


@pytest.mark.parametrize("cells", [None, ["layers.*"]])
def test_outputs_of_classes_registered_without_names_of_their_parts(
    cells: list[str] | None,
) -> None:
    torch.manual_seed(0)
    model, x = Denoiser(), torch.randn(6, 3)
    captured = stagewise.capture_cells(model, cells, x) if cells else stagewise.capture(model, x)
    plan = stagewise.Plan(balance=(1, len(captured.chain) - 1), schedule="1f1b", num_microbatches=3)
    pipe = stagewise.Pipeline(model, plan, loss=lambda out, y: (out.sample - y).square().mean())
    _, output = pipe.step(x, target=x, return_outputs=True)
    torch.testing.assert_close(output.sample, model(x).sample)
    torch.testing.assert_close(pipe.predict(x).sample, model(x).sample)
    assert type(output) is Sample
    assert with_paths([output, Output(x, {})])[0][0] == "[0]['sample']"
