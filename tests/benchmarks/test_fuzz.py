"""What comes from files is refused with an error of ours, or read: a small part of the fuzzing."""

import json
import pickle
import signal
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_parsers import PARSERS, Parser
from stagewise.errors import StagewiseError


@pytest.mark.parametrize("name", PARSERS)
def test_no_input_does_harm(name: str) -> None:
    found = fuzz.tried(name, 120, seed=1)
    assert (found["faults"], found["kinds"]) == (0, "")
    assert found["refused"] + found["valid"] == 120


def changed_plan(**changes: object) -> bytes:
    plan = json.loads(PARSERS["plan"].examples()[0])
    cells = {name: changes.pop(name) for name in [*changes] if name in plan["cells"][0]}
    plan["cells"][0] |= cells
    return json.dumps(plan | changes).encode()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("schedule", b"999999999F0 999999999B0"),
        ("schedule", b"0F999999999 0B999999999"),
        ("schedule", b"0F" + b"9" * 4000),
        ("options", json.dumps({"schedule": "[" * 1000, "devices": 2}).encode()),
        ("options", json.dumps({"schedule": "a\0.txt", "devices": 2}).encode()),
        ("plan", changed_plan(num_microbatches=10**9)),
        ("plan", changed_plan(cells=[], balance=[1, 1], replicas=[1, 10**9])),
        ("plan", changed_plan(forward_seconds="1")),
        ("plan", changed_plan(activation_bytes=[8])),
        ("plan", changed_plan(output_bytes=None)),
        ("plan", changed_plan(backward_seconds=1e308)),
        ("plan", changed_plan(link={"latency_seconds": "0", "seconds_per_byte": 0})),
        ("plan", b"[" * 100_000),
        ("devices", b"a = " + b"[" * 100_000),
        ("devices", b"a = " + b"9" * 5000),
        ("checkpoint", b"[" * 100_000),
        ("TOML beside a recipe", b"stages = " + b"[" * 100_000),
        ("TOML beside a recipe", b"stages = " + b"9" * 5000),
        ("command line", b"train own.py --mesh pp=" + b"9" * 5000),
        ("command line", b"train own.py --devices " + b"9" * 5000),
    ],
)
def test_an_input_is_refused_at_once(name: str, text: bytes, tmp_path: Path) -> None:
    with pytest.raises(StagewiseError):
        PARSERS[name].parse(text, tmp_path)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 100_000, b'{"step": 1e999}', b'{"step": []}'])
def test_a_log_that_is_damaged_is_read_without_its_damaged_lines(
    text: bytes, tmp_path: Path
) -> None:
    whole = PARSERS["log"].examples()[0]
    kept, interrupted = PARSERS["log"].parse(whole + text + b"\n" + whole, tmp_path)  # type: ignore[misc]
    assert len(kept) == 4 and interrupted.last_step == 2


def test_the_fuzzer_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(text: bytes, folder: Path) -> object:
        return {
            b"hang": lambda: [None for _ in iter(int, 1)],
            b"memory": lambda: bytearray(2 << 30),
            b"code": lambda: pickle.loads(pickle.dumps(fuzz.Runs())),
            b"crash": lambda: signal.raise_signal(signal.SIGKILL),
            b"other": lambda: int("x"),
            b"valid": lambda: 1,
        }[text]()

    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    texts = (b"hang", b"memory", b"code", b"crash", b"other", b"valid")
    monkeypatch.setitem(fuzz.PARSERS, "bad", Parser(lambda: texts, fails))
    monkeypatch.setattr(fuzz, "inputs", lambda name, count, seed: iter(texts))
    found = fuzz.tried("bad", len(texts), seed=0)
    assert (found["valid"], found["faults"]) == (1, 5)
    for kind in ("slow", "MemoryError", "code ran", "crash", "ValueError"):
        assert kind in found["kinds"]
