"""Policies act in the order of one list, and are completed or undone in its reverse."""

import pytest
import torch

from stagewise.engine.gradients.policy import ParameterPolicy, Policies, Settlement
from stagewise.engine.stage.batchnorm import BatchNorms
from stagewise.engine.transport.connect import in_one_process


class Noted(ParameterPolicy):
    """Says what is asked of it."""

    def __init__(self, name: str, said: list[str], fails: bool = False) -> None:
        self.name, self.said, self.fails = name, said, fails

    def before_step(self, step: Settlement) -> None:
        self.said.append(f"{self.name} begins")
        if self.fails:
            raise ValueError("no")

    def settle(self, step: Settlement) -> None:
        self.said.append(f"{self.name} settles")

    def undo(self, step: Settlement, error: BaseException) -> None:
        self.said.append(f"{self.name} undoes {error}")


def a_step() -> Settlement:
    ranks = in_one_process([torch.device("cpu")]).ranks
    return Settlement(ranks=ranks, program=(), batchnorms=BatchNorms(()))


def test_the_last_settles_first() -> None:
    said, step = list[str](), a_step()
    policies = Policies([Noted("a", said), Noted("b", said)])
    with policies.around(step):
        policies.settle(step)
    assert said == ["a begins", "b begins", "b settles", "a settles"]


def test_what_has_begun_is_undone_last_first() -> None:
    said = list[str]()
    three = [Noted("a", said), Noted("b", said, fails=True), Noted("c", said)]
    with pytest.raises(ValueError), Policies(three).around(a_step()):
        pass
    assert said == ["a begins", "b begins", "b undoes no", "a undoes no"]
