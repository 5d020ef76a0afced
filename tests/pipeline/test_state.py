"""Names, ownership, state_dict, clipping, timeline, memory: what a Pipeline tells."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import stagewise
from stagewise.errors import CheckpointError, StagewiseError
from stagewise.schedule import POLICIES, needed
from tests.harness import Pools
from tests.models import batch, build
from tests.pipeline.runs import Run, even, num_cells, pipeline
from tests.schedules import RUNNABLE, stages_on

EXAMPLE = "conv_batchnorm"


def run_on(num_stages: int, **changes: object) -> Run:
    balance = even(num_cells(EXAMPLE), num_stages)
    return Run(**{"example": EXAMPLE, "balance": balance, **changes})  # type: ignore[arg-type]


def state_of(run: Run) -> dict[str, torch.Tensor]:
    return pipeline(run).state_dict()


def test_state_dict_has_the_plain_models_names(pools: Pools) -> None:
    wanted = build(EXAMPLE).state_dict()
    whole = state_of(run_on(3))
    assert list(whole) == list(wanted)
    parts = pools[3].run(state_of, run_on(3))
    assert [name for part in parts for name in part] == list(wanted)
    assert all(len(part) < len(wanted) for part in parts), "a rank holds its own stages only"
    for name, tensor in {k: v for part in parts for k, v in part.items()}.items():
        assert torch.equal(tensor, wanted[name]) and torch.equal(whole[name], wanted[name])


def load_trained(run: Run) -> dict[str, torch.Tensor]:
    """Load another model's whole state_dict; return what this rank then holds."""
    pipe = pipeline(run)
    pipe.load_state_dict(build(run.example, seed=99).state_dict())
    return pipe.state_dict()


def test_load_state_dict_takes_the_whole_models_state(pools: Pools) -> None:
    wanted = build(EXAMPLE, seed=99).state_dict()
    for part in [load_trained(run_on(2)), *pools[2].run(load_trained, run_on(2))]:
        assert part and all(torch.equal(tensor, wanted[name]) for name, tensor in part.items())
    # and back into the plain model
    plain = build(EXAMPLE)
    plain.load_state_dict(load_trained(run_on(4)))


def test_load_state_dict_names_what_is_missing_or_misshapen() -> None:
    pipe = pipeline(run_on(2))
    state = dict(build(EXAMPLE).state_dict())
    del state["1.weight"]
    state["8.bias"] = torch.zeros(7)
    before = copy.deepcopy(pipe.state_dict())
    with pytest.raises(CheckpointError, match=r"2 entries.*1\.weight, 8\.bias"):
        pipe.load_state_dict(state)
    assert all(torch.equal(t, before[n]) for n, t in pipe.state_dict().items())


class Extra(nn.Linear):
    """Keeps something in the state_dict that is no tensor."""

    note = "fresh"

    def get_extra_state(self) -> str:
        return self.note

    def set_extra_state(self, state: str) -> None:
        self.note = state


def test_extra_state_is_loaded() -> None:
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline([nn.Linear(2, 2), Extra(2, 2)], plan)
    state = pipe.state_dict()
    state["1._extra_state"] = "trained"  # type: ignore[assignment]
    pipe.load_state_dict(state)
    assert pipe.module.get_submodule("1").note == "trained"


def test_parameter_shapes_are_the_whole_models(pools: Pools) -> None:
    wanted = {n: tuple(p.shape) for n, p in build(EXAMPLE).named_parameters()}
    assert pipeline(run_on(3)).parameter_shapes == wanted
    assert pools[3].run(shapes, run_on(3)) == [wanted] * 3


def shapes(run: Run) -> dict[str, tuple[int, ...]]:
    return pipeline(run).parameter_shapes


def timelines(run: Run) -> list[stagewise.Timeline]:
    pipe = pipeline(run)
    inputs, target = batch(run.example, 10)
    seen = []
    for _ in range(2):
        pipe.step(inputs, target=target)
        seen.append(pipe.timeline())
    return seen


@pytest.mark.parametrize("schedule", RUNNABLE)
def test_timeline_has_every_instruction_once_and_is_the_same_on_all_ranks(
    pools: Pools, schedule: str
) -> None:
    run = run_on(stages_on(schedule, 3), schedule=schedule, recompute="except_last")
    pipe = pipeline(run)
    bare = [s for s, stage in pipe._runner.stages.items() if not stage._parameters]
    wanted = needed(pipe.plan.built_schedule, 0, bare)  # no `W` where there are no weights
    first, *others = pools[3].run(timelines, run)
    assert all(other == first for other in others)
    for timeline in [*timelines(run), *first]:
        spans = timeline.spans
        assert sorted((s.device, s.instruction) for s in spans) == sorted(wanted.instructions())
        for device in range(3):
            own = [span for span in spans if span.device == device]
            assert [s.instruction for s in own] == list(wanted.programs[device])
            assert all(a.end_seconds <= b.start_seconds for a, b in itertools.pairwise(own))
        assert 0 <= timeline.bubble_fraction < 1


def memory_of(run: Run) -> tuple[tuple[int, ...], bool]:
    pipe = pipeline(run)
    inputs, target = batch(run.example, 16)
    pipe.step(inputs, target=target)
    gradients = [p.grad for p in pipe.parameters()]
    values = [g.clone() for g in gradients if g is not None]
    buffers = {n: (b, b.clone()) for n, b in pipe.named_buffers()}
    torch.manual_seed(1)
    rng = torch.get_rng_state()
    peaks = pipe.measure_memory(inputs, target=target)
    same = pipe.step_index == 1 and torch.equal(torch.get_rng_state(), rng)
    for parameter, gradient, value in zip(pipe.parameters(), gradients, values, strict=True):
        same &= parameter.grad is gradient and torch.equal(parameter.grad, value)
    for name, buffer in pipe.named_buffers():
        same &= buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])
    return peaks, same


