"""Any module as a chain of cells: the plain model's numbers, names and buffers, however cut."""

import copy
import dataclasses
import functools
import gc
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import stagewise
from stagewise.errors import BatchError, ModelError
from stagewise.model.captured import Captured
from stagewise.model.chain import chain_of, module_tree
from tests.harness import Pools

F = nn.functional
Batch = dict[str, Any]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.both = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        keys, values = self.both(source).chunk(2, dim=-1)
        split = [t.view(batch, -1, 2, width // 2).transpose(1, 2) for t in (self.query(x), keys)]
        values = values.view(batch, -1, 2, width // 2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(*split, values, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
    def __init__(self, width: int, p: float, crossed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width)
        self.cross = Attention(width) if crossed else None
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(p)

    def forward(
        self, x: Tensor, mask: Tensor, memory: Tensor | None = None, across: Tensor | None = None
    ) -> Tensor:
        normed = self.norm1(x)
        x = x + self.dropout(self.attention(normed, normed, mask))
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), memory, across)
        return x + F.dropout(self.mlp(self.norm3(x)), self.dropout.p, self.training)


class Translator(nn.Module):
    """Encoder-decoder: one embedding for source, target and output, a mask, loss inside."""

    def __init__(self, p: float = 0.0, num_layers: int = 2) -> None:
        width, vocabulary = 16, 20
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(32, width))
        self.encoder = nn.ModuleList(Layer(width, p, crossed=False) for _ in range(num_layers))
        self.decoder = nn.ModuleList(Layer(width, p, crossed=True) for _ in range(num_layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, source: Tensor, target: Tensor, keep: Tensor | None = None) -> dict[str, Any]:
        batch, length = source.shape
        if keep is None:
            keep = torch.ones_like(source)
        across = (keep != 0)[:, None, None, :]
        memory = self.embed(source) * self.scale + self.position[:length]
        for layer in self.encoder:
            memory = layer(memory, across.expand(batch, 1, length, length))
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).tril()
        x = self.embed(target) * self.scale + self.position[: target.shape[1]]
        for layer in self.decoder:
            x = layer(x, causal, memory, across)
        logits = self.head(x)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        return {"loss": loss, "logits": logits, "cache": None}


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(8) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


class Counting(nn.Module):
    """Buffers that forward changes: one in place, one anew; and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.third = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.first.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        if self.training:
            self.count += 1
            self.average = 0.5 * self.average + 0.5 * x.detach().mean(0)
        else:
            x = x + self.average
        x = self.second(x).tanh()
        with torch.no_grad():
            size = self.second.weight.abs().sum()
        return self.third(x) * size


class Recurrent(nn.Module):
    """What torch.export would write out step by step, and sizes that no tensor at hand shows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        batch = tokens.shape[0]
        x, (last, _) = self.lstm(self.embed(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        flat = x.reshape(-1, 8) + torch.arange(8, device=x.device)
        return self.head(flat).view(batch, -1, 3).mean(1) + last[0, :, :3] * (batch / batch)


@dataclass(frozen=True)
class Example:
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[..., Tensor]
    normalised: bool = False  # by microbatch


def loss_inside(output: Batch) -> Tensor:
    return output["loss"]


def words(size: int) -> Batch:
    source = torch.arange(size * 7).view(size, 7) * 3 % 20
    keep = torch.ones_like(source)
    keep[0, 5:] = 0
    return {"source": source, "target": source[:, :5].flip(1), "keep": keep}


def images(size: int) -> Batch:
    generator = torch.Generator().manual_seed(size)
    return {"image": torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)}


def numbers(size: int) -> Batch:
    generator = torch.Generator().manual_seed(size)
    return {"x": torch.randn(size, 6, dtype=torch.float64, generator=generator)}


def tokens(size: int) -> Batch:
    return {"tokens": torch.arange(size * 4).view(size, 4) % 11}


def square(output: Tensor) -> Tensor:
    return output.square().mean()


EXAMPLES = {
    "translator": Example(Translator, words, loss_inside),
    "small translator": Example(functools.partial(Translator, num_layers=1), words, loss_inside),
    "resnet": Example(ResNet, images, square, normalised=True),
    "counting": Example(Counting, numbers, square),
    "recurrent": Example(Recurrent, tokens, square),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return EXAMPLES[name].build().double()


@functools.cache
def original(name: str) -> tuple[nn.Module, Captured]:
    model = build(name)
    return model, stagewise.capture(model, **EXAMPLES[name].batch(4))


def fresh(name: str) -> tuple[nn.Module, Captured]:
    """A model and its capture, which costs seconds, as copies."""
    return copy.deepcopy(original(name))


def gradients(module: nn.Module | stagewise.Pipeline) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def assert_close(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name] is None) == (tensor is None), name
        if tensor is not None:
            torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-13, msg=name)


