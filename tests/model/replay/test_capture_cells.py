"""Cells by module path: the model's own forward, run in every cell, is the plain model."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import CellError, ModelError
from stagewise.model.captured import Captured
from stagewise.model.chain import chain_of, module_tree
from stagewise.model.replay.patterns import selected
from stagewise.model.replay.replayed_call import Run
from tests.harness import Pools

F = nn.functional
WIDTH, WORDS, LENGTH = 8, 11, 5
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors as small as these take longer on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Layer(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(p)

    def forward(self, h: Tensor, mask: Tensor | None, *, scale: float) -> tuple[Tensor, Tensor]:
        h = h + scale * self.dropout(self.linear(self.norm(h)).relu())
        if h.mean() > 100:  # control flow that depends on data, inside
            h = h / 2
        return (h if mask is None else h * mask[..., None]), h.square().mean()


class Decoder(nn.Module):
    """What a Hugging Face decoder does around its layers, and what torch.export cannot follow."""

    def __init__(self, p: float = 0.0, layerdrop: float = 0.0, num_layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) / 4)
        self.layers = nn.ModuleList(Layer(p) for _ in range(num_layers))
        self.dropout, self.layerdrop = nn.Dropout(p), layerdrop
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if mask is not None and mask.all():
            mask = None
        if self.training:
            self.calls += 1
        h = first = self.dropout(self.embed(ids) + self.position[: ids.shape[1]]) * self.scale
        added, states = torch.zeros(()), [h]
        for index, layer in enumerate(self.layers):
            if self.training and torch.rand([]) < self.layerdrop:
                continue
            h, extra = layer(h, mask, scale=1.0)
            added = added + extra
            factor = 0.5 if h.abs().max() > 2 else 1.1  # by what blocks computed
            h = h * factor
            if index == 1:
                h = h + first  # past a block
            states.append(h)
        logits = self.head(self.norm(h))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.1 * added
        return {"loss": loss, "logits": logits, "states": tuple(states)}


def words(num_samples: int) -> Tensors:
    torch.manual_seed(num_samples)
    ids = torch.randint(0, WORDS, (num_samples, LENGTH))
    mask = torch.ones(num_samples, LENGTH, dtype=torch.float64)
    mask[0, 3:] = 0
    return {"ids": ids, "mask": mask, "labels": ids}


def loss_of(output: dict[str, Tensor]) -> Tensor:
    return output["loss"]


def decoder(cells: Sequence[str], **options: float) -> tuple[Decoder, Captured]:
    torch.manual_seed(0)
    model = Decoder(**options).double()  # type: ignore[arg-type]
    return model, stagewise.capture_cells(model, cells, **words(4))


def step(
    cells: Sequence[str],
    num_stages: int,
    *,
    schedule: str = "1f1b",
    recompute: str = "never",
    count: int = 3,
    transport: Any = "auto",
    **options: float,
) -> tuple[Tensor, Tensors, Tensors, Tensor]:
    """Loss, gradients, buffers and an evaluation."""
    model, ours = decoder(cells, **options)
    small, extra = divmod(len(ours.chain), num_stages)
    plan = stagewise.Plan(
        balance=tuple(small + (stage < extra) for stage in range(num_stages)),
        schedule=schedule,
        num_microbatches=count,
        recompute=recompute,
    )
    pipe = stagewise.Pipeline(model, plan, loss=loss_of, transport=transport)
    loss = pipe.step(**words(8))
    gradients = {n: p.grad.clone() for n, p in pipe.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in pipe.named_buffers()}
    return loss, gradients, buffers, pipe.evaluate(**words(3))


EVERY = ["embed", "layers.*", "norm", "head"]


@pytest.mark.parametrize("cells", [["layers.*"], EVERY, ["head", "layers.1", "embed"]])
def test_it_is_exact_at_every_cut(cells: list[str]) -> None:
    model, ours = decoder(cells)
    plain = copy.deepcopy(model)
    assert list(module_tree(ours.chain).state_dict()) == list(plain.state_dict())
    one, *others = [step(cells, k, count=1) for k in (1, 2, 3)]
    wanted = loss_of(plain(**words(8)))
    wanted.backward()
    assert abs(one[0] - wanted.detach()) < 1e-12
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(one[1][name], parameter.grad, rtol=1e-12, atol=1e-13)
    others.append(step(cells, 2, count=1, recompute="always"))
    for loss, gradients, buffers, evaluated in others:
        assert torch.equal(loss, one[0]) and torch.equal(evaluated, one[3])
        assert gradients.keys() == one[1].keys() and buffers.keys() == one[2].keys()
        for ours_, theirs in ((gradients, one[1]), (buffers, one[2])):
            assert all(torch.equal(ours_[name], theirs[name]) for name in theirs)
    assert one[2]["calls"] == 1


@pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")
@pytest.mark.parametrize("options", [{"schedule": "zb_h1"}, {"recompute": "always"}])
def test_random_numbers_outside_blocks_are_drawn_once(options: dict[str, str]) -> None:
    """Layers are left out at random, which decides what the later cells do."""
    chance = {"p": 0.3, "layerdrop": 0.4}
    one = step(["layers.*"], 1, **chance)
    two = step(["layers.*"], 2, **options, **chance)  # type: ignore[arg-type]
    assert torch.equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])
    assert one[0] != step(["layers.*"], 1)[0]


def distributed_step(cells: list[str], options: dict[str, float]) -> Any:
    torch.set_num_threads(1)
    return step(cells, 2, transport="distributed", **options)


@pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")
def test_between_processes_the_bits_are_the_same(pools: Pools) -> None:
    options = {"p": 0.2, "layerdrop": 0.2}
    ranks = pools[2].run(distributed_step, EVERY, options, seconds=110)
    loss, gradients, buffers, evaluated = step(EVERY, 2, **options)
    for rank in ranks:
        assert torch.equal(rank[0], loss) and torch.equal(rank[3], evaluated)
        for name, tensor in rank[1].items():
            assert torch.equal(tensor, gradients[name]), name
    assert {n: b for rank in ranks for n, b in rank[2].items()}.keys() == buffers.keys()
    assert ranks[0][1].keys() | ranks[1][1].keys() == gradients.keys()
    assert ranks[0][1].keys() & ranks[1][1].keys() == {"embed.weight"}, "the tied one alone"


@pytest.mark.filterwarnings("ignore:cell .* mixes samples:UserWarning")
def test_plan_takes_cells() -> None:
    torch.manual_seed(0)
    model, batch = Decoder().double(), words(6)
    asked: dict[str, Any] = {"kwargs": batch, "loss": loss_of, "num_microbatches": 2}
    asked |= {"num_stages": 2, "seconds": 0.05}
    plan = stagewise.plan(model, cells=["layers.*"], **asked)
    assert [cell.name for cell in plan.cells] == [f"layers.{i}" for i in range(4)]
    chain = chain_of(model)
    assert stagewise.plan(model, cells=["layers.*"], balance=[1, 3], **asked).balance == (1, 3)
    assert chain_of(model) is chain, "it is cut so already"
    pipe = stagewise.Pipeline(model, plan, loss=loss_of)
    assert pipe.predict(batch["ids"][:3])["logits"].shape == (3, LENGTH, WORDS)  # type: ignore[index]
    with pytest.raises(ModelError, match="needs an example of the batch"):
        stagewise.plan(Decoder(), cells=["layers.*"], balance=[4], num_stages=1, num_microbatches=1)


# Any code around the blocks


class Around(nn.Module):
    """Blocks, and a function of (model, x) that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(num_blocks))
        self.gain = nn.Parameter(torch.full((4,), 0.5))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def unet(model: Any, x: Tensor) -> Tensor:
    one = model.blocks[0](x * model.gain)
    two = model.blocks[1](one)[..., :2]
    return model.blocks[2](torch.cat([one[..., :2], two], dim=-1)) * one * model.gain


