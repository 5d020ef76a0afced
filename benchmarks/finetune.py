"""LoRA on a Llama, on two workers of one thread: stagewise beside what else people do.

All systems train the same adapters on the same batch in the same processes, in turn, so that noise
affects all alike: stagewise; one process that accumulates gradients; layers on two workers of which
one is busy at a time, as with `device_map`; FSDP2, with half the batch on each rank. `frozen-blind`
is cut as if everything were trained, and one norm of the first layer is, so that gradients run down
to it. Emulated rows show the same with devices that sleep, where no other process takes the core.
Needs transformers and peft.

Below the first adapter a frozen cell has its forward alone, F; above it also the backward of its
input, I, which takes as long. With adapters in the upper half of equal cells, 3/4 of a blind plan's
work is left: at most 1.33 times as fast. In the upper quarter it is 1.6, in all layers 1.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import stagewise
from benchmarks.workers import Row, keep_to_core, print_rows, run_workers
from stagewise.schedule import parse_schedule
from stagewise.testing import EmulatedDevice, emulated_model

EXAMINED = 8  # calls that are looked at closely
WORKERS, LAYERS = 2, "base_model.model.model.layers"
GOAL = "goal of issue 18: at least 1.3 times as fast as the frozen-blind plan"


@dataclass(frozen=True)
class Size:
    """The Llama's and the batch's measures; `upper`: adapters in the upper half only."""

    width: int = 256
    num_layers: int = 8
    context: int = 128
    batch: int = 16
    num_microbatches: int = 8
    num_steps: int = 9
    upper: bool = False


QUICK = Size(width=128, context=64, num_steps=5)


@dataclass
class Contender:
    """One system: a step without optimizer, and what it leaves."""

    name: str
    step: Callable[[], object]
    model: nn.Module | stagewise.Pipeline
    sent: int | None = None  # bytes a step
    kept: int | None = None  # peak bytes of activations on the fullest worker


def main(
    quick: bool = typer.Option(False, help="A smaller model, and fewer steps."),
    json: bool = typer.Option(False, "--json", help="One JSON object per row."),
) -> None:
    """Measure a step of each way to fine-tune on two workers."""
    size, rows = QUICK if quick else Size(), list[Row]()
    for upper in (False, True):
        rows += run_workers(WORKERS, measure, replace(size, upper=upper))
    rows += run_workers(WORKERS, emulated, 5 if quick else 9)
    notes = (
        GOAL,
        "times: how many times as fast as one process. MiB are those sent in a step, and the most "
        "that a worker keeps for the backward",
        "frozen-blind also runs and sends the gradients of layers before the first adapter",
        "error: largest difference of a gradient from one process's, over its largest element",
    )
    print_rows("a step of fine-tuning on two workers", rows, as_json=json, notes=notes)


def measure(size: Size) -> list[Row]:
    """Run on every rank: all contenders in turn."""
    keep_to_core()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (size.batch, size.context), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    alone = model_of(size)
    contenders = [Contender("one process", partial(_accumulated, alone, batch, size), alone)]
    aware = _planned(size, batch)
    turns = parse_schedule("device_map", _in_turns(size.num_microbatches))
    one_busy = stagewise.Plan.from_schedule(turns, balance=aware.balance)
    contenders += [
        _pipeline("stagewise", size, batch, aware),
        _pipeline("as device_map: one busy", size, batch, one_busy),
        _sharded(size, batch),
    ]
    if size.upper:
        blind = _planned(size, batch, trains=lambda name: True)
        contenders += [
            _pipeline("stagewise, frozen-blind", size, batch, blind, trains=_first_norm),
            _pipeline("stagewise, cut frozen-blind", size, batch, blind),
        ]
    where = "upper half" if size.upper else "all layers"
    return _race(contenders, size.num_steps, where, gradients_of(alone))


def model_of(size: Size, trains: Callable[[str], bool] = lambda name: False) -> nn.Module:
    """The Llama with new adapters; other parameters that `trains` names are trained too."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=size.num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_cache=False,
        )
    )
    first = size.num_layers // 2 if size.upper else 0
    layers = [*range(first, size.num_layers)]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=layers)
    model: nn.Module = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or trains(name))
        if "lora_B" in name:  # zero: nothing would reach lora_A
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def _first_norm(name: str) -> bool:
    """What makes every gradient needed, as if nothing were known to be frozen."""
    return name == f"{LAYERS}.0.input_layernorm.weight"


def _planned(
    size: Size,
    batch: dict[str, Tensor],
    trains: Callable[[str], bool] = lambda name: False,
    model: nn.Module | None = None,
) -> stagewise.Plan:
    """The plan for a model, whose cells are its layers from then on."""
    return stagewise.plan(
        model or model_of(size, trains),
        seconds=1.0 if model is None else 0.01,  # a given one has its plan already
        **batch,  # type: ignore[arg-type]
        cells=[f"{LAYERS}.{layer}" for layer in range(size.num_layers)],
        num_stages=WORKERS,
        num_microbatches=size.num_microbatches,
    )


