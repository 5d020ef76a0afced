"""`stagewise.plan`: measure the model where it will run, then cut it optimally.

Under torch.distributed every rank measures at the same time, so that the costs are those of a
machine as busy as in training, and all take the mean; so every rank must call it.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from stagewise.costs import FREE_LINK, CellCost, LinkCost
from stagewise.engine.microbatch import extent, first_microbatch, microbatch_sizes
from stagewise.engine.stage import Loss
from stagewise.engine.values import move
from stagewise.errors import BatchError, PlanError
from stagewise.model.chain import chain_of
from stagewise.model.materialise import is_meta
from stagewise.pipeline.connect import Device, connect
from stagewise.pipeline.measure import profile
from stagewise.pipeline.pipeline import Pipeline
from stagewise.planning.choice import ScheduleLike, choose_schedule
from stagewise.planning.partition import check_balance, check_counts
from stagewise.planning.plan import Plan, plan_from_costs
from stagewise.planning.rehearsal import message_seconds
from stagewise.schedule import with_recompute

_TIMES = "forward_seconds", "backward_seconds", "input_seconds", "weight_seconds"
_SMALL_BYTES, _LARGE_BYTES, _PROBES = 8, 1 << 22, 15


def plan(
    model: nn.Module | Sequence[nn.Module],
    inputs: object = None,
    *,
    target: object = None,
    kwargs: Mapping[str, object] | None = None,
    loss: Loss | None = None,
    num_stages: int | None = None,
    num_devices: int | None = None,
    replicas: Sequence[int] = (),
    num_microbatches: int,
    schedule: ScheduleLike = "1f1b",
    recompute: str = "never",
    balance: Sequence[int] | None = None,
    device: Device | None = None,
    seconds: float = 3.0,
) -> Plan:
    """Choose the cut of `model` whose busiest stage has the least to do.

    Args:
        model: an `nn.Sequential` or a list of modules; left as it was (gradients, buffers,
            random state, mode).
        inputs, target: an example minibatch; its first microbatch is measured. They may be None
            if `balance` is given; then nothing is measured and the plan predicts nothing.
        kwargs: the example's keyword arguments, as for `Pipeline.step`.
        loss: as for Pipeline; counts to the last cell.
        num_stages, num_devices: into how many stages the model is cut, or on how many devices it
            will run; one follows from the other by the schedule.
        replicas: devices of each stage, which share its microbatches; in place of the two.
        num_microbatches, recompute: how the model will be run; policies are in
            `stagewise.schedule.POLICIES`.
        schedule: a name in `stagewise.schedule.SCHEDULES`; or a Schedule, or a function
            (num_devices, num_microbatches) -> Schedule.
        balance: number of cells on each stage, in place of the optimal cut.
        device: where to measure; by default where Pipeline would run.
        seconds: about how long to measure.

    Raises:
        PlanError: more stages than cells, a balance that does not fit, or a schedule that has
            other numbers of stages, devices or microbatches.
        ScheduleError: unknown schedule or policy, or a schedule that breaks a rule.
        BatchError: the example has fewer samples than microbatches.
    """
    chain = chain_of(model)
    choice = choose_schedule(
        schedule,
        num_microbatches,
        num_stages=num_stages,
        num_devices=num_devices,
        replicas=replicas,
    )
    check_counts(len(chain), choice.num_stages)
    if balance is not None:
        check_balance(balance, len(chain), choice.num_stages)
    built = with_recompute(choice.built, recompute)
    if inputs is None and not kwargs:
        if balance is None:
            raise PlanError(
                "plan() got neither an example batch nor a balance; pass inputs (and target) to "
                "measure the cells, or balance=[...] to cut by hand"
            )
        return Plan(
            balance=tuple(balance),
            schedule=choice.name,
            stages_per_device=choice.stages_per_device,
            replicas=choice.replicas,
            programs=choice.programs,
            num_microbatches=num_microbatches,
            recompute=recompute,
        )
    if is_meta(chain):
        raise PlanError(
            "the model is on the meta device, where nothing can be measured; give the costs of "
            "stagewise.estimate(...) to stagewise.planning.plan_from_costs(...), give plan() a "
            "balance and no inputs, or build the model on a real device"
        )
    keywords = dict(kwargs or {})
    batch = extent([("inputs", inputs), ("target", target), *keywords.items()])
    if batch.num_samples is None:
        raise BatchError(
            "nothing in the example has samples; pass tensors with samples along dimension 0"
        )
    sizes = batch.sizes or microbatch_sizes(batch.num_samples, num_microbatches)
    first = first_microbatch((inputs, target, keywords), sizes[0])
    devices, _ = connect("local", None, chain, 1)
    where = torch.device(device) if device is not None else devices[0]
    for cell in chain:
        cell.module.to(where)
    cells = profile(
        chain,
        *move(first, where),  # type: ignore[misc]
        loss=loss,
        device=where,
        seconds=seconds,
        split=built.splits_backward,
    )
    cells, link = _agree(cells)

    def best(link: LinkCost) -> Plan:
        return plan_from_costs(
            cells,
            num_stages=choice.num_stages,
            num_devices=choice.num_devices,
            replicas=choice.replicas,
            num_microbatches=num_microbatches,
            schedule=choice.name if isinstance(schedule, str) else choice.built,
            recompute=recompute,
            link=link,
            balance=balance,
        )

    return best(_rehearsed(link, best(link), model, loss, (inputs, target, keywords)))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _agree(cells: tuple[CellCost, ...]) -> tuple[tuple[CellCost, ...], LinkCost]:
    """The mean of all ranks' times, and what a message between ranks costs."""
    if not _distributed():
        return cells, FREE_LINK
    own = (cells, *_link_times())
    ranks = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    all_cells = [cells for cells, _, _ in ranks]
    small = max(seconds for _, seconds, _ in ranks)
    large = max(seconds for _, _, seconds in ranks)
    mean = tuple(_mean(same) for same in zip(*all_cells, strict=True))
    per_byte = max(0.0, large - small) / (_LARGE_BYTES - _SMALL_BYTES)
    return mean, LinkCost(latency_seconds=small, seconds_per_byte=per_byte)


