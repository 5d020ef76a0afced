"""A layer of experts, of which each position uses a few: Switch-style, or the best k.

Sources: Switch Transformer (Fedus et al., arXiv:2101.03961) and GShard (Lepikhin et al.,
arXiv:2006.16668). A router gives every position odds for each expert. The position goes through
the `top_k` best; an expert takes at most its capacity of a microbatch's positions, first choices
first, then in order, and those beyond pass by with zeros. A balance loss, small where experts get
equal shares, is added by `stagewise.add_loss`. Over an axis of a mesh (`split_experts`) every rank
holds some experts: positions travel there and back by all-to-all. All is counted per microbatch and
rank, so the layer computes what it does on one rank, microbatch by microbatch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional

from stagewise.batch.layouts import is_fake
from stagewise.errors import ModelError
from stagewise.model.added_losses import add_loss
from stagewise.parallel.exchange import Axis

_OF_EXPERTS = ("up", "up_bias", "down", "down_bias")


class Experts(nn.Module):
    """Feed-forward experts of [..., width], in place of one feed-forward network.

    Args:
        width, hidden: of every expert's two layers.
        num_experts: of which each position uses `top_k`: with 1 its output is scaled by the odds
            (Switch), with more by the odds among those chosen (which add up to 1).
        capacity_factor: an expert takes at most `capacity_factor * positions * top_k / num_experts`
            positions of a microbatch, rounded up; None: any number.
        balance: the factor of the balance loss, `num_experts * sum(share * mean odds)`, which is
            1 where all is equal; 0 for none.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int = 1,
        capacity_factor: float | None = None,
        balance: float = 0.01,
        activation: Callable[[Tensor], Tensor] = functional.gelu,
    ) -> None:
        super().__init__()
        if not 0 < top_k <= num_experts:
            raise ModelError(f"top_k is {top_k} of {num_experts} experts; give 1 to {num_experts}")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ModelError(f"capacity_factor is {capacity_factor}; give a positive one, or None")
        self.top_k, self.capacity_factor, self.balance = top_k, capacity_factor, balance
        self.activation = activation
        self.router = nn.Linear(width, num_experts, bias=False)
        self.up = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.down = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_bias = nn.Parameter(torch.empty(num_experts, width))
        self._axis = Axis(None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, as nn.Linear does."""
        for weight, bias in ((self.up, self.up_bias), (self.down, self.down_bias)):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def split(self, mesh: DeviceMesh) -> None:
        """Keep this rank's experts only; see `split_experts`."""
        axis = Axis(mesh)
        if len(self.up) % axis.size:
            raise ModelError(
                f"{len(self.up)} experts cannot be divided over {axis.size} ranks; give a number "
                f"of experts that is a multiple of {axis.size}"
            )
        self._axis = axis
        for name in _OF_EXPERTS:
            held = getattr(self, name)
            part = distribute_tensor(held.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(self, name, nn.Parameter(part, requires_grad=held.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        positions = x.reshape(-1, x.shape[-1])
        odds = self.router(positions).softmax(-1)
        shares, chosen = odds.topk(self.top_k, -1)  # [positions, top_k]
        if self.top_k > 1:
            shares = shares / shares.sum(-1, keepdim=True)
        if self.balance:
            add_loss(self.balance * self._imbalance(odds, chosen), "balance")
        which = chosen.T.flatten()  # first choices first
        order = which.argsort(stable=True)
        if is_fake(order):  # an estimate: experts get equal shares
            order = order[: len(order) // odds.shape[-1] * odds.shape[-1]]
            rows = order % len(positions)
            computed = self._in_equal_shares(positions[rows])
        else:
            counts = _uses(which, odds.shape[-1])
            order, counts = self._within_capacity(order, counts, len(positions))
            rows = order % len(positions)
            computed = self._exchanged(positions[rows], counts)
        scaled = computed * shares.T.flatten()[order, None]
        return torch.zeros_like(positions).index_add(0, rows, scaled).view_as(x)

    def _in_equal_shares(self, rows: Tensor) -> Tensor:
        """Do what `_exchanged` does with rows of which every expert gets as many."""
        axis, num_here = self._axis, len(self.up) // self._axis.size
        if axis.size == 1:
            return self._computed(rows, [len(rows) // num_here] * num_here)
        each = [len(rows) // axis.size] * axis.size
        here = axis.swap(rows, each, each)
        return axis.swap(self._computed(here, [len(rows) // num_here] * num_here), each, each)

    def _imbalance(self, odds: Tensor, chosen: Tensor) -> Tensor:
        used = _uses(chosen.flatten(), odds.shape[-1]).to(odds.dtype)
        return odds.shape[-1] * (used / chosen.numel() * odds.mean(0)).sum()

    def _within_capacity(
        self, order: Tensor, counts: Tensor, num_positions: int
    ) -> tuple[Tensor, Tensor]:
        """Drop what is beyond an expert's capacity of what is sorted by expert."""
        if self.capacity_factor is None:
            return order, counts
        equal = num_positions * self.top_k / len(counts)
        most = math.ceil(self.capacity_factor * equal)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = torch.arange(len(order), device=order.device) - starts
        return order[place < most], counts.clamp_max(most)

    def _exchanged(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Send rows, sorted by expert, to the ranks of their experts; return what these compute."""
        axis = self._axis
        if axis.size == 1:
            return self._computed(rows, counts.tolist())
        sent = counts.view(axis.size, -1)
        taken = axis.swap_equal(sent)  # [from rank, own expert]
        sends, takes = sent.sum(1).tolist(), taken.sum(1).tolist()
        here = axis.swap(rows, sends, takes)  # sorted by rank, then by expert
        expert = torch.arange(taken.shape[1], device=rows.device).repeat(axis.size)
        by_expert = expert.repeat_interleave(taken.flatten()).argsort(stable=True)
        computed = self._computed(here[by_expert], taken.sum(0).tolist())
        return axis.swap(computed[by_expert.argsort()], takes, sends)

    def _computed(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Run the experts that are here, each on so many rows in turn."""
        held = [getattr(self, name) for name in _OF_EXPERTS]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in held]
        experts = zip(
            *(weights.unbind() for weights in local), rows.split_with_sizes(counts), strict=True
        )
        return torch.cat(
            [
                torch.addmm(down_bias, self.activation(torch.addmm(up_bias, part, up)), down)
                for up, up_bias, down, down_bias, part in experts
            ]
        )


def _uses(chosen: Tensor, number: int) -> Tensor:
    """Return how often each of so many experts was chosen; also of tensors without values."""
    return chosen.new_zeros(number).index_add(0, chosen, torch.ones_like(chosen))


def split_experts(stage: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the experts of every `Experts` of a stage over an axis of a mesh, as in `mesh["ep"]`.

    Call it in a Pipeline's `parallelize`, and name the axis in its `data_axes`: every rank gives
    its own part of the batch, of equally many microbatches.
    """
    for module in stage.modules():
        if isinstance(module, Experts):
            module.split(mesh)
