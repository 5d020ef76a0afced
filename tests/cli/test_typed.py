"""What is typed becomes one request, and a request becomes the same words again."""

from pathlib import Path

import pytest

from stagewise.cli.train.wanted import _request
from stagewise.cli.typed import (
    NumDevices,
    Typed,
    check_unnamed,
    command_line,
    num_devices,
    words_of,
)
from stagewise.errors import PlanError, UsageError
from stagewise.planning.request import PlanRequest
from stagewise.schedule import grid, named_schedule


@pytest.mark.parametrize(
    "typed",
    [
        Typed(),
        Typed(schedule="zb_v", stages=6, devices=3, microbatches="5", balance="1,2,1,1,2,1"),
        Typed(schedule="gpipe", replicas="1,2,1", recompute="except_last"),
        Typed(schedule="auto", recompute="auto", microbatches="auto", memory="8.1GiB"),
        Typed(schedule="auto", memory="16GB,24.5GB", devices=2),
        Typed(devices=3, speeds="1,0.3,0.7"),
        Typed(devices=num_devices("cuda:1,cpu"), speeds="measured"),
        Typed(devices=2, speeds="measured", memory="16GB,24GB"),
        Typed(replicas="auto", microbatches="4,8", recompute="segments", devices=4),
    ],
    ids=str,
)
def test_a_worker_is_told_the_same_request(typed: Typed) -> None:
    request = typed.request()
    words = command_line(words_of(request))
    given = dict(zip(words[::2], words[1::2], strict=True))
    kinds = {"stages": int, "devices": num_devices}
    numbers = {
        name: kind(given.pop(f"--{name}")) for name, kind in kinds.items() if f"--{name}" in given
    }
    again = Typed(**{name[2:]: text for name, text in given.items()}, **numbers)  # type: ignore[arg-type]
    assert again.request() == request


def test_what_is_not_said() -> None:
    assert Typed().request() == PlanRequest(num_devices=2, num_microbatches=8)
    assert Typed(stages=3).request() == PlanRequest(num_stages=3, num_microbatches=8)
    assert Typed(microbatches="6").request().num_microbatches == 6
    assert Typed().request(default_devices=4).num_devices == 4


def test_a_file_says_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(grid(named_schedule("1f1b", 3, 5)))
    request = Typed(schedule=str(path)).request()
    assert (request.num_microbatches, request.num_devices) == (5, None)
    assert words_of(request)["--schedule"] == str(path)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (Typed(microbatches="0"), "'0' is not a positive integer"),
        (Typed(microbatches="many"), "write one, such as --microbatches 8"),
        (Typed(microbatches="auto", schedule="mine.txt"), "mine.txt is for a fixed number"),
        (Typed(balance="half"), "--balance 'half' is not a list of positive"),
        (Typed(replicas="1,0"), "--replicas '1,0' is not a list of positive integers"),
        (Typed(recompute="auto"), "needs one schedule, policy and number of microbatches"),
        (Typed(microbatches="4,8"), "needs one schedule, policy and number of microbatches"),
    ],
)
def test_what_training_refuses(typed: Typed, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        _request(typed)


def test_training_with_auto_begins_at_the_usual_number() -> None:
    assert _request(Typed(microbatches="auto")).num_microbatches == 8
    assert _request(Typed(microbatches="6")).num_microbatches == 6


def test_contradictions_are_told_by_option() -> None:
    with pytest.raises(UsageError, match="but --stages and --balance was given; leave it out"):
        Typed(schedule="auto", stages=2, balance="1,2").request()


def test_training_takes_unequal_devices() -> None:
    request = Typed(devices=2, speeds="2,1", memory="16GB,24GB").fixed()
    assert request.speeds == (1.0, 0.5) and request.caps(2) == (16e9, 24e9)
    with pytest.raises(UsageError, match="--speeds 'fast' is not a list of numbers; write one for"):
        Typed(speeds="fast").request()
    with pytest.raises(PlanError, match="speeds has 3 numbers for 2 devices"):
        Typed(devices=2, speeds="1,2,3").request()


@pytest.mark.parametrize(
    ("text", "number", "share_a_process"),
    [
        ("3", 3, False),
        ("cuda:0,cuda:1", 2, False),
        ("cpu,cpu,cpu", 3, False),
        ("cuda:0,cpu", 2, True),
        ("cuda:0,cuda:0", 2, True),
        ("mps", 1, False),
    ],
)
def test_devices_are_counted_or_named(text: str, number: int, *, share_a_process: bool) -> None:
    found = num_devices(text)
    assert found == number and found.share_a_process is share_a_process
    assert found.names == (() if text.isdecimal() else tuple(text.split(",")))
    if found.names:
        with pytest.raises(UsageError, match=f"--devices {text} names .*, but so; .* {number}$"):
            check_unnamed(found, "so")
    else:
        check_unnamed(found, "so")


@pytest.mark.parametrize(
    "text", ["0", "-1", "2.5", "", "cuda:0,", "cuda:x", "cuda:0;cuda:1", "2,2"]
)
def test_what_is_neither_a_number_of_devices_nor_names(text: str) -> None:
    with pytest.raises(UsageError, match="give a number of at least 1, such as 4, or names"):
        num_devices(text)


def test_every_device_is_named() -> None:
    with pytest.raises(PlanError, match="2 devices are named for 3; name each"):
        PlanRequest(num_devices=3, num_microbatches=4, device_names=("cpu", "cpu"))
    assert NumDevices.of(2, ()).names == ()
