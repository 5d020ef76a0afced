"""Ranks that do not make the same calls hear of it at once, all of them, by name."""

import io
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from multiprocessing import util
from pathlib import Path

import pytest
import torch
from torch import nn

import stagewise
from stagewise.checker.check_parity import check_parity
from stagewise.engine.transport.connect import leave
from stagewise.engine.watch.watchdog import FAILURE
from stagewise.errors import BatchError, PeerError, PlanError, StagewiseError
from tests.engine.transport.wires import fresh_connections
from tests.harness import Pools

X = torch.arange(32.0).view(8, 4) / 32
PLAN = stagewise.Plan(balance=(1, 2), schedule="1f1b", num_microbatches=2)
SOON_SECONDS = 5.0  # the process group's timeout is half an hour


def pipeline(**options: object) -> stagewise.Pipeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4))
    options = {"loss": nn.functional.mse_loss} | options
    return stagewise.Pipeline(model, PLAN, **options)  # type: ignore[arg-type]


def crossed() -> str:
    """Each rank steps another of two Pipelines; then both go on."""
    one, two = pipeline(), pipeline()
    with pytest.raises(BatchError) as caught:
        step((one, two)[one.rank])
    step(one), step(two)
    return str(caught.value)


def one_in_eval() -> str:
    """The user's own model is put in eval mode on rank 1."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4))
    pipe = stagewise.Pipeline(model, PLAN, loss=nn.functional.mse_loss)
    frozen = stagewise.Pipeline(model.eval(), PLAN, loss=nn.functional.mse_loss).train()
    model.train()
    step(frozen)
    model.train(pipe.rank == 0)
    step(frozen.train())
    with pytest.raises(BatchError) as caught:
        step(pipe)
    return str(caught.value)


def step(pipe: stagewise.Pipeline, batch: torch.Tensor = X, **options: object) -> object:
    return pipe.step(batch, target=batch, **options)  # type: ignore[call-overload]


def cast(pipe: stagewise.Pipeline, *, enabled: bool) -> object:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        return step(pipe)


def precisely(pipe: stagewise.Pipeline, precision: str) -> object:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        return step(pipe)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def planned() -> object:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return stagewise.plan(model, X, num_stages=2, num_microbatches=2)


def compared() -> object:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return check_parity(model, X, target=X, transport="distributed", schedules=["1f1b"])


Act = Callable[[stagewise.Pipeline], object]
# name -> (what rank 0 does, what rank 1 does, the words that both hear)
ACTS: dict[str, tuple[Act, Act, str]] = {
    "values": (step, lambda p: step(p, X + 1), "ranks were given different values of inputs"),
    "order": (step, lambda p: step(p, X.flip(0)), "ranks were given different values of inputs"),
    "any, step": (lambda p: p.any(False), step, "calls: rank 0: any, rank 1: step"),
    "step, any": (step, lambda p: p.any(True), "calls: rank 0: step, rank 1: any"),
    "step, timeline": (step, lambda p: p.timeline(), "rank 0: step, rank 1: timeline"),
    "any, memory": (
        lambda p: p.any(True),
        lambda p: p.measure_memory(X, target=X),
        "rank 0: any, rank 1: measure_memory",
    ),
    "step, clip": (
        step,
        lambda p: p.clip_grad_norm_(1.0),
        "rank 0: step, rank 1: clip_grad_norm_(1.0)",
    ),
    "other norms": (
        lambda p: p.clip_grad_norm_(1),
        lambda p: p.clip_grad_norm_(2.0),
        "rank 0: clip_grad_norm_(1.0), rank 1: clip_grad_norm_(2.0)",
    ),
    "use": (lambda p: p.use(PLAN), step, "rank 0: use(plan), rank 1: step"),
    "save": (step, lambda p: p.save_checkpoint("nowhere"), "rank 1: save_checkpoint"),
    "save, elsewhere": (
        lambda p: p.save_checkpoint("one"),
        lambda p: p.save_checkpoint("two" * 100),
        "/one), rank 1: save_checkpoint(...",
    ),
    "load, elsewhere": (
        lambda p: p.load_checkpoint("one"),
        lambda p: p.load_checkpoint("two"),
        "/one), rank 1: load_checkpoint(",
    ),
    "load, strictly": (
        lambda p: p.load_checkpoint("one"),
        lambda p: p.load_checkpoint("one", strict=False),
        "/one), rank 1: load_checkpoint(",
    ),
    "rehearse, longer": (
        lambda p: p.rehearse(X, target=X, num_steps=1),
        lambda p: p.rehearse(X, target=X, num_steps=2),
        "rank 0: rehearse(num_steps=1), rank 1: rehearse(num_steps=2)",
    ),
    "autocast": (
        step,
        partial(cast, enabled=True),
        "under different autocast: rank 0: none, rank 1: [('cpu', torch.bfloat16)]",
    ),
    "precision": (
        step,
        lambda p: precisely(p, "tf32"),
        "different settings of torch: rank 0: [('cudnn.conv', 'tf32'), ('cudnn.rnn', 'tf32')], "
        "rank 1: [('cuda.matmul', 'tf32'), ('cudnn.conv', 'tf32'), ('cudnn.rnn', 'tf32')]; set",
    ),
    "mode": (step, lambda p: step(p.eval()), "rank 0: train(), rank 1: eval()"),
    "outputs": (
        step,
        lambda p: step(p, return_outputs=True),
        "outputs on different ranks: rank 0: none, rank 1: [0, 1]",
    ),
    "total": (
        step,
        lambda p: step(p, total_samples=16),
        "different total_samples, total_weight or loss_scale: rank 0: (Scaling(total_samples=None",
    ),
    "shapes": (
        step,
        lambda p: step(p, X[:4]),
        "rank 0: (8, 4) torch.float32, rank 1: (4, 4) torch.float32",
    ),
    "build, step": (lambda p: pipeline(), step, "calls: rank 0: Pipeline(...), rank 1: step;"),
    "step, build": (step, lambda p: pipeline(), "calls: rank 0: step, rank 1: Pipeline(...);"),
    "plan, step": (lambda p: planned(), step, "calls: rank 0: plan, rank 1: step;"),
    "any, plan": (lambda p: p.any(True), lambda p: planned(), "rank 0: any, rank 1: plan;"),
    "plan, build": (
        lambda p: planned(),
        lambda p: pipeline(),
        "calls: rank 0: plan, rank 1: Pipeline(...);",
    ),
    "parity, step": (lambda p: compared(), step, "calls: rank 0: check_parity, rank 1: step;"),
    "refused by itself": (step, lambda p: p.predict(X, ranks=[7]), "rank 0: step, rank 1: predict"),
}


def other_calls() -> dict[str, tuple[str, float]]:
    """What each act raises here, and after how many seconds; then all steps go on."""
    pipe = pipeline()
    texts = {}
    for name, acts in ACTS.items():
        step(pipe)
        start = time.monotonic()
        try:
            acts[pipe.rank](pipe)
        except BatchError as error:
            texts[name] = str(error), time.monotonic() - start
        pipe.train()
    step(pipe)
    return texts


def test_other_calls_are_named_on_both_ranks(pools: Pools) -> None:
    for texts in pools[2].run(other_calls):
        assert set(texts) == set(ACTS)
        for name, (text, seconds) in texts.items():
            assert ACTS[name][2] in text, name
            assert seconds < SOON_SECONDS, name


def test_a_model_in_eval_mode_on_one_rank_is_named(pools: Pools) -> None:
    """Found silent: dropout in a part of the model only."""
    for text in pools[2].run(one_in_eval):
        assert "different modes: rank 0: train(), rank 1: eval()" in text


def test_calls_of_other_pipelines_are_named(pools: Pools) -> None:
    for text in pools[2].run(crossed):
        assert re.search(r"rank 0: step of Pipeline \d+, rank 1: step of Pipeline \d+;", text)


# What each rank is given.
BUILT: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "seed=": ({"seed": 1}, {"seed": 2}),
    "weight=": ({"weight": len}, {}),
    "accumulate_in_float32=": ({}, {"accumulate_in_float32": True}),
    "state=": ({"state": "one"}, {"state": "another"}),
    "init=": ({"init": print}, {}),
}


def other_options() -> dict[str, str]:
    rank, texts = torch.distributed.get_rank(), {}
    for name, options in BUILT.items():
        try:
            pipeline(**options[rank])
        except PlanError as error:
            texts[name] = str(error)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1 * rank), nn.Linear(4, 4))
        stagewise.Pipeline(model, PLAN)
    except PlanError as error:
        texts["models"] = str(error)
    return texts


def test_other_options_are_named_when_a_pipeline_is_built(pools: Pools) -> None:
    for texts in pools[2].run(other_options):
        assert set(texts) == {*BUILT, "models"}
        for name, text in texts.items():
            assert f"ranks [1] have different {name} than rank 0" in text


def one_ends(ending: int) -> tuple[str, float]:
    with fresh_connections():
        pipe = pipeline()
        step(pipe)
        if pipe.rank == ending:
            finalizers = util._finalizer_registry.values()  # type: ignore[attr-defined]
            [at_its_end, *_] = [one for one in finalizers if one._callback is leave]
            at_its_end()
            return "", 0.0
        start = time.monotonic()
        with pytest.raises(PeerError) as raised:
            step(pipe)
        return str(raised.value), time.monotonic() - start


def drawn_apart() -> str:
    """Rank 1 skips a batch after the calls that compare values unasked."""
    pipe = pipeline(compare_batches=True)
    for number in range(10):
        step(pipe, X + number)
    with pytest.raises(BatchError) as caught:
        step(pipe, X + 10 + pipe.rank)
    step(pipe)
    return str(caught.value)


def test_batches_are_compared_in_every_call_if_asked(pools: Pools) -> None:
    for text in pools[2].run(drawn_apart):
        assert "ranks were given different values of inputs" in text
        assert "drawn with one seed or sampler" in text


def one_fails(failing: int, error_file: Path) -> tuple[str, float]:
    """An optimizer raises after the second step, which ends the rank's program."""
    with fresh_connections():
        pipe = pipeline()
        step(pipe), step(pipe)
        if pipe.rank == failing:
            os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)
            sys.last_value = ValueError("no more")
            leave()
            del sys.last_value, os.environ["TORCHELASTIC_ERROR_FILE"]
            return json.loads(error_file.read_text())["message"]["message"], 0.0
        start = time.monotonic()
        with pytest.raises(PeerError) as raised:
            step(pipe)
        return str(raised.value), time.monotonic() - start


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_outside_a_call_is_told_with_rank_host_stage_and_step(
    pools: Pools, failing: int, tmp_path: Path
) -> None:
    told = pools[2].run(one_fails, failing, tmp_path / "error.json")
    said = f"rank {failing} on {socket.gethostname()}, stage {failing}, after step 1: "
    assert told[failing][0] == said + "ValueError: no more"
    text, seconds = told[1 - failing]
    assert text.startswith(said + "ValueError: no more") and seconds < SOON_SECONDS


