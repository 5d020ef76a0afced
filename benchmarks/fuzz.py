"""Try the parsers of what comes from files on inputs that nobody would write.

Problem: recipes' values, plans, schedules, devices, checkpoints and logs come from elsewhere, and
must give an error of ours or a value: never a crash, a hang, memory without bound, or code that
runs. Idea: seeded mutations of valid examples, bytes and structure, each parsed in a forked process
under a limit of time and of memory. An input is a function of (seed, parser, number).
"""

import argparse
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.fuzz_parsers import PARSERS, Parser
from benchmarks.workers import print_rows
from stagewise.errors import StagewiseError

SECONDS, BYTES = 2.0, 1 << 30  # for one input: of processor time, and beyond what is there
_CANARY = "code-ran"  # a file that an input's code would make
_NUMBERS = (0, -1, 2, 3, 1 << 31, 1 << 63, 10**9, 10**18, 10**40, -0.5, 0.1, 1e308, 1e-320)
_VALUES = (
    None,
    True,
    False,
    "",
    "x",
    "1",
    "auto",
    "../../x",
    "\x00",
    [],
    {},
    [[]],
    [None],
    {"": 0},
)


class Runs:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (_CANARY, "w")


class TooLong(BaseException):
    """An input that takes too long; no parser may catch it."""


def inputs(name: str, count: int, seed: int) -> Iterator[bytes]:
    """Give the inputs of a parser: some are still valid, some are pickles that would run code."""
    examples = PARSERS[name].examples()
    for number in range(count):
        drawn = random.Random(f"{seed}/{name}/{number}")
        text = drawn.choice(examples)
        for _ in range(drawn.choice((1, 1, 1, 2, 4))):
            text = drawn.choice((_changed_json, _changed_bytes, _changed_tokens))(text, drawn)
        yield text if drawn.random() > 0.01 else drawn.choice((pickle.dumps(Runs()), text))


