"""`I` and `W` on one graph: together the bits of one backward, each piece of work and hook once."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F  # noqa: N812 (the name that PyTorch's users know)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stagewise.engine.stage import split_backward
from stagewise.engine.stage.activation_meter import ActivationMeter
from stagewise.engine.stage.split_backward import Product, backward_inputs, backward_weights


class Apply(nn.Module):
    """A function of an input and of parameters, named p0, p1, ... by their order."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.own = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.own)


class Scaled(torch.autograd.Function):
    """A custom product with a weight; counts its backwards."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        Scaled.runs += 1
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class First(nn.Module):
    """The first output of a module that takes its input `times` times."""

    def __init__(self, module: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*[x] * self.times)[0]  # type: ignore[no-any-return]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def twice(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Tanh(), module)


def _shared_bias() -> nn.Module:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.bias = one.bias
    return nn.Sequential(one, nn.Tanh(), other)


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def _checkpointed(use_reentrant: bool) -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return nn.Sequential(
        Apply(lambda x: checkpoint(inner, x, use_reentrant=use_reentrant)), inner, nn.Linear(4, 4)
    )


def _tied_embedding() -> nn.Module:
    embedding = nn.Embedding(7, 4)
    return nn.Sequential(embedding, nn.Tanh(), Apply(lambda x: x @ embedding.weight.T))


TOKENS = torch.tensor([[1, 2, 1], [0, 6, 1]])
# name -> (module, input, how many products have weights that can wait)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(4, 5), lambda: rows(3, 4), 1),
    "without bias, 3 dimensions": (lambda: nn.Linear(4, 5, bias=False), lambda: rows(2, 3, 4), 1),
    "transposed input": (lambda: nn.Linear(4, 5), lambda: rows(4, 3).t().detach(), 1),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)),
        lambda: rows(3, 4),
        2,
    ),
    "input without gradient": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)),
        lambda: torch.randn(3, 4),
        2,
    ),
    "no bias on such an input": (
        lambda: nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Linear(8, 4)),
        lambda: torch.randn(3, 4),
        2,
    ),
    "matmul": (lambda: Apply(lambda x, w: x @ w, (4, 5)), lambda: rows(2, 3, 4), 1),
    "vector": (lambda: Apply(lambda x, w: x @ w, (4,)), lambda: rows(3, 4), 1),
    "batched": (lambda: Apply(torch.bmm, (2, 4, 5)), lambda: rows(2, 3, 4), 1),
    "einsum": (
        lambda: Apply(lambda x, w: torch.einsum("bi,ij->bj", x, w), (4, 5)),
        lambda: rows(3, 4),
        1,
    ),
    "broadcast bias": (
        lambda: Apply(lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0), (1, 5), (4, 5)),
        lambda: rows(3, 4),
        1,
    ),
    "weight made of two": (
        lambda: Apply(lambda x, a, b: x @ (a @ b), (4, 2), (2, 4)),
        lambda: rows(3, 4),
        1,
    ),
    "weight transformed": (
        lambda: Apply(lambda x, w: x @ w.double().exp().T.float(), (5, 4)),
        lambda: rows(3, 4),
        1,
    ),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), lambda: rows(2, 3, 8), 1),
    "conv2d in groups": (
        lambda: nn.Conv2d(4, 4, 3, groups=2, stride=2),
        lambda: rows(2, 4, 8, 8),
        1,
    ),
    "conv2d, channels last": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False).to(memory_format=torch.channels_last),
        lambda: rows(2, 3, 8, 8),
        1,
    ),
    "transposed conv": (lambda: nn.ConvTranspose2d(3, 4, 3), lambda: rows(2, 3, 5, 5), 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: rows(2, 2, 4, 4, 4), 1),
    "bilinear": (
        lambda: Apply(lambda x, w: F.bilinear(x, x.sin(), w), (2, 4, 4)),
        lambda: rows(3, 4),
        1,
    ),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), lambda: TOKENS, 1),
    "sparse embedding": (lambda: nn.Embedding(7, 4, sparse=True), lambda: TOKENS, 1),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 4), lambda: TOKENS, 1),
    "embedding and its output": (_tied_embedding, lambda: TOKENS, 0),
    "layer norm": (lambda: nn.LayerNorm(4), lambda: rows(3, 4), 0),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        lambda: rows(2, 3, 8, 8),
        1,
    ),
    "attention": (
        lambda: First(nn.MultiheadAttention(8, 2, batch_first=True), times=3),
        lambda: rows(2, 3, 8),
        2,
    ),
    "transformer block": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        lambda: rows(2, 3, 8),
        4,
    ),
    "lstm, one kernel": (lambda: First(nn.LSTM(4, 4, batch_first=True)), lambda: rows(2, 3, 4), 0),
    "gru": (lambda: First(nn.GRU(4, 4, batch_first=True)), lambda: rows(2, 3, 4), 1),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: rows(3, 4),
        1,
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: rows(3, 4),
        1,
    ),
    "used twice": (lambda: twice(nn.Linear(4, 4)), lambda: rows(3, 4), 0),
    "used twice at once": (lambda: Apply(lambda x, w: x @ (w @ w), (4, 4)), lambda: rows(3, 4), 0),
    "shared bias": (_shared_bias, lambda: rows(3, 4), 2),
    "custom function": (lambda: Apply(Scaled.apply, (4, 4)), lambda: rows(3, 4), 0),
    "custom function beside": (
        lambda: nn.Sequential(nn.Linear(4, 4), Apply(Scaled.apply, (4, 4)), nn.Linear(4, 4)),
        lambda: rows(3, 4),
        2,
    ),
    "weight in a custom function too": (
        lambda: Apply(lambda x, w: Scaled.apply(x @ w, w), (4, 4)),
        lambda: rows(3, 4),
        0,
    ),
    "frozen": (lambda: _frozen(nn.Linear(4, 4)), lambda: rows(3, 4), 0),
    "frozen below": (
        lambda: nn.Sequential(_frozen(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 4)),
        lambda: rows(3, 4),
        1,
    ),
    "in place on a view": (
        lambda: nn.Sequential(nn.Linear(4, 4), Apply(_in_place, (2,)), nn.Linear(4, 4)),
        lambda: rows(3, 4),
        2,
    ),
    "reentrant checkpoint": (lambda: _checkpointed(True), lambda: rows(3, 4), 0),
    # What it packs is made anew whenever it is unpacked, so its products do not wait.
    "checkpoint": (lambda: _checkpointed(False), lambda: rows(3, 4), 1),
    "constant output": (lambda: Apply(lambda x, p: p * 2, (3,)), lambda: rows(3, 4), 0),
    "its parameter": (lambda: Apply(lambda x, p: p, (3,)), lambda: rows(3, 4), 0),
    "its input": (lambda: nn.Identity(), lambda: rows(3, 4), 0),
}


def _in_place(x: Tensor, p: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] += p
    return y


def entered(x: Tensor) -> Tensor:
    """`x` as a stage feeds it: a view of a leaf."""
    return x.detach().requires_grad_(x.requires_grad)[...]


def start(y: Tensor) -> Tensor:
    """A gradient to begin with."""
    return torch.cos(torch.arange(float(y.numel()))).view(y.shape)


def split(y: Tensor, fed: Tensor) -> list[Product]:
    return backward_inputs(
        [get_gradient_edge(y)], [start(y)], [fed.grad_fn] if fed.grad_fn is not None else []
    )


def gradients(
    module: nn.Module, x: Tensor, *, whole: bool
) -> tuple[Tensor | None, list[Tensor | None], int]:
    """Of the input and of the parameters; and how many products waited."""
    seen: list[Tensor | None] = [None]

    def keep(received: tuple[Tensor, ...]) -> tuple[None, ...]:
        (seen[0],) = received
        return (None,)

    for parameter in module.parameters():
        parameter.grad = None
    fed, number = entered(x), 0
    if fed.grad_fn is not None:
        fed.grad_fn.register_prehook(keep)
    y = module(fed)
    if whole:
        y.backward(start(y))
    else:
        products = split(y, fed)
        number = len(products)
        backward_weights(products)
        assert products == []
    return seen[0], [p.grad for p in module.parameters()], number


@pytest.mark.filterwarnings("ignore:a stage's backward holds reentrant checkpointing")
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_one_backward(name: str) -> None:
    build, make, number = CASES[name]
    torch.manual_seed(0)
    module, x = build().eval(), make()
    below, own, _ = gradients(module, x, whole=True)
    before = Scaled.runs
    also_below, also_own, products = gradients(module, x, whole=False)
    assert Scaled.runs - before == sum(
        "custom" in name and isinstance(m, Apply) for m in module.modules()
    )
    for wanted, got in zip([below, *own], [also_below, *also_own], strict=True):
        assert (wanted is None) == (got is None)
        if wanted is not None and got is not None:
            assert wanted.dtype == got.dtype and wanted.layout == got.layout
            assert torch.equal(wanted.to_dense(), got.to_dense())
            assert wanted.is_sparse or wanted.stride() == got.stride()
    assert products == number
    assert any(grad is not None for grad in [below, *own])


class Noting(TorchDispatchMode):
    """Counts the kernels that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.kernels[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def kernels(
    build: Callable[[], nn.Module], x: Tensor, names: Sequence[str]
) -> list[tuple[int, ...]]:
    """How often each kernel ran in `B`, `I` and `W`."""
    module, fed = build(), entered(x)
    with Noting() as whole:
        y = module(entered(x))
        whole.kernels.clear()
        y.sum().backward()
    y = module(fed)
    with Noting() as first:
        products = split(y, fed)
    with Noting() as second:
        backward_weights(products)
    return [tuple(noted.kernels[name] for noted in (whole, first, second)) for name in names]


def test_every_kernel_runs_once() -> None:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.LayerNorm(4))

    names = ["mm", "gelu_backward", "native_layer_norm_backward"]
    assert kernels(mlp, rows(3, 4), names) == [(4, 2, 2), (1, 1, 0), (1, 1, 0)]
    assert kernels(mlp, torch.randn(3, 4), names) == [(3, 1, 2), (1, 1, 0), (1, 1, 0)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_hooks_fire_once_and_count_once() -> None:
    """Also a tensor's, which doubles the gradient just where it enters a product."""
    fired: Counter[str] = Counter()

    def noting(name: str) -> Callable[..., None]:
        return lambda *_: fired.update([name])

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: fired.update(["tensor"]) or gradient * 2)
            z = self.two(y.tanh())
            z.grad_fn.register_prehook(noting("node"))
            z.register_hook(lambda gradient: gradient + 1)
            return z.sin()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    module = Hooked()
    module.one.register_full_backward_hook(noting("module"))
    module.two.register_full_backward_pre_hook(noting("pre"))
    for parameter in module.parameters():
        parameter.register_hook(noting("parameter"))
        parameter.register_post_accumulate_grad_hook(noting("accumulated"))
    for x in (rows(3, 4), torch.randn(3, 4)):
        below, own, _ = gradients(module, x, whole=True)
        once = dict(fired)
        assert once["parameter"] == once["accumulated"] == 4
        fired.clear()
        also_below, also_own, number = gradients(module, x, whole=False)
        assert fired == once and number == 2
        fired.clear()
        for wanted, got in zip([below, *own], [also_below, *also_own], strict=True):
            assert wanted is got is None or torch.equal(wanted, got)  # type: ignore[arg-type]


