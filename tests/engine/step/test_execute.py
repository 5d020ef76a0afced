"""The loop, on a transport and stages that only write down what happens."""

from typing import Any

import torch

from stagewise.engine.stage.call import Call, Mode
from stagewise.engine.step.execute import execute
from stagewise.engine.transport.connect import in_one_process
from stagewise.schedule import Instruction, Message, lower, one_f_one_b, with_recompute


class Recorder:
    """Stage and transport at once; `log` holds the order of everything."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.time = 0.0

    def run(self, instruction: Instruction, received: list[object], call: Call) -> object:
        self.log.append(str(instruction))
        self.time += 1
        return f"value of {instruction}"

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
    programs = lower(with_recompute(one_f_one_b(3, 3), "always"))
    seen: list[str] = []
    spans = execute(
        [(1, step) for step in programs[1]],
        {1: recorder},
        recorder,
        Call(mode=Mode.TRAIN),
        clock=lambda: recorder.time,
        observe=lambda instruction: seen.append(str(instruction)),
    )
    wanted = (
        "< F0, 1F0, > F0, ..., < F1, 1F1, > F1, ..., 1R0, ..., < B0, 1B0, > B0, ..., "
        "< F2, 1F2, > F2, ..., 1R1, ..., < B1, 1B1, > B1, ..., 1R2, ..., < B2, 1B2, > B2, ..."
    )
    assert ", ".join(recorder.log) == wanted, "a recomputation precedes the wait for its gradient"
    assert seen == [str(span.instruction) for span in spans]
    assert all(span.device == 1 and span.seconds == 1 for span in spans), "waiting is no work"


def test_local_transport_moves_and_forgets() -> None:
    alone = in_one_process([torch.device("cpu"), torch.device("meta")])
    mail, ranks = alone.mail, alone.ranks
    message = next(s.sends[0] for s in lower(one_f_one_b(2, 1))[0] if s.sends)
    x = torch.ones(2)
    mail.begin(0, {})
    mail.send(message, {"x": x})
    moved = mail.receive(message)
    assert isinstance(moved, dict) and moved["x"].is_meta
    mail.finish()
    mail.send(message, x)
    mail.begin(0, {})  # what a failed call left behind is dropped
    mail.finish()
    assert ranks.exchange([1, 2], "a row") == [[1, 2]] and ranks.gather("a", "a value") == ["a"]
    assert ranks.broadcast(x, 0) is x
