"""Operations that are given a number made of a size, captured, then run at other sizes.

Each gives what the plain model gives, or is refused in words; those that torch traces with a
symbol for the number must not be refused.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError, ModelError

F = nn.functional
EXAMPLE = 8, 19  # samples, length
OTHERS = (1, 19), (2, 19), (3, 12), (5, 32), (8, 5)
Operation = Callable[[Tensor], Any]  # of (samples, length, 4)


def half(h: Tensor) -> int:
    return h.shape[1] // 2


def blocks(h: Tensor) -> int:
    return h.shape[0] * h.shape[1] // 8


def weighed(parts: Any) -> Any:
    return sum(part.sum() * (index + 1) for index, part in enumerate(parts))


FREE: dict[str, Operation] = {
    "narrow": lambda h: h.narrow(1, 0, half(h)),
    "select": lambda h: h.select(1, half(h)),
    "roll": lambda h: h.roll((half(h), 1), (1, 2)),
    "split in two": lambda h: weighed(h.split([half(h), h.shape[1] - half(h)], 1)),
    "unfold": lambda h: h.unfold(1, 3, 2),
    "view": lambda h: (
        h.transpose(0, 1).reshape(h.shape[1], -1).view(-1, 4).mean(0)
        + (h @ h.transpose(1, 2)).view(h.shape[0] * h.shape[1], h.shape[1]).mean()
    ),
    "unflatten": lambda h: h.flatten(0, 1).unflatten(0, (h.shape[0], h.shape[1])),
    "repeat": lambda h: h.mean(1, keepdim=True).repeat(1, half(h), 1),
    "repeat_interleave": lambda h: h.repeat_interleave(half(h), 2),
    "pad to a block": lambda h: F.pad(h, (0, 0, 0, -h.shape[1] % 8)),
    "pad in a circle": lambda h: F.pad(h.transpose(1, 2), (half(h), 0), mode="circular"),
    "arange": lambda h: h.mean() * torch.arange(0, h.shape[1], 3),
    "full": lambda h: h + torch.full((h.shape[1], 1), h.shape[1] / 3),
    "eye": lambda h: torch.eye(h.shape[1], half(h)).to(h).T @ h,
    "tril": lambda h: (h @ h.transpose(1, 2)).tril(half(h)),
    "index_add": lambda h: h.new_zeros(half(h) + 1, 4).index_add(
        0, torch.arange(h.shape[1]) // 2, h.mean(0)
    ),
    "adaptive_avg_pool2d": lambda h: F.adaptive_avg_pool2d(h, (half(h), 2)),
    "interpolate": lambda h: F.interpolate(h.transpose(1, 2), size=half(h), mode="linear"),
    "topk": lambda h: h.topk(h.shape[1] // 3, 1)[0],
    "kthvalue": lambda h: h.kthvalue(half(h), 1)[0],
    "rfft": lambda h: torch.fft.rfft(h, n=half(h), dim=1).abs(),
    "layer_norm": lambda h: F.layer_norm(h, (h.shape[1], 4)),
    "leaky_relu": lambda h: F.leaky_relu(h, 1 / h.shape[1]),
    "clamp": lambda h: h.clamp(max=1 / h.shape[1]),
    "root": lambda h: h / h.shape[1] ** 0.5,
    "ceil": lambda h: h * math.ceil(h.shape[1] / 7),
    "shift": lambda h: h * (h.shape[1] >> 2),
    "sum of sizes": lambda h: h / sum(h.shape),
    "tensor of sizes": lambda h: h.mean() * torch.tensor([h.shape[0], h.shape[1]]),
    "a message": lambda h: (torch._assert(h.dim() == 3, f"got {h.shape}, {h.shape[1]}"), h * 2)[1],
    "causal attention": lambda h: F.scaled_dot_product_attention(h, h, h, is_causal=True),
}
HELD: dict[str, Operation] = {
    "chunk by length": lambda h: weighed(h.chunk(h.shape[1] // 3, 1)),
    "chunk of samples": lambda h: weighed(h.flatten(0, 1).chunk(blocks(h))),
    "chunk": lambda h: weighed(h.chunk(4, 1)),
    "tensor_split": lambda h: weighed(h.tensor_split(h.shape[1] // 3, 1)),
    "split by length": lambda h: weighed(h.split(half(h), 1)),
    "split": lambda h: weighed(h.split(3, 1)),
    "split of samples": lambda h: weighed(
        h.flatten(0, 1).split([8] * blocks(h) + [h.shape[0] * h.shape[1] - 8 * blocks(h)])
    ),
    "unbind": lambda h: weighed(h.unbind(1)),
    "iterate over samples": weighed,
    "range": lambda h: sum(h[:, i].mean() * i for i in range(h.shape[1])),
    "copies": lambda h: torch.cat([h] * (h.shape[1] // 4), 1),
    "unfold by length": lambda h: h.unfold(1, half(h), 2),
    "slice": lambda h: h[:, :6].sum(1) / h[:, :6].shape[1],
    "slice from the end": lambda h: h[:, -6:].sum(1) / h[:, -6:].shape[1],
    "slice of samples": lambda h: h[:4].sum(0) / h[:4].shape[0],
    "index by a list": lambda h: h[:, [0, half(h)]],
    "one_hot": lambda h: h.mean(2) @ F.one_hot(torch.arange(h.shape[1]) // 2, half(h) + 1).to(h),
    "linspace": lambda h: h.mean(2) * torch.linspace(0, 1, h.shape[1]),
    "bartlett_window": lambda h: h.mean() * torch.bartlett_window(half(h)),
    "diagonal": lambda h: (h @ h.transpose(1, 2)).diagonal(half(h), 1, 2),
    "diag_embed": lambda h: torch.diag_embed(h.mean(2), half(h)),
    "vander": lambda h: h.mean() * torch.vander(torch.arange(4.0), half(h)),
    "histc": lambda h: h.mean() * torch.histc(torch.arange(9.0), bins=half(h)),
    "adaptive_avg_pool1d": lambda h: F.adaptive_avg_pool1d(h.transpose(1, 2), half(h)),
    "adaptive_max_pool1d": lambda h: F.adaptive_max_pool1d(h.transpose(1, 2), half(h)),
    "avg_pool1d": lambda h: F.avg_pool1d(h.transpose(1, 2), half(h)),
    "max_pool1d": lambda h: F.max_pool1d(h.transpose(1, 2), 3, 2, ceil_mode=True),
    "group_norm": lambda h: F.group_norm(h[:, : 2 * half(h)], half(h)),
    "quantile": lambda h: h.quantile(1 / h.shape[1], 1),
    "diff": lambda h: h.diff(n=h.shape[1] // 8, dim=1),
    "norm": lambda h: h.norm(p=h.shape[1], dim=1),
    "stft": lambda h: torch.stft(
        h.mean(2), 8, max(1, h.shape[1] // 8), return_complex=True, window=h.new_ones(8)
    ).abs(),
    "matrix_power": lambda h: torch.linalg.matrix_power(
        h.transpose(1, 2) @ h / 99, h.shape[1] // 6
    ),
    "polygamma": lambda h: torch.polygamma(h.shape[1] // 8, h.square() + 1),
    "cdist": lambda h: torch.cdist(h, h, p=h.shape[1] / 9),
    "scale of attention": lambda h: F.scaled_dot_product_attention(h, h, h, scale=1 / h.shape[1]),
    "huber": lambda h: F.huber_loss(h, torch.zeros_like(h), delta=1 / h.shape[1]),
    "isclose": lambda h: h * torch.isclose(torch.arange(4.0), torch.ones(4), 0, h.shape[1] / 10),
    "cosine_similarity": lambda h: F.cosine_similarity(h, h.roll(1, 1), 1, h.shape[1] / 10),
    "padding_idx": lambda h: (
        F.embedding(torch.arange(h.shape[1]) % 5, h.new_ones(5, 4), h.shape[1] % 4) * h
    ),
    "float": lambda h: h * float(h.shape[1] / 7),
    "int": lambda h: h * int(h.shape[1] ** 0.5),
    "log": lambda h: h * math.log(h.shape[1]),
    "gcd": lambda h: h * math.gcd(h.shape[1], 12),
    "divmod": lambda h: h * divmod(h.shape[1], 4)[1],
    "bit_length": lambda h: h * half(h).bit_length(),
    "str": lambda h: h * len(str(h.shape[1])),
    "f-string": lambda h: h * len(f"{h.shape[1] * h.shape[0]:d}"),
    "percent": lambda h: h * len("%d" % (h.shape[1] * h.shape[0])),  # noqa: UP031
    "a table by text": lambda h: h * {"19": 2, "12": 3}.get(str(h.shape[1]), 1),
    "repr": lambda h: h * len(repr(tuple(h.shape))),
    "a choice": lambda h: h * (2 if half(h) > 7 else 3),
    "a choice by the rest": lambda h: h * (2 if h.shape[0] * h.shape[1] % 8 else 3),
    "a choice by one sample": lambda h: h * (2 if h.shape[0] == 1 else 3),
    "a table": lambda h: h * {19: 2, 12: 3}.get(h.shape[1], 1),
    "min": lambda h: h * min(h.shape[1], 10, h.shape[0]),
    "sorted": lambda h: h * sorted([h.shape[1], 10])[0],
    "a question asked twice": lambda h: (h[:, : half(h)].contiguous() * 2) * (1 + (half(h) == 2)),
}
REFUSED_WHOLE = {"iterate over samples"}  # it fixes the samples


@pytest.fixture(autouse=True)
def without_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STAGEWISE_CAPTURE_CACHE", "off")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(nn.Module):
    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.scale, self.operation = nn.Parameter(torch.randn(4)), operation

    def forward(self, x: Tensor) -> Any:
        return self.operation(x * self.scale)


def test_a_number_that_torch_traces_with_a_symbol_follows_every_size() -> None:
    torch.manual_seed(0)
    model = Model(lambda h: {name: operation(h) for name, operation in FREE.items()})
    captured = stagewise.capture(model, torch.randn(*EXAMPLE, 4))
    for sizes in (EXAMPLE, *OTHERS):
        x = torch.randn(*sizes, 4)
        torch.testing.assert_close(
            captured(x), model(x), msg=lambda text, at=sizes: f"{at}: {text}"
        )


@pytest.mark.parametrize("name", HELD)
def test_a_number_made_of_a_size_is_never_an_old_one(name: str) -> None:
    torch.manual_seed(0)
    model = Model(HELD[name])
    if name in REFUSED_WHOLE:
        with pytest.raises(ModelError, match="exactly 8 samples"):
            stagewise.capture(model, torch.randn(*EXAMPLE, 4))
        return
    if name == "quantile" and torch.__version__ < (2, 12):  # which cannot trace it for any size
        with pytest.raises(ModelError, match=r"torch\.export cannot trace it"):
            stagewise.capture(model, torch.randn(*EXAMPLE, 4))
        return
    captured = stagewise.capture(model, torch.randn(*EXAMPLE, 4))
    refused = 0
    for sizes in (EXAMPLE, *OTHERS):
        x = torch.randn(*sizes, 4)
        try:
            output: Any = captured(x)
        except BatchError as error:
            assert sizes != EXAMPLE, error
            refused += 1
            continue
        torch.testing.assert_close(output, model(x), msg=lambda text, at=sizes: f"{at}: {text}")
    assert refused


def test_the_line_that_asks_is_named() -> None:
    captured = stagewise.capture(Model(HELD["one_hot"]), torch.randn(*EXAMPLE, 4))
    with pytest.raises(
        BatchError,
        match=r"x\.shape\[1\] is 12, but .* where .*x\.shape\[1\] ?// ?2.* == 10, on which "
        r".*test_asked_sizes\.py, line \d+ depends",
    ):
        captured(torch.randn(8, 12, 4))


class Two(nn.Module):
    """Its inputs go to different cells; it decides by the sizes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        sign = 1 if (x.shape[0] * x.shape[1] + y.shape[1]) % 8 == 0 else -1
        same = 3 if x.shape[0] * x.shape[1] == y.shape[0] * y.shape[1] else 2
        return sign * self.b(self.a(x).mean(1) + same * y.mean(1))


def test_what_hangs_on_several_inputs_is_held_where_they_meet() -> None:
    model = Two()
    captured = stagewise.capture(model, torch.randn(8, 3, 4), torch.randn(8, 8, 4))
    assert len(captured.chain) == 2
    x, y = torch.randn(16, 5, 4), torch.randn(16, 16, 4)
    torch.testing.assert_close(captured(x, y), model(x, y))
    with pytest.raises(BatchError, match=r"% 8.* == 0"):
        captured(x[:6], y[:6])
    with pytest.raises(BatchError, match=r"x\.shape\[1\] is 5, y\.shape\[1\] is 5, but .* !="):
        captured(x, y[:, :5])


class AtOtherSizes(nn.Module):
    """What it does there leaves no guard: a size is no int while torch.export traces."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.kind == "rank":
            return h * (2 if x.squeeze().dim() == 2 else 3)
        return h * (2 if isinstance(x.shape[1], int) else 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("type", "its cells differ from the plain model in training mode"),
        ("rank", r"for other sizes than its example's \(x of \(1, 20, 4\)\) its cells differ"),
    ],
)
def test_what_no_guard_tells_is_found_by_comparison(kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        stagewise.capture(AtOtherSizes(kind), torch.randn(*EXAMPLE, 4))