def one_loses_it_outside() -> str:
    """Rank 1's program fails, upon which a collective of torch's own fails on rank 0."""
    group = torch.distributed.distributed_c10d._get_default_group()
    default = torch.distributed.distributed_c10d._get_default_store()
    torch.distributed.PrefixStore(group.group_name, default).delete_key(FAILURE)  # of other tests
    torch.distributed.barrier()
    with fresh_connections():
        step(pipe := pipeline())
        if pipe.rank == 0:
            torch.distributed.barrier()
        own, said = ValueError("no more"), io.StringIO()
        sys.last_value = own if pipe.rank else RuntimeError("Connection closed by peer")
        with redirect_stderr(said):
            leave()
        del sys.last_value
        if pipe.rank == 1:
            torch.distributed.barrier()
        return said.getvalue()


def test_who_ends_by_a_failure_that_torch_does_not_explain_says_the_first(pools: Pools) -> None:
    told, first = pools[2].run(one_loses_it_outside)
    assert re.fullmatch(
        r"(stagewise: the run has failed .*\n)?stagewise: the first failure: rank 1 on "
        rf"{socket.gethostname()}, stage 1, after step 0: ValueError: no more\n",
        told,
    )
    assert first == ""


@pytest.mark.parametrize("ending", [0, 1])
def test_a_rank_that_ends_is_named_to_who_waits_for_it(pools: Pools, ending: int) -> None:
    text, seconds = pools[2].run(one_ends, ending)[1 - ending]
    assert f"rank {ending}'s program has ended after its last call, step" in text
    assert f"while rank {1 - ending} called step" in text and seconds < SOON_SECONDS


