"""Which message comes next, and in what form: the same on every kind of wire."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.transport.failure import LOST, Lost
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.wires.wire import Arrival
from stagewise.errors import CellError, PeerError
from stagewise.schedule import forward_only, links, lower
from tests.engine.transport.wires import Lines, fake_wires

NUM_MICROBATCHES = 6
PROGRAMS = lower(forward_only([(device,) for device in range(2)], NUM_MICROBATCHES))
MESSAGES = [message for step in PROGRAMS[0] for message in step.sends]
LOST_HERE = object()


def pair(*, stream: bool) -> tuple[Lines, Mailbox, Mailbox]:
    lines, device = Lines(), torch.device("cpu")
    one, other = (fake_wires(rank, lines, stream=stream) for rank in (0, 1))
    return lines, Mailbox(one, device), Mailbox(other, device)


def call(lines: Lines, sender: Mailbox, receiver: Mailbox, values: list[object]) -> list[object]:
    """What arrives of one call's messages; nothing may be left on the way."""
    for mailbox in (sender, receiver):
        mailbox.begin(1, links(PROGRAMS))
    for message, value in zip(MESSAGES, values, strict=True):
        if value is LOST_HERE:
            sender.send_lost(message)
        else:
            sender.send(message, take_apart(value))
    arrived = []
    for message in MESSAGES:
        apart = receiver.receive(message)
        arrived.append(apart if isinstance(apart, Lost) else put_together(*apart))
        receiver.look_ahead()
    assert not any(lines.stream.values())
    assert all(lines.posted[link] == len(sent) for link, sent in lines.far.items())
    return arrived


def same(got: object, sent: object) -> bool:
    if isinstance(sent, Tensor):
        return isinstance(got, Tensor) and got.dtype is sent.dtype and torch.equal(got, sent)
    if isinstance(sent, tuple):
        return isinstance(got, tuple) and all(map(same, got, sent))
    return got == sent


def some_value(draw: random.Random) -> object:
    size = draw.choice([0, 1, 3, 127, 128, 129, 4000])  # doubles: around the limit, and far past
    tensor = torch.full((size,), draw.random(), dtype=torch.float64)
    return draw.choice([tensor, (tensor, None), (tensor, draw.random(), tensor.float()), None])


@pytest.mark.parametrize("seed", range(20))
def test_any_forms_in_any_order_arrive(seed: int) -> None:
    draw = random.Random(seed)
    lines, sender, receiver = pair(stream=True)
    usual = [some_value(draw) for _ in MESSAGES]
    for _ in range(12):
        values = [some_value(draw) if draw.random() < 0.3 else value for value in usual]
        arrived = call(lines, sender, receiver, values)
        assert all(map(same, arrived, values))
        for message in MESSAGES:
            assert sender._forms.known.get(message) == receiver._forms.known.get(message)


@pytest.mark.parametrize("stream", [True, False])
def test_lost_ones_leave_the_rest_in_order(stream: bool) -> None:
    lines, sender, receiver = pair(stream=stream)
    values: list[object] = [torch.full((n * 100,), float(n)) for n in range(NUM_MICROBATCHES)]
    first = call(lines, sender, receiver, [LOST_HERE, *values[1:]])
    assert first[0] is LOST and all(map(same, first[1:], values[1:]))
    assert all(map(same, call(lines, sender, receiver, values), values))
    last = call(lines, sender, receiver, [*values[:-1], LOST_HERE])
    assert all(map(same, last[:-1], values[:-1]))
    assert same(last[-1], torch.zeros(500))  # of the form that it had


def test_without_marks_another_form_is_refused_in_words() -> None:
    lines, sender, receiver = pair(stream=False)
    values: list[object] = [torch.ones(3)] * NUM_MICROBATCHES
    call(lines, sender, receiver, values)
    sender.begin(1, links(PROGRAMS))
    with pytest.raises(CellError, match=r"\[\(3,\) torch.float32\] before, \[\(4,\).* now"):
        sender.send(MESSAGES[0], take_apart(torch.ones(4)))


def test_bytes_that_are_no_message_are_told_as_a_lost_one() -> None:
    """A stream from which a message is missing gives the bytes of later ones in its place."""
    lines, sender, receiver = pair(stream=True)
    values: list[object] = [torch.ones(3)] * NUM_MICROBATCHES
    for _ in range(4):  # until the form is remembered
        call(lines, sender, receiver, values)
    for mailbox in (sender, receiver):
        mailbox.begin(1, links(PROGRAMS))
    sender.data.start_send([torch.full((1,), 7, dtype=torch.uint8), torch.ones(3)], 1)
    sender._wires.control.start_send([torch.tensor([2]), torch.tensor([1, 2]).byte()], 1)
    assert sender._wires.stream is not None
    sender._wires.stream.start_send([torch.tensor([2]), torch.tensor([1, 2]).byte()], 1)
    with pytest.raises(PeerError, match=r"rank 1 receives from rank 0 .* lost or damaged") as told:
        receiver.receive(MESSAGES[0])
    assert told.value.is_first


@pytest.mark.parametrize("turn", [0, 1])  # by header, then by the remembered form
def test_a_message_whose_receive_found_no_memory_is_received_afterwards(
    monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    lines, sender, receiver = pair(stream=False)
    values: list[object] = [torch.full((200,), float(n)) for n in range(NUM_MICROBATCHES)]
    for _ in range(turn):
        call(lines, sender, receiver, values)
    start_receive, num_calls = receiver.data.start_receive, itertools.count()

    def scarce(tensors: list[Tensor], rank: int) -> Arrival:
        if tensors[0].numel() == 200 and next(num_calls) % 2 == 0:
            raise MemoryError
        return start_receive(tensors, rank)

    monkeypatch.setattr(receiver.data, "start_receive", scarce)
    for mailbox in (sender, receiver):
        mailbox.begin(1, links(PROGRAMS))
    for message, value in zip(MESSAGES, values, strict=True):
        sender.send(message, take_apart(value))
    for message, value in zip(MESSAGES, values, strict=True):
        try:
            apart = receiver.receive(message)
        except MemoryError:
            apart = receiver.receive(message)
        assert not isinstance(apart, Lost) and same(put_together(*apart), value)
    assert next(num_calls) > NUM_MICROBATCHES