def test_hooks_of_weights_fire_where_their_gradient_is_made() -> None:
    linear, fired = nn.Linear(4, 4), []
    norm = nn.LayerNorm(4)
    linear.weight.register_hook(lambda _: fired.append("product"))
    norm.weight.register_hook(lambda _: fired.append("other"))
    fed = entered(rows(3, 4))
    products = split(norm(linear(fed)), fed)
    assert fired == ["other"] and linear.weight.grad is None and norm.weight.grad is not None
    backward_weights(products)
    assert fired == ["other", "product"]


def test_what_weights_need_lives_between_and_nothing_else() -> None:
    alive: dict[str, weakref.ref[Tensor]] = {}
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(fed: Tensor) -> Tensor:
        hidden = one(fed)
        active = F.gelu(hidden)
        scaled = active.exp()
        for name, tensor in (("hidden", hidden), ("active", active), ("scaled", scaled)):
            alive[name] = weakref.ref(tensor)
        return two(scaled).square()  # type: ignore[no-any-return]

    def living() -> list[str]:
        return [name for name, tensor in alive.items() if tensor() is not None]

    gc.disable()  # reference counting alone must do
    try:
        fed = entered(rows(3, 4))
        y = forward(fed)
        assert living() == ["hidden", "scaled"], "active is saved by nobody"
        products = split(y, fed)
        del y, fed
        assert living() == ["scaled"]
        backward_weights(products)
        assert living() == []
    finally:
        gc.enable()


