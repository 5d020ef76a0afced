"""Trial steps: measure a model without changing it.

A trial is a real step, run by the real executor; afterwards gradients, buffers and random
generators are restored. The profile of a model comes from such steps with one cell per stage.
"""

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils import _pytree as pytree

from stagewise.batch.layouts import held_bytes
from stagewise.batch.values import take_apart
from stagewise.costs import CellCost, without_gradients
from stagewise.engine.stage.activation_meter import ActivationMeter, StorageKey, storage_key
from stagewise.engine.stage.buffers import values_put_back
from stagewise.engine.stage.gradient import gradients_aside
from stagewise.engine.stage.keywords import Routes
from stagewise.engine.stage.loss import Loss
from stagewise.engine.stage.skips import SkipRoutes
from stagewise.engine.stage.stage import Stage
from stagewise.engine.stage.work import Mode
from stagewise.engine.step.step import Runner
from stagewise.engine.step.step_request import Request
from stagewise.engine.transport.connect import in_one_process
from stagewise.engine.transport.transport import Transport
from stagewise.model.cell import Cell, Chain
from stagewise.profiling.in_turn import InTurn, Together, takes_turns
from stagewise.profiling.live_memory import LiveMemory
from stagewise.profiling.sized_mail import SizedMail
from stagewise.schedule import Instruction, Kind, Schedule
from stagewise.timeline import Timeline

MIN_ROUNDS, MAX_ROUNDS, WARMUP_ROUNDS = 3, 20, 1
_HALVES = Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
Batch = tuple[object, object, Mapping[str, object]]  # inputs, target, keyword arguments


@contextmanager
def untouched(stages: Mapping[int, Stage]) -> Iterator[None]:
    """Restore gradients and buffers of `stages` after the body."""
    modules = [cell.module for stage in stages.values() for cell in stage.cells]
    parameters = dict.fromkeys(p for module in modules for p in module.parameters())
    with gradients_aside(parameters), values_put_back(modules):
        yield


def measure_memory(runner: Runner, request: Request) -> LiveMemory:
    """Return this rank's activation bytes through one trial step."""
    meter = ActivationMeter(_excluded(runner.stages, request))
    live = LiveMemory(meter, lambda: _held(runner))
    with untouched(runner.stages), meter.counting():
        runner.run(replace(request, observe=live.observe))
    return live


def rehearse(runner: Runner, request: Request, num_steps: int) -> tuple[Timeline, ...]:
    """Return the timelines of `num_steps` trial steps, after WARMUP_ROUNDS warm-up steps."""
    with untouched(runner.stages):
        for _ in range(WARMUP_ROUNDS):
            trial_step(runner, request, is_measured=False)
        return tuple(trial_step(runner, request)[0] for _ in range(num_steps))


def trial_step(
    runner: Runner, request: Request, *, is_measured: bool = True
) -> tuple[Timeline, float]:
    """Run a step, inside `untouched`; return its timeline and its seconds on this rank."""
    start = time.perf_counter()
    runner.run(replace(request, is_measured=is_measured))
    seconds = time.perf_counter() - start
    return runner.last_run.timeline(runner.ranks, runner.schedule.num_devices), seconds


def profile(
    chain: Chain,
    batch: Batch,
    *,
    loss: Loss | None,
    device: torch.device,
    seconds: float = 3.0,
    split: bool = False,
    least: int = MIN_ROUNDS,
) -> tuple[CellCost, ...]:
    """Measure every cell on one microbatch; the loss is part of the last cell.

    Takes about `seconds`, at least `least` trial steps, and returns the median times. With
    `split`, also measures `I` and `W`, by steps that alternate with the others, in the same time.
    """
    mail = SizedMail(in_one_process([device] * len(chain)))
    runners = _runners(chain, mail.transport, loss, device, split=split)
    stages = runners[0].stages
    plain = (*batch[:2], dict(batch[2]))
    inputs, target, keywords = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, plain)
    request = Request(mode=Mode.TRAIN, inputs=inputs, target=target, keywords=keywords)
    excluded = _excluded(stages, request)
    trials = InTurn(excluded, device, mail.under_way) if takes_turns(device) else Together(excluded)
    with untouched(stages):
        times = _times(runners, request, trials, seconds=seconds, least=least)
    measured = _activation_bytes(runners[-1], request, mail, trials)
    seconds_of = partial(_median, times)
    return without_gradients(
        CellCost(
            name=cell.name,
            forward_seconds=seconds_of(cell, Kind.FORWARD),
            backward_seconds=seconds_of(cell, Kind.BACKWARD),
            parameter_bytes=sum(map(held_bytes, cell.module.parameters())),
            activation_bytes=measured.kept[cell.index],
            unsaved_output_bytes=measured.unsaved[cell.index],
            released_output_bytes=measured.released[cell.index],
            output_bytes=mail.size_between(cell.index, cell.index + 1)[0],
            gradient_bytes=mail.size_between(cell.index, cell.index + 1)[1],
            far_outputs=mail.far_outputs(cell.index),
            input_seconds=seconds_of(cell, Kind.BACKWARD_INPUT) if split else None,
            weight_seconds=seconds_of(cell, Kind.BACKWARD_WEIGHT) if split else None,
            deferred_bytes=measured.deferred.get(cell.index, 0 if split else None),
            deferred_input_bytes=measured.deferred_inputs.get(cell.index, 0),
            trainable_bytes=cell.trainable_bytes,
        )
        for cell in chain
    )


def _median(times: Mapping[Instruction, list[float]], cell: Cell, kind: Kind) -> float:
    """Return what `cell` takes: 0 if it is not needed, as a `W` whose `I` is a whole `B`."""
    kinds = (kind, Kind.BACKWARD) if kind is Kind.BACKWARD_INPUT else (kind,)
    ran = [own for one in kinds if (own := times.get(Instruction(cell.index, one, 0)))]
    return statistics.median(ran[0]) if ran else 0.0