def _pipeline(
    name: str,
    size: Size,
    batch: dict[str, Tensor],
    plan: stagewise.Plan,
    trains: Callable[[str], bool] = lambda name: False,
) -> Contender:
    model = model_of(size, trains)
    _planned(size, batch, model=model)
    pipe = stagewise.Pipeline(model, plan)
    with pipe.record() as recorder:
        pipe.step(**batch)
    assert recorder.recording is not None
    sent = sum(message.num_bytes for step in recorder.recording.steps for message in step.messages)
    kept = max(pipe.measure_memory(**batch))
    for _ in range(EXAMINED - 1):
        pipe.step(**batch)
    return Contender(name, lambda: pipe.step(**batch), pipe, sent, kept)


def _in_turns(num_microbatches: int) -> str:
    """A schedule in which one device computes at a time."""
    programs = (
        " ".join(f"{stage}F{m} {stage}B{m}" for m in range(num_microbatches))
        for stage in range(WORKERS)
    )
    return "\n".join(programs)


def _accumulated(model: nn.Module, batch: dict[str, Tensor], size: Size) -> None:
    """Gradient accumulation in rank 0's process, while the other one waits."""
    if dist.get_rank() == 0:
        for part in _parts(batch["input_ids"], size.num_microbatches):
            torch.autograd.backward(_loss(model, part) / size.num_microbatches)


def _sharded(size: Size, batch: dict[str, Tensor]) -> Contender:
    """FSDP2: parameters are gathered layer by layer, and gradients summed after the last part."""
    model: Any = model_of(size)
    mesh = init_device_mesh("cpu", (WORKERS,))
    for layer in model.get_submodule(LAYERS):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = batch["input_ids"].chunk(WORKERS)[dist.get_rank()]
    parts = [*_parts(own, size.num_microbatches // WORKERS)]

    def step() -> None:
        for part in parts:
            model.set_requires_gradient_sync(part is parts[-1])
            torch.autograd.backward(_loss(model, part) / len(parts))

    return Contender("FSDP2", step, model)


def _parts(ids: Tensor, number: int) -> Iterator[Tensor]:
    yield from ids.chunk(number)


def _loss(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def gradients_of(model: nn.Module | stagewise.Pipeline) -> dict[str, Tensor]:
    """The gradients here, by name."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _race(
    contenders: list[Contender], num_steps: int, adapters: str, expected: dict[str, Tensor]
) -> list[Row]:
    """Run all in turn; the first contender is what others are compared with."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    errors = dict[str, float]()
    for number in range(1 + num_steps):
        for contender in contenders:
            contender.model.zero_grad()
            dist.barrier()
            start = time.perf_counter()
            contender.step()
            dist.barrier()
            if number:
                times[contender.name].append(time.perf_counter() - start)
            else:
                expected = expected or _of_first(contender)
                errors[contender.name] = _error(gradients_of(contender.model), expected)
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    first = seconds[contenders[0].name]
    return [
        {
            "adapters": adapters,
            "system": contender.name,
            "step_ms": 1e3 * seconds[contender.name],
            "times": first / seconds[contender.name],
            "sent_MiB": None if contender.sent is None else contender.sent / 2**20,
            "kept_MiB": None if contender.kept is None else contender.kept / 2**20,
            "error": errors[contender.name],
        }
        for contender in contenders
    ]


def _of_first(contender: Contender) -> dict[str, Tensor]:
    """Rank 0's gradients, on every rank."""
    told = [copy.deepcopy(gradients_of(contender.model))]
    dist.broadcast_object_list(told)
    return told[0]


def _error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    worst = torch.zeros(1)
    for name in gradients.keys() & expected.keys():
        difference = (gradients[name] - expected[name]).abs().max() / expected[name].abs().max()
        worst = torch.maximum(worst, difference.reshape(1))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def emulated(num_steps: int) -> list[Row]:
    """The same plans of 16 cells on devices that sleep; adapters in the upper half."""
    number, device = 16, EmulatedDevice()
    x, target = torch.zeros(8, 1), torch.zeros(8, 1)

    def pipeline(name: str, balance: tuple[int, ...], first: int) -> Contender:
        cells = emulated_model([2e-3] * number, [2e-3] * number, device)
        for cell in cells[:first]:
            cell.requires_grad_(False)
        plan = stagewise.Plan(balance=balance, num_microbatches=8)
        pipe = stagewise.Pipeline(cells, plan, loss=nn.functional.mse_loss)
        device.speed = float("inf")
        with pipe.record() as recorder:
            pipe.step(x, target=target)
        device.speed = 1.0
        assert recorder.recording is not None
        sent = sum(m.num_bytes for step in recorder.recording.steps for m in step.messages)
        return Contender(name, lambda: pipe.step(x, target=target), pipe, sent)

    contenders = [
        pipeline("stagewise, frozen-blind", (8, 8), 0),
        pipeline("stagewise, cut frozen-blind", (8, 8), 8),
        pipeline("stagewise", (10, 6), 8),
    ]
    return _race(contenders, num_steps, "emulated, upper half", {"none": torch.zeros(1)})


if __name__ == "__main__":
    typer.run(main)
