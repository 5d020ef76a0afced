"""A model's modules live on without its values, and take those of a rank for a while."""

import gc
import weakref
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import ModelError, UsageError
from stagewise.pipeline.generation.bare_model import filled, skeleton_of


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.ones(2))
        self.again = MethodType(Writes.forward, self)  # as PEFT keeps a method of its base
        self.inner: Any = {"first": self.first}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.table

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(x)


def test_a_skeleton_keeps_no_values_and_computes_with_those_it_is_lent() -> None:
    model = Writes()
    values = {**dict(model.named_parameters(remove_duplicate=False)), "table": torch.zeros(2)}
    expected = model.second(model.first(torch.ones(1, 2)))
    bare = skeleton_of(model)
    assert bare is not None and not bare.training and model.training
    assert all(p.is_meta for p in bare.parameters()) and bare.second.weight is bare.first.weight
    model.inner = None
    there = weakref.ref(model)
    with filled(bare, values):
        assert torch.equal(bare.generate(torch.ones(1, 2)), expected)
    assert all(p.is_meta for p in bare.parameters()) and bare.table.sum() == 2
    del model
    gc.collect()
    assert there() is None
    assert skeleton_of(nn.Linear(1, 1)) is None


def test_what_cannot_generate_says_why() -> None:
    plan = stagewise.Plan(balance=(1, 1), num_microbatches=1)
    pipe = stagewise.Pipeline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), plan)
    with pytest.raises(ModelError, match="has no generate; build the Pipeline from"):
        pipe.generate(torch.ones(1, 2))
    pipe._skeleton = nn.Identity()
    with pytest.raises(UsageError, match="lanes=0"):
        pipe.generate(torch.ones(1, 2), lanes=0)
