"""Are loss and gradients on the device those of one stage, and of the plain model?"""

import torch

from benchmarks.gpu_check.machine import Machine
from benchmarks.gpu_check.subjects import Result, Subject, mse, pipeline
from benchmarks.gpu_check.supervise import Say

COMPARED = ("Transformer", "BatchNorm", "LSTM", "draws on the CPU")
WAYS: dict[str, tuple[int, dict[str, object]]] = {
    "2 stages": (2, {}),
    "4 stages, recomputed": (4, {"recompute": "always"}),
    "zb_h1": (4, {"schedule": "zb_h1"}),
    "zb_v": (4, {"schedule": "zb_v", "stages_per_device": 2}),
}


def exact(dry: bool, say: Say) -> None:
    """Bits at any number of stages, then the plain model in float64."""
    machine = Machine.here(dry)
    for deterministic in machine.size((False, True), (True,)):
        machine.use_repeatable_kernels(deterministic)
        for kind in COMPARED:
            _same_bits(Subject(machine, kind), deterministic, say)
    subject = Subject(machine, "Transformer", torch.bfloat16)
    one, again = (subject.result(1, float32=True) for _ in range(2))
    apart = one.difference(subject.result(4, float32=True, recompute="always"))
    ok = apart == 0 if one.difference(again) == 0 else None
    say("bfloat16, summed in float32, deterministic kernels", ok=ok, difference=apart)
    machine.use_repeatable_kernels(False)
    _plain_model(machine, say)


def _same_bits(subject: Subject, deterministic: bool, say: Say) -> None:
    one = subject.result(1)
    again = one.difference(subject.result(1))
    found = {
        way: one.difference(subject.result(num_stages, **options))
        for way, (num_stages, options) in WAYS.items()
    }
    # Kernels that do not repeat themselves give no bits to compare with.
    ok = not any(found.values()) if again == 0 else None
    how = "deterministic kernels" if deterministic else "default kernels"
    say(f"{subject.kind}, {how}", ok=ok, one_stage_again=again, **found)


def _plain_model(machine: Machine, say: Say) -> None:
    subject = Subject(machine, "no dropout", torch.float64)
    inputs, target = subject.batch()
    model = subject.model()
    loss = mse(model(inputs), target)
    loss.backward()
    plain = Result.of(loss, model)
    pipe = pipeline(subject.model(), 4, schedule="zb_h1")
    apart = plain.difference(Result.of(pipe.step(inputs, target=target), pipe))
    say("the plain model, float64", ok=apart < 1e-12, difference=apart)