def test_a_meter_sees_what_lives_between() -> None:
    one, two, x = nn.Linear(4, 8), nn.Linear(8, 4), rows(3, 4)
    meter = ActivationMeter([*one.parameters(), *two.parameters()])
    with meter.counting():
        fed = entered(x)
        y = two(F.gelu(one(fed))).tanh()
        floats = 3 * (4 + 8 + 8 + 4)  # inputs of both products, of gelu, output of tanh
        assert meter.live_bytes([]) == floats * 4
        products = split(y, fed)
        received = [t for product in products for t in product.received if t is not None]
        assert meter.live_bytes([]) == 3 * (4 + 8) * 4
        assert meter.live_bytes(received) == 3 * (4 + 8 + 4 + 8) * 4
        backward_weights(products)
        assert meter.live_bytes([]) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module_runs_backward_whole() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    compiled = torch.compile(module, backend="aot_eager")
    x = rows(3, 4)
    wanted = gradients(compiled, x, whole=True)
    split_backward._warn_that_all_is_in_i.cache_clear()
    with pytest.warns(UserWarning, match="holds code compiled by torch.compile.*such as 1f1b"):
        got = gradients(compiled, x, whole=False)
    assert gradients(compiled, x, whole=False)[2] == 0, "it is said once"
    assert got[2] == 0 and torch.equal(wanted[0], got[0])  # type: ignore[arg-type]
    assert all(map(torch.equal, wanted[1], got[1]))  # type: ignore[arg-type]