def _mean(same: Sequence[CellCost]) -> CellCost:
    """The mean of several ranks' times for one cell; its bytes are the same everywhere."""
    times: dict[str, float] = {}
    for name in _TIMES:
        values = [getattr(cell, name) for cell in same]
        if None not in values:
            times[name] = statistics.fmean(values)
    return replace(same[0], **times)  # type: ignore[arg-type]


def _rehearsed(
    link: LinkCost,
    chosen: Plan,
    model: nn.Module | Sequence[nn.Module],
    loss: Loss | None,
    batch: tuple[object, object, dict[str, object]],
) -> LinkCost:
    """`link` with what trial steps of the chosen plan showed of it, on busy devices."""
    if not _distributed() or dist.get_world_size() != chosen.num_devices:
        return link
    pipe = Pipeline(model, chosen, loss=loss)
    inputs, target, keywords = batch
    timelines = pipe.rehearse(inputs, target=target, **keywords)  # type: ignore[arg-type]
    overhead, waited = message_seconds(chosen.built_schedule, timelines)
    num_bytes = [size for cell in chosen.cells for size in (cell.output_bytes, cell.gradient_bytes)]
    on_its_way = waited - overhead - statistics.fmean(num_bytes) * link.seconds_per_byte
    return replace(
        link,
        latency_seconds=max(link.latency_seconds, on_its_way),
        overhead_seconds=overhead,
    )


def _link_times() -> tuple[float, float]:
    """Median one-way seconds of a small and of a large message between ranks 0 and 1."""
    rank = dist.get_rank()
    uses_gpu = "nccl" in str(dist.get_backend())
    device = torch.device("cuda", torch.cuda.current_device()) if uses_gpu else torch.device("cpu")
    medians = []
    for num_bytes in (_SMALL_BYTES, _LARGE_BYTES):
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        times = []
        for _ in range(_PROBES if rank < 2 else 0):
            start = time.perf_counter()
            for sender in (0, 1):
                if rank == sender:
                    dist.send(buffer, 1 - sender)
                else:
                    dist.recv(buffer, sender)
            times.append((time.perf_counter() - start) / 2)
        medians.append(sorted(times)[len(times) // 2] if times else 0.0)
    return medians[0], medians[1]
