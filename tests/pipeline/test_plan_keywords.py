"""`plan(model, **batch)` and `step(**batch)`, and a model that computes its own loss."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import BatchError


class Output(dict):
    """As transformers' are: a dict that knows attributes."""

    loss = property(lambda self: self["loss"])


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh() * attention_mask
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Case(NamedTuple):
    model: Classifier
    batch: dict[str, Tensor]


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (12,))
    mask = torch.randint(0, 2, (12, 8)).double()
    batch = {"input_ids": torch.randn(12, 6).double(), "attention_mask": mask, "labels": labels}
    return Case(Classifier().double(), batch)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_models_own_loss_trains_as_the_plain_model(case: Case, num_stages: int) -> None:
    plain = copy.deepcopy(case.model)
    plain(**case.batch)["loss"].backward()
    plan = stagewise.plan(
        case.model, **case.batch, num_stages=num_stages, num_microbatches=4, seconds=0.01
    )
    pipe = stagewise.Pipeline(case.model, plan)
    loss = pipe.step(**case.batch)
    assert torch.allclose(loss, plain(**case.batch)["loss"], rtol=1e-12)
    for name, parameter in pipe.named_parameters():
        expected = plain.get_parameter(name).grad
        assert torch.allclose(parameter.grad, expected, rtol=1e-11, atol=1e-14), name


def test_the_same_from_kwargs_and_by_name(case: Case) -> None:
    asked = {"num_stages": 2, "num_microbatches": 4, "balance": None, "seconds": 0.01}
    by_name = stagewise.plan(copy.deepcopy(case.model), **case.batch, **asked)
    from_kwargs = stagewise.plan(copy.deepcopy(case.model), kwargs=case.batch, **asked)
    assert len(by_name.cells) == len(from_kwargs.cells)


def test_a_dict_of_arguments_is_to_be_unpacked(case: Case) -> None:
    with pytest.raises(BatchError, match=r"plan\(model, \*\*batch, \.\.\.\), pipe\.step\(\*\*b"):
        stagewise.plan(case.model, case.batch, num_stages=2, num_microbatches=4)
    plan = stagewise.plan(case.model, **case.batch, num_stages=2, num_microbatches=4, seconds=0.01)
    pipe = stagewise.Pipeline(case.model, plan)
    with pytest.raises(BatchError, match=r"pipe\.step\(\*\*batch\)"):
        pipe.step(case.batch)


def test_a_wrapper_that_takes_any_keyword_passes_on_what_the_model_takes() -> None:
    class Wrapper(nn.Module):  # as PEFT's
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
            return self.model(*args, **kwargs)

    model = Wrapper(Classifier())
    batch = {"input_ids": torch.randn(4, 6), "attention_mask": torch.ones(4, 1)}
    labels = torch.zeros(4, dtype=torch.long)
    plan = stagewise.plan(
        model, **batch, labels=labels, num_stages=2, num_microbatches=2, seconds=0
    )
    assert plan.num_stages == 2
    with pytest.raises(TypeError, match="write inputs="):
        stagewise.plan(model, **batch, input=batch["input_ids"], num_microbatches=2)
