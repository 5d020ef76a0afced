"""Microbatches of equal cost: near the best of all packings, and exact in any order."""

import random
from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.batch.packing import CostOf, pack_samples
from stagewise.costs import CellCost
from stagewise.errors import BatchError
from stagewise.planning import order_microbatches

PADDING = 0


def padded(lengths: Sequence[float]) -> float:
    return len(lengths) * max(lengths)


def dearest(groups: Sequence[Sequence[int]], lengths: Sequence[float], cost: CostOf) -> float:
    return max(cost([lengths[sample] for sample in group]) for group in groups)


def packings(count: int, number: int) -> Iterator[list[list[int]]]:
    for owners in product(range(number), repeat=count):
        if len(set(owners)) == number:
            yield [[s for s in range(count) if owners[s] == group] for group in range(number)]


@pytest.mark.parametrize("cost", [sum, padded])
def test_close_to_the_best_of_all_packings(cost: CostOf) -> None:
    rng = random.Random(0)
    ratios = []
    for _ in range(40):
        count, number = rng.randint(3, 7), rng.randint(1, 3)
        lengths = [rng.randint(1, 20) for _ in range(count)]
        found = pack_samples(lengths, number, None if cost is sum else cost)
        assert sorted(sample for group in found for sample in group) == [*range(count)]
        assert len(found) == number and all(found)
        best = min(dearest(each, lengths, cost) for each in packings(count, number))
        ratios.append(dearest(found, lengths, cost) / best)
    assert max(ratios) <= 1.25 and sum(ratios) / len(ratios) < 1.02


def test_unequal_texts_cost_the_same() -> None:
    rng = random.Random(1)
    lengths = [int(rng.lognormvariate(3.5, 0.6)) + 1 for _ in range(64)]
    found = pack_samples(lengths, 8)
    costs = [sum(lengths[sample] for sample in group) for group in found]
    assert max(costs) - min(costs) <= 1
    in_turn = [range(at, at + 8) for at in range(0, 64, 8)]
    most = dearest(pack_samples(lengths, 8, padded), lengths, padded)
    assert most < 0.6 * dearest(in_turn, lengths, padded)  # of padded tokens


def test_the_cheapest_run_first_and_last() -> None:
    assert pack_samples([5, 9, 1, 7], 4) == [[2], [3], [1], [0]]


def test_fewer_samples_than_microbatches() -> None:
    with pytest.raises(BatchError, match="2 samples cannot form 3 microbatches"):
        pack_samples([1, 2], 3)


class Words(nn.Module):
    """Each text's mean over words that are not padding, of any number of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.words(tokens).tanh())  # type: ignore[no-any-return]


def loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PADDING)


def num_words(target: Tensor) -> Tensor:
    return (target != PADDING).sum()


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_gradients_are_those_of_the_whole_batch(num_stages: int) -> None:
    rng = random.Random(num_stages)
    lengths = [rng.randint(1, 12) for _ in range(11)]
    torch.manual_seed(0)
    texts = [torch.randint(1, 9, (length,)) for length in lengths]

    def together(samples: Sequence[int]) -> Tensor:
        own = [texts[sample] for sample in samples]
        return nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=PADDING)

    plain = nn.Sequential(Words(), nn.Tanh(), nn.Linear(9, 9)).double()
    piped = nn.Sequential(Words(), nn.Tanh(), nn.Linear(9, 9)).double()
    piped.load_state_dict(plain.state_dict())
    everything = together(range(11))
    loss(plain(everything), everything).backward()
    cells = (CellCost(name="cell", forward_seconds=1, backward_seconds=2),) * 3
    balance = [[3], [1, 2], [1, 1, 1]][num_stages - 1]
    plan = stagewise.Plan(balance=balance, num_microbatches=4, cells=cells)
    pipe = stagewise.Pipeline(piped, plan, loss=loss, weight=num_words)
    for cost in (None, padded):
        pipe.zero_grad()
        parts = [*map(together, pack_samples(lengths, 4, cost))]
        order = order_microbatches(plan, [part.numel() for part in parts])
        parts = [parts[number] for number in order]
        batch = stagewise.Microbatches(parts)
        pipe.step(batch, target=batch)
        for wanted, got in zip(plain.parameters(), piped.parameters(), strict=True):
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-12, atol=1e-14)
