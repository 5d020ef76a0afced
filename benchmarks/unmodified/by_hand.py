"""Models as their users write them, with what torch offers besides layers in a row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES = 16, 5


class Block(nn.Module):
    """A residual layer."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x + self.linear(self.norm(x)).tanh()


class Graph(nn.Module):
    """Convolution over edges, with all graphs' nodes in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """`nodes` (graphs, nodes, width), `edges` (graphs, edges, 2)."""
        graphs, count, width = nodes.shape
        offset = torch.arange(graphs, device=nodes.device).mul(count)[:, None]
        source, target = ((edges[..., i] + offset).flatten() for i in (0, 1))
        x = nodes.reshape(graphs * count, width)
        for layer in self.layers:
            x = x + torch.zeros_like(x).index_add(0, target, layer(x)[source]).tanh()
        return self.head(x.view(graphs, count, width).mean(1))


class Attending(nn.Module):
    """Attention over edges: softmax by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """As Graph."""
        source, target = (edges[..., i : i + 1].expand(-1, -1, WIDTH) for i in (0, 1))
        x = nodes
        for key in self.keys:
            h = key(x)
            weight = (h.gather(1, source) * h.gather(1, target)).sum(-1, keepdim=True).exp()
            total = torch.zeros_like(h[..., :1]).scatter_add(1, target[..., :1], weight) + 1e-6
            share = weight / total.gather(1, target[..., :1])
            x = x + torch.zeros_like(h).scatter_add(1, target, share * h.gather(1, source))
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(kind(WIDTH, WIDTH, batch_first=True) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens."""
        y = self.embed(x)
        for layer in self.layers:
            y = layer(y)[0]
        return self.head(y[:, -1])


class Cells(nn.Module):
    """A recurrent cell stepped by a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(50, WIDTH), nn.GRUCell(WIDTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens."""
        state = self.embed(x[:, 0]) * 0
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.head(self.blocks(state))


class Packed(nn.Module):
    """Sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.rnn = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Of tokens, and how many there are."""
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.blocks(self.rnn(packed)[1][0][-1]))


class Force(nn.Module):
    """An energy's gradient by the inputs is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.energy = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Of positions."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = x
            for block in self.blocks:
                y = block(y)
            energy = self.energy(y).sum()
            (found,) = torch.autograd.grad(energy, x, create_graph=True)
        return found[:, :CLASSES]


class Layers(nn.Module):
    """Blocks, changed by `change` as users do."""

    def __init__(self, change: Callable[[nn.Module], object], how: str = "plain") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.how = how
        for block in self.blocks:
            change(block.linear)

    def forward(self, x: Tensor) -> Tensor:
        """Of features."""
        for block in self.blocks:
            if self.how == "plain":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x)


class Mixture(nn.Module):
    """Experts chosen by masks, in plain Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of features."""
        x = self.first(x)
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            at = torch.where(chosen == number)[0]
            y = y.index_add(0, at, expert(x[at]) * weight[at][:, None])
        return self.head(y)


class Reversal(torch.autograd.Function):
    """The identity, whose gradient changes its sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Of x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Of the gradient."""
        return -gradient


class Adversarial(nn.Module):
    """Two heads, one of them behind a gradient's reversal."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.domain = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of features."""
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x) + self.domain(Reversal.apply(x))
        return found


class Transforming(nn.Module):
    """torch's own Transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.core = nn.Transformer(WIDTH, 2, 2, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens."""
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(self.head.weight)
        y = self.embed(x)
        return self.head(self.core(y, y, tgt_mask=causal).mean(1))


class Spectral(nn.Module):
    """Layers in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH // 2 + 1) for _ in range(3))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of features."""
        for weight, block in zip(self.weights, self.blocks, strict=True):
            x = block(torch.fft.irfft(torch.fft.rfft(x) * weight, n=WIDTH))
        return self.head(x)


class Mapped(nn.Module):
    """A function of one sample, mapped over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Of features."""
        for block in self.blocks:
            x = torch.vmap(lambda row, block=block: block.linear(row).tanh() + row)(x)
        return self.head(x)


class Symmetric(nn.Module):
    """A parametrization: the weight and its transpose."""

    def forward(self, weight: Tensor) -> Tensor:
        """Of a square matrix."""
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Down(nn.Module):
    """Two convolutions."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Of an image."""
        return self.second(self.first(x).relu()).relu()


class UNet(nn.Module):
    """A U-Net as its users write it: no container, skips as local variables."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = Down(3, width), Down(width, 2 * width)
        self.middle = Down(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = Down(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = Down(2 * width, width)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Of an image."""
        pool = nn.functional.max_pool2d
        one = self.down1(x)
        two = self.down2(pool(one, 2))
        below = self.middle(pool(two, 2))
        two = self.join2(torch.cat([two, self.up2(below)], 1))
        one = self.join1(torch.cat([one, self.up1(two)], 1))
        return {"out": self.head(one)}
