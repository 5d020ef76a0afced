"""The transport between processes: any tensor arrives as it was sent."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from stagewise.batch.values import put_together, take_apart
from stagewise.engine.transport.connect import between_processes
from stagewise.engine.transport.failure import Lost
from stagewise.engine.transport.mailbox import Mailbox
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import CellError
from stagewise.schedule import Kind, Message, forward_only, links, lower, named_schedule
from tests.harness import Pools

DENSE: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.arange(24.0).view(2, 3, 4),
    "channels_last": lambda: (
        torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    ),
    "permuted": lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    "transposed with a dimension of 1": lambda: torch.arange(6.0).view(2, 1, 3).transpose(0, 2),
    "offset": lambda: torch.arange(10.0)[4:],
    "bool": lambda: torch.tensor([[True, False], [False, True]]),
    "int64": lambda: torch.arange(5),
    "uint8": lambda: torch.arange(5, dtype=torch.uint8),
    "bfloat16": lambda: torch.arange(5.0).bfloat16(),
    "float16": lambda: torch.arange(5.0).half(),
    "float64": lambda: torch.arange(5.0).double() / 3,
    "complex": lambda: torch.complex(torch.arange(3.0), torch.ones(3)),
    "scalar": lambda: torch.tensor(3.5),
    "one sample": lambda: torch.ones(1, 1, 1),
    "expanded": lambda: torch.arange(3.0).view(3, 1).expand(3, 100),
    "expanded scalar": lambda: torch.tensor(2.0).expand(4, 5),
    "expanded and permuted": lambda: (
        torch.arange(6.0).view(1, 2, 3).expand(4, 2, 3).permute(2, 0, 1)
    ),
    "nan and inf": lambda: torch.tensor([float("nan"), float("inf"), -0.0]),
}
CONTIGUOUS: dict[str, Callable[[], Tensor]] = {  # their gaps do not travel
    "strided": lambda: torch.arange(12.0).view(3, 4)[:, ::2],
    "narrow": lambda: torch.arange(12.0).view(3, 4)[:, 1:3],
    "conjugated": lambda: torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
    "empty": lambda: torch.empty(0, 3),
    "overlapping": lambda: torch.arange(6.0).unfold(0, 3, 1),
}


def made() -> tuple[Ranks, Mailbox]:
    transport = between_processes(torch.device("cpu"))
    assert isinstance(transport.mail, Mailbox)
    return transport.ranks, transport.mail


def got_by(mail: Mailbox, message: Message) -> object:
    """What arrived, put together."""
    apart = mail.receive(message)
    assert not isinstance(apart, Lost)
    return put_together(*apart)


def transfer(values: list[object], times: int) -> list[list[object]]:
    """Rank 0 sends one value per microbatch, `times` times; rank 1 gives back what arrived."""
    ranks, mail = made()
    programs = lower(forward_only([(d,) for d in range(2)], len(values)))
    arrived: list[list[object]] = []
    for _ in range(times):
        mail.begin(1, links(programs))
        got = []
        for step in programs[ranks.rank]:
            for message in step.receives:
                got.append(got_by(mail, message))
            for message in step.sends:
                mail.send(message, take_apart(values[message.microbatch]))
        mail.finish()
        arrived.append(got)
    return arrived


def test_every_tensor_arrives_as_it_was(pools: Pools) -> None:
    """By header the first time, without the second."""
    makers = DENSE | CONTIGUOUS
    values = [make() for make in makers.values()]
    _, arrived = pools[2].run(described_transfer, sorted(makers), 2)
    for got in arrived:
        for name, (tensor, stride, needs) in zip(sorted(makers), got, strict=True):
            wanted = makers[name]()
            assert tensor.dtype is wanted.dtype and tensor.shape == wanted.shape, name
            assert torch.equal(tensor.nan_to_num(1), wanted.resolve_conj().nan_to_num(1)), name
            if name in DENSE:
                real = [dim for dim, size in enumerate(wanted.shape) if size != 1]
                assert [stride[d] for d in real] == [wanted.stride(d) for d in real], name
            assert needs == wanted.is_floating_point(), name
    assert len(values) == len(makers)


def described_transfer(
    names: list[str], times: int
) -> list[list[tuple[Tensor, tuple[int, ...], bool]]]:
    values: list[object] = []
    for name in names:
        tensor = (DENSE | CONTIGUOUS)[name]()
        values.append(tensor.requires_grad_() if tensor.is_floating_point() else tensor)
    return [
        [(t.detach().clone(), t.stride(), t.requires_grad) for t in got]  # type: ignore[attr-defined]
        for got in transfer(values, times)
    ]


def test_what_is_repeated_travels_once(pools: Pools) -> None:
    """A mean's gradient over a long sequence is one row, not the sequence."""
    _, sizes = pools[2].run(expanded_storage)
    assert sizes == [3 * 4] * 2