def _changed_json(text: bytes, drawn: random.Random) -> bytes:
    """Replace, remove or repeat a value somewhere in a JSON text."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _changed_tokens(text, drawn)
    spots: list[tuple[Any, Any]] = []

    def look(at: Any) -> None:
        for key in at if isinstance(at, dict) else range(len(at)):
            spots.append((at, key))
            if isinstance(at[key], dict | list):
                look(at[key])

    if isinstance(whole, dict | list):
        look(whole)
    if not spots:
        return json.dumps(_odd(drawn)).encode()
    at, key = drawn.choice(spots)
    action = drawn.randrange(4)
    if action == 0:
        del at[key]
    elif action == 1 and isinstance(at, list):
        at.extend([at[key]] * drawn.choice((1, 100)))
    elif action == 2:
        other, theirs = drawn.choice(spots)
        at[key] = json.loads(json.dumps(other[theirs]))
    else:
        at[key] = _odd(drawn)
    return json.dumps(whole).encode()


def _odd(drawn: random.Random) -> Any:
    if drawn.random() < 0.05:
        deep: Any = 0
        for _ in range(500):
            deep = [deep]
        return deep
    return drawn.choice(drawn.choice((_NUMBERS, _VALUES)))  # type: ignore[call-overload]


def _changed_bytes(text: bytes, drawn: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    start = drawn.randrange(len(text) + 1)
    end = min(len(text), start + drawn.choice((1, 2, 8, 200)))
    new = drawn.choice(
        (
            b"",
            bytes(byte ^ 1 << drawn.randrange(8) for byte in text[start:end]),
            text[start:end] * drawn.choice((2, 50)),
            drawn.randbytes(end - start),
            drawn.choice(
                (b"9" * 400, b"9" * 5000, b"[" * 2000, b"(" * 300, b"\n", b"\xff", b'"', b"\x00")
            ),
        )
    )
    return text[:start] + new + (b"" if drawn.random() < 0.05 else text[end:])


def _changed_tokens(text: bytes, drawn: random.Random) -> bytes:
    """Replace a number or word of a text by an odd value, or by another of its words."""
    words = text.split(b" ")
    digits = [index for index, word in enumerate(words) if any(48 <= byte < 58 for byte in word)]
    index = drawn.choice(digits or range(len(words)))
    odd = (str(drawn.choice(_NUMBERS)).encode(), repr(_odd(drawn)).encode())
    words[index] = drawn.choice((*odd, drawn.choice(words)))
    return b" ".join(words)


def tried(name: str, count: int, seed: int) -> dict[str, Any]:
    """Parse `count` inputs; return how often each thing happened, and the first of each fault."""
    outcomes, faults, begun = Counter[str](), dict[str, str](), time.monotonic()
    parser, texts = PARSERS[name], list(inputs(name, count, seed))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        number = 0
        while number < count:
            number = _in_a_process(parser, texts, number, Path(folder), outcomes, faults)
    return {
        "parser": name,
        "inputs": count,
        "refused": outcomes.pop("refused", 0),
        "valid": outcomes.pop("valid", 0),
        "faults": sum(outcomes.values()),
        "seconds": round(time.monotonic() - begun, 1),
        "kinds": "; ".join(f"{kind}: {example}" for kind, example in faults.items()),
    }


def _in_a_process(
    parser: Parser,
    texts: list[bytes],
    first: int,
    folder: Path,
    outcomes: Counter[str],
    faults: dict[str, str],
) -> int:
    """Parse inputs from number `first` on in a child, until one ends it; return the next number."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            _serve(parser, texts, first, folder, write)
        finally:
            os._exit(0)
    os.close(write)
    done = first
    with os.fdopen(read) as told:
        for line in told:
            kind, _, why = line.rstrip("\n").partition("\t")
            _count(kind, f"input {done}: {why}", outcomes, faults)
            done += 1
    _, status = os.waitpid(child, 0)
    if done < len(texts):
        _count("crash", f"input {done}: status {status}", outcomes, faults)
        done += 1
    return done


def _count(kind: str, example: str, outcomes: Counter[str], faults: dict[str, str]) -> None:
    outcomes[kind] += 1
    if kind not in ("refused", "valid"):
        faults.setdefault(kind, example)


def _serve(parser: Parser, texts: list[bytes], first: int, folder: Path, write: int) -> None:
    """Parse in a child; a line about each input goes to the pipe."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong

    signal.signal(signal.SIGVTALRM, too_long)
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for text in texts[first:]:
        os.write(write, f"{_outcome(parser, text, folder)}\n".encode())


def _outcome(parser: Parser, text: bytes, folder: Path) -> str:
    """Return what happened, and after a tab why."""
    # Python's handler needs a step of Python; the kernel needs none.
    most = int(time.process_time() + 5 * SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        parser.parse(text, folder)
        told = "valid\t"
    except StagewiseError:
        told = "refused\t"
    except TooLong:
        told = f"slow\tmore than {SECONDS:g} s"
    except BaseException as error:
        where = sys.exc_info()[2]
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = (
            f" at {Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else ""
        )
        message = " ".join(str(error).split())[:120]
        told = f"{type(error).__name__}{line}\t{message}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if Path(_CANARY).exists():
        Path(_CANARY).unlink()
        told = "code ran\t"
    return told


def main() -> None:
    """Try every parser, or some, and print what happened."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--inputs", type=int, default=10_000, help="for each parser")
    arguments.add_argument("--parser", action="append", choices=list(PARSERS))
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--quick", action="store_true", help="100 inputs each")
    arguments.add_argument("--json", action="store_true")
    given = arguments.parse_args()
    count = 100 if given.quick else given.inputs
    rows = [tried(name, count, given.seed) for name in given.parser or PARSERS]
    print_rows("fuzzing: a refusal is an error of ours", rows, as_json=given.json, notes=())
    if any(row["faults"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
