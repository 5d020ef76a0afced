"""Models on the meta device: each rank makes its own stages, with the same values at any cut."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stagewise
from stagewise.errors import ModelError, PlanError
from tests.harness import Pools, Raised
from tests.models import token_loss
from tests.pipeline.runs import even
from tests.zoo.cases import CASES


def on_meta(name: str) -> nn.Sequential:
    with torch.device("meta"):
        return CASES[name].model()


def pipeline(name: str, num_stages: int, model: nn.Module | None = None) -> stagewise.Pipeline:
    from stagewise.model.chain import chain_of

    model = on_meta(name) if model is None else model
    plan = stagewise.Plan(
        balance=even(len(chain_of(model)), num_stages), schedule="1f1b", num_microbatches=2
    )
    return stagewise.Pipeline(model, plan, loss=CASES[name].loss, seed=5)


@dataclass
class Result:
    state: dict[str, Tensor]
    losses: list[Tensor]
    real_bytes: int  # of the whole model's tensors
    own_bytes: int


def train(name: str, num_stages: int) -> Result:
    """The first state, and the losses of three steps."""
    model = on_meta(name)
    before = torch.get_rng_state()
    pipe = pipeline(name, num_stages, model)
    assert torch.equal(torch.get_rng_state(), before)
    state = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    real = {t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    own = {*pipe.parameters(), *pipe.module.buffers()}
    torch.manual_seed(1)
    inputs, target = CASES[name].batch()
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(pipe.step(inputs, target=target))
        optimizer.step()
    return Result(state, losses, sum(t.nbytes for t in real), sum(t.nbytes for t in own))


@pytest.mark.parametrize("name", ["decoder_lm", "transformer", "resnet18", "unet"])
def test_the_same_weights_and_training_at_any_number_of_stages(pools: Pools, name: str) -> None:
    """One thread, since other numbers of threads sum in another order."""
    whole = train(name, 1)
    assert all(bool(t.isfinite().all()) for t in whole.state.values())
    parts = pools[3].run(train, name, 3)
    for part in (train(name, 2), *parts):
        for key, tensor in part.state.items():
            assert torch.equal(tensor, whole.state[key]), key
        for ours, theirs in zip(part.losses, whole.losses, strict=True):
            assert torch.equal(ours, theirs)
        assert part.real_bytes == part.own_bytes, "nothing else has memory"
    assert {key for part in parts for key in part.state} == set(whole.state)
    assert all(part.own_bytes < whole.own_bytes for part in parts)


def replicated(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The state and two losses of a stage on ranks 0 and 1, and one on rank 2."""
    plan = stagewise.Plan(balance=(2, 3), schedule="1f1b", num_microbatches=2, replicas=(2, 1))
    pipe = stagewise.Pipeline(on_meta("decoder_lm"), plan, loss=token_loss, seed=5)
    state = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    pipe.save_checkpoint(path)
    torch.manual_seed(1)
    inputs, target = CASES["decoder_lm"].batch()
    losses = [pipe.step(inputs, target=target)]
    again = stagewise.Pipeline(on_meta("decoder_lm"), plan, loss=token_loss, state=path)
    return state, [*losses, again.step(inputs, target=target)]


def test_replicas_have_the_same_weights_and_write_them_once(pools: Pools, tmp_path: Path) -> None:
    whole = train("decoder_lm", 1)
    parts = pools[3].run(replicated, tmp_path)
    for state, losses in parts:
        assert all(torch.equal(tensor, whole.state[n]) for n, tensor in state.items())
        assert torch.equal(losses[0], whole.losses[0]) and torch.equal(losses[1], losses[0])
    assert parts[0][0].keys() == parts[1][0].keys()
    assert {name for state, _ in parts for name in state} == set(whole.state)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_stage_alone_has_the_whole_models_weights() -> None:
    whole = pipeline("decoder_lm", 1).state_dict()
    part = on_meta("decoder_lm")[2:4]
    plan = stagewise.Plan(balance=(2,), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline(part, plan, loss=nn.functional.mse_loss, seed=5)
    assert pipe.state_dict().keys() <= whole.keys()
    assert all(torch.equal(t, whole[n]) for n, t in pipe.state_dict().items())
    assert float(pipe.step(torch.randn(2, 5, 8), target=torch.zeros(2, 5, 8))) > 0


def test_the_seed_decides() -> None:
    states = []
    for seed in (0, 0, 1):
        plan = stagewise.Plan(balance=(5,), schedule="1f1b", num_microbatches=1)
        pipe = stagewise.Pipeline(on_meta("decoder_lm"), plan, loss=token_loss, seed=seed)
        states.append(pipe.state_dict()["0.token.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def scaled(filled: bool) -> float:
    def init(module: nn.Module) -> None:
        if isinstance(module, Scale) and filled:
            nn.init.constant_(module.scale, 2.0)

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Scale())
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss, init=init)
    return float(pipe.step(torch.ones(1, 3), target=torch.zeros(1, 3)))


def test_a_cell_that_one_rank_cannot_initialise_stops_all(pools: Pools) -> None:
    assert pools[2].run(scaled, True) == [scaled(True)] * 2
    outcomes = pools[2].outcomes(scaled, False)
    assert all(isinstance(outcome, Raised) for outcome in outcomes)
    assert outcomes[0].error.startswith("ModelError: rank 1: 1.scale (Scale) of a model on the")
    assert outcomes[1].error.startswith("ModelError: 1.scale (Scale) of a model on the meta device")


def test_what_is_on_the_meta_device_cannot_be_measured() -> None:
    with pytest.raises(PlanError, match="on the meta device, where nothing can be measured"):
        stagewise.plan(on_meta("unet"), torch.ones(2, 3, 8, 8), num_stages=2, num_microbatches=2)


def test_half_a_model_is_refused() -> None:
    model = on_meta("decoder_lm")
    model[2] = CASES["decoder_lm"].model()[2]
    with pytest.raises(ModelError, match=r"partly on the meta device: 0\.token\.weight is, 2\."):
        pipeline("decoder_lm", 1, model)