def step(name: str, num_stages: int, num_microbatches: int, size: int, **options: Any) -> Any:
    """Loss, gradients, buffers and evaluation of one pipelined step."""
    (_, ours), example = fresh(name), EXAMPLES[name]
    chain = ours.chain
    small, extra = divmod(len(chain), num_stages)
    plan = stagewise.Plan(
        balance=tuple(small + (stage < extra) for stage in range(num_stages)),
        schedule=options.pop("schedule", "1f1b"),
        num_microbatches=num_microbatches,
        recompute=options.pop("recompute", "never"),
    )
    pipe = stagewise.Pipeline(ours, plan, loss=example.loss, **options)
    loss = pipe.step(**example.batch(size))
    buffers = {n: b.clone() for n, b in pipe.named_buffers()}
    return loss, gradients(pipe), buffers, pipe.evaluate(**example.batch(3))


@pytest.mark.parametrize("name", ["translator", "resnet", "counting", "recurrent"])
def test_a_captured_model_runs_as_the_plain_one(name: str) -> None:
    (model, ours), example = fresh(name), EXAMPLES[name]
    plain = build(name)
    assert len(ours.chain) > 2
    for training, size in ((True, 6), (False, 5)):  # another batch size than the captured
        plain.train(training)
        module_tree(ours.chain).train(training)
        wanted, got = (
            example.loss(plain(**example.batch(size))),
            example.loss(
                ours(**example.batch(size))  # type: ignore[arg-type]
            ),
        )
        assert torch.equal(got, wanted)
        wanted.backward()
        got.backward()
    for (n, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), n
        assert p.grad is None or torch.equal(p.grad, q.grad), n
    for (n, b), c in zip(plain.named_buffers(), model.buffers(), strict=True):
        if n != "average":  # the plain model makes a new tensor; the chain writes into its own
            assert torch.equal(b, c), n
    tree = module_tree(ours.chain)
    assert list(tree.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in tree.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in tree.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert torch.equal(
        dict(tree.named_buffers()).get("average", plain_average(plain)), plain_average(plain)
    )


def plain_average(plain: nn.Module) -> Tensor:
    return dict(plain.named_buffers()).get("average", torch.zeros(()))


@pytest.mark.parametrize("name", ["translator", "resnet", "counting", "recurrent"])
def test_pipelined_it_is_exact_at_every_cut(name: str) -> None:
    example = EXAMPLES[name]
    count, size = (1, 6) if example.normalised else (3, 8)  # 3, 3, 2 samples
    plain = build(name)
    wanted = example.loss(plain(**example.batch(size)))
    wanted.backward()
    one, *others = [step(name, stages, count, size) for stages in (1, 2, 3)]
    assert abs(one[0] - wanted) <= 1e-12 * abs(wanted)
    assert_close(one[1], gradients(plain))
    plain.eval()
    if name != "counting":  # its buffers change once per microbatch
        assert abs(one[3] - example.loss(plain(**example.batch(3)))) <= 1e-12
    others.append(step(name, 2, count, size, recompute="always"))
    assert_close(step(name, 2, count, size, schedule="zb_h1")[1], one[1])
    for other in others:
        assert torch.equal(other[0], one[0]) and torch.equal(other[3], one[3])
        for ours, theirs in zip(other[1:3], one[1:3], strict=True):
            assert list(ours) == list(theirs)
            for key, tensor in theirs.items():
                assert tensor is None or torch.equal(ours[key], tensor), key


def test_dropout_does_not_depend_on_the_cut() -> None:
    losses = []
    torch.manual_seed(0)
    original = stagewise.capture(Translator(p=0.5, num_layers=1).double(), **words(4))
    for num_stages in (1, 2, 3):
        ours = copy.deepcopy(original)
        chain = ours.chain
        first = len(chain) // num_stages
        balance = [first] * (num_stages - 1)
        plan = stagewise.Plan(
            balance=(*balance, len(chain) - sum(balance)), schedule="1f1b", num_microbatches=2
        )
        pipe = stagewise.Pipeline(ours, plan, loss=loss_inside)
        losses.append(pipe.step(**words(6)))
        pipe.eval()
        assert pipe.evaluate(**words(6)) == pipe.step(**words(6)), "no dropout in eval mode"
    assert losses[0] == losses[1] == losses[2]


def test_cells_follow_the_modules() -> None:
    names = [cell.name for cell in original("translator")[1].chain]
    assert names == [
        "embed",
        "encoder.0.attention",
        "encoder.0.mlp",
        "encoder.1.attention",
        "encoder.1.mlp",
        "embed#2",
        "decoder.0.attention",
        "decoder.0.cross",
        "decoder.0.mlp",
        "decoder.1",
        "decoder.1.mlp",
        "head",
    ]


def test_masks_are_computed_once_per_stage_and_never_sent() -> None:
    """What follows from the batch alone travels nowhere, and is not made again for every cell."""
    _, ours = fresh("translator")
    chain = ours.chain
    programs = [cell.module._programs[True] for cell in chain]  # type: ignore[union-attr, index]
    assert sum(bool(program.shared) for program in programs) >= 4, "masks are shared"
    made: list[int] = []

    class Counted:
        def __init__(self, code: Any) -> None:
            self._run = code.function

        def function(self, *args: object) -> object:
            made.append(1)
            return self._run(*args)

    for cell, program in zip(chain, programs, strict=True):
        if program.derive is not None:
            derive = Counted(program.derive)
            cell.module._programs[True] = dataclasses.replace(program, derive=derive)  # type: ignore[union-attr, index]
    ours(**words(4))
    assert len(made) == len({name for program in programs for name in program.shared})
    value: Any = ()
    for cell in chain[:-1]:
        names = cell.keywords(cell.index and 1)
        value = cell.module(value, **{name: words(4)[name] for name in names})
        assert all(tensor.is_floating_point() for tensor in pytree.tree_leaves(value))


def test_plan_captures_by_itself() -> None:
    model = build("resnet")
    with pytest.raises(ModelError, match=r"stagewise.capture\(model"):
        chain_of(model)
    plan = stagewise.plan(
        model,
        images(4)["image"],
        loss=square,
        num_stages=2,
        num_microbatches=2,
        seconds=0.05,
    )
    assert sum(plan.balance) == len(chain_of(model))
    pipe = stagewise.Pipeline(model, plan, loss=square)
    by_position, by_name = pipe.evaluate(images(4)["image"]), pipe.evaluate(**images(4))
    assert torch.equal(by_position, by_name)


class Scaled(nn.Module):
    """Its own parameter beside a layer's, with an initialisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.linear = nn.Parameter(torch.empty(6)), nn.Linear(6, 6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.scale + torch.ones(6))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Scaled(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_the_meta_device() -> None:
    """Captured, estimated and made real stage by stage; the same weights at any cut."""
    states = []
    for num_stages in (1, 2):
        with torch.device("meta"):
            model, x = Two(), torch.empty(4, 6)
        cells = stagewise.estimate(model, x, loss=square, num_microbatches=2, device="cpu")
        assert [cell.name for cell in cells] == ["one", "two.linear"]
        balance = (2,) if num_stages == 1 else (1, 1)
        plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=2)
        pipe = stagewise.Pipeline(model, plan, loss=square)
        states.append(pipe.state_dict())
        plain = Two()
        plain.load_state_dict(states[-1])
        wanted = square(plain(torch.ones(4, 6)))
        assert torch.allclose(pipe.step(torch.ones(4, 6)), wanted, rtol=1e-6)
        assert abs(states[-1]["one.scale"].std() - 1) < 0.9, "drawn, not left as it was"
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


class Balanced(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        stagewise.add_loss(x.abs().mean(), "balance")
        return self.two(x)


def test_added_losses_are_added_by_the_cells() -> None:
    torch.manual_seed(0)
    model, x = Balanced(), torch.randn(6, 6)
    plain = copy.deepcopy(model)
    ours = stagewise.capture(model, x)
    plan = stagewise.Plan(balance=(1, len(ours.chain) - 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=square)
    loss = pipe.step(x)
    with stagewise.collect_losses() as added:
        main = square(plain(x))
    (main + added["balance"]).backward()
    torch.testing.assert_close(loss, main + added["balance"])
    torch.testing.assert_close(pipe.losses["balance"], added["balance"].detach())
    for name, gradient in gradients(pipe).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])


def test_autocast_is_that_of_the_call() -> None:
    torch.manual_seed(0)
    model = Two()
    ours = stagewise.capture(model, torch.ones(4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(torch.ones(4, 6))
        assert output.dtype == torch.bfloat16  # type: ignore[union-attr, attr-defined]
        assert torch.equal(output, model(torch.ones(4, 6)))  # type: ignore[arg-type]


def test_gpipe_takes_any_module() -> None:
    torch.manual_seed(0)
    gpipe = stagewise.GPipe(Two(), 2, 2, loss=F.mse_loss)
    x, target = torch.ones(4, 6), torch.zeros(4, 6)
    torch.manual_seed(0)
    torch.testing.assert_close(gpipe.training_step((x, target)), F.mse_loss(Two()(x), target))


def test_a_capture_lives_as_long_as_its_model() -> None:
    model = build("resnet")
    stagewise.capture(model, **images(4))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_batchnorm_warnings_name_the_layer() -> None:
    _, ours = fresh("resnet")
    plan = stagewise.Plan(balance=(len(ours.chain),), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(ours, plan, loss=square)
    with pytest.warns(UserWarning, match=r"stem\.1, blocks\.0\.bn1"):
        pipe.step(**images(4))


# Processes


def distributed_step(name: str, count: int, size: int) -> Any:
    torch.set_num_threads(1)
    return step(name, 2, count, size, transport="distributed")


@pytest.mark.parametrize("name", ["small translator", "counting"])
def test_between_processes_the_bits_are_the_same(name: str, pools: Pools) -> None:
    ranks = pools[2].run(distributed_step, name, 3, 8, seconds=110)
    loss, grads, buffers, evaluated = step(name, 2, 3, 8)
    for rank in ranks:
        assert torch.equal(rank[0], loss) and torch.equal(rank[3], evaluated)
        for ours, theirs in ((rank[1], grads), (rank[2], buffers)):
            for key, tensor in ours.items():
                assert tensor is None or torch.equal(tensor, theirs[key]), key
    assert set(ranks[0][1]) | set(ranks[1][1]) == set(grads)


# Errors name module, line and the way out


class Inner(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.run = nn.Linear(6, 6), forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self.linear(x))


class Outer(nn.Module):
    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = Inner(forward)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Opaque:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def branches(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


def one_size(x: Tensor) -> Tensor:
    return x.view(4, 6) * 2


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branches, r"module inner .*test_capture.py, line \d+ cannot be captured: .*data.*where"),
        (Opaque, r"Outer.* cannot be captured: .*taken apart into tensors"),
        (one_size, r"batches of exactly 4 samples"),
        (
            Reverse.apply,
            r"test_capture.py, line \d+ cannot be captured: .*lose the backward.*Reverse",
        ),
    ],
)
def test_what_cannot_be_captured(forward: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        stagewise.capture(Outer(forward), torch.randn(4, 6))
    told = "".join(traceback.format_exception(caught.value))
    assert len(told.splitlines()) < 60, told  # hundreds of lines are torch's own


class Changes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.linear(x)


def test_inputs_changed_in_place() -> None:
    with pytest.raises(ModelError, match=r"test_capture.py, line \d+ changes an input.*clone it"):
        stagewise.capture(Changes(), torch.randn(4, 6))


def test_calls_that_were_not_captured() -> None:
    _, ours = fresh("translator")
    batch = words(4)
    with pytest.raises(BatchError, match="cannot be called like this"):
        ours(**batch, extra=torch.ones(4))
    with pytest.raises(
        BatchError, match=r"keep.shape\[1\] is 7, .* equals source.shape\[1\], which"
    ):
        ours(**{**batch, "source": batch["source"][:, :6]})
    with pytest.raises(BatchError, match="captured with 'keep', which is missing here"):
        ours(batch["source"], batch["target"])
    _, ours = fresh("counting")
    with pytest.raises(BatchError, match="float32"):
        ours(torch.ones(4, 6))


class Spread(nn.Module):
    """Its own parameters go to several cells, one is used by none."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(4))
        self.register_buffer("second", torch.randn(4))
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.first = nn.Parameter(torch.randn(4))
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.settings = Frozen(width=4)
        self.shown = MethodType(functools.partial(repr), self)  # as torchao adds methods

    def forward(self, x: Tensor) -> Tensor:
        return self.last * self.b(self.a(x * self.first).relu() + self.second * self.mask)


class Frozen(OrderedDict[str, int]):
    """Settings as diffusers keeps them."""

    def update(self, *args: object, **kwargs: int) -> None:
        if vars(self):
            raise TypeError("frozen")
        super().update(*args, **kwargs)
        self.frozen = True

    clear = None  # type: ignore[assignment]


def test_parameters_of_a_module_spread_over_cells_keep_their_order() -> None:
    model = Spread()
    names, state = [name for name, _ in model.named_parameters()], list(model.state_dict())
    captured = stagewise.capture(model, torch.randn(4, 4))
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    assert len(captured.chain) == 2
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    assert [name for name, _ in pipe.named_parameters()] == names
    assert list(pipe.state_dict()) == state


class Kept:
    """What transformers' caches are: a plain object of plain objects that hold tensors."""

    def __init__(self, values: list[Any], count: int) -> None:
        self.values, self.count, self.dtype = values, count, torch.float32


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.one(x)
        z = self.two(y.tanh())
        return {"y": z, "kept": Kept([Kept([y], 1), {"z": z}], 2)}


def pipeline(
    model: nn.Module, num_microbatches: int, example: Tensor | None = None
) -> stagewise.Pipeline:
    example = torch.randn(4, 4) if example is None else example
    cells = len(stagewise.capture(model, example).chain)
    balance = (1, cells - 1) if cells > 1 else (1,)
    plan = stagewise.Plan(balance=balance, schedule="1f1b", num_microbatches=num_microbatches)
    return stagewise.Pipeline(
        model, plan, loss=lambda out: (out["y"] if isinstance(out, dict) else out).square().mean()
    )


def test_an_object_that_holds_tensors_is_returned_whole() -> None:
    model, x = Keeps(), torch.randn(4, 4)
    found = pipeline(model, 2).predict(x)
    wanted = model(x)["kept"]
    assert isinstance(wanted, Kept)
    kept = found["kept"]
    assert type(kept) is Kept and type(kept.values[0]) is Kept
    assert (kept.count, kept.values[0].count, kept.dtype) == (2, 1, torch.float32)
    torch.testing.assert_close(kept.values[0].values[0], wanted.values[0].values[0])
    torch.testing.assert_close(kept.values[1]["z"], wanted.values[1]["z"])


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = torch.vmap(lambda row: self.linear(row).tanh() + row)(x)
        return mapped


class Asks(nn.Module):
    """Asks whether there is one sample, as transformers' masks do, and `differs` then, or not."""

    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.one, self.two, self.differs = nn.Linear(4, 4), nn.Linear(4, 4), differs

    def forward(self, x: Tensor) -> Tensor:
        y = torch.arange(4.0)[None]
        if x.shape[0] != y.shape[0]:
            y = y.expand(x.shape[0], -1) * (2 if self.differs else 1)
        return self.two(self.one(x).tanh() + y)


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(Mapped(), Mapped()), functools.partial(Asks, False)]
)
def test_single_samples(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(4, 4)
    loss = pipeline(model, 4).step(x)
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    wanted = model(x).square().mean()
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(ours, [p.grad for p in model.parameters()])


def test_one_sample_that_forward_treats_otherwise() -> None:
    with pytest.raises(BatchError, match=r"shape\[0\] is 1.*where x.shape\[0\] != 1"):
        pipeline(Asks(True), 4).step(torch.randn(4, 4))


class Positions(nn.Module):
    """A table of the whole model's, persistent, which every layer reads and none changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(16))
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        at = self.table[: x.shape[1], None] * torch.ones_like(x)[..., None]
        y = self.embed(x)
        for layer in self.layers:
            y = layer(y * at.cos()).tanh()
        return y


def test_a_buffer_that_no_cell_changes_may_be_read_by_all() -> None:
    model, x = Positions(), torch.randint(0, 9, (4, 6))
    pipe = pipeline(model, 2, x)
    assert pipe.plan.num_stages == 2
    torch.testing.assert_close(pipe.step(x), model(x).square().mean().detach())