def expanded_storage() -> list[int]:
    value = torch.arange(3.0).expand(1000, 3)
    return [t.untyped_storage().nbytes() for got in transfer([value], 2) for t in got]  # type: ignore[attr-defined]


def change_form(second: str) -> str:
    """Where no message has a mark, as between hosts."""
    ranks, mail = made()
    mail._marked = frozenset()
    programs = lower(forward_only([(d,) for d in range(2)], 1))
    values: dict[str, object] = {
        "same": torch.ones(3),
        "shape": torch.ones(4),
        "dtype": torch.ones(3).double(),
        "constant": (torch.ones(3), "constant"),
        "gradient": torch.ones(3).requires_grad_(),
    }
    text = ""
    for value in ("same", second):
        mail.begin(1, links(programs))
        for step in programs[ranks.rank]:
            for message in step.sends:
                try:
                    mail.send(message, take_apart(values[value]))
                except CellError as error:
                    text = str(error)
                    mail.send(message, take_apart(values["same"]))  # so that the peer need not fail
            for message in step.receives:
                got_by(mail, message)
        mail.finish()
    return text


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ("shape", "(4,) torch.float32"),
        ("dtype", "(3,) torch.float64"),
        ("constant", "and constants ['constant']"),
        ("gradient", "(3,) torch.float32 with gradient"),
    ],
)
def test_a_changed_form_is_refused_in_words(pools: Pools, second: str, words: str) -> None:
    sender, receiver = pools[2].run(change_form, second)
    assert "the activation of microbatch 0, stage 0 -> 1 (device 0 -> 1) changed its form" in sender
    assert "[(3,) torch.float32] before" in sender and words in sender.split("before")[1]
    assert receiver == ""
    assert pools[2].run(change_form, "same") == ["", ""]