@pytest.mark.parametrize("recompute", POLICIES)
def test_measuring_memory_leaves_no_trace_and_agrees(pools: Pools, recompute: str) -> None:
    run = run_on(3, recompute=recompute)
    (together,), untouched = memory_of(run)
    assert untouched
    first, *others = pools[3].run(memory_of, run)
    peaks, untouched = first
    assert untouched and len(peaks) == 3 and others == [first] * 2
    assert max(peaks) < together <= sum(peaks)


def clip_like_torch(
    dtypes: tuple[torch.dtype, ...], max_norm: float, norm_type: float = 2.0
) -> None:
    torch.manual_seed(0)
    cells = [nn.Linear(3, 3).to(dtype) for dtype in dtypes]
    for index, cell in enumerate(cells):
        for parameter in cell.parameters():
            parameter.grad = torch.randn_like(parameter) * (index + 1)
    cells[1].bias.grad = None
    cells[0].double().requires_grad_(False)  # no gradient: its dtype must not count
    for parameter in cells[0].parameters():
        parameter.grad = None
    plain = copy.deepcopy(cells)
    for ours, theirs in zip(cells, plain, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = None if a.grad is None else a.grad.clone()
    plan = stagewise.Plan(balance=(1, 2), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline(cells, plan)
    norm = pipe.clip_grad_norm_(max_norm, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(nn.ModuleList(plain).parameters(), max_norm, norm_type)
    assert norm.dtype is wanted.dtype and torch.equal(norm, wanted), (norm, wanted)
    theirs_by_name = dict(nn.ModuleList(plain).named_parameters())
    for name, parameter in pipe.named_parameters():
        other = theirs_by_name[name].grad
        assert (parameter.grad is None) == (other is None)
        assert other is None or torch.equal(parameter.grad, other), name  # type: ignore[arg-type]


@pytest.mark.parametrize("max_norm", [0.1, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_is_torchs_bit_for_bit(pools: Pools, dtype: torch.dtype, max_norm: float) -> None:
    """Found a bug: the norm of a bfloat16 model was float32, and frozen dtypes counted."""
    for dtypes in [(dtype,) * 3, (dtype, torch.float32, dtype)]:
        clip_like_torch(dtypes, max_norm)
        pools[2].run(clip_like_torch, dtypes, max_norm)


@pytest.mark.parametrize("norm_type", [float("inf"), "inf", 1, 3.0, 0.5])
def test_clipping_by_another_norm(norm_type: float) -> None:
    clip_like_torch((torch.float32,) * 3, 0.1, norm_type)


def clip_what_is_not_finite() -> tuple[str, bool]:
    """One rank has a gradient that is no number: what all are told, and whether all is as before.

    Found raw: a TypeError about Share for torch's own arguments.
    """
    cells = [nn.Linear(3, 3), nn.Linear(3, 3)]
    for cell in cells:
        cell.weight.grad = torch.ones(3, 3)
    cells[1].weight.grad[0] = torch.nan  # type: ignore[index]
    plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=1)
    pipe = stagewise.Pipeline(cells, plan)
    with pytest.raises(RuntimeError) as caught:
        pipe.clip_grad_norm_(0.1, error_if_nonfinite=True)
    kept = all(p.grad is None or p.grad[1, 1] == 1 for p in pipe.parameters())
    assert pipe.clip_grad_norm_(0.1, error_if_nonfinite=False, foreach=False).isnan()
    pipe.clip_grad_value_(1.0, foreach=False)
    return str(caught.value), kept


def test_a_norm_that_is_not_finite_is_refused_on_all_ranks_if_asked(pools: Pools) -> None:
    for text, kept in pools[2].run(clip_what_is_not_finite):
        assert "order 2.0" in text and "is nan" in text and kept


def test_a_pipeline_is_not_copied() -> None:
    pipe = pipeline(run_on(2))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps, lambda one: copy.deepcopy([one])):
        with pytest.raises(StagewiseError, match=r"a Pipeline cannot be copied .*save_checkpoint"):
            copied(pipe)  # type: ignore[operator]


def test_clipping_without_any_gradient() -> None:
    pipe = pipeline(run_on(2))
    assert pipe.clip_grad_norm_(1.0) == 0


def test_one_flag_is_known_to_all_ranks(pools: Pools) -> None:
    assert pools[3].run(any_flag, run_on(3), 1) == [True] * 3
    assert pools[3].run(any_flag, run_on(3), 7) == [False] * 3


def any_flag(run: Run, rank: int) -> bool:
    pipe = pipeline(run)
    return pipe.any(pipe.rank == rank)


def resumed(run: Run, skip: int) -> torch.Tensor:
    pipe = pipeline(run)
    pipe.step_index = skip
    inputs, target = batch(run.example, 10)
    return pipe.step(inputs, target=target)


def test_step_index_decides_the_masks(pools: Pools) -> None:
    losses = [resumed(run_on(2), skip) for skip in (0, 3)]
    assert not torch.equal(*losses)
    assert torch.equal(pools[2].run(resumed, run_on(2), 3)[0], losses[1])
