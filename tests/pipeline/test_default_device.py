"""A default device that scripts set, as for GPUs, is not where ranks tell each other something."""

import torch
from torch import Tensor, nn

import stagewise
from tests.harness import Pools


def results(default: str | None, schedule: str, transport: str) -> list[Tensor]:
    torch.manual_seed(0)
    cells = [nn.Linear(4, 4, device="cpu"), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)]
    model, x = nn.Sequential(*cells), torch.randn(8, 4)
    plan = stagewise.Plan(balance=(2, 2), schedule=schedule, num_microbatches=4)
    torch.set_default_device(default)
    try:
        pipe = stagewise.Pipeline(
            model, plan, loss=nn.functional.mse_loss, transport=transport, seed=1
        )
        found = [pipe.step(x, target=x) for _ in range(2)]
        found += [pipe.clip_grad_norm_(0.1), pipe.evaluate(x, target=x)]
        return [*found, *(p.grad for p in pipe.parameters()), pipe.predict(x)]  # type: ignore
    finally:
        torch.set_default_device(None)


def same(schedule: str, transport: str) -> bool:
    ours, plain = (results(default, schedule, transport) for default in ("meta", None))
    return len(ours) == len(plain) and all(map(torch.equal, ours, plain))


def test_ranks_compute_and_agree_where_their_stages_are(pools: Pools) -> None:
    assert same("zb_h1", "local")
    assert pools[2].run(same, "zb_h1", "auto") == [True, True]