def forms_in_turn(num_bytes: int) -> tuple[list[str], list[bool]]:
    """What arrives of messages whose forms change, beside one that follows and never does."""
    big = torch.arange(num_bytes // 8.0, dtype=torch.float64)
    turns: list[object] = [
        big,
        big[1:],
        (big, None),
        {"a": big, "b": 0.5},
        {"a": big, "b": float("nan")},
        {"a": big, "b": float("nan")},
        None,
        big.float().requires_grad_(),
        *[big] * 7,
        big[:3],
    ]
    ranks, mail = made()
    programs = lower(forward_only([(d,) for d in range(2)], 3))
    arrived, steady, remembered = [], [], []
    for turn in turns:
        mail.begin(1, links(programs))
        for step in programs[ranks.rank]:
            for message in step.sends:
                mail.send(message, take_apart(turn if message.microbatch == 1 else big))
            for message in step.receives:
                got = got_by(mail, message)
                if message.microbatch == 1:
                    arrived.append(described(got))
                else:
                    steady.append(torch.equal(got, big))  # type: ignore[arg-type]
            mail.look_ahead()
        mail.finish()
        message = next(m for s in programs[0] for m in s.sends if m.microbatch == 1)
        remembered.append(mail._forms.known.get(message) is not None)
    assert all(steady)
    return arrived if ranks.rank else [described(turn) for turn in turns], remembered


def described(value: object) -> str:
    def one(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        return (leaf.dtype, leaf.requires_grad, leaf.shape, float(leaf.double().sum()))

    return str(pytree.tree_map(one, value))


@pytest.mark.parametrize("num_bytes", [1 << 10, 3 << 20])  # past the sockets too
def test_changed_forms_arrive_and_settle(pools: Pools, num_bytes: int) -> None:
    (sent, at_sender), (arrived, at_receiver) = pools[2].run(forms_in_turn, num_bytes)
    assert arrived == sent
    assert at_sender == at_receiver and at_sender[0] and not at_sender[1]
    assert at_sender[-2] and not at_sender[-1]  # remembered again after a while


def local_classes() -> list[object]:
    @dataclass
    class Pair:
        first: Tensor
        second: float

    class Both(NamedTuple):
        x: Tensor
        y: Tensor

    def fresh() -> object:  # of a class that the other rank has not
        @dataclass
        class Here:
            x: Tensor

        return Here(torch.ones(2)) if torch.distributed.get_rank() == 0 else None

    values = [Pair(torch.ones(3), 0.5), Both(torch.zeros(2), torch.ones(2)), fresh()]
    first, second = transfer(values, 2)
    if not first:
        return []
    assert all(type(got[0]) is Pair and type(got[1]) is Both for got in (first, second))
    assert [str(value) for value in first] == [str(value) for value in second]
    return [type(first[2]).__name__, str(first[0]), float(first[1].y.sum()), first[2].x.tolist()]  # type: ignore[attr-defined]


def test_classes_of_a_function_arrive_as_this_ranks_own(pools: Pools) -> None:
    got = pools[2].run(local_classes)[1]
    assert got[0] == "Here" and "Pair(first=tensor([1., 1., 1.]), second=0.5)" in got[1]
    assert got[2:] == [2.0, [1.0, 1.0]]


class Varied:
    """As many tensors as there happen to be, with a word."""

    varies = True

    def __init__(self, word: str, tensors: list[Tensor]) -> None:
        self.word, self.tensors = word, tensors


pytree.register_pytree_node(
    Varied, lambda v: (v.tensors, v.word), lambda tensors, word: Varied(word, list(tensors))
)


def there_and_back() -> list[list[float]]:
    """Three calls of one signature; other tensors in each, and as many gradients back."""
    ranks, mail = made()
    programs = lower(named_schedule("1f1b", 2, 2))
    seen: list[list[float]] = []
    kept: dict[int, list[Tensor]] = {}
    for call in range(3):
        mail.begin(1, links(programs))
        for step in programs[ranks.rank]:
            m = step.instruction.microbatch
            for message in step.receives:
                value = got_by(mail, message)
                kept[m] = value.tensors if isinstance(value, Varied) else list(value)  # type: ignore[call-overload]
                seen.append([float(tensor) for tensor in kept[m]])
            for message in step.sends:
                tensors = [torch.tensor(10.0 * call + m + i) for i in range(call + m)]
                forward = message.kind is Kind.FORWARD
                sent = Varied(f"call {call}", tensors) if forward else (*kept[m],)
                mail.send(message, take_apart(sent))
        mail.finish()
    return seen


def test_what_varies_by_its_class_may_have_another_form_in_every_call(pools: Pools) -> None:
    wanted = [[10.0 * call + m + i for i in range(call + m)] for call in range(3) for m in range(2)]
    assert pools[2].run(there_and_back) == [wanted, wanted]


def collectives() -> list[object]:
    ranks, _ = made()
    rank = ranks.rank
    value: object = {"x": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(2) > 0, "n": None}
    return [
        ranks.exchange([rank, -(2**62)], "row"),
        ranks.gather(f"rank {rank}", "name"),
        ranks.broadcast(value if rank == 1 else None, 1),
        (ranks.rank, ranks.num_ranks, dist.get_world_size()),
    ]


def timeout_of_a_subgroup() -> timedelta:
    world = dist.new_group([0, 1], timeout=timedelta(seconds=77))
    group = between_processes(torch.device("cpu"), world).ranks.group([0, 1])
    assert group is not None
    return group._group._get_backend(torch.device("cpu")).options._timeout


def test_groups_of_replicas_wait_as_long_as_the_users_group(pools: Pools) -> None:
    assert pools[2].run(timeout_of_a_subgroup) == [timedelta(seconds=77)] * 2


def test_collectives(pools: Pools) -> None:
    for rank, (rows, texts, value, where) in enumerate(pools[3].run(collectives)):
        assert rows == [[0, -(2**62)], [1, -(2**62)], [2, -(2**62)]]
        assert texts == ["rank 0", "rank 1", "rank 2"]
        assert value["x"].tolist() == [[0, 3], [1, 4], [2, 5]] and value["n"] is None
        assert value["b"].tolist() == [True, True]
        assert where == (rank, 3, 3)