def backwards(model: Any, x: Tensor) -> Tensor:
    for block in reversed(model.blocks):
        x = block(x).tanh()
    return x


def in_place(model: Any, x: Tensor) -> Tensor:
    kept = torch.zeros(3, *x.shape)
    h = x + 0
    for index, block in enumerate(model.blocks):
        h = block(h)
        h += model.gain
        h.mul_(2)
        kept[index] = h
    return kept.sum(0) + h


def by_the_data(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    if (factor := h.sum().item()) > 0:
        h = h * factor
    positive = h[h > 0]  # of no known size
    h = model.blocks[1](h) + positive.sum() * float(len(positive) > 2)
    return model.blocks[2](h) + positive.mean()


def statistics(model: Any, x: Tensor) -> dict[str, Any]:
    h = x
    for block in model.blocks:
        h = block(h).to(x.dtype)
        h = h.detach() + h * (h.shape[0] / x.shape[0]) if h.device == x.device else None
    return {"h": h, "size": tuple(h.shape)}


@pytest.mark.parametrize("run", [unet, backwards, in_place, by_the_data, statistics])
def test_code_around_blocks_runs_as_it_is(run: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Around(run)
    captured = stagewise.capture_cells(model, ["blocks.*"], torch.randn(4, 4))
    names = [cell.name for cell in captured.chain]
    assert names == [f"blocks.{i}" for i in ((2, 1, 0) if run is backwards else (0, 1, 2))]
    for seed in range(4):  # other batches go other ways
        torch.manual_seed(seed)
        x = torch.randn(5, 4, requires_grad=True)
        results = []
        for call in (captured, model):
            model.zero_grad()
            output = call(x)  # type: ignore[operator]
            output = output["h"] if isinstance(output, dict) else output
            sources = (x, *model.parameters())
            results.append(
                (output, *torch.autograd.grad(output.square().sum(), sources, allow_unused=True))
            )
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


# Which modules


PATHS = ["", "embed", "layers", "layers.0", "layers.0.linear", "layers.1", "layers.10", "head"]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["embed", "layers.*", "head"], ["embed", "layers.0", "layers.1", "layers.10", "head"]),
        (["head", "layers.1*"], ["layers.1", "layers.10", "head"]),
        (["*.0"], ["layers.0"]),
        (["layers.0", "layers.0"], ["layers.0"]),
    ],
)
def test_patterns(patterns: list[str], found: list[str]) -> None:
    assert selected(patterns, PATHS) == found


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layer.*"], r"names 'layer\.\*', but .* the nearest names are layers\.0"),
        (["layers.*", "layers.0.linear"], r"'layers\.0' and, inside it, 'layers\.0\.linear'"),
        ([], "names no modules"),
        ("layers.*", r"the string 'layers\.\*'; give a list"),
    ],
)
def test_patterns_that_name_no_cells(patterns: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        selected(patterns, PATHS)


def twice(model: Any, x: Tensor) -> Tensor:
    return model.blocks[1](model.blocks[0](model.blocks[0](x)))


def partly(model: Any, x: Tensor) -> Tensor:
    return model.blocks[0](x)


def other_order(model: Any, x: Tensor) -> Tensor:
    return (backwards if model.training else statistics)(model, x)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("run", "cells", "message"),
    [
        (twice, ["blocks.*"], r"blocks\.0 is called 2 times"),
        (partly, ["blocks.*"], r"blocks\.1, blocks\.2, which the example does not call"),
        (backwards, ["blocks"], r"it is a container: name blocks\.\*"),
        (other_order, ["blocks.*"], "different order in training mode"),
    ],
)
def test_blocks_are_called_once(
    run: Callable[[Any, Tensor], Any], cells: list[str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        stagewise.capture_cells(Around(run), cells, torch.randn(4, 4))


# What cannot be carried is named


class Opaque:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Wrapping(nn.Linear):
    def forward(self, x: Any) -> Any:
        return Opaque(super().forward(x.tensor if isinstance(x, Opaque) else x))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Wrapping(4, 4), Wrapping(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).tensor


def to_numpy(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    mean = torch.from_numpy(h.detach().numpy().mean(0))
    return model.blocks[2](model.blocks[1](h) + mean)


class Keeping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = super().forward(x)
        return self.seen


def by_attribute(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[2](model.blocks[1](model.blocks[0](x)))
    h = h + model.blocks[0].seen
    del model.blocks[0].seen
    return h


def by_attribute_or_not(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[2](model.blocks[1](model.blocks[0](x)))
    return h + getattr(model.blocks[0], "seen", 0)


def changes_input(model: Any, x: Tensor) -> Tensor:
    x += 1
    return unet(model, x)


def assigns_buffer(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    model.mean = h.detach().mean(0)
    return model.blocks[2](model.blocks[1](h))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            to_numpy,
            r"numpy .*test_capture_cells\.py, line \d+\) returns a ndarray, which cannot be passed",
        ),
        (by_attribute, r"AttributeError: .*'seen', .*must only call blocks"),
        (
            by_attribute_or_not,
            "in training mode: the output itself differs .*a tensor in an",
        ),
        (changes_input, r"test_capture_cells\.py, line \d+ changes an input of the model in place"),
        (assigns_buffer, "the buffer mean differs"),
    ],
)
def test_what_cannot_be_carried(run: Callable[[Any, Tensor], Any], message: str) -> None:
    model = Around(run)
    model.blocks[0] = Keeping(4, 4)
    model.register_buffer("mean", torch.zeros(4))
    with pytest.raises(ModelError, match=message):
        stagewise.capture_cells(model, ["blocks.*"], torch.randn(4, 4))
    assert torch.equal(model.mean, torch.zeros(4)), "it is as it was"


def test_an_object_that_hides_tensors() -> None:
    message = (
        r"block blocks\.0 \(.*test_capture_cells\.py.*returns a Opaque, which cannot be passed"
    )
    with pytest.raises((ModelError, CellError), match=message):
        stagewise.capture_cells(Wrapped(), ["blocks.*"], torch.randn(4, 4))


def some_way(model: Any, x: Tensor) -> Tensor:
    h = first = model.blocks[0](x)
    h = model.blocks[2](model.blocks[1](h))
    return h + first if x[0, 0] > 0 else h


def any_order(model: Any, x: Tensor) -> Tensor:
    return (backwards if x[0, 0] > 0 else statistics)(model, x)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (some_way, r"add .*uses the result of block blocks\.0 \(.*took a different path"),
        (any_order, r"the model called blocks\.1 after blocks\.2 .*in the example.s order"),
    ],
)
def test_a_way_that_the_example_did_not_go(run: Callable[[Any, Tensor], Any], message: str) -> None:
    captured = stagewise.capture_cells(Around(run), ["blocks.*"], -torch.ones(4, 4))
    with pytest.raises(CellError, match=message):
        captured(torch.ones(4, 4))


def counts_calls(model: Any, x: Tensor) -> Tensor:
    h = model.blocks[0](x)
    COUNT.append(1)
    if len(COUNT) % 2:
        h = h * 2
    return model.blocks[2](model.blocks[1](h))


COUNT: list[int] = []


def test_code_that_does_something_else_each_time() -> None:
    with pytest.raises(
        ModelError, match=r"forward of Around changes run COUNT\[\d+\].* every call"
    ):
        stagewise.capture_cells(Around(counts_calls), ["blocks.*"], torch.ones(4, 4))


def test_gradient_checkpointing_is_refused() -> None:
    def checkpointed(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x

    with pytest.raises(CellError, match="as gradient checkpointing does; disable that"):
        stagewise.capture_cells(Around(checkpointed), ["blocks.*"], torch.ones(4, 4))


def test_the_model_must_have_values() -> None:
    with torch.device("meta"):
        model = Around(unet)
    with pytest.raises(ModelError, match="on the meta device"):
        stagewise.capture_cells(model, ["blocks.*"], torch.ones(4, 4))


class OwnBackward(torch.autograd.Function):
    """A reversible network's: its backward runs the layers again, and one of autograd's on them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, body: Any) -> Tensor:
        ctx.body = body
        ctx.save_for_backward(x)
        with torch.no_grad():
            return body.run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        assert ctx.body.training, "reversible layers are trained in training mode only"
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.body.run(x).backward(gradient)
        return x.grad, None


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def run(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).tanh())

    def forward(self, x: Tensor) -> Any:
        return OwnBackward.apply(x, self)


def test_a_backward_that_adds_to_gradients_itself_leaves_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Reversible(), nn.Linear(4, 2))
    plain, x, target = copy.deepcopy(model), torch.randn(6, 4), torch.randn(6, 2)
    model[1].first.bias.grad = torch.ones(4)
    stagewise.capture_cells(model, ["0", "1", "2"], x)
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(left) == ["1.first.bias"]
    assert left["1.first.bias"].tolist() == [1, 1, 1, 1]
    model.zero_grad()
    plan = stagewise.Plan(balance=(2, 1), schedule="1f1b", num_microbatches=2)
    stagewise.Pipeline(model, plan, loss=F.mse_loss).step(x, target=target)
    F.mse_loss(plain(x), target).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


class Biased(Decoder):
    """Nothing is tied, and its forward takes numbers of the batch, which may require gradients."""

    def __init__(self, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor, mask: Any, labels: Tensor, bias: Tensor) -> Any:  # type: ignore[override]
        output = super().forward(ids, mask, labels)
        output["loss"] = output["loss"] + (bias * output["logits"]).mean()
        return output


def third_step(num_stages: int, recompute: str, *, asks: bool) -> tuple[list[Tensor], int]:
    """Loss and gradients of a step that is not looked at, and how often forward began in it."""
    torch.manual_seed(0)
    model = Biased(p=0.3, layerdrop=0.4).double()
    bias = torch.randn(8, LENGTH, WORDS, dtype=torch.float64, requires_grad=asks)
    batch = {**words(8), "bias": bias}
    num_cells = len(stagewise.capture_cells(model, EVERY, **batch).chain)
    small, extra = divmod(num_cells, num_stages)
    balance = tuple(small + (stage < extra) for stage in range(num_stages))
    plan = stagewise.Plan(balance=balance, num_microbatches=2, recompute=recompute)
    pipe = stagewise.Pipeline(model, plan, loss=loss_of)
    for _ in range(3):
        pipe.zero_grad()
        bias.grad = None
        with mock.patch.object(Run, "run", autospec=True, side_effect=Run.run) as runs:
            loss = pipe.step(**batch)
    gradients = [p.grad for p in pipe.parameters() if p.grad is not None]
    return [loss, *gradients, *([bias.grad] if bias.grad is not None else [])], runs.call_count


@pytest.mark.filterwarnings("ignore::stagewise.errors.ExactnessWarning")
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_the_cells_of_a_stage_run_in_one_call_with_the_same_bits(recompute: str) -> None:
    found = {count: third_step(count, recompute, asks=False) for count in (1, 2, 7)}
    assert all(map(torch.equal, found[1][0], found[7][0]))
    assert all(map(torch.equal, found[2][0], found[7][0]))
    assert found[1][1] == 2 < found[2][1] < found[7][1]  # of two microbatches


@pytest.mark.filterwarnings("ignore::stagewise.errors.ExactnessWarning")
def test_numbers_of_the_batch_that_require_gradients_are_summed_alike_at_every_cut() -> None:
    one, seven = (third_step(count, "never", asks=True)[0] for count in (1, 7))
    assert all(map(torch.equal, one, seven))


def test_an_error_in_a_stage_of_several_cells_names_its_cell() -> None:
    torch.manual_seed(0)
    model = Biased().double()
    batch = {**words(8), "bias": torch.ones(8, LENGTH, WORDS)}
    ours = stagewise.capture_cells(model, ["layers.*"], **batch)
    pipe = stagewise.Pipeline(model, stagewise.Plan(balance=(4,), num_microbatches=1), loss=loss_of)
    pipe.step(**batch)
    owned = {path: module for _, path, module in ours.chain[2].module.owned()}  # type: ignore[operator]
    owned["layers.2"].register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(CellError, match=r"cell 'layers.2' .*ZeroDivisionError"):
            pipe.step(**batch)
