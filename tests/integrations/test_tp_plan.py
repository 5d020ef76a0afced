"""transformers' own tensor-parallel plans in a pipeline, against the plain model, in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import ModelError, PlanError
from stagewise.parallel import shard_cells, tp_plan
from tests.harness import Pools

transformers = pytest.importorskip("transformers")

NAMES = ("LlamaForCausalLM", "Qwen3ForCausalLM")


def tiny(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(
        **{
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "max_position_embeddings": 16,
            "use_cache": False,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        }
        | more
    )
    model: nn.Module = kind(config).double().train()
    return model


class Embed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.words = model.model.embed_tokens

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens)


class Block(nn.Module):
    def __init__(self, model: Any, index: int) -> None:
        super().__init__()
        self.layer, self.rotary = model.model.layers[index], copy.deepcopy(model.model.rotary_emb)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = self.rotary(x, torch.arange(x.shape[1])[None])
        return self.layer(x, position_embeddings=angles)


class Head(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.words = model.model.norm, model.lm_head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words(self.norm(x))


def in_cells(model: Any) -> nn.Sequential:
    blocks = [Block(model, index) for index in range(len(model.model.layers))]
    return nn.Sequential(Embed(model), *blocks, Head(model))


def loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else output.logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def difference(name: str, axes: dict[str, int], tied: bool) -> float:
    """The largest difference of loss and gradients of one step; of a second, of the loss."""
    from torch.distributed.device_mesh import init_device_mesh

    model = tiny(name, tie_word_embeddings=tied)
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    split = tp_plan(model)

    def parallelize(stage: nn.Module, mesh: Any, index: int) -> None:
        split(stage, mesh, index)
        if "dp_shard" in axes:
            shard_cells(stage, mesh, index)

    tokens = torch.randint(0, 32, (4, 8))
    chain = in_cells(model)
    balance = (3, 3) if axes["pp"] == 2 else (6,)
    plan = stagewise.Plan(balance=balance, schedule="zb_h1", num_microbatches=2)
    names = {p: key for key, p in model.named_parameters()}
    called = {key: names[p] for key, p in chain.named_parameters()}
    pipe = stagewise.Pipeline(chain, plan, loss=loss, mesh=mesh, parallelize=parallelize)
    part = mesh.get_local_rank("dp_shard") if "dp_shard" in axes else 0
    own = tokens.chunk(axes.get("dp_shard", 1))[part]
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01, foreach=False)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.01, foreach=False)
    worst = 0.0
    for _ in range(2):
        optimizer.zero_grad()
        theirs.zero_grad()
        expected = loss(plain(input_ids=tokens), tokens)
        expected.backward()
        given = float(pipe.step(own, target=own))
        worst = max(worst, abs(given - float(expected)))
        gradients = {name: p.grad for name, p in plain.named_parameters()}
        sharded = 0
        for key, parameter in pipe.named_parameters():
            found = parameter.grad
            sharded += hasattr(parameter, "full_tensor")
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            worst = max(worst, float((found - gradients[called[key]]).abs().max()))
        assert sharded > 0
        optimizer.step()
        theirs.step()
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_a_models_own_plan_splits_its_stages(name: str, own_pools: Pools) -> None:
    assert max(own_pools[4].run(difference, name, {"pp": 2, "tp": 2}, False, seconds=120)) < 1e-12
    both = {"pp": 1, "dp_shard": 2, "tp": 2}
    assert max(own_pools[4].run(difference, name, both, False, seconds=120)) < 1e-12
    assert max(own_pools[4].run(difference, name, {"pp": 2, "tp": 2}, True, seconds=120)) < 1e-12


def test_what_has_no_plan_or_another_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear has no tp_plan"):
        tp_plan(nn.Linear(2, 2))
    model = nn.Linear(2, 2)
    model.tp_plan = {"0": "moe_tp_experts"}  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"has the styles \['moe_tp_experts'\], but only"):
        tp_plan(model)


def captured(cells: list[str] | None) -> str:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    model, tokens = tiny(NAMES[0]), torch.zeros(4, 8, dtype=torch.long)
    wishes: dict[str, Any] = {"num_devices": 2, "num_microbatches": 2, "cells": cells}
    plan = stagewise.plan(model, input_ids=tokens, target=tokens, loss=loss, **wishes)
    try:
        stagewise.Pipeline(model, plan, loss=loss, mesh=mesh, parallelize=tp_plan(model))
    except ModelError as error:
        return str(error)
    return ""


def test_captured_stages_are_refused(own_pools: Pools) -> None:
    for cells in (None, ["model.layers.*"]):
        for said in own_pools[4].run(captured, cells, seconds=120):
            assert "does not run the model's own layers: it was captured" in said


def heads_refused() -> str:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    model = tiny(NAMES[0])
    try:
        tp_plan(model)(model, mesh, 0)
    except PlanError as error:
        return str(error)
    return ""


def test_heads_that_cannot_be_shared_are_refused(own_pools: Pools) -> None:
    for said in own_pools[4].run(heads_refused):
        assert "2 num_key_value_heads, which 4 ranks along 'tp' cannot share" in said
