"""The loop, on a transport and stages that only write down what happens."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.stage.stage import Action
from stagewise.engine.stage.work import Mode, Work
from stagewise.engine.step import programs
from stagewise.engine.step.execute import Ran, execute
from stagewise.engine.step.programs import ProgramKey, Programs
from stagewise.engine.transport.connect import in_one_process
from stagewise.engine.transport.failure import Lost
from stagewise.schedule import Instruction, Message, gpipe, lower, one_f_one_b, with_recompute


class Recorder:
    """Stage and transport at once; `log` holds the order of everything."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.log: list[str] = []
        self.time = 0.0

    def action(self, instruction: Instruction) -> Action:
        def run(received: list[object], work: Work) -> object:
            self.log.append(str(instruction))
            self.time += 1
            return f"value of {instruction}"

        return run

    def receive(self, message: Message) -> object:
        self.log.append(f"< {message.kind}{message.microbatch}")
        self.time += 10
        return None

    def send(self, message: Message, value: object) -> None:
        self.log.append(f"> {message.kind}{message.microbatch}")
        assert value == f"value of {message.source_stage}{message.kind}{message.microbatch}"

    def look_ahead(self) -> None:
        self.log.append("...")


def test_one_devices_program_in_order() -> None:
    recorder: Any = Recorder()
    schedule = with_recompute(one_f_one_b(3, 3), "always")
    program = Programs(schedule, {1: recorder}, rank=1)[ProgramKey(True, 3)]
    seen: list[str] = []
    ran = execute(
        program.steps,
        {1: recorder},
        recorder,
        Work(mode=Mode.TRAIN, sizes=(1, 1, 1), by_samples=(1 / 3,) * 3),
        clock=lambda: recorder.time,
        observers=[lambda instruction: seen.append(str(instruction))],
    )
    spans = Ran(ran).spans
    wanted = (
        "< F0, 1F0, > F0, ..., < F1, 1F1, > F1, ..., 1R0, ..., < B0, 1B0, > B0, ..., "
        "< F2, 1F2, > F2, ..., 1R1, ..., < B1, 1B1, > B1, ..., 1R2, ..., < B2, 1B2, > B2, ..."
    )
    assert ", ".join(recorder.log) == wanted, "a recomputation precedes the wait for its gradient"
    assert seen == [str(span.instruction) for span in spans]
    assert all(span.device == 1 and span.seconds == 1 for span in spans), "waiting is no work"


def test_a_stage_runs_with_its_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels without a guard, and `device="cuda"` in a forward, mean the current one."""
    current = ["none"]

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.pop()

    module = SimpleNamespace(device=entered)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(programs, "has_streams", lambda device: False)  # there is no such device

    class Told(Recorder):
        def action(self, instruction: Instruction) -> Action:
            def run(received: list[object], work: Work) -> object:
                self.log.append(current[-1])
                return None

            return run

    for devices, wanted in {
        ("cuda:0", "cuda:1"): ["cuda:0", "cuda:1", "cuda:1", "cuda:0"],
        ("cuda:0", "cuda:0"): ["none"] * 4,
        ("cpu", "cuda:0"): ["none", "cuda:0", "cuda:0", "none"],
    }.items():
        stages: Any = {index: Told(device) for index, device in enumerate(devices)}
        stages[1].log = stages[0].log
        for step in Programs(gpipe(2, 1), stages, rank=None)[ProgramKey(True, 1)].steps:
            step.action([], None)  # type: ignore[arg-type]
        assert stages[0].log == wanted


def test_local_transport_moves_and_forgets() -> None:
    alone = in_one_process([torch.device("cpu"), torch.device("meta")])
    mail, ranks = alone.mail, alone.ranks
    message = next(s.sends[0] for s in lower(one_f_one_b(2, 1))[0] if s.sends)
    x = torch.ones(2)
    mail.begin(0, {})
    mail.send(message, take_apart({"x": x}))
    moved = mail.receive(message)
    assert not isinstance(moved, Lost) and moved[0][0].is_meta
    assert put_together(*moved).keys() == {"x"}  # type: ignore[attr-defined]
    mail.finish()
    mail.send(message, take_apart(x))
    mail.begin(0, {})  # what a failed call left behind is dropped
    mail.finish()
    assert ranks.exchange([1, 2], "a row") == [[1, 2]] and ranks.gather("a", "a value") == ["a"]
    assert ranks.broadcast(x, 0) is x