def other_requests() -> list[str]:
    rank, texts = torch.distributed.get_rank(), []
    for num_cells, num_microbatches in ((2 + rank, 2), (2, 2 + 2 * rank)):
        cells = [nn.Linear(4, 4) for _ in range(num_cells)]
        with pytest.raises(PlanError) as caught:
            stagewise.plan(cells, X, num_stages=2, num_microbatches=num_microbatches)
        texts.append(str(caught.value))
    return texts


def test_other_requests_for_a_plan_are_named(pools: Pools) -> None:
    for texts in pools[2].run(other_requests):
        for text, name in zip(texts, ("model", "num_microbatches"), strict=True):
            assert f"ranks [1] called plan with a different {name} than rank 0" in text


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * scale


def other_keywords() -> str:
    torch.manual_seed(0)
    pipe = stagewise.Pipeline(
        [nn.Linear(4, 4), Scaled(4, 4)],
        stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2),
        loss=nn.functional.mse_loss,
    )
    with pytest.raises(BatchError) as raised:
        step(pipe, scale=torch.tensor(1.0 + pipe.rank))
    step(pipe, scale=torch.tensor(2.0))
    return str(raised.value)


def test_other_values_by_name_are_named(pools: Pools) -> None:
    for text in pools[2].run(other_keywords):
        assert "ranks were given different values of 'scale'" in text