def _runners(
    chain: Chain, transport: Transport, loss: Loss | None, device: torch.device, *, split: bool
) -> list[Runner]:
    """Return runners of one-cell stages: with whole backwards, and with `split` ones."""
    num_cells = len(chain)
    skips = SkipRoutes(chain, [1] * num_cells)
    stages = {
        cell.index: skips.stage(
            cell.index, (cell,), device, is_last=cell.index == num_cells - 1, loss=loss
        )
        for cell in chain
    }
    routes = Routes(chain, [1] * num_cells, [(0,)] * num_cells, skips.flows)
    return [
        Runner(stages, transport, schedule, seed=0, routes=routes)
        for schedule in (
            _in_order(num_cells, Kind.BACKWARD),
            *([_in_order(num_cells, *_HALVES)] if split else []),
        )
    ]


def _times(
    runners: Sequence[Runner], request: Request, trials: Together, *, seconds: float, least: int
) -> dict[Instruction, list[float]]:
    """Return each instruction's times, from trial steps of all runners in turn."""
    times: dict[Instruction, list[float]] = {}
    deadline, rounds = time.perf_counter() + seconds, 0
    while rounds < least + WARMUP_ROUNDS or (
        time.perf_counter() < deadline and rounds < MAX_ROUNDS
    ):
        for runner in runners:
            trials.run(runner, request)
            if rounds >= WARMUP_ROUNDS:
                for span in runner.last_run.spans:
                    times.setdefault(span.instruction, []).append(span.seconds)
        rounds += 1
    return times


def _in_order(num_stages: int, *backward: Kind) -> Schedule:
    """Return a schedule of one microbatch: all forwards, then all `B`, or all `I`, then all `W`.

    When a `W` runs, nothing else of the step is alive, so it frees what its stage alone kept.
    """
    up, down = range(num_stages), range(num_stages - 1, -1, -1)
    order = (Kind.FORWARD, up), *((kind, down) for kind in backward)
    return Schedule(
        name="in order",
        programs=(
            tuple(Instruction(stage, kind, 0) for kind, stages in order for stage in stages),
        ),
        placement=((0,),) * num_stages,
        num_microbatches=1,
    )


@dataclass
class _Bytes:
    """What each one-cell stage keeps or sends, how much of that is output that nothing saves, or
    that is free once sent; what its `W` frees, and how much of that is the stage's input."""

    kept: list[int]
    unsaved: list[int]
    released: list[int]
    deferred: dict[int, int]
    deferred_inputs: dict[int, int]


def _activation_bytes(
    runner: Runner, request: Request, mail: SizedMail, trials: Together
) -> _Bytes:
    meter = trials.meter
    live: list[dict[StorageKey, int]] = [{}]  # after every instruction
    sent, unsaved = list[set[StorageKey]](), list[dict[StorageKey, int]]()  # by every forward
    released, given = list[int](), dict[int, set[StorageKey]]()
    freed: dict[int, dict[StorageKey, int]] = {}

    def observe(instruction: Instruction) -> None:
        leaving = mail.leaving(instruction)
        held = itertools.chain(_held(runner), *leaving.values())
        before, now = live[-1], meter.saved | meter.unsaved(held)
        live.append(now)
        stage = runner.stages[instruction.stage]
        if instruction.kind is Kind.FORWARD:
            keys = {far: set(map(storage_key, tensors)) for far, tensors in leaving.items()}
            sent.append(keys[False] | keys[True])
            free = (keys[False] - keys[True] - meter.saved.keys()) & now.keys()
            made = now.keys() - before.keys()
            # What a cell only passes on is free too if it keeps nothing else.
            released.append(sum(now[key] for key in (free & made if made else free)))
            # After the last forward, all cells have saved everything.
            unsaved[:] = [
                {key: now[key] for key in keys & now.keys() - meter.saved.keys()} for keys in sent
            ]
            given[stage.index] = before.keys() & set(map(storage_key, stage.held()))
        if instruction.kind is Kind.BACKWARD_WEIGHT:
            freed[stage.index] = {k: size for k, size in before.items() if k not in now}

    with untouched(runner.stages), meter.counting():
        trials.run(runner, replace(request, observe=observe))
    levels = [sum(storages.values()) for storages in live[: len(runner.stages) + 1]]
    first = next((s for s, stage in sorted(runner.stages.items()) if stage.trains), 0)
    levels[:first] = [0] * first  # what is sent there is not kept
    # What several cells pass on is excluded: a stage may begin between them.
    holders = Counter(key for storages in unsaved for key in storages)
    return _Bytes(
        kept=[after - before for before, after in itertools.pairwise(levels)],
        unsaved=[
            sum(num_bytes for key, num_bytes in storages.items() if holders[key] == 1)
            for storages in unsaved
        ],
        released=released,
        deferred={index: sum(storages.values()) for index, storages in freed.items()},
        deferred_inputs={
            index: sum(storages[key] for key in storages.keys() & given[index])
            for index, storages in freed.items()
        },
    )


def _excluded(stages: Mapping[int, Stage], request: Request) -> list[torch.Tensor]:
    """Return what is no activation: the cells' own tensors, and the batch's."""
    modules = [cell.module for stage in stages.values() for cell in stage.cells]
    own = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    batch = request.inputs, request.target, dict(request.keywords)
    return [*own, *take_apart(batch)[0]]


def _held(runner: Runner) -> Iterator[torch.Tensor]:
    for stage in runner.stages.values():
        yield from stage.held()
    yield from runner.mail.waiting()