def test_the_way_through_a_graph_is_found_once_for_all_of_its_shape() -> None:
    """A microbatch's graph with another shape, also of the same classes, is cut by itself."""
    torch.manual_seed(0)
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)

    class Shared(nn.Module):
        def __init__(self, second: nn.Linear) -> None:
            super().__init__()
            self.own = nn.ModuleList({one: None, second: None})
            self.second = second

        def forward(self, x: Tensor) -> Tensor:
            return self.second(one(x).tanh())  # type: ignore[no-any-return]

    x = rows(3, 4)
    split_backward._cut.cache_clear()
    for second, products in ((two, 2), (two, 2), (one, 0), (two, 2), (one, 0)):
        below, own, _ = gradients(Shared(second), x, whole=True)
        also_below, also_own, number = gradients(Shared(second), x, whole=False)
        assert number == products
        assert torch.equal(below, also_below) and all(map(torch.equal, own, also_own))  # type: ignore[arg-type]
    assert split_backward._cut.cache_info().misses == 2


def test_a_graph_that_microbatches_share_is_refused() -> None:
    """As autograd refuses it where the backward is whole."""
    weight = nn.Parameter(torch.randn(4, 4))
    shared, linear = weight.exp(), nn.Linear(4, 4)
    for last in (False, True):
        fed = entered(rows(3, 4))
        y = linear(fed) * shared[0]
        if not last:
            backward_weights(split(y, fed))
        else:
            with pytest.raises(RuntimeError, match="recompute in each microbatch what they share"):
                split(y, fed)


def test_what_received_nothing_is_left_out() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    fed = entered(rows(3, 4))
    left = one(fed)
    right = two(left.detach())
    assert left.grad_fn is not None and fed.grad_fn is not None
    backward_weights(backward_inputs([get_gradient_edge(right)], [torch.ones(3, 4)], [fed.grad_fn]))
    assert one.weight.grad is None and two.weight.grad is not None