def complex_loss() -> list[object]:
    pipe = pipeline(loss=lambda output, target: (output - target).mean() * (1 + 1j))
    value = pipe.evaluate(X, target=X)
    return [value.dtype, complex(value)]


def test_a_loss_of_any_dtype_arrives_on_all_ranks(pools: Pools) -> None:
    one, other = pools[2].run(complex_loss)
    assert one == other and one[0] is torch.complex64 and one[1] != 0


def scaled(poisoned: bool) -> tuple[float, bool, bool]:
    """Matrices and the rest have an optimizer each, where a rank has such: rank 1 has no matrix.

    Returns the scale and whether weights of either kind moved here.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    kinds = [[p for p in pipe.parameters() if (p.ndim > 1) is big] for big in (True, False)]
    optimizers = [torch.optim.SGD(ps, lr=0.1) for ps in kinds if ps]
    scaler = stagewise.GradScaler(pipe, init_scale=1024.0, growth_interval=100)
    before = [p.detach().clone() for p in pipe.parameters()]
    step(pipe, loss_scale=scaler.get_scale())
    if poisoned and pipe.rank == 0:
        next(pipe.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    pipe.clip_grad_norm_(10.0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert not pipe.any(False)
    pipe.zero_grad()
    step(pipe, loss_scale=scaler.get_scale())  # refused if the scales differed
    moved = [not torch.equal(p, old) for p, old in zip(pipe.parameters(), before, strict=True)]
    return scaler.get_scale(), any(moved), all(moved)


@pytest.mark.parametrize(("poisoned", "scale"), [(False, 1024.0), (True, 512.0)])
def test_ranks_may_have_other_numbers_of_optimizers(
    pools: Pools, poisoned: bool, scale: float
) -> None:
    for results in ([scaled(poisoned)], pools[2].run(scaled, poisoned)):
        for got, any_moved, all_moved in results:
            assert got == scale
            assert any_moved is all_moved is not poisoned


def without_parameters(leaves_out: bool) -> list[float]:
    """Rank 1 has none, so no optimizer: it may leave out `step`, but makes the other calls."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
    pipe = stagewise.Pipeline(model, plan, loss=nn.functional.mse_loss)
    scaler, scales = stagewise.GradScaler(pipe, init_scale=8.0, growth_interval=1), []
    optimizer = torch.optim.SGD([{"params": [*pipe.parameters()]}], lr=0.1)
    for n in range(3):
        pipe.zero_grad()
        step(pipe, loss_scale=scaler.get_scale())
        for parameter in pipe.parameters() if n == 1 else ():
            parameter.grad = torch.full_like(parameter, float("nan"))
        if pipe.rank == 0 or not leaves_out:
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("leaves_out", [False, True])
def test_a_rank_without_parameters_may_leave_out_its_step(pools: Pools, leaves_out: bool) -> None:
    assert pools[2].run(without_parameters, leaves_out) == [[16.0, 8.0, 16.0]] * 2


def uneven_update() -> str:
    pipe = pipeline()
    scaler = stagewise.GradScaler(pipe)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    step(pipe)
    try:
        scaler.step(optimizer) if pipe.rank == 0 else pipe.save_checkpoint("nowhere")
    except StagewiseError as error:
        return str(error)
    return ""


def test_a_scaler_against_another_call_is_named(pools: Pools, tmp_path: Path) -> None:
    for text in pools[2].run(uneven_update):
        assert "rank 0: GradScaler: whether gradients are finite, rank 1: save_checkpoint" in text
